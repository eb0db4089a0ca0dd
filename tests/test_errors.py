"""The error tree is the one that its docstring draws, and an excerpt never shows more than it may."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pulse_ecg import errors
from pulse_ecg.errors import PulseError, excerpt, nearest_hint

_BRANCH = re.compile(r"^([ │├└─]*)(\w+) +(\d{3})  \S")
INSIDE = "sk-0123456789abcdef-secret"


class Telltale:
    """Whatever is printed of it gives a secret away."""

    def __repr__(self) -> str:
        return INSIDE

    __str__ = __repr__


class TelltaleDict(dict[str, str]):
    """A mapping with a repr of its own."""

    def __repr__(self) -> str:
        return INSIDE


def drawn_tree() -> list[tuple[str, str | None, int]]:
    """(class, parent, status) for each line of the drawing."""
    tree: list[tuple[str, str | None, int]] = []
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := _BRANCH.match(line):
            depth = len(match[1]) // 4 - 1
            path = [*path[:depth], match[2]]
            tree.append((match[2], path[-2] if depth else None, int(match[3])))
    return tree


def test_drawn_tree_is_the_real_one() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]
    real = {(c.__name__, c.__base__.__name__ if c is not PulseError else None, c.status) for c in classes}
    drawn = drawn_tree()
    assert len(drawn) == len(set(drawn)) > 10
    assert set(drawn) == real


def test_statuses_are_the_contracts() -> None:
    hung_up = 499  # nobody reads it
    assert {status for _, _, status in drawn_tree()} == {400, 413, 422, 429, hung_up, 500, 503, 504}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (5, "5"),
        (-(2**63), "-9223372036854775808"),
        (10**5000, "a very large number"),
        (0.1, "0.1"),
        (2.0000001, "2.0000001"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        ("abc", "'abc'"),
        ("a" * 24, f"'{'a' * 24}'"),
        ("a" * 25, f"'{'a' * 24}…'"),
        ("a\nb\x00\ud800\u202e", "'a?b???'"),
        ({"key": INSIDE}, "an object"),
        ([INSIDE], "a list"),
        ((INSIDE,), "a list"),
        (INSIDE.encode(), "bytes"),
        (Telltale(), "a value of another type"),
        (TelltaleDict(), "a value of another type"),
        ({INSIDE}, "a value of another type"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_excerpt(value: object, shown: str) -> None:
    assert excerpt(value) == shown


@given(st.text(), st.integers(0, 40))
def test_excerpt_of_text_shows_at_most_its_limit_and_only_printable_characters(text: str, limit: int) -> None:
    shown = excerpt(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit + len("'…'")
    assert shown[1:-1].rstrip("…") == "".join(c if c.isprintable() else "?" for c in text[:limit]).rstrip("…")


JSON_LIKE: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON_LIKE)
@settings(max_examples=50)
def test_excerpt_is_always_short(value: object) -> None:
    assert len(excerpt(value)) <= 27


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("topK", "top_k"),
        ("top-p", "top_p"),
        ("stops", "stop"),
        ("TOP_K", "top_k"),
        ("tpo_k", "top_k"),
        ("topp_", "top_p"),
    ],
)
def test_nearest_name(name: str, nearest: str) -> None:
    assert nearest_hint(name, ["stop", "top_p", "top_k"]) == f" Did you mean '{nearest}'?"


@pytest.mark.parametrize("name", ["zzz", "", "_", None, 5, ("stop",)], ids=repr)
def test_no_name_is_near(name: object) -> None:
    assert nearest_hint(name, ["stop", "top_p", "top_k"]) == ""
