"""The stream of texts, joined, is the whole decoded at once, cut at the first completed stop string and stripped."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pulse_ecg.text_stream import TextStream
from pulse_ecg.tokenizer import Tokenizer

FIRST_BYTE, LAST_ID = 3, 767  # the demo's tokenizer: <unk>, <s>, </s>, 256 bytes, pieces

BYTES = st.integers(0, 255).map(lambda value: FIRST_BYTE + value)
CHARACTERS = st.sampled_from(
    [*"ab \n\t", "ş", "İ", "心", "😀", "❤️", "e\u0301", "\u00a0", "\u2003", "▁", "\ufffd", "\x00", "\x1c"]
)
BROKEN = st.sampled_from(
    [b"\xc3", b"\xe5\xbf", b"\xf0\x9f\x98", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x80"]
)


def byte_ids(data: bytes) -> list[int]:
    return [FIRST_BYTE + value for value in data]


RUNS: st.SearchStrategy[list[int]] = st.one_of(
    st.lists(st.integers(FIRST_BYTE + 256, LAST_ID), min_size=1, max_size=4),
    st.lists(BYTES, min_size=1, max_size=4),
    CHARACTERS.map(lambda character: byte_ids(character.encode())),
    BROKEN.map(byte_ids),
    st.sampled_from([[0], [1], [2], [-200], [LAST_ID + 1]]),
)
TOKENS = st.lists(RUNS, max_size=10).map(lambda runs: [token for run in runs for token in run])


@dataclass(frozen=True)
class Scene:
    """Tokens of an answer and the stop strings asked for."""

    ids: list[int]
    stop: tuple[str, ...]


@st.composite
def scenes(draw: st.DrawFn, tokenizer: Tokenizer) -> Scene:
    """Stop strings are mostly cut out of the answer itself, at any character, so that they do occur."""
    ids = draw(TOKENS)
    text = tokenizer.decode(ids)
    stop = draw(st.lists(st.sampled_from(["</s>", "\n", "\n\n", " ", "a", "aa", "ab", "\ufffd", "ş"]), max_size=2))
    for _ in range(draw(st.integers(0, 3)) if text else 0):
        start = draw(st.integers(0, len(text) - 1))
        cut = text[start : start + draw(st.integers(1, 6))]
        stop.append(cut + draw(st.sampled_from(["", "", "x"])))
    return Scene(ids, tuple(stop))


def cut_at_stop(text: str, stop: Sequence[str]) -> str | None:
    """What stands before the stop string that is complete first, found by reading character by character."""
    for end in range(1, len(text) + 1):
        begins = [end - len(s) for s in stop if text[:end].endswith(s)]
        if begins:
            return text[: min(begins)]
    return None


def expected(tokenizer: Tokenizer, scene: Scene) -> str:
    text = tokenizer.decode(scene.ids)
    before = cut_at_stop(text, scene.stop)
    return (text if before is None else before).strip()


def streamed(tokenizer: Tokenizer, scene: Scene) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, scene.stop)
    return [*(stream.push(token) for token in scene.ids), stream.finish()], stream


@given(st.data())
@hypothesis_settings(max_examples=400)
def test_joined_pushes_are_the_whole_decoded_cut_and_stripped(demo_tokenizer: Tokenizer, data: st.DataObject) -> None:
    scene = data.draw(scenes(demo_tokenizer))
    pushed, stream = streamed(demo_tokenizer, scene)
    assert "".join(pushed) == expected(demo_tokenizer, scene)
    assert stream.stopped is (cut_at_stop(demo_tokenizer.decode(scene.ids), scene.stop) is not None)


@given(st.data())
def test_the_same_for_a_legacy_tokenizer(demo_checkpoint: Path, data: st.DataObject) -> None:
    legacy = Tokenizer((demo_checkpoint / "tokenizer.model").read_bytes(), legacy=True)
    scene = data.draw(scenes(legacy))
    assert "".join(streamed(legacy, scene)[0]) == expected(legacy, scene)


@given(st.data())
def test_nothing_shown_is_ever_taken_back(demo_tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Whatever follows, the answer begins with what was shown."""
    scene = data.draw(scenes(demo_tokenizer))
    pushed, _ = streamed(demo_tokenizer, scene)
    other = data.draw(TOKENS)
    for count in range(len(scene.ids) + 1):
        shown = "".join(pushed[:count])
        for following in ([], other):
            assert expected(demo_tokenizer, Scene(scene.ids[:count] + following, scene.stop)).startswith(shown)


