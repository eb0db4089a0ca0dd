"""OpenAI's route of our own server, spoken to by OpenAI's and Hugging Face's own clients."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import requests
from huggingface_hub import InferenceClient

from handler import EndpointHandler
from pulse_ecg.config import Settings
from pulse_ecg.params import _READERS
from server.chat_request import HARMLESS, MOST_TOKENS, READ, UNSUPPORTED, chat_request
from server.errors import ChatFieldError
from tests.commentary_service import TURKISH, answer, chat_server
from tests.our_server import OurServer, our_server
from utils import DeepSeekClient

QUESTION = [{"role": "user", "content": "What is the rate?"}]
GREEDY: Any = {"model": "PULSE-7B", "messages": QUESTION, "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def server(handler: EndpointHandler) -> Iterator[OurServer]:
    with our_server(handler) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: OurServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def commented(handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with chat_server(answer()) as service:
        commentary = DeepSeekClient(Settings(commentary_key="sk-0", commentary_base_url=service.url))
        monkeypatch.setattr(handler, "_commentary", commentary)
        yield
        commentary.close()


def native(handler: EndpointHandler, messages: object = QUESTION, **parameters: object) -> dict[str, Any]:
    """The same question by the endpoint's own contract."""
    plain = {"enable_turkish_commentary": False, "details": True, "max_new_tokens": 12, "temperature": 0}
    [record] = handler({"inputs": {"messages": messages}, "parameters": plain | parameters})
    return record


def part(png: bytes, **more: str) -> dict[str, Any]:
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png).decode()}", **more},
    }


# --- OpenAI's client


def test_a_completion_is_the_native_answer(client: openai.OpenAI, handler: EndpointHandler) -> None:
    completion = client.chat.completions.create(**GREEDY)
    record = native(handler)
    assert completion.choices[0].message.content == record["generated_text"]
    assert completion.choices[0].message.role == "assistant"
    assert (completion.object, completion.model) == ("chat.completion", handler.model_name)
    assert completion.id.startswith("chatcmpl-")
    details, usage = record["details"], completion.usage
    assert usage is not None
    assert usage.prompt_tokens == details["prompt_tokens"]
    assert usage.completion_tokens == details["generated_tokens"]
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert "turkish_commentary" not in completion.model_dump()


def test_images_and_several_turns_with_messages_as_they_came_back(
    client: openai.OpenAI, handler: EndpointHandler, sample_png: bytes
) -> None:
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "Rate?"}, part(sample_png, detail="high")]}
    ]
    first = client.chat.completions.create(**GREEDY | {"messages": messages})
    messages.append(first.choices[0].message.model_dump())  # with refusal, tool_calls and more, all null
    messages.append({"role": "user", "content": "Why?", "name": "reader"})
    second = client.chat.completions.create(**GREEDY | {"messages": messages})
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    record = native(handler, plain)
    assert second.choices[0].message.content == record["generated_text"]
    assert record["details"]["image_tokens"] > 0
    messages[0]["content"].pop()
    without = client.chat.completions.create(**GREEDY | {"messages": messages})
    assert without.choices[0].message.content != second.choices[0].message.content


