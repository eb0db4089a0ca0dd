"""Traffic on an engine, and what its callers feel: one process, many threads, a new question or image every time."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.workload import IMAGE_QUESTIONS, data_uri, ecg_png, text_question

Kind = Literal["text", "image"]
Handler = Callable[[Any], list[dict[str, Any]]]

MODEL_STAGES = ("vision", "prefill", "decode")


@dataclass(frozen=True)
class Streamed:
    """One streamed answer: its tokens, when each came, when it was asked for, and the positions of its prompt."""

    asked: float
    times: list[float]
    token_ids: list[int]
    positions: int

    @property
    def first_s(self) -> float:
        """Time to first token."""
        return self.times[0] - self.asked

    @property
    def token_s(self) -> float:
        """Mean time from one token to the next."""
        return (self.times[-1] - self.times[0]) / max(1, len(self.times) - 1)


def parameters(new_tokens: int) -> dict[str, Any]:
    """Greedy, as the official evaluation does it, without a penalty, a stop string or a commentary."""
    return {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "repetition_penalty": 1.0,
        "stop": [],
        "details": True,
        "enable_turkish_commentary": False,
    }


class Traffic:
    """Asks one handler; no question and no image is ever asked about twice unless the measurement wants it."""

    def __init__(self, handler: Any, picture: Callable[[int], bytes] = ecg_png) -> None:
        """``picture`` gives another PNG file for every number."""
        self._picture = picture
        self._handler: Handler = handler
        self._analyzer = handler._analyzer
        self._defaults = handler._defaults
        self._numbers = itertools.count(1000)  # the comparison with the other sides uses those below

    def inputs(self, kind: Kind) -> Any:
        """A fresh question, with a fresh image if it is about one."""
        number = next(self._numbers)
        if kind == "text":
            return text_question(number)
        return {"query": IMAGE_QUESTIONS[0], "image": data_uri(self._picture(number))}

    def ask(self, inputs: Any, new_tokens: int) -> tuple[float, dict[str, Any]]:
        """Seconds and record of one request through the handler."""
        started = time.perf_counter()
        (record,) = self._handler({"inputs": inputs, "parameters": parameters(new_tokens)})
        seconds = time.perf_counter() - started
        if "error" in record:
            raise RuntimeError(record["error"])
        assert record["details"]["generated_tokens"] == new_tokens, "an answer ended before its tokens were all there"
        return seconds, record

    def stream(self, inputs: Any, new_tokens: int) -> Streamed:
        """One request through the streaming interface."""
        from pulse_ecg.request import parse_input

        asked = time.perf_counter()
        params = self._defaults.updated(parameters(new_tokens))
        prepared = self._analyzer.prepare(parse_input(inputs, params))
        times, ids = [], []
        for step in self._analyzer.stream(prepared):
            times.append(time.perf_counter())
            ids.append(step.token_id)
        return Streamed(asked, times, ids, prepared.prompt.length)

    def level(self, kind: Kind, concurrency: int, requests: int, new_tokens: int) -> dict[str, float]:
        """One step of the sweep: as many callers as ``concurrency``, each asking anew once it is answered."""
        asked = [self.inputs(kind) for _ in range(requests)]
        wall_s, answers = together(lambda i: self.ask(i, new_tokens), asked, concurrency)
        streams: list[Streamed]
        _, streams = together(lambda i: self.stream(i, new_tokens), [self.inputs(kind) for _ in asked], concurrency)
        firsts = sorted(stream.first_s for stream in streams)
        return {
            "requests": requests,
            "requests_per_s": requests / wall_s,
            "tokens_per_s": requests * new_tokens / wall_s,
            "answer_s": statistics.median(seconds for seconds, _ in answers),
            "first_token_s": statistics.median(firsts),
            "first_token_worst_s": firsts[-1],
            "token_s": statistics.median(stream.token_s for stream in streams),
        }

    def at_once(self, kind: Kind, questions: int, new_tokens: int, together_first: bool) -> dict[str, float]:
        """Questions one after another, and other ones of the same length all together."""
        seconds = {}
        for concurrency in (questions, 1) if together_first else (1, questions):
            asked = [self.inputs(kind) for _ in range(questions)]
            seconds[concurrency], _ = together(lambda i: self.ask(i, new_tokens), asked, concurrency)
        return {"one_after_another_s": seconds[1], "together_s": seconds[questions]}

    def throughput(self, kind: Kind, requests: int, concurrency: int, new_tokens: int) -> float:
        """Requests a second through the handler, from their bodies to their records."""
        return self.rate([self.inputs(kind) for _ in range(requests)], concurrency, new_tokens)

    def rate(self, asked: Sequence[Any], concurrency: int, new_tokens: int) -> float:
        """The same for given inputs."""
        seconds, _ = together(lambda inputs: self.ask(inputs, new_tokens), asked, concurrency)
        return len(asked) / seconds

    def tokens(self, inputs: Any, new_tokens: int) -> list[int]:
        """The token ids of one answer."""
        return self.stream(inputs, new_tokens).token_ids

    def same_image(self, new_tokens: int) -> dict[str, float]:
        """Two questions about one fresh image, one after the other, streamed."""
        image = self.inputs("image")["image"]
        first, second = (self.stream({"query": q, "image": image}, new_tokens) for q in IMAGE_QUESTIONS)
        return {"first_s": first.first_s, "second_s": second.first_s}

    def overhead(self, kind: Kind, new_tokens: int) -> dict[str, float]:
        """One request through the handler: seconds in all, in the model, and in the stages before it."""
        seconds, record = self.ask(self.inputs(kind), new_tokens)
        timings = record["details"]["timings"]
        model = sum(timings[stage] for stage in MODEL_STAGES)
        return {"total_s": seconds, "model_s": model, **{s: t for s, t in timings.items() if s not in MODEL_STAGES}}

    def answer(self, image: bytes, question: str, new_tokens: int) -> dict[str, Any]:
        """What the other sides are asked too: a question about an image file."""
        inputs = {"query": question, "image": data_uri(image)}
        cpu = time.process_time()
        seconds, record = self.ask(inputs, new_tokens)
        cpu_s = time.process_time() - cpu
        timings = record["details"]["timings"]
        stages = {stage: timings[stage] for stage in MODEL_STAGES}
        stages["preprocess"] = sum(timings[stage] for stage in ("image_fetch", "image_decode", "preprocess"))
        # The record has no token ids; they come from the stream, outside the measured time.
        ids = self.stream(inputs, new_tokens).token_ids
        said = {"text": record["generated_text"], "token_ids": ids}
        return {"seconds": seconds, "cpu_s": cpu_s, "stages": stages, **said}


def together(send: Callable[[Any], Any], asked: Sequence[Any], concurrency: int) -> tuple[float, list[Any]]:
    """Send all, so many at a time; seconds from the first request to the last answer, and the answers."""
    with ThreadPoolExecutor(concurrency) as callers:
        started = time.perf_counter()
        answers = list(callers.map(send, asked))
        return time.perf_counter() - started, answers
