"""The contract's table of parameters: defaults, ranges in and out, and messages that say what is accepted."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse_ecg.errors import ConfigurationError, ParameterError, RequestError, excerpt
from pulse_ecg.params import DEFAULTS_FILE, GenerationParams, load_defaults
from tests.conftest import ROOT

NAN, INF = float("nan"), float("inf")

# The contract's table.  ``said`` is what a message about the parameter has to mention.
DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 512,
    "temperature": 0.2,
    "top_p": 0.9,
    "top_k": 50,
    "do_sample": True,
    "repetition_penalty": 1.05,
    "stop": ("</s>",),
    "return_full_text": False,
    "enable_turkish_commentary": True,
    "deepseek_timeout": 30,
    "seed": None,
    "details": False,
}
SAMPLING = tuple(DEFAULTS)[:7]
SAID = {
    "max_new_tokens": ("1", "2048"),
    "temperature": ("0.01", "2.0", "0 for greedy"),
    "top_p": ("0.01", "1.0"),
    "top_k": ("0 (off)",),
    "do_sample": ("true", "false"),
    "repetition_penalty": ("1.0", "2.0"),
    "stop": ("string", "list", "8"),
    "return_full_text": ("true", "false"),
    "enable_turkish_commentary": ("true", "false"),
    "deepseek_timeout": ("10", "60"),
    "seed": ("0", "2^63 - 1"),
    "details": ("true", "false"),
}
BOOLEANS = ("do_sample", "return_full_text", "enable_turkish_commentary", "details")
INTEGERS = ("max_new_tokens", "top_k", "deepseek_timeout", "seed")
NUMBERS = ("temperature", "top_p", "repetition_penalty")

ACCEPTED: list[tuple[str, object, object]] = [
    ("max_new_tokens", 1, 1),
    ("max_new_tokens", 2048, 2048),
    ("max_new_tokens", "256", 256),
    ("max_new_tokens", "256.0", 256),
    ("max_new_tokens", " 256 ", 256),
    ("max_new_tokens", 256.0, 256),
    ("temperature", 0, 0.0),
    ("temperature", 0.0, 0.0),
    ("temperature", "0", 0.0),
    ("temperature", 0.01, 0.01),
    ("temperature", 2, 2.0),
    ("temperature", "0.7", 0.7),
    ("temperature", "2e-1", 0.2),
    ("temperature", ".5", 0.5),
    ("top_p", 0.01, 0.01),
    ("top_p", 1, 1.0),
    ("top_p", "0.95", 0.95),
    ("top_k", 0, 0),
    ("top_k", 1, 1),
    ("top_k", 10**9, 10**9),
    ("top_k", "40", 40),
    *((name, value, value in (True, "true", "True")) for name in BOOLEANS for value in (True, False)),
    *((name, value, value.lower() == "true") for name in BOOLEANS for value in ("true", "false", "True", "FALSE")),
    ("repetition_penalty", 1, 1.0),
    ("repetition_penalty", 1.0, 1.0),
    ("repetition_penalty", 2.0, 2.0),
    ("repetition_penalty", "1.1", 1.1),
    ("stop", "END", ("END",)),
    ("stop", " ", (" ",)),
    ("stop", [], ()),
    ("stop", ["a"], ("a",)),
    ("stop", ("a", "b"), ("a", "b")),
    ("stop", list("abcdefgh"), tuple("abcdefgh")),
    ("deepseek_timeout", 10, 10),
    ("deepseek_timeout", 60, 60),
    ("deepseek_timeout", "45", 45),
    ("seed", 0, 0),
    ("seed", 2**63 - 1, 2**63 - 1),
    ("seed", "7", 7),
    ("seed", None, None),
]

REFUSED: list[tuple[str, object]] = [
    ("max_new_tokens", 0),
    ("max_new_tokens", 2049),
    ("max_new_tokens", -1),
    ("max_new_tokens", 1.5),
    ("max_new_tokens", "1.5"),
    ("max_new_tokens", "0x10"),
    ("max_new_tokens", "1_000"),
    ("max_new_tokens", "²"),
    ("max_new_tokens", "٣"),
    ("temperature", 0.0099),
    ("temperature", -0.1),
    ("temperature", 2.0001),
    ("temperature", "nan"),
    ("temperature", "inf"),
    ("temperature", "1e999"),
    ("temperature", "0,7"),
    ("temperature", "warm"),
    ("top_p", 0),
    ("top_p", 0.0099),
    ("top_p", 1.0001),
    ("top_k", -1),
    ("top_k", 0.5),
    ("repetition_penalty", 0),
    ("repetition_penalty", 0.99),
    ("repetition_penalty", 2.01),
    ("stop", None),
    ("stop", ""),
    ("stop", [""]),
    ("stop", ["a", 5]),
    ("stop", [["a"]]),
    ("stop", "\ud800"),
    ("stop", list("abcdefghi")),
    ("stop", {"a": "b"}),
    ("deepseek_timeout", 9),
    ("deepseek_timeout", 61),
    ("deepseek_timeout", 0),
    ("deepseek_timeout", 30.5),
    ("seed", -1),
    ("seed", 2**63),
    ("seed", 0.5),
    *((name, value) for name in BOOLEANS for value in (1, 0, 1.0, "1", "yes", "", None, [True])),
    *(
        (name, value)
        for name in INTEGERS + NUMBERS
        for value in (True, False, "true", "", " ", [1], {}, NAN, INF, -INF)
    ),
    *((name, None) for name in ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")),
    *((name, value) for name in NUMBERS for value in (10**400, -(10**400), 1e308, "9" * 5000)),
    *((name, value) for name in INTEGERS for value in (-(10**5000), 1e308, "9" * 5000, -1)),
    *((name, 10**5000) for name in ("max_new_tokens", "deepseek_timeout", "seed")),
]


def kinds(value: object) -> str:
    return value if isinstance(value, str) and len(value) < 30 else type(value).__name__


def test_defaults_are_the_contracts(default_params: GenerationParams) -> None:
    assert {f.name: getattr(default_params, f.name) for f in fields(default_params)} == DEFAULTS


def test_every_parameter_is_in_these_tables() -> None:
    assert {name for name, *_ in ACCEPTED} | {"return_full_text"} == set(DEFAULTS)
    assert {name for name, _ in REFUSED} == set(DEFAULTS) == set(SAID)


@pytest.mark.parametrize(("name", "value", "meant"), ACCEPTED, ids=kinds)
def test_accepted(default_params: GenerationParams, name: str, value: object, meant: object) -> None:
    updated = default_params.updated({name: value})
    assert getattr(updated, name) == meant
    assert type(getattr(updated, name)) is type(meant)
    assert {f.name: getattr(updated, f.name) for f in fields(updated)} == DEFAULTS | {name: meant}


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=kinds)
def test_refused_with_name_value_and_what_is_accepted(
    default_params: GenerationParams, name: str, value: object
) -> None:
    with pytest.raises(ParameterError) as caught:
        default_params.updated({name: value})
    message = str(caught.value)
    assert message.startswith(f"Parameter '{name}' is ")
    given_part, accepted = message.split("; accepted: ")
    culprit = next((v for v in value if not isinstance(v, str) or not v), value) if isinstance(value, list) else value
    assert given_part.endswith((excerpt(value), excerpt(culprit)))
    assert all(said in accepted for said in SAID[name])
    assert len(message) < 200


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("max_tokens", "max_new_tokens"),
        ("maxNewTokens", "max_new_tokens"),
        ("temprature", "temperature"),
        ("Temperature", "temperature"),
        ("topp", "top_p"),
        ("topK", "top_k"),
        ("dosample", "do_sample"),
        ("repetitionPenalty", "repetition_penalty"),
        ("stops", "stop"),
        ("enable_commentary", "enable_turkish_commentary"),
        ("timeout", "deepseek_timeout"),
        ("detail", "details"),
    ],
)
def test_unknown_name_gets_the_nearest_known_one(default_params: GenerationParams, misspelt: str, meant: str) -> None:
    with pytest.raises(ParameterError, match=f"Unknown parameter '{misspelt}'.*Did you mean '{meant}'") as caught:
        default_params.updated({misspelt: 1})
    assert all(name in str(caught.value) for name in DEFAULTS)


def test_unknown_name_like_no_other_gets_the_list_alone(default_params: GenerationParams) -> None:
    with pytest.raises(ParameterError, match=r"Unknown parameter 'zzzzzz'\. Known: "):
        default_params.updated({"zzzzzz": 1})


@pytest.mark.parametrize("given_name", ["x" * 10_000, "\x00\n", None, 5, 10**5000, ("a",)], ids=kinds)
def test_unknown_name_of_any_kind_makes_a_short_message(default_params: GenerationParams, given_name: object) -> None:
    with pytest.raises(ParameterError) as caught:
        default_params.updated({given_name: 1})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("given_value", [[], "", "max_new_tokens", 5, True, [["max_new_tokens", 5]]], ids=kinds)
def test_parameters_that_are_no_object(default_params: GenerationParams, given_value: object) -> None:
    with pytest.raises(RequestError, match="'parameters' must be an object") as caught:
        default_params.updated(given_value)
    assert caught.value.status == 400


def test_null_and_empty_parameters_are_the_defaults(default_params: GenerationParams) -> None:
    assert default_params.updated(None) == default_params.updated({}) == default_params


def test_a_refused_update_leaves_nothing_behind(default_params: GenerationParams) -> None:
    with pytest.raises(ParameterError):
        default_params.updated({"top_k": 7, "top_p": 7})
    assert default_params.top_k == 50


@given(st.dictionaries(st.sampled_from(list(DEFAULTS)), st.integers() | st.floats() | st.text() | st.booleans()))
def test_whatever_is_accepted_is_in_range(default_params: GenerationParams, given_params: dict[str, object]) -> None:
    try:
        params = default_params.updated(given_params)
    except ParameterError:
        return
    assert 1 <= params.max_new_tokens <= 2048
    assert params.temperature == 0 or 0.01 <= params.temperature <= 2
    assert 0.01 <= params.top_p <= 1
    assert params.top_k >= 0
    assert 1 <= params.repetition_penalty <= 2
    assert 10 <= params.deepseek_timeout <= 60
    assert params.seed is None or 0 <= params.seed < 2**63
    assert len(params.stop) <= 8
    assert all(params.stop)


@given(st.floats(0.01, 2.0), st.integers(1, 2048), st.booleans())
def test_strings_mean_what_the_values_mean(
    default_params: GenerationParams, temperature: float, tokens: int, sample: bool
) -> None:
    """The stock container passes floats of the URL's query as strings."""
    plain = {"temperature": temperature, "max_new_tokens": tokens, "do_sample": sample}
    typed = {name: str(value) for name, value in plain.items()}
    assert default_params.updated(plain) == default_params.updated(typed)


