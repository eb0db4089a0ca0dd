"""From what the host hands over to :class:`AnalysisRequest`: every form of ``inputs``, checked.

Nothing is fetched or decoded here.  A key that is not known is an error, never ignored: a misspelt ``image`` would
otherwise be answered as a question without an image.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image

from pulse_ecg.errors import PayloadTooLargeError, RequestError, excerpt, nearest_hint
from pulse_ecg.images import ImageSource, image_source
from pulse_ecg.params import GenerationParams
from pulse_ecg.prompt import LLAVA_V1_SYSTEM, Conversation, Turn

DEFAULT_QUESTION = "Please write a clinical report based on this ECG image."
MAX_BATCH = 64
EMPTY_IN_MESSAGES = frozenset({"refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content"})
"""Fields of an OpenAI answer, which clients send back as it came: accepted in a message where they say nothing."""

_QUESTION_KEYS = ("query", "text", "prompt")
_IMAGE_KEYS = ("image", "image_url", "image_base64")
# How the base64 of JPEG, PNG, GIF, WebP, TIFF and BMP files begins.
_BASE64_IMAGES = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkqA", "TU0AK", "Qk")
_LONE_URL = re.compile(r"(?:[a-z][a-z0-9+.-]*://|www\.)\S+", re.IGNORECASE)

RequestForm = Literal["text", "object", "chat", "image"]


@dataclass(frozen=True)
class AnalysisRequest:
    """One question to be answered: a conversation that ends with the user, at most one image, the parameters.

    What the caller sent stays out of ``repr``.
    """

    conversation: Conversation = field(repr=False)
    image: ImageSource | None = field(repr=False)
    params: GenerationParams
    form: RequestForm


def split_inputs(data: object) -> tuple[list[object], object]:
    """Take a request body apart.

    Returns:
        The inputs, one for each record of the response, and the ``parameters``.

    Raises:
        RequestError: the body is no object, has an unknown key, or its ``inputs`` are missing or an empty list.
        PayloadTooLargeError: more than :data:`MAX_BATCH` inputs.
    """
    if not isinstance(data, Mapping):
        raise RequestError(f"The body must be an object with the key 'inputs', not {excerpt(data)}.")
    _refuse_unknown({k: v for k, v in data.items() if not _without_effect(k, v)}, ("inputs", "parameters"), "The body")
    inputs = data.get("inputs")
    if inputs is None:
        raise RequestError("The body has no 'inputs'. Send a question, or an object with 'query' and 'image'.")
    if not isinstance(inputs, (list, tuple)):
        return [inputs], data.get("parameters")
    if not inputs:
        raise RequestError("'inputs' is an empty list; send at least one question.")
    if len(inputs) > MAX_BATCH:
        raise PayloadTooLargeError(f"'inputs' has {len(inputs)} items; at most {MAX_BATCH} are accepted at once.")
    return list(inputs), data.get("parameters")


def _without_effect(key: object, value: object) -> bool:
    """What Hugging Face's clients send with the inputs: `options` for their routing, `stream` even where it is off."""
    return key == "options" or (key == "stream" and (value is None or value is False))


def parse_input(value: object, params: GenerationParams) -> AnalysisRequest:
    """One item of ``inputs`` as a request.

    Raises:
        RequestError: the item is malformed; ImageError, one of its kinds, where it is the image.
    """
    if isinstance(value, str):
        return _text_request(value, params)
    if isinstance(value, Image.Image):
        return AnalysisRequest(_single(DEFAULT_QUESTION), image_source(value), params, "image")
    if not isinstance(value, Mapping):
        raise RequestError(
            f"'inputs' is {excerpt(value)}; accepted: a question, an object with 'query' and 'image', "
            "an object with 'messages', or a list of these."
        )
    if value.get("messages") is not None:
        return _chat_request(value, params)
    return _query_request(value, params)


def _text_request(question: str, params: GenerationParams) -> AnalysisRequest:
    _refuse_image(question, "'inputs'")
    if not question.strip():
        raise RequestError("'inputs' is an empty question.")
    return AnalysisRequest(_single(_readable(question, "'inputs'")), None, params, "text")


def _refuse_image(question: str, where: str) -> None:
    """Nothing but a URL, a data URI or an image's base64: as a question, it would be answered without its image."""
    text = question.strip()
    encoded = text.startswith(_BASE64_IMAGES) and len(text) > 100 and " " not in text
    if encoded or text[:11].lower() == "data:image/" or _LONE_URL.fullmatch(text):
        raise RequestError(
            f'{where} looks like an image, not a question. Send it under its key: {{"inputs": {{"image": …}}}}, or in '
            'a chat as a part {"type": "image_url", …}.'
        )


def _query_request(value: Mapping[object, object], params: GenerationParams) -> AnalysisRequest:
    _refuse_unknown(value, (*_QUESTION_KEYS, *_IMAGE_KEYS, "messages"), "'inputs'")
    image_key, image = _only_one(value, _IMAGE_KEYS)
    spoken = {key: text for key, text in value.items() if not (isinstance(text, str) and not text.strip())}
    question_key, question = _only_one(spoken, _QUESTION_KEYS)
    if question is not None and not isinstance(question, str):
        raise RequestError(f"'{question_key}' must be a string, not {excerpt(question)}.")
    # A key that is there and holds null is an image that went missing on its way, not a question without one.
    named = image_key or next((key for key in _IMAGE_KEYS if key in value), "")
    source = image_source(image, f"'{named}'") if named else None
    if question is None:
        if source is None:
            raise RequestError("'inputs' holds neither a question ('query') nor an image ('image').")
        question = DEFAULT_QUESTION
    if source is None:
        _refuse_image(question, f"'{question_key}'")
    return AnalysisRequest(_single(_readable(question, f"'{question_key}'")), source, params, "object")