@given(ids=TOKENS)
def test_without_stop_strings_only_white_space_and_half_characters_wait(
    demo_tokenizer: Tokenizer, ids: list[int]
) -> None:
    stream, shown = TextStream(demo_tokenizer), ""
    for count, token in enumerate(ids, 1):
        shown += stream.push(token)
        waiting = demo_tokenizer.decode(ids[:count]).strip().removeprefix(shown)
        assert waiting.replace("\ufffd", "").strip() == ""
        assert waiting.count("\ufffd") <= 3


@given(text=st.lists(CHARACTERS | st.text(max_size=3), max_size=12).map("".join))
def test_a_character_is_shown_whole_or_not_at_all(demo_tokenizer: Tokenizer, text: str) -> None:
    ids = demo_tokenizer.encode(text)
    pushed, _ = streamed(demo_tokenizer, Scene(ids, ()))
    whole = demo_tokenizer.decode(ids).strip()
    assert "".join(pushed) == whole
    assert sum(piece.count("\ufffd") for piece in pushed) == whole.count("\ufffd")


@pytest.mark.parametrize("character", ["ş", "心", "😀"])
def test_the_last_byte_lets_its_character_through(demo_tokenizer: Tokenizer, character: str) -> None:
    stream, data = TextStream(demo_tokenizer), character.encode()
    assert [stream.push(token) for token in byte_ids(data)] == [""] * (len(data) - 1) + [character]


def test_bytes_that_never_become_a_character_are_shown_as_soon_as_that_is_clear(demo_tokenizer: Tokenizer) -> None:
    stream = TextStream(demo_tokenizer)
    assert [stream.push(token) for token in byte_ids(b"\xff\xe5\xbfa")] == ["\ufffd", "", "", "\ufffd\ufffda"]


def test_half_a_character_at_the_end_is_shown_as_replacement(demo_tokenizer: Tokenizer) -> None:
    stream = TextStream(demo_tokenizer)
    assert [stream.push(token) for token in byte_ids(b"a\xe5\xbf")] == ["a", "", ""]
    assert stream.finish() == "\ufffd\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "answer"),
    [
        ("one END two END", ["END"], "one"),
        ("one END", ["X", "END"], "one"),
        ("abcdef", ["cd", "bcde"], "ab"),  # "cd" is complete first
        ("abcd", ["d", "bcd", "cd"], "a"),  # all complete at once: the one that begins first
        ("aaab", ["aab"], "a"),
        ("ENEND x", ["END"], "EN"),
        ("one EN", ["END"], "one EN"),
        ("END one", ["END"], ""),
        ("  one  \n END", ["END"], "one"),
        ("one\n\ntwo", ["\n\n"], "one"),
        ("\n\none", ["\n"], ""),
        ("sinüs ritmi. ş", ["ş"], "sinüs ritmi."),
        ("one </s> two", ["</s>"], "one"),
        ("END", [], "END"),
    ],
)
def test_where_the_answer_is_cut(demo_tokenizer: Tokenizer, text: str, stop: list[str], answer: str) -> None:
    for ids in (demo_tokenizer.encode(text, prefix=False), byte_ids(text.encode())):
        assert "".join(streamed(demo_tokenizer, Scene(ids, tuple(stop)))[0]) == answer


def test_what_may_become_a_stop_string_waits_and_is_shown_when_it_does_not(demo_tokenizer: Tokenizer) -> None:
    stream = TextStream(demo_tokenizer, ["END"])
    assert [stream.push(token) for token in byte_ids(b"aENEx")] == ["a", "", "", "EN", "Ex"]
    assert not stream.stopped


def test_nothing_comes_after_a_stop(demo_tokenizer: Tokenizer) -> None:
    stream = TextStream(demo_tokenizer, ["b"])
    assert [stream.push(token) for token in byte_ids(b"abab")] == ["a", "", "", ""]
    assert (stream.stopped, stream.finish()) == (True, "")


def test_a_special_token_is_no_text_and_splits_no_character(demo_tokenizer: Tokenizer) -> None:
    first, last = byte_ids("ş".encode())
    assert "".join(streamed(demo_tokenizer, Scene([first, 1, 0, -200, last, 2], ()))[0]) == "ş"


@pytest.mark.parametrize("piece", [b"a", b" ", b"\n", b"\x80"])
def test_the_longest_answer_streams_in_little_time(demo_tokenizer: Tokenizer, piece: bytes) -> None:
    """Held back as it may be: white space alone, or the beginning of a stop string longer than the answer."""
    ids = byte_ids(piece) * 2048
    stop = (*("a" * n + "b" + "a" * 5000 for n in range(6)), "a" * 5000, "\ufffd" * 5000)
    started = time.process_time()
    pushed, _ = streamed(demo_tokenizer, Scene(ids, stop))
    assert "".join(pushed) == demo_tokenizer.decode(ids).strip()
    assert time.process_time() - started < 5