@pytest.mark.parametrize(
    ("given_params", "greedy"),
    [
        ({}, False),
        ({"do_sample": False}, True),
        ({"temperature": 0}, True),
        ({"temperature": "0.0"}, True),
        ({"temperature": 0.01}, False),
        ({"do_sample": True, "temperature": 0}, True),
        ({"do_sample": False, "temperature": 1}, True),
    ],
)
def test_greedy(default_params: GenerationParams, given_params: dict[str, object], greedy: bool) -> None:
    assert default_params.updated(given_params).greedy is greedy


# --- where the defaults come from


def written(folder: Path, **changes: object) -> Path:
    """The project's ``generation_config.json`` with some values changed; None takes one out."""
    values = json.loads((ROOT / DEFAULTS_FILE).read_text("utf-8")) | changes
    kept = {name: value for name, value in values.items() if value is not None}
    (folder / DEFAULTS_FILE).write_text(json.dumps(kept), "utf-8")
    return folder


def test_an_edited_file_changes_every_default(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "max_new_tokens": 99,
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 7,
        "do_sample": False,
        "repetition_penalty": 1.5,
        "stop": ["END", "STOP"],
    }
    assert tuple(changes) == SAMPLING
    edited = load_defaults(written(tmp_path, **changes))
    assert {name: getattr(edited, name) for name in SAMPLING} == changes | {"stop": ("END", "STOP")}


