"""The handler on vLLM in a process of its own, and the same vLLM asked directly, answering on command.

    python -m benchmarks.vllm_answers CHECKPOINT

Both ask one and the same vLLM, so a difference between them is what our layer costs.  Asked directly, it gets prompts
that are embeddings already, and says nothing before an answer is whole.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterable
from itertools import cycle
from typing import Any

from benchmarks.traffic import Kind, Traffic, parameters
from benchmarks.worker import serve


class Answers:
    """The handler under traffic, and what is beneath it."""

    def __init__(self, handler: Any) -> None:
        self.traffic = Traffic(handler)
        self._analyzer = handler._analyzer
        self._defaults = handler._defaults
        self._engine = handler._analyzer._generator.engine
        self._known: list[str] = []

    def layer(self, kind: Kind, requests: int, concurrency: int, new_tokens: int, bare_first: bool) -> dict[str, float]:
        """Requests a second through the handler and without it; images were asked about before.

        So neither waits for the tower, and the prompts of both are equally well known to vLLM.
        """
        images = self._known_images(concurrency) if kind == "image" else [None]
        figures = {}
        for side in ("bare", "ours") if bare_first else ("ours", "bare"):
            asked = [self._question(image) for image, _ in zip(cycle(images), range(requests), strict=False)]
            measure = self.traffic.rate if side == "ours" else self._bare
            figures[side] = measure(asked, concurrency, new_tokens)
        return figures

    def _question(self, image: str | None) -> Any:
        question = self.traffic.inputs("text")
        return {"query": question, "image": image} if image else question

    def _known_images(self, count: int) -> list[str]:
        while len(self._known) < count:
            inputs = self.traffic.inputs("image")
            self.traffic.ask(inputs, 1)
            self._known.append(inputs["image"])
        return self._known

    def _bare(self, asked: list[Any], concurrency: int, new_tokens: int) -> float:
        prompts = [self._embedded(inputs, new_tokens) for inputs in asked]
        ids, seconds = self._engine._run(self._generate_all(prompts, concurrency, new_tokens))
        assert all(len(answer) == new_tokens for answer in ids)
        return len(asked) / float(seconds)

    async def _generate_all(
        self, prompts: list[Any], concurrency: int, new_tokens: int
    ) -> tuple[list[list[int]], float]:
        waiting = iter(enumerate(prompts))
        started = time.perf_counter()
        callers = [self._generate_some(waiting, new_tokens) for _ in range(concurrency)]
        answers = [ids for some in await asyncio.gather(*callers) for ids in some]
        return answers, time.perf_counter() - started

    async def _generate_some(self, waiting: Iterable[tuple[int, Any]], new_tokens: int) -> list[list[int]]:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        answers = []
        for number, prompt in waiting:
            params = SamplingParams(
                max_tokens=new_tokens, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
            )
            async for output in self._engine._llm.generate(prompt, params, f"bare-{number}-{time.perf_counter_ns()}"):
                answers.append(list(output.outputs[0].token_ids))
        return answers

    def _embedded(self, inputs: Any, new_tokens: int) -> Any:
        import torch
        from vllm.inputs.engine import embeds_input

        from pulse_ecg.request import parse_input

        prompt = self._analyzer.prepare(parse_input(inputs, self._defaults.updated(parameters(new_tokens)))).prompt
        with torch.inference_mode():
            image = self._engine._encoder.encode([prompt.image])[0] if prompt.image else None
            return embeds_input(self._analyzer.model.network.embed(prompt.ids, image)[0])


def _load() -> tuple[dict[str, Any], dict[str, Any]]:
    started = time.perf_counter()
    from handler import EndpointHandler

    answers = Answers(EndpointHandler(sys.argv[1]))
    traffic = answers.traffic
    commands = {"throughput": traffic.throughput, "tokens": traffic.tokens, "layer": answers.layer}
    return {"start_s": time.perf_counter() - started}, commands


if __name__ == "__main__":
    serve(_load)
