"""Every form of ``inputs``: what it means, and that nothing makes anything but a request, a safe error or a record."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from pulse_ecg.errors import ImageError, ImageUrlRefusedError, PayloadTooLargeError, PulseError, RequestError
from pulse_ecg.images import DecodedImage, EncodedImage, UrlImage
from pulse_ecg.params import GenerationParams
from pulse_ecg.prompt import LLAVA_V1_SYSTEM
from pulse_ecg.request import MAX_BATCH, AnalysisRequest, parse_input, split_inputs

if TYPE_CHECKING:
    from handler import EndpointHandler
    from pulse_ecg.analyzer import Analysis, PreparedRequest

DEFAULT_QUESTION = "Please write a clinical report based on this ECG image."
QUESTION = "  What is the rhythm?\n"
URL = "https://images.example/ecg.png"
BASE64 = "iVBORw0KGgo="


@pytest.fixture(scope="module")
def params(default_params: GenerationParams) -> GenerationParams:
    return default_params.updated({"max_new_tokens": 3})


def turns(request: AnalysisRequest) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in request.conversation.turns]


def user(*parts: object) -> dict[str, object]:
    return {"role": "user", "content": list(parts)}


def said(text: str) -> dict[str, object]:
    return {"type": "text", "text": text}


def shown(url: object) -> dict[str, object]:
    return {"type": "image_url", "image_url": url}


def small_image() -> str:
    file = BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# --- the body


@pytest.mark.parametrize("inputs", ["text", {"query": "q"}, {}, 5, Image.new("RGB", (2, 2))], ids=type)
def test_anything_but_a_list_is_one_input(inputs: object) -> None:
    assert split_inputs({"inputs": inputs, "parameters": {"top_k": 1}}) == ([inputs], {"top_k": 1})


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_is_a_batch_in_order(kind: type) -> None:
    assert split_inputs({"inputs": kind(["a", {"query": "b"}, None])}) == (["a", {"query": "b"}, None], None)


@pytest.mark.parametrize("beside", [{"options": {"use_cache": False}}, {"stream": False}, {"stream": None}], ids=str)
def test_what_other_clients_send_beside_it_is_without_effect(beside: dict[str, object]) -> None:
    assert split_inputs({"inputs": "x", **beside}) == (["x"], None)


def test_the_largest_batch() -> None:
    assert len(split_inputs({"inputs": ["x"] * MAX_BATCH})[0]) == MAX_BATCH
    with pytest.raises(PayloadTooLargeError, match=f"{MAX_BATCH + 1} items; at most {MAX_BATCH}"):
        split_inputs({"inputs": ["x"] * (MAX_BATCH + 1)})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, "The body must be an object with the key 'inputs', not null"),
        ("text", "The body must be an object"),
        ([], "The body must be an object"),
        ({}, "The body has no 'inputs'"),
        ({"inputs": None}, "The body has no 'inputs'"),
        ({"inputs": []}, "'inputs' is an empty list"),
        ({"input": "x"}, "unknown key 'input'. Did you mean 'inputs'?"),
        ({"inputs": "x", "Parameters": {}}, "unknown key 'Parameters'. Did you mean 'parameters'?"),
        ({"inputs": "x", "option": {}}, "unknown key 'option'"),
        ({"inputs": "x", 5: 6}, "unknown key 5"),
        ({"inputs": "x", "stream": True}, "unknown key 'stream'"),
    ],
    ids=str,
)
def test_malformed_body(body: object, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        split_inputs(body)
    assert message in str(caught.value)
    assert caught.value.status == 400


# --- a question, an image, both


def test_a_string_is_a_question_verbatim(params: GenerationParams) -> None:
    request = parse_input(QUESTION, params)
    assert (turns(request), request.image, request.form) == ([("user", QUESTION)], None, "text")
    assert request.conversation.system == LLAVA_V1_SYSTEM
    assert request.params is params


@pytest.mark.parametrize("key", ["query", "text", "prompt"])
def test_question_aliases(params: GenerationParams, key: str) -> None:
    request = parse_input({key: QUESTION}, params)
    assert (turns(request), request.image, request.form) == ([("user", QUESTION)], None, "object")


@pytest.mark.parametrize("key", ["image", "image_url", "image_base64"])
@pytest.mark.parametrize(
    ("value", "source"),
    [
        (URL, UrlImage(URL)),
        (f"data:image/png;base64,{BASE64}", EncodedImage(f"data:image/png;base64,{BASE64}")),
        (BASE64, EncodedImage(BASE64)),
    ],
    ids=["url", "data-uri", "base64"],
)
def test_image_aliases_take_every_kind_of_image(params: GenerationParams, key: str, value: str, source: object) -> None:
    request = parse_input({"query": QUESTION, key: value}, params)
    assert request.image == source
    assert turns(request) == [("user", QUESTION)]


@pytest.mark.parametrize("question", [{}, {"query": None}, {"text": ""}, {"prompt": " \n"}], ids=str)
def test_an_image_without_a_question_gets_the_default_one(
    params: GenerationParams, question: dict[str, object]
) -> None:
    request = parse_input({"image": URL, **question}, params)
    assert turns(request) == [("user", DEFAULT_QUESTION)]
    assert request.image == UrlImage(URL)


def test_a_pil_image_gets_the_default_question(params: GenerationParams) -> None:
    picture = Image.new("RGB", (4, 4))
    request = parse_input(picture, params)
    assert (turns(request), request.form) == ([("user", DEFAULT_QUESTION)], "image")
    assert isinstance(request.image, DecodedImage)
    assert request.image.image is picture


def test_a_pil_image_may_stand_beside_a_question(params: GenerationParams) -> None:
    request = parse_input({"query": QUESTION, "image": Image.new("RGB", (4, 4))}, params)
    assert isinstance(request.image, DecodedImage)


def test_a_blank_alias_does_not_count(params: GenerationParams) -> None:
    assert turns(parse_input({"query": "", "text": QUESTION, "image": URL}, params)) == [("user", QUESTION)]


IMAGES = [URL, f" {URL}\n", "HTTP://a.example/ecg.png", "s3://bucket/ecg.png", "www.a.example/ecg.png", BASE64 * 60]


@pytest.mark.parametrize("text", [*IMAGES, small_image()], ids=len)
def test_an_image_in_the_questions_place_is_no_question(params: GenerationParams, text: str) -> None:
    """Answered as a question, it would be without its image."""
    for inputs in (text, {"query": text}, {"messages": [{"role": "user", "content": text}]}):
        with pytest.raises(RequestError, match="looks like an image, not a question"):
            parse_input(inputs, params)
    assert turns(parse_input({"query": text, "image": URL}, params)) == [("user", text)]


@pytest.mark.parametrize("text", [f"What does {URL} show?", "x" * 400, "ş" * 600, "ECG? " * 200], ids=len)
def test_a_question_is_not_taken_for_an_image(params: GenerationParams, text: str) -> None:
    assert turns(parse_input(text, params)) == [("user", text)]


def test_null_aliases_do_not_count(params: GenerationParams) -> None:
    request = parse_input({"query": QUESTION, "text": None, "image": None, "image_url": URL}, params)
    assert (turns(request), request.image) == ([("user", QUESTION)], UrlImage(URL))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, RequestError, "'inputs' is null"),
        (5, RequestError, "'inputs' is 5"),
        (True, RequestError, "'inputs' is true"),
        ([["nested"]], RequestError, "'inputs' is a list"),
        (b"bytes", RequestError, "'inputs' is bytes"),
        ("", RequestError, "'inputs' is an empty question"),
        (" \n\t", RequestError, "'inputs' is an empty question"),
        ("data:image/png;base64,AAAA", RequestError, "looks like an image"),
        (" DATA:image/png;base64,AAAA", RequestError, "looks like an image"),
        ("https://example.org/ecg.png", RequestError, "looks like an image"),
        ("iVBORw0KGgo" * 60, RequestError, "looks like an image"),
        ("/9j/" + "A" * 76 + "\n" + "A" * 76, RequestError, "looks like an image"),
        ("half \ud83d a pair", RequestError, "half a surrogate pair"),
        ({}, RequestError, "neither a question ('query') nor an image ('image')"),
        ({"query": ""}, RequestError, "neither a question"),
        ({"query": None, "text": None}, RequestError, "neither a question"),
        ({"query": 5}, RequestError, "'query' must be a string, not 5"),
        ({"text": ["a"]}, RequestError, "'text' must be a string, not a list"),
        ({"query": "half \ud83d a pair"}, RequestError, "'query' holds half a surrogate pair"),
        ({"query": "a", "text": "a"}, RequestError, "both 'query' and 'text'"),
        ({"query": "a", "image": URL, "image_url": URL}, RequestError, "both 'image' and 'image_url'"),
        ({"query": "a", "imgae": URL}, RequestError, "unknown key 'imgae'. Did you mean 'image'?"),
        ({"question": "a"}, RequestError, "unknown key 'question'"),
        ({"query": "a", "imageUrl": URL}, RequestError, "Did you mean 'image_url'?"),
        ({"query": "a", "image": ""}, ImageError, "'image' is empty"),
        ({"query": "a", "image": " "}, ImageError, "'image' is empty"),
        ({"query": "a", "image": None}, ImageError, "'image' is null"),
        ({"query": "a", "image_url": None, "image": None}, ImageError, "'image' is null"),
        ({"query": "a", "image_url": {"url": URL}}, ImageError, "'image_url' is an object"),
        ({"query": "a", "image": 5}, ImageError, "'image' is 5"),
        ({"query": "a", "image": {"url": URL}}, ImageError, "'image' is an object"),
        ({"query": "a", "image": [URL]}, ImageError, "'image' is a list"),
        ({"query": "a", "image": False}, ImageError, "'image' is false"),
        ({"query": "a", "image": "file:///etc/passwd"}, ImageUrlRefusedError, "'file'"),
    ],
    ids=repr,
)
def test_malformed_input(params: GenerationParams, value: object, error: type[PulseError], message: str) -> None:
    with pytest.raises(error) as caught:
        parse_input(value, params)
    assert message in str(caught.value)
    assert caught.value.status == (422 if issubclass(error, ImageError) else 400)


# --- chats


def test_a_chat_of_strings(params: GenerationParams) -> None:
    request = parse_input(
        {
            "messages": [
                {"role": "user", "content": "one"},
                {"role": "assistant", "content": "two"},
                {"role": "user", "content": "three", "name": "doctor"},
            ]
        },
        params,
    )
    assert turns(request) == [("user", "one"), ("assistant", "two"), ("user", "three")]
    assert (request.image, request.form, request.conversation.question) == (None, "chat", "three")
    assert request.conversation.system == LLAVA_V1_SYSTEM


@pytest.mark.parametrize("link", [URL, {"url": URL}, {"url": URL, "detail": "high"}], ids=str)
def test_image_parts(params: GenerationParams, link: object) -> None:
    request = parse_input({"messages": [user(said("one"), shown(link), said("two"))]}, params)
    assert turns(request) == [("user", "one\ntwo")]
    assert request.image == UrlImage(URL)


def test_the_image_of_a_later_turn_is_the_chats(params: GenerationParams) -> None:
    chat = [user(said("one")), {"role": "assistant", "content": "two"}, user(said("three"), shown(URL))]
    assert parse_input({"messages": chat}, params).image == UrlImage(URL)


def test_a_chat_of_an_image_alone_gets_the_default_question(params: GenerationParams) -> None:
    assert turns(parse_input({"messages": [user(shown(URL))]}, params)) == [("user", DEFAULT_QUESTION)]


@pytest.mark.parametrize("content", ["", " \n", []])
def test_an_empty_system_message_is_none(params: GenerationParams, content: object) -> None:
    """Chat programs send one where nobody wrote any; the model would lose the sentence that it was trained with."""
    chat = {"messages": [{"role": "system", "content": content}, {"role": "user", "content": "Rate?"}]}
    assert parse_input(chat, params).conversation.system == LLAVA_V1_SYSTEM


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_replaces_the_system_sentence(params: GenerationParams, role: str) -> None:
    chat = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "one"}]
    request = parse_input({"messages": chat}, params)
    assert request.conversation.system == "Be brief."
    assert turns(request) == [("user", "one")]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "neither a question"),
        ([], "'messages' must be a list of at least one"),
        ("hello", "'messages' must be a list"),
        ([5], "messages[0] must be an object with 'role' and 'content', not 5"),
        ([{"content": "x"}], "messages[0] has the role null"),
        ([{"role": "tool", "content": "x"}], "messages[0] has the role 'tool'"),
        ([{"role": ["user"], "content": "x"}], "messages[0] has the role a list"),
        ([{"role": "user"}], "messages[0] must have a 'content'"),
        ([{"role": "user", "content": 5}], "not 5"),
        ([{"role": "user", "content": "x", "image": URL}], "messages[0] has the unknown key 'image'"),
        ([{"role": "user", "content": " "}], "a message without text"),
        ([{"role": "user", "content": []}], "a message without text"),
        ([{"role": "user", "content": "half \udc00"}], "messages[0] holds half a surrogate pair"),
        ([user(said("half \udc00"))], "messages[0].content[0] holds half a surrogate pair"),
        ([user("x")], "messages[0].content[0] must be an object with 'type'"),
        ([user({"type": "audio"})], "messages[0].content[0] has the type 'audio'"),
        ([user({"type": "text"})], "messages[0].content[0] must have a 'text' that is a string, not null"),
        ([user({"type": "text", "text": 5})], "messages[0].content[0] must have a 'text' that is a string, not 5"),
        ([user(said("x"), shown(None))], "messages[0].content[1].image_url is null"),
        ([user(said("x"), shown({}))], "messages[0].content[1].image_url is null"),
        ([user(said("x"), shown({"url": 5}))], "messages[0].content[1].image_url is 5"),
        ([user(said("x"), shown(""))], "messages[0].content[1].image_url is empty"),
        ([user(said("x") | {"image_url": {"url": URL}})], "messages[0].content[0] has the type 'text' and 'image_url'"),
        ([user(said("x") | {"image": URL})], "messages[0].content[0] has the type 'text' and 'image'"),
        ([user(shown(URL) | {"text": "x"})], "messages[0].content[0] has the type 'image_url' and 'text'"),
        ([user(said(URL))], "A message looks like an image"),
        ([{"role": "user", "content": f" {URL}"}], "A message looks like an image"),
        ([user(said("x")) | {"refusal": "no"}], "messages[0] has the unknown key 'refusal'"),
        ([user(shown(URL), shown(URL))], "2 images; one image per chat"),
        ([{"role": "assistant", "content": "x"}], "messages[0] has the role 'assistant' where 'user' is due"),
        ([user(said("x")), user(said("y"))], "messages[1] has the role 'user' where 'assistant' is due"),
        ([user(said("x")), {"role": "assistant", "content": "y"}], "must end with a message of the role 'user'"),
        ([{"role": "system", "content": "x"}], "must end with a message of the role 'user'"),
        ([user(said("x")), {"role": "system", "content": "y"}], "messages[1] has the role 'system'"),
        ([{"role": "system", "content": [shown(URL)]}, user(said("x"))], "messages[0] has an image"),
        (
            [user(said("x")), {"role": "assistant", "content": [shown(URL)]}, user(said("y"))],
            "messages[1] has an image",
        ),
        ([user(said("x")), {"role": "assistant", "content": ""}, user(said("y"))], "a message without text"),
    ],
    ids=repr,
)
def test_malformed_chat(params: GenerationParams, messages: object, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_input({"messages": messages}, params)
    assert message in str(caught.value)


def test_a_chat_takes_no_keys_of_the_other_form(params: GenerationParams) -> None:
    chat = {"messages": [user(said("x"))]}
    with pytest.raises(RequestError, match="unknown key 'model'"):
        parse_input(chat | {"model": "x"}, params)
    for key in ("query", "text", "image", "image_base64"):
        with pytest.raises(RequestError, match=f"'messages' and '{key}'. In a chat, question and image are parts"):
            parse_input(chat | {key: URL}, params)
    with pytest.raises(RequestError, match="'messages' and 'image'"):  # it went missing on its way
        parse_input(chat | {"image": None}, params)
    assert turns(parse_input(chat | {"query": None}, params)) == [("user", "x")]


def test_an_answer_may_be_sent_back_as_it_came(params: GenerationParams) -> None:
    nothing = {"refusal": None, "annotations": [], "tool_calls": [], "function_call": None, "reasoning_content": ""}
    answered = {"role": "assistant", "content": "two", "audio": None} | nothing
    request = parse_input({"messages": [user(said("one")), answered, user(said("three"))]}, params)
    assert turns(request) == [("user", "one"), ("assistant", "two"), ("user", "three")]


def test_what_a_part_says_of_nothing_is_allowed(params: GenerationParams) -> None:
    for nothing in (None, ""):
        parts = (said("one") | {"image_url": nothing, "cache_control": {}}, shown(URL) | {"text": nothing})
        assert parse_input({"messages": [user(*parts)]}, params).image == UrlImage(URL)


def test_what_the_caller_sent_is_not_in_repr(params: GenerationParams) -> None:
    request = parse_input({"query": "a private question", "image": "https://user.example/private.png"}, params)
    assert "private" not in repr(request)
    chat = [{"role": "system", "content": "private"}, user(said("private"), shown("https://a.example/private"))]
    assert "private" not in repr(parse_input({"messages": chat}, params))


# --- whatever comes


# No name that DNS would be asked for: addresses that policy refuses, and rubbish.
IMAGES = st.sampled_from(
    [small_image(), BASE64, "http://127.0.0.1/a.png", "https://[::1]/a", "http://0x7f.1/", "data:image/png;base64,"]
)
WORDS = st.sampled_from(
    [
        "inputs",
        "parameters",
        "query",
        "text",
        "prompt",
        "image",
        "image_url",
        "image_base64",
        "messages",
        "role",
        "content",
        "type",
        "user",
        "assistant",
        "system",
        "max_new_tokens",
        "temperature",
        "top_p",
        "top_k",
        "do_sample",
        "repetition_penalty",
        "stop",
        "seed",
        "details",
        "true",
        "1",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | WORDS | IMAGES
VALUES: Any = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
PARTS: Any = VALUES | st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url"])}, optional={"text": VALUES, "image_url": IMAGES | VALUES}
)
MESSAGES: Any = VALUES | st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text() | st.lists(PARTS, max_size=3)}
)
INPUTS: Any = (
    VALUES
    | st.fixed_dictionaries({}, optional={"query": SCALARS, "text": SCALARS, "image": IMAGES | VALUES})
    | st.fixed_dictionaries({"messages": st.lists(MESSAGES, max_size=4) | VALUES})
)
BODIES: Any = VALUES | st.fixed_dictionaries(
    {"inputs": INPUTS | st.lists(INPUTS, max_size=3)},
    optional={"parameters": VALUES | st.dictionaries(WORDS, SCALARS, max_size=3)},
)


def assert_safe(message: str) -> None:
    """Short, printable, and without what only code writes."""
    assert message
    assert len(message) < 500
    assert message.isprintable()
    assert not any(trace in message for trace in ("Traceback", " object at 0x", "<class", 'File "', "/home/", "/tmp/"))


@given(INPUTS)
@example("\ud800")
@example({"query": "\udfff", "image": "\ud800"})
@example({"image": "http://\ud800/"})
@example({"query": 10**5000})
@example({"query": float("nan")})
def test_any_input_is_a_request_or_a_safe_error(default_params: GenerationParams, value: object) -> None:
    try:
        request = parse_input(value, default_params)
    except RequestError as error:
        assert_safe(str(error))
        return
    assert isinstance(request, AnalysisRequest)
    roles = [turn.role for turn in request.conversation.turns]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    assert all(turn.text.strip() for turn in request.conversation.turns)


@given(BODIES)
def test_any_body_is_inputs_or_a_safe_error(body: object) -> None:
    try:
        inputs, _ = split_inputs(body)
    except RequestError as error:
        assert_safe(str(error))
        return
    assert 0 < len(inputs) <= MAX_BATCH


@pytest.fixture(scope="module")
def quick_handler(handler: EndpointHandler) -> Iterator[EndpointHandler]:
    """The handler with answers of one token, whatever is asked for; all else is real."""
    answer = handler._analyzer.answer

    def one_token(prepared: PreparedRequest, **options: Any) -> Analysis:
        params = prepared.request.params.updated({"max_new_tokens": 1})
        return answer(replace(prepared, request=replace(prepared.request, params=params)), **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handler._analyzer, "answer", one_token)
        yield handler


@given(BODIES)
@example(None)
@example({"inputs": {"query": "x", "image": "http://\ud800/"}})
@example({"inputs": {"image": "data:image/png;base64,\ud800"}})
@example({"inputs": "x", "parameters": {"stop": ["\ud800"], "return_full_text": True}})
@example({"inputs": "x", "parameters": {"top_k": 10**5000}})
@example({"inputs": ["<s></s><unk><image>", "\x00", "\u202e"], "parameters": {"seed": 2**63 - 1, "temperature": 0.01}})
@hypothesis_settings(max_examples=60)
def test_any_body_gives_records(quick_handler: EndpointHandler, body: object) -> None:
    try:
        expected = len(split_inputs(body)[0])
    except RequestError:
        expected = 1
    records = quick_handler(body)
    assert len(records) == expected
    for record in records:
        assert isinstance(record["generated_text"], str)
        if record.get("success") is False:
            assert set(record) == {"generated_text", "error", "model", "handler", "success"}
            assert record["generated_text"] == ""
            assert "internal error" not in record["error"]
            assert_safe(record["error"])
        else:
            assert {"generated_text", "model", "processing_method"} <= set(record)
    json.dumps(records).encode("utf-8")


@pytest.mark.parametrize("key", ["query", "image", "messages"])
def test_nesting_without_end_gives_records(quick_handler: EndpointHandler, key: str) -> None:
    deep: object = "end"
    for level in range(100_000):
        deep = [deep] if level % 2 else {key: deep}
    for body in ({"inputs": deep}, {"inputs": {key: deep}}, {"inputs": "x", "parameters": deep}, deep):
        for record in quick_handler(body):
            assert record["success"] is False
            assert_safe(record["error"])


def test_a_fault_of_ours_is_a_record_that_gives_nothing_away(
    handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("a private question, in /some/path")

    monkeypatch.setattr(handler._analyzer, "answer", broken)
    with caplog.at_level(logging.DEBUG):
        [record] = handler({"inputs": "a private question"})
    assert record["success"] is False
    assert "private" not in record["error"] + caplog.text
    reference = record["error"].split("reference ")[1].split(")")[0]
    assert reference in caplog.text
    assert "ValueError at test_request.py" in caplog.text


def test_a_bad_item_of_a_batch_fails_alone(quick_handler: EndpointHandler, sample_png: bytes) -> None:
    image = base64.b64encode(sample_png).decode()
    batch = ["What is it?", {"query": 5}, {"image": image}, {"image": image[:200]}, "What is it?"]
    records = quick_handler({"inputs": batch, "parameters": {"enable_turkish_commentary": False, "do_sample": False}})
    assert [record.get("success", True) for record in records] == [True, False, True, False, True]
    assert records[0] == records[4]


def test_a_later_image_without_a_question_gets_the_default_one(params: GenerationParams) -> None:
    shown = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/ecg.png"}}]}
    chat = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}, shown]
    request = parse_input({"messages": chat}, params)
    assert request.conversation.question == DEFAULT_QUESTION


def test_the_options_of_older_clients_change_nothing() -> None:
    assert split_inputs({"inputs": "x", "options": {"wait_for_model": True}}) == split_inputs({"inputs": "x"})