def test_a_stream_is_the_completion(client: openai.OpenAI, handler: EndpointHandler) -> None:
    chunks = list(client.chat.completions.create(**GREEDY, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert len(deltas) > 4
    assert "".join(delta.content or "" for delta in deltas) == native(handler)["generated_text"]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_the_usage_comes_last_where_it_is_asked_for(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**GREEDY)
    options: Any = {"include_usage": True}
    *chunks, last = client.chat.completions.create(**GREEDY, stream=True, stream_options=options)
    assert (last.choices, last.usage) == ([], whole.usage)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert "usage" in chunks[0].model_fields_set


def test_the_asynchronous_client(server: OurServer, handler: EndpointHandler) -> None:
    async def talk() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            whole = await client.chat.completions.create(**GREEDY)
            stream = await client.chat.completions.create(**GREEDY, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return [whole.choices[0].message.content or "", "".join(pieces)]

    assert asyncio.run(talk()) == [native(handler)["generated_text"]] * 2


def test_how_an_answer_ends(client: openai.OpenAI, handler: EndpointHandler) -> None:
    whole = client.chat.completions.create(**GREEDY)
    text = whole.choices[0].message.content or ""
    assert whole.choices[0].finish_reason == "length"
    cut = client.chat.completions.create(**GREEDY, stop=[text[4:7], "zzzz"])
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == (
        text[: text.index(text[4:7])].rstrip(),
        "stop",
    )
    assert native(handler, stop=text[4:7])["details"]["finish_reason"] == "stop"


def test_an_answer_that_the_model_ends_itself_ends_with_stop(
    client: openai.OpenAI, handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    details = handler._details
    monkeypatch.setattr(handler, "_details", lambda analysis: details(analysis) | {"finish_reason": "eos"})
    assert client.chat.completions.create(**GREEDY).choices[0].finish_reason == "stop"


def test_seeds_and_sampling_parameters_have_their_effect(client: openai.OpenAI, handler: EndpointHandler) -> None:
    def text(**changes: Any) -> str | None:
        return client.chat.completions.create(**GREEDY | changes).choices[0].message.content

    hot: Any = {"temperature": 1.5, "seed": 5, "extra_body": {"top_k": 40, "repetition_penalty": 1.3}}
    parameters = {"temperature": 1.5, "seed": 5, "top_k": 40, "repetition_penalty": 1.3}
    assert text(**hot) == text(**hot) == native(handler, **parameters)["generated_text"]
    assert text(**hot | {"seed": 6}) != text(**hot)
    assert text(seed=-3) == text()  # OpenAI's seeds may be negative
    assert text(top_p=0.01, temperature=2) == text()
    assert text(extra_body={"top_k": 1}, temperature=2) == text()
    assert text(extra_body={"top_k": -1}) == text()


def test_more_tokens_than_there_can_be_are_cut_and_the_newer_name_counts() -> None:
    def most(**fields: object) -> object:
        return chat_request({"messages": QUESTION, **fields}, ["m"]).data["parameters"].get("max_new_tokens")

    assert most() is None
    assert most(max_tokens=None, max_completion_tokens=None) is None
    assert most(max_tokens=100_000) == MOST_TOKENS == 2048
    assert most(max_tokens=5, max_completion_tokens=7) == 7
    assert most(max_tokens=5.0) == 5
    assert _READERS["max_new_tokens"]("", MOST_TOKENS) == MOST_TOKENS


def test_what_lies_below_our_ranges_and_within_openais_has_the_effect_of_the_least() -> None:
    def parameters(**fields: object) -> dict[str, Any]:
        sent: dict[str, Any] = chat_request({"messages": QUESTION, **fields}, ["m"]).data["parameters"]
        for name in fields:
            assert _READERS[name]("", sent[name]) == sent[name]
        return sent

    assert parameters(temperature=1e-6)["temperature"] == parameters(temperature=0.01)["temperature"] == 0.01
    assert parameters(temperature=0)["temperature"] == 0
    assert parameters(top_p=0)["top_p"] == parameters(top_p=0.001)["top_p"] == 0.01
    assert parameters(temperature=0.5, top_p=1)["top_p"] == 1


def test_what_may_be_sent_instead_is_told_as_json() -> None:
    with pytest.raises(ChatFieldError, match=r"or send \{\"type\": \"text\"\}\."):
        chat_request({"messages": QUESTION, "response_format": {"type": "json_object"}}, ["m"])


def test_the_commentary_is_our_extension(client: openai.OpenAI, commented: None) -> None:
    extra = {"turkish_commentary": True, "deepseek_timeout": 10}
    expected = {"comment_text": TURKISH, "commentary_model": "local-turkish-1", "commentary_tokens": 123}
    expected |= {"commentary_status": "success"}
    whole = client.chat.completions.create(**GREEDY, extra_body=extra)
    assert whole.model_dump()["turkish_commentary"] == expected
    options: Any = {"include_usage": True}
    chunks = list(client.chat.completions.create(**GREEDY, extra_body=extra, stream=True, stream_options=options))
    usage, last = chunks[-2:]
    assert usage.usage
    assert usage.choices == last.choices == []
    assert last.model_dump()["turkish_commentary"] == expected
    assert not any("turkish_commentary" in chunk.model_dump() for chunk in chunks[:-1])


def test_a_commentary_that_fails_leaves_the_completion(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**GREEDY, extra_body={"turkish_commentary": True})
    assert whole.model_dump()["turkish_commentary"]["commentary_status"] == "api_key_missing"
    assert whole.choices[0].message.content


def test_models(client: openai.OpenAI, handler: EndpointHandler) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object) == (handler.model_name, "model")
    for name in ("PULSE-ECG/PULSE-7B", "PULSE-7B", "pulse-7b"):
        assert client.models.retrieve(name) == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-9")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("name", ["PULSE-7B", "pulse-7b", "PULSE-ECG/PULSE-7B", "tgi", "dummy", "", None])
def test_the_models_names(server: OurServer, handler: EndpointHandler, name: str | None) -> None:
    response = server.post("/v1/chat/completions", GREEDY | {"model": name, "max_tokens": 1})
    assert (response.status_code, response.json()["model"]) == (200, handler.model_name)


# --- its errors


def test_errors_are_those_that_the_client_knows(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**GREEDY | {"model": "gpt-9"})
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(**GREEDY | {"messages": [{"role": "user", "content": "long " * 5000}]})
    assert (long.value.code, long.value.param, long.value.type) == (
        "context_length_exceeded",
        "messages",
        "invalid_request_error",
    )
    image = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(
                **GREEDY | {"messages": [{"role": "user", "content": [image]}], "stream": stream}
            )
        assert refused.value.code == "invalid_image"


def test_an_error_in_mid_answer_is_raised_by_the_client(
    client: openai.OpenAI, handler: EndpointHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pulse_ecg.generation.Answer._step", lambda *_, **__: 1 / 0)
    with pytest.raises(openai.APIError, match="internal error"):
        list(client.chat.completions.create(**GREEDY, stream=True))


REFUSED = [
    ("temperature", -0.1),
    ("temperature", 2.5),
    ("temperature", "0.2"),
    ("temperature", True),
    ("temperature", 10**400),
    ("top_p", -0.1),
    ("top_p", 1.5),
    ("repetition_penalty", 0.5),
    ("top_k", -2),
    ("top_k", 1.5),
    ("max_tokens", 0),
    ("max_tokens", -5),
    ("max_tokens", "many"),
    ("max_completion_tokens", 0),
    ("max_completion_tokens", 1.5),
    ("seed", "x"),
    ("seed", 2**63),
    ("stop", ""),
    ("stop", [""]),
    ("stop", ["x"] * 9),
    ("stop", 5),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("turkish_commentary", "yes"),
    ("deepseek_timeout", 5),
    ("n", 2),
    ("n", 0),
    ("n", True),
    ("logprobs", True),
    ("top_logprobs", 3),
    ("presence_penalty", 0.5),
    ("frequency_penalty", -0.5),
    ("logit_bias", {"50": 5}),
    ("tools", [{"type": "function"}]),
    ("tool_choice", "required"),
    ("response_format", {"type": "json_object"}),
    ("modalities", ["audio"]),
    ("audio", {}),
    ("reasoning_effort", "high"),
    ("model", 5),
    ("messages", []),
    ("messages", None),
    ("messages", "Rate?"),
    ("temprature", 1),
    ("max_new_tokens", 5),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=[f"{name}={value!r}"[:40] for name, value in REFUSED])
def test_what_cannot_be_done_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ChatFieldError) as caught:
        chat_request({"messages": QUESTION, name: value}, ["m"])
    assert (caught.value.status, caught.value.param) == (400, name)
    assert f"'{name}'" in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_misspelt_field_is_told_the_nearest(server: OurServer) -> None:
    response = server.post("/v1/chat/completions", GREEDY | {"maxTokens": 5})
    assert response.status_code == 400
    assert "Did you mean 'max_tokens'?" in response.json()["error"]["message"]


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    nothing = {name: values[0] for name, values in UNSUPPORTED.items() if values}
    nothing |= dict.fromkeys(HARMLESS, "x")
    plain = chat_request({"messages": QUESTION}, ["m"])
    assert chat_request({"messages": QUESTION, **nothing}, ["m"]) == plain
    nulls = dict.fromkeys((READ | HARMLESS | set(UNSUPPORTED)) - {"messages"})
    assert chat_request({"messages": QUESTION, **nulls}, ["m"]) == plain


def test_messages_that_the_model_cannot_read_are_refused(server: OurServer) -> None:
    for messages in (
        [{"role": "assistant", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}],
        [{"role": "tool", "content": "x", "tool_call_id": "1"}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
        [5],
        [{}],
    ):
        response = server.post("/v1/chat/completions", {"messages": messages})
        assert response.status_code == 400
        assert "messages" in response.json()["error"]["message"]


# --- Hugging Face's client, and the wire itself


def test_hugging_faces_client(server: OurServer, handler: EndpointHandler, sample_png: bytes) -> None:
    client = InferenceClient(base_url=server.url, api_key="none")
    text = native(handler)["generated_text"]
    options: Any = {"messages": QUESTION, "temperature": 0, "max_tokens": 12}
    assert client.chat_completion(**options).choices[0].message.content == text
    chunks = list(client.chat_completion(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage is not None
    image = client.chat_completion(**options | {"messages": [{"role": "user", "content": [part(sample_png)]}]})
    assert image.choices[0].message.content != text


def test_a_stream_on_the_wire(server: OurServer) -> None:
    response = server.post("/v1/chat/completions", GREEDY | {"stream": True, "max_tokens": 3})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = response.text.removesuffix("\n\n").split("\n\n")
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    assert all(json.loads(block[6:])["object"] == "chat.completion.chunk" for block in blocks[:-1])


def test_the_request_id_is_in_the_completions(server: OurServer) -> None:
    headers = {"Content-Type": "application/json", "X-Request-Id": "trace-3"}
    response = requests.post(f"{server.url}/v1/chat/completions", json=GREEDY, headers=headers, timeout=60)
    assert (response.json()["id"], response.headers["x-request-id"]) == ("chatcmpl-trace-3", "trace-3")
