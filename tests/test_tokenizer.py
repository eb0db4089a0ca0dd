"""Text to ids and back: nothing lost, nothing taken for a special token, and the official rules of prefixes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from pulse_ecg.errors import CheckpointError
from pulse_ecg.tokenizer import Tokenizer

ATOMS = [
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "▁",
    " ",
    "  ",
    "\n",
    "\t",
    "\u00a0",
    "\x00",
    "e\u0301",
    "ş",
    "İ",
    "❤️",
    "😀",
    "ECG",
    "st",
]
TEXTS = st.lists(st.sampled_from(ATOMS) | st.text(max_size=6), max_size=8).map("".join)


@pytest.fixture(scope="module")
def legacy_tokenizer(demo_checkpoint: Path) -> Tokenizer:
    return Tokenizer((demo_checkpoint / "tokenizer.model").read_bytes(), legacy=True)


@pytest.fixture(scope="module")
def sentence_pieces(demo_checkpoint: Path) -> sentencepiece.SentencePieceProcessor:
    """The library underneath, on the file as it is."""
    return sentencepiece.SentencePieceProcessor(model_file=str(demo_checkpoint / "tokenizer.model"))


@given(text=TEXTS, prefix=st.booleans())
def test_decode_gives_back_what_was_encoded(demo_tokenizer: Tokenizer, text: str, prefix: bool) -> None:
    """Sentencepiece writes a space as ``▁``, so a ``▁`` comes back as a space; the prefix is a space too."""
    expected = (" " if prefix and text else "") + text.replace("▁", " ")
    assert demo_tokenizer.decode(demo_tokenizer.encode(text, prefix=prefix)) == expected


@given(text=TEXTS)
def test_legacy_decode_gives_back_what_was_encoded(legacy_tokenizer: Tokenizer, text: str) -> None:
    expected = (" " if text else "") + text.replace("▁", " ")
    assert legacy_tokenizer.decode(legacy_tokenizer.encode(text)) == expected


@given(text=TEXTS, prefix=st.booleans())
def test_no_text_yields_a_special_token(demo_tokenizer: Tokenizer, text: str, prefix: bool) -> None:
    ids = demo_tokenizer.encode(text, prefix=prefix)
    assert not any(demo_tokenizer.is_special(i) for i in ids)
    assert demo_tokenizer.bos_id not in ids
    assert demo_tokenizer.eos_id not in ids


@given(text=TEXTS)
def test_legacy_is_plain_sentencepiece(
    legacy_tokenizer: Tokenizer, sentence_pieces: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    assert legacy_tokenizer.encode(text) == sentence_pieces.encode(text)
    assert legacy_tokenizer.encode(text, prefix=False) == sentence_pieces.encode(text)


@given(text=st.text("abEgs.,1ş", min_size=1, max_size=20))
def test_without_leading_spaces_both_kinds_agree_with_sentencepiece(
    demo_tokenizer: Tokenizer, sentence_pieces: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    assert demo_tokenizer.encode(text) == sentence_pieces.encode(text)


def test_the_prefix_is_a_space_of_its_own(demo_tokenizer: Tokenizer) -> None:
    """``▁`` opens a piece whether or not the text opens with a space; legacy or not, only the number differs."""
    encode = demo_tokenizer.encode
    assert encode("signs") == encode(" signs", prefix=False) == encode("▁signs", prefix=False)
    assert encode("signs", prefix=False) != encode("signs")
    assert encode(" signs") != encode("signs")
    assert encode("") == encode("", prefix=False) == []


def test_the_prefix_stays_where_the_library_would_strip_it(demo_checkpoint: Path, demo_tokenizer: Tokenizer) -> None:
    """A model trained to remove white space drops a space that opens a text, but not one behind ``<unk>``."""
    strips = b"\x1a\x02\x20\x01"  # ModelProto{normalizer_spec{remove_extra_whitespaces: true}}
    tokenizer = Tokenizer((demo_checkpoint / "tokenizer.model").read_bytes() + strips, legacy=False)
    assert tokenizer.encode("signs") == demo_tokenizer.encode("signs")
    assert tokenizer.encode(" signs", prefix=False) == demo_tokenizer.encode("signs")


@pytest.mark.parametrize("legacy", [False, True])
def test_tokens_decoded_one_by_one_join_to_the_whole_where_the_library_strips(
    demo_checkpoint: Path, demo_tokenizer: Tokenizer, legacy: bool
) -> None:
    strips = b"\x1a\x02\x20\x01"
    tokenizer = Tokenizer((demo_checkpoint / "tokenizer.model").read_bytes() + strips, legacy=legacy)
    ids = demo_tokenizer.encode("The rhythm is sinus rhythm.")
    assert "".join(tokenizer.decode([token]) for token in ids) == tokenizer.decode(ids) == demo_tokenizer.decode(ids)


def test_runs_of_spaces_stay(demo_tokenizer: Tokenizer) -> None:
    encodings = [tuple(demo_tokenizer.encode("a" + " " * n + "b")) for n in range(6)]
    assert len(set(encodings)) == 6


@pytest.mark.parametrize("character", ["a", "é", "心", "😀"])
def test_a_character_outside_the_vocabulary_is_its_bytes(demo_tokenizer: Tokenizer, character: str) -> None:
    ids = demo_tokenizer.encode("😀" + character, prefix=False)[4:]
    values = [demo_tokenizer.byte_value(i) for i in ids]
    if len(ids) > 1:
        assert bytes(v for v in values if v is not None) == character.encode()
    else:
        assert values == [None]


def test_there_is_one_token_for_each_byte_and_no_other_token_has_a_value(demo_tokenizer: Tokenizer) -> None:
    values = [demo_tokenizer.byte_value(i) for i in range(-5, 800)]
    assert sorted(v for v in values if v is not None) == list(range(256))


def test_special_tokens_and_foreign_ids_are_no_text(demo_tokenizer: Tokenizer) -> None:
    assert (demo_tokenizer.bos_id, demo_tokenizer.eos_id) == (1, 2)
    foreign = [0, 1, 2, -200, -1, 768, 32_000]
    assert all(demo_tokenizer.is_special(i) for i in foreign)
    assert not any(demo_tokenizer.is_special(i) for i in range(3, 768))
    ids = demo_tokenizer.encode("signs")
    assert demo_tokenizer.decode([1, *foreign, *ids, 2, *foreign]) == " signs"


def test_longest_piece_bounds_the_characters_of_every_token(demo_tokenizer: Tokenizer) -> None:
    longest = max(len(demo_tokenizer.decode([i])) for i in range(768))
    assert 1 < longest <= demo_tokenizer.longest_piece < 100


# --- the checkpoint's files


@pytest.fixture
def folder(demo_checkpoint: Path, tmp_path: Path) -> Path:
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(demo_checkpoint / name, tmp_path)
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, object]], object]) -> Tokenizer:
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text("utf-8"))
    change(settings)
    file.write_text(json.dumps(settings), "utf-8")
    return Tokenizer.from_folder(folder)


def is_legacy(tokenizer: Tokenizer) -> bool:
    """Legacy encodes every text with a prefix, whatever stands before it."""
    return tokenizer.encode("signs", prefix=False) == tokenizer.encode("signs")


def test_legacy_false_null_true_and_absent(folder: Path) -> None:
    assert not is_legacy(edit(folder, lambda s: s.update(legacy=False)))
    assert is_legacy(edit(folder, lambda s: s.update(legacy=True)))
    assert is_legacy(edit(folder, lambda s: s.update(legacy=None)))
    assert is_legacy(edit(folder, lambda s: s.pop("legacy")))


def test_without_a_config_it_is_legacy(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    assert is_legacy(Tokenizer.from_folder(folder))


def test_added_special_tokens_are_no_text(folder: Path) -> None:
    added = {"700": {"content": "<pad>", "special": True}, "701": {"content": "word", "special": False}}
    tokenizer = edit(folder, lambda s: s.update(added_tokens_decoder=added))
    assert tokenizer.is_special(700)
    assert not tokenizer.is_special(701)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"add_eos_token": True}, "add_eos_token"),
        ({"add_bos_token": False}, "add_bos_token"),
        ({"added_tokens_decoder": {"90000": {"content": "<ecg>", "special": False}}}, "90000"),
    ],
)
def test_settings_that_would_change_tokens_are_refused(folder: Path, settings: dict[str, object], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        edit(folder, lambda s: s.update(settings))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.model", b""),
        ("tokenizer.model", b"no protobuf"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"special": true}}}'),
    ],
)
def test_a_broken_file_is_a_checkpoint_error(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model or tokenizer_config\.json") as caught:
        Tokenizer.from_folder(folder)
    assert str(folder) not in str(caught.value)


def test_a_missing_model_is_a_checkpoint_error(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.model"):
        Tokenizer.from_folder(folder)
