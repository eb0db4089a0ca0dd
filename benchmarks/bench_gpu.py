"""A random 7B of PULSE's true shape on a GPU: how much of what the device can do the engine gets out of it.

    python -m benchmarks.bench_gpu [--rounds 3] [--layers N] [--device cuda] [--dtype float16] [--out FILE]
    python -m benchmarks.bench_gpu --device cpu --tiny      # the same steps on a toy, to try the script itself

The weights are drawn on the device; nothing is downloaded or written to a disk.  Without a GPU the exit status is 2.
All goes through the handler or the analyzer's stream, greedy; no image is asked about twice unless that is measured.
Figures are medians over the rounds, times are seconds.  The last line is one JSON document:

- ``limits``: ``bandwidth`` (bytes/s, read and written, of a 2 GiB copy) and ``matrix_rate`` (FLOP/s of a product of
  8192 x 8192 random matrices in the model's dtype), both measured in this run, and the data sheet's figures.
- ``model``: ``build_s``, ``weights_bytes`` of the whole model.  ``warm_up``: its ``seconds``, graphs included.
- ``decode``: one answer at a time, about a text (``text``) and about an image (``image``): ``token_s``,
  ``tokens_per_s``, ``bytes`` that a step cannot but read (the language model's weights without the embedding table,
  the keys and values of the context), ``of_bandwidth`` and ``of_sheet_bandwidth``: the share of the limit, bytes /
  token_s / bandwidth.  ``image_16``: sixteen at once, in the span in which all sixteen are in their answers (null if
  there is none); ``step_s`` is the time in which each gets a token.
- ``prefill``: an image prompt: ``positions``, ``prefill_s``, ``flops`` by formula, ``of_matrix_rate``; ``vision`` the
  same for the vision tower and the projector.  Both times are the engine's own, from ``details.timings``.
- ``plain``: transformers' ``generate`` (``sdpa``, no captured graphs) on the same network: ``answer_s``, ``token_s``;
  ``over_ours``: its answer's time over ours, same image and question.
- ``parity``: that answer against ours: ``same_tokens``, how many agree before the first that differs, of ``tokens``;
  and ours against the plain network's logits, all tokens in one pass: ``agreement``, the share that is the best token
  there too, ``worst_gap``, by how many logits the worst one misses it (the logits' standard deviation is 3); the same
  of the plain answer itself, ``plain_agreement`` and ``plain_worst_gap``: what rounding alone does.
- ``at_once``: image questions, sixteen at once against one after another: ``speedup``; ``bound``, the speedup of a
  device at its limits in both (keys and values of sixteen images outweigh the weights, and prefill does not get
  faster in a batch); ``over_plain``, against sixteen plain answers one after another (one measured, times sixteen).
  ``text_at_once``: the same with text questions.
- ``same_image``: time to first token of the first and the second question about one image, and second over first.
- ``memory``: bytes on the device: ``peak`` allocated since the model was built, ``reserved`` at the end.
- ``python``, ``torch``: their versions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import handler as endpoint
from benchmarks import device_limits
from benchmarks.device_limits import Work
from benchmarks.plain_answers import Plain
from benchmarks.random_model import TINY, Sizes, random_model
from benchmarks.traffic import Kind, Streamed, Traffic, together
from benchmarks.workload import IMAGE_QUESTIONS, data_uri, drawing_png
from pulse_ecg.checkpoint import LoadedModel

Figures = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int = 3
    decode_tokens: int = 256
    answer_tokens: int = 64
    callers: int = 16


class Bench:
    """One model, its limits, and the traffic on it."""

    def __init__(self, model: LoadedModel, limits: device_limits.Limits, plan: Plan) -> None:
        os.environ["PULSE_MAX_CONCURRENT_REQUESTS"] = str(plan.callers)
        self._model, self._limits, self._plan = model, limits, plan
        self._work = Work(model.network)
        self._plain = Plain(model)
        self._png = drawing_png(0)
        # Before there is an engine: what it changes on the network or takes of the memory does not matter here.
        for _ in range(2):  # the first one warms up
            self._plain_said = self._plain.answer(self._png, IMAGE_QUESTIONS[0], plan.answer_tokens)
        vars(endpoint)["load_model"] = lambda *_: model  # the handler takes this model for the checkpoint's
        self._traffic = Traffic(endpoint.EndpointHandler(""), drawing_png)

    def run(self) -> Figures:
        """Everything, in an order in which each step finds the device warm."""
        steps = {
            "warm_up": self.warm_up,
            "plain": self.plain,
            "decode": self.decode,
            "prefill": self.prefill,
            "at_once": lambda: self.at_once("image"),
            "text_at_once": lambda: self.at_once("text"),
            "same_image": self.same_image,
            "memory": self.memory,
        }
        figures: Figures = {}
        for name, step in steps.items():
            started = time.perf_counter()
            found = step()
            figures |= found if name in ("plain", "prefill") else {name: found}
            print(f"{name} ({time.perf_counter() - started:.1f} s): {json.dumps(found)}", flush=True)
        return figures

    def warm_up(self) -> Figures:
        """What is compiled, captured or allocated on first use, for one and for sixteen."""
        started = time.perf_counter()
        self._stream("text", 1)
        self._stream("image", 1)
        self._stream("image", self._plan.callers)
        return {"seconds": rounded(time.perf_counter() - started)}

    def plain(self) -> Figures:
        """Against transformers' ``generate``: time and tokens."""
        said, tokens = self._plain_said, self._plan.answer_tokens
        inputs = {"query": IMAGE_QUESTIONS[0], "image": data_uri(self._png)}
        seconds, _ = self._traffic.ask(inputs, tokens)
        ours = self._traffic.stream(inputs, tokens).token_ids
        pairs = zip(ours, said["token_ids"], strict=True)
        same = next((at for at, (a, b) in enumerate(pairs) if a != b), tokens)
        judged = [self._plain.judge(self._png, IMAGE_QUESTIONS[0], ids) for ids in (ours, said["token_ids"])]
        (agreement, worst_gap), (plain_agreement, plain_worst_gap) = judged
        figures = {
            "answer_s": rounded(said["seconds"]),
            "token_s": rounded(said["stages"]["decode"] / max(1, tokens - 1)),
            "over_ours": rounded(said["seconds"] / seconds),
        }
        parity = {"tokens": tokens, "same_tokens": same, "agreement": agreement, "worst_gap": rounded(worst_gap)}
        parity |= {"plain_agreement": plain_agreement, "plain_worst_gap": rounded(plain_worst_gap)}
        return {"plain": figures, "parity": parity}

    def decode(self) -> Figures:
        """One answer at a time, then sixteen."""
        figures: Figures = {}
        for kind in ("text", "image"):
            answers = [self._stream(kind, 1)[0] for _ in range(self._plan.rounds)]
            token_s = statistics.median(answer.token_s for answer in answers)
            needed = self._work.decode_bytes([_context(answers[0])])
            figures[kind] = {"token_s": rounded(token_s), "tokens_per_s": rounded(1 / token_s)}
            figures[kind] |= self._of_bandwidth(needed, token_s)
        answers = self._stream("image", self._plan.callers)
        return figures | {f"image_{len(answers)}": self._all_at_once(answers)}

    def _all_at_once(self, answers: list[Streamed]) -> Figures | None:
        """The steps between the last answer's first token and the first one's last."""
        opened, closed = max(a.times[0] for a in answers), min(a.times[-1] for a in answers)
        during = sum(opened < at <= closed for answer in answers for at in answer.times)
        if not during:
            return None
        step_s = (closed - opened) * len(answers) / during
        needed = self._work.decode_bytes([_context(answer) for answer in answers])
        figures = {"step_s": rounded(step_s), "tokens_per_s": rounded(len(answers) / step_s)}
        return figures | self._of_bandwidth(needed, step_s)

    def prefill(self) -> Figures:
        """Vision tower and prompt of a fresh image, by the engine's own clock."""
        records = [self._traffic.ask(self._traffic.inputs("image"), 1)[1]["details"] for _ in range(self._plan.rounds)]
        positions, patches = records[0]["prompt_tokens"], self._model.config.patches_per_side**2
        figures: Figures = {}
        for stage, flops in (
            ("prefill", self._work.prefill_flops(positions)),
            ("vision", self._work.vision_flops(records[0]["image_tokens"] // patches)),
        ):
            seconds = statistics.median(record["timings"][stage] for record in records)
            share = flops / seconds / self._limits.matrix_rate
            figures[stage] = {f"{stage}_s": rounded(seconds), "flops": flops, "of_matrix_rate": rounded(share)}
        figures["prefill"]["positions"] = positions
        return figures

    def at_once(self, kind: Kind) -> Figures:
        """Sixteen at once against one after another."""
        plan = self._plan
        rounds = [
            self._traffic.at_once(kind, plan.callers, plan.answer_tokens, together_first=bool(number % 2))
            for number in range(plan.rounds)
        ]
        figures = {name: rounded(statistics.median(r[name] for r in rounds)) for name in rounds[0]}
        speedup = statistics.median(r["one_after_another_s"] / r["together_s"] for r in rounds)
        figures |= {"speedup": rounded(speedup), "bound": rounded(self._bound(kind))}
        if kind == "image":
            together_s = figures["together_s"]
            figures["over_plain"] = rounded(plan.callers * self._plain_said["seconds"] / together_s)
        return figures

    def same_image(self) -> Figures:
        """The second question about an image against the first."""
        rounds = [self._traffic.same_image(8) for _ in range(self._plan.rounds)]
        figures = {name: rounded(statistics.median(r[name] for r in rounds)) for name in rounds[0]}
        ratio = statistics.median(r["second_s"] / r["first_s"] for r in rounds)
        return figures | {"second_over_first": rounded(ratio)}

    def memory(self) -> Figures:
        """Of the device; nothing on the CPU."""
        if self._model.device.type != "cuda":
            return {}
        device = self._model.device
        peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device)
        return {"peak": peak, "reserved": reserved}

    def _stream(self, kind: Kind, callers: int) -> list[Streamed]:
        asked = [self._traffic.inputs(kind) for _ in range(callers)]
        answers: list[Streamed]
        _, answers = together(lambda inputs: self._traffic.stream(inputs, self._plan.decode_tokens), asked, callers)
        return answers

    def _of_bandwidth(self, needed: float, seconds: float) -> Figures:
        figures: Figures = {"bytes": int(needed), "of_bandwidth": rounded(needed / seconds / self._limits.bandwidth)}
        if self._limits.sheet_bandwidth:
            figures["of_sheet_bandwidth"] = rounded(needed / seconds / self._limits.sheet_bandwidth)
        return figures

    def _bound(self, kind: Kind) -> float:
        """The speedup at the device's limits, in both ways of asking."""
        plan, work, limits = self._plan, self._work, self._limits
        prepared = self._traffic.stream(self._traffic.inputs(kind), 1).positions
        flops = work.prefill_flops(prepared)
        if kind == "image":
            flops += work.vision_flops(prepared // self._model.config.patches_per_side**2)
        first_s, context = flops / limits.matrix_rate, prepared + plan.answer_tokens / 2
        steps = plan.answer_tokens - 1
        alone = first_s + steps * work.decode_bytes([context]) / limits.bandwidth
        batched = plan.callers * first_s + steps * work.decode_bytes([context] * plan.callers) / limits.bandwidth
        return plan.callers * alone / batched


def _context(answer: Streamed) -> float:
    """Positions that an answer's steps read, on average."""
    return answer.positions + len(answer.token_ids) / 2


def rounded(value: float) -> float:
    """To six significant digits."""
    return float(f"{value:.6g}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default=None, choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--layers", type=int, default=32, help="of the language model; fewer for a quick look")
    parser.add_argument("--tiny", action="store_true", help="the demo's widths and few tokens: tries the script itself")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON document there too")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench_gpu needs a CUDA GPU and found none; --device cpu --tiny tries the script without one.")
        raise SystemExit(2)
    dtype = getattr(torch, options.dtype or ("float16" if device.type == "cuda" else "float32"))
    for name in [n for n in os.environ if n.startswith(("PULSE_", "DEEPSEEK_")) or n == "deep_key"]:
        del os.environ[name]
    limits = device_limits.measure(device, dtype)
    print(f"limits: {limits}", flush=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # what the limits took is no part of it
    started = time.perf_counter()
    model = random_model(TINY if options.tiny else Sizes(layers=options.layers), device=device, dtype=dtype)
    device_limits.synchronize(device)
    built = {
        "build_s": rounded(time.perf_counter() - started),
        "weights_bytes": sum(parameter.nbytes for parameter in model.network.parameters()),
        "layers": model.config.llama.num_hidden_layers,
        "dtype": str(dtype).removeprefix("torch."),
    }
    print(f"model: {built}", flush=True)
    plan = Plan(options.rounds, decode_tokens=8, answer_tokens=6, callers=4) if options.tiny else Plan(options.rounds)
    figures: Figures = {"limits": vars(limits), "model": built} | Bench(model, limits, plan).run()
    figures |= {"python": sys.version.split()[0], "torch": torch.__version__}
    if options.out:
        options.out.write_text(json.dumps(figures) + "\n", "utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