def test_the_code_has_no_default_of_its_own_for_sampling(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=re.compile(".*".join(SAMPLING))):
        GenerationParams()  # type: ignore[call-arg]
    for name in SAMPLING:
        with pytest.raises(ConfigurationError, match=f"{DEFAULTS_FILE} has no value for '{name}'"):
            load_defaults(written(tmp_path, **{name: None}))


@pytest.mark.parametrize(("name", "value"), [("top_p", 2), ("max_new_tokens", 4096), ("stop", [""]), ("do_sample", 1)])
def test_a_default_out_of_range_stops_the_start(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"{DEFAULTS_FILE}.*'{name}'.*accepted"):
        load_defaults(written(tmp_path, **{name: value}))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', "5", "\ufeff{}", b"\xff\xfe"], ids=repr)
def test_a_broken_file_stops_the_start(tmp_path: Path, content: str | bytes) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / DEFAULTS_FILE).write_bytes(data)
    with pytest.raises(ConfigurationError, match=DEFAULTS_FILE) as caught:
        load_defaults(tmp_path)
    assert str(tmp_path) not in str(caught.value)


def test_a_missing_file_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=DEFAULTS_FILE) as caught:
        load_defaults(tmp_path)
    assert str(tmp_path) not in str(caught.value)


def test_the_file_also_serves_transformers() -> None:
    """The hub and transformers read the same file: its token ids are the checkpoint's."""
    values = json.loads((ROOT / DEFAULTS_FILE).read_text("utf-8"))
    assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (1, 2, 0)
    assert math.isclose(values["repetition_penalty"], 1.05)