def _chat_request(value: Mapping[object, object], params: GenerationParams) -> AnalysisRequest:
    _refuse_beside_messages(value)
    messages = value["messages"]
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RequestError("'messages' must be a list of at least one message with 'role' and 'content'.")
    system, turns, images = LLAVA_V1_SYSTEM, list[Turn](), list[ImageSource]()
    for index, message in enumerate(messages):
        role, text, found = _message(message, f"messages[{index}]")
        if found and role != "user":
            raise RequestError(f"messages[{index}] has an image; images are accepted in user messages alone.")
        images += found
        if found and not text.strip():
            text = DEFAULT_QUESTION
        if role in ("system", "developer"):
            if index:
                raise RequestError(
                    f"messages[{index}] has the role '{role}', which is accepted in the first message alone."
                )
            if text.strip():  # an empty one says nothing in place of the sentence that the model was trained with
                system = text
            continue
        expected: Literal["user", "assistant"] = "assistant" if len(turns) % 2 else "user"
        if role != expected:
            raise RequestError(f"messages[{index}] has the role '{role}' where '{expected}' is due: roles alternate.")
        turns.append(Turn(expected, text))
    if len(images) > 1:
        raise RequestError(f"'messages' holds {len(images)} images; one image per chat is accepted.")
    if len(turns) % 2 == 0:
        raise RequestError("'messages' must end with a message of the role 'user'.")
    if any(not turn.text.strip() for turn in turns):
        raise RequestError("'messages' holds a message without text.")
    for turn in turns[::2] if not images else ():
        _refuse_image(turn.text, "A message")
    return AnalysisRequest(Conversation(tuple(turns), system), images[0] if images else None, params, "chat")


def _refuse_beside_messages(value: Mapping[object, object]) -> None:
    for key in value:
        if key in _IMAGE_KEYS or (key in _QUESTION_KEYS and value[key] is not None):
            raise RequestError(
                f"'inputs' has 'messages' and '{key}'. In a chat, question and image are parts of a user message: "
                '{"type": "text", "text": …}, {"type": "image_url", "image_url": {"url": …}}.'
            )
    _refuse_unknown(
        {k: v for k, v in value.items() if k not in _QUESTION_KEYS}, ("messages",), "'inputs' with 'messages'"
    )


def _message(message: object, where: str) -> tuple[str, str, list[ImageSource]]:
    """Role, text and images of one message; its text parts are joined by line breaks."""
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object with 'role' and 'content', not {excerpt(message)}.")
    said = {key: value for key, value in message.items() if value or key not in EMPTY_IN_MESSAGES}
    _refuse_unknown(said, ("role", "content", "name"), where)
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "developer", "user", "assistant"):
        raise RequestError(f"{where} has the role {excerpt(role)}; accepted: system, user, assistant.")
    if isinstance(content, str):
        return str(role), _readable(content, where), []
    if not isinstance(content, (list, tuple)):
        raise RequestError(
            f"{where} must have a 'content' that is a string or a list of parts, not {excerpt(content)}."
        )
    texts, images = list[str](), list[ImageSource]()
    for number, part in enumerate(content):
        found = _part(part, f"{where}.content[{number}]")
        if isinstance(found, str):
            texts.append(found)
        else:
            images.append(found)
    return str(role), "\n".join(texts), images


def _part(part: object, where: str) -> str | ImageSource:
    if not isinstance(part, Mapping):
        raise RequestError(f"{where} must be an object with 'type', not {excerpt(part)}.")
    kind = part.get("type")
    own, others = {"text": ("text", _IMAGE_KEYS), "image_url": ("image_url", _QUESTION_KEYS)}.get(str(kind), ("", ()))
    for key in others:
        if part.get(key) not in (None, "", {}):
            raise RequestError(f"{where} has the type '{kind}' and '{key}' too: send two parts, one for each.")
    if own == "text":
        if not isinstance(text := part.get("text"), str):
            raise RequestError(f"{where} must have a 'text' that is a string, not {excerpt(text)}.")
        return _readable(text, where)
    if own == "image_url":
        link = part.get("image_url")
        return image_source(link.get("url") if isinstance(link, Mapping) else link, f"{where}.image_url")
    raise RequestError(
        f'{where} has the type {excerpt(kind)}; accepted: {{"type": "text", "text": …}} and '
        '{"type": "image_url", "image_url": {"url": …}}.'
    )


def _single(question: str) -> Conversation:
    return Conversation((Turn("user", question),))


def _readable(text: str, where: str) -> str:
    """``text``, if it is Unicode that can be encoded (JSON lets half a surrogate pair through)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(f"{where} holds half a surrogate pair, which is no valid Unicode text.") from None
    return text


def _only_one(value: Mapping[object, object], keys: Sequence[str]) -> tuple[str, object]:
    """The one of several alias keys that is given and not null; ``("", None)`` for none."""
    given = [key for key in keys if value.get(key) is not None]
    if len(given) > 1:
        raise RequestError(f"'inputs' has both '{given[0]}' and '{given[1]}'; they mean the same: send one.")
    return (given[0], value[given[0]]) if given else ("", None)


def _refuse_unknown(value: Mapping[object, object], known: Sequence[str], where: str) -> None:
    for key in value:
        if key not in known:
            hint = nearest_hint(key, known)
            raise RequestError(f"{where} has the unknown key {excerpt(key)}.{hint} Known: {', '.join(known)}.")
