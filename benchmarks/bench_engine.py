"""The engine on a checkpoint of middling size: against the official code, against plain ``generate``, under traffic.

    python -m benchmarks.bench_engine [--rounds 5] [--quick] [--without-official] [--without-sweep] [--plot DIR]
        [--out FILE]

CPU, float32, greedy; the checkpoint (Llama 8 x 512, CLIP 6 x 256, patch 14, vocabulary 32,000) is random and never
says its end-of-sequence token, so every answer has all its tokens.  The official code runs in its own environment,
which is installed first if it is missing.  Every side is a process that loads once; all are given the same number of
threads, one computes at a time, and a round asks each of them once, about an image that none has seen.  Figures are
medians over the rounds; a ratio is the median of the rounds' ratios.  Times are seconds.  The last line is one JSON
document:

- ``image_answer``: one question about a PNG of 1241 x 704, from the file's bytes in memory to the text.  By side
  (``official``; ``plain``: transformers' ``generate`` with ``sdpa`` on the same network; ``ours``: the whole handler,
  from a data URI to the record): ``answer_s`` and its stages ``preprocess`` (file to tiles), ``vision`` (tower and
  projector), ``prefill`` (to the first token), ``decode`` (the other tokens); ``cpu_s``: processor time, which other
  programs on the machine disturb less.  ``official_over_ours``, ``plain_over_ours``, ``official_over_plain``, and the
  same of processor time (``…_cpu``).  ``tokens_equal``: all sides said the same token ids and text every round.
- ``text``, ``image``: by concurrency, callers that ask anew once they are answered.  Through the handler:
  ``requests_per_s``, ``tokens_per_s`` (generated), ``answer_s`` (median).  Through the stream: ``first_token_s``
  (median; from the request with its image file to the first token) and ``first_token_worst_s``, ``token_s`` (median
  over the answers of the time between two tokens).
- ``together``: eight text questions one after another against eight at once; ``speedup`` is the ratio.
- ``same_image``: time to first token of the first and the second question about one image, and second over first.
- ``host_overhead``: wall time of the handler's call less model time (its timings' vision + prefill + decode), over
  model time; for the image question and for a text question.  ``decode_image_and_tiles`` is the part of it that the
  image takes.
- ``start``: ``import_s`` (the handler with torch and transformers), ``start_s`` (``EndpointHandler(path)``),
  ``weights_bytes``, ``peak_rss_bytes`` of the process after all of the above.
- ``targets``: what the figures are held against, and whether they hold (``--quick`` measures too little to tell).
- ``python``, ``threads``, ``checkpoint``: what it ran on.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.worker import Worker, environment
from benchmarks.workload import IMAGE_QUESTIONS, MIDDLING, SMALL, WORK, checkpoint, ecg_png
from demo.random_weights import CheckpointShape

Figures = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    shape: CheckpointShape = MIDDLING
    name: str = "middling"
    image_tokens: int = 64
    text_tokens: int = 128
    levels: tuple[int, ...] = (1, 2, 4, 8, 16)
    requests_per_caller: int = 2
    sweep: bool = True
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)


def quick() -> Plan:
    """Everything once, on the demo's small checkpoint: shows that the benchmark runs."""
    return Plan(1, SMALL, "small", image_tokens=8, text_tokens=8, levels=(1, 2), requests_per_caller=1)


def compare(sides: dict[str, Worker], plan: Plan) -> Figures:
    """Ask all sides the same, round by round."""
    rounds: list[dict[str, Figures]] = []
    for number in range(plan.rounds + 1):
        image = WORK / f"ecg-{number}.png"
        image.write_bytes(ecg_png(number))
        asked = {"image": str(image), "question": IMAGE_QUESTIONS[0], "new_tokens": plan.image_tokens}
        answers = {name: side.ask("answer", **asked) for name, side in sides.items()}
        if number:  # the first one warms up
            rounds.append(answers)
        progress(f"image answer {number}/{plan.rounds}", {name: said["seconds"] for name, said in answers.items()})
    figures: Figures = {"new_tokens": plan.image_tokens, "rounds": plan.rounds}
    for name in sides:
        stages = {
            s: median(r[name]["stages"][s] for r in rounds) for s in ("preprocess", "vision", "prefill", "decode")
        }
        seconds = {
            "answer_s": median(r[name]["seconds"] for r in rounds),
            "cpu_s": median(r[name]["cpu_s"] for r in rounds),
        }
        figures[name] = seconds | {"stages": stages}
    for slow, fast in (("official", "ours"), ("plain", "ours"), ("official", "plain")):
        if slow in sides:
            figures[f"{slow}_over_{fast}"] = median(r[slow]["seconds"] / r[fast]["seconds"] for r in rounds)
            figures[f"{slow}_over_{fast}_cpu"] = median(r[slow]["cpu_s"] / r[fast]["cpu_s"] for r in rounds)
    said = [{(tuple(a["token_ids"]), a["text"]) for a in answers.values()} for answers in rounds]
    figures["tokens_equal"] = all(len(different) == 1 for different in said)
    return figures


def sweep(ours: Worker, kind: str, plan: Plan) -> Figures:
    """Throughput and latency against the number of callers."""
    tokens = plan.text_tokens if kind == "text" else plan.image_tokens
    figures: Figures = {"new_tokens": tokens}
    for concurrency in plan.levels:
        requests = concurrency * plan.requests_per_caller
        level = ours.ask("level", kind=kind, concurrency=concurrency, requests=requests, new_tokens=tokens)
        figures[str(concurrency)] = {name: rounded(value) for name, value in level.items()}
        progress(f"{kind}, {concurrency} callers", level)
    return figures


def together(ours: Worker, plan: Plan) -> Figures:
    """Eight at once against one after another."""
    rounds = []
    for number in range(plan.rounds):
        asked = {"kind": "text", "questions": 8, "new_tokens": plan.text_tokens}
        seconds = ours.ask("at_once", **asked, together_first=bool(number % 2))
        rounds.append(seconds)
        progress(f"eight together {number + 1}/{plan.rounds}", seconds)
    speedup = median(r["one_after_another_s"] / r["together_s"] for r in rounds)
    return {"questions": 8, "new_tokens": plan.text_tokens} | medians(rounds) | {"speedup": speedup}


def same_image(ours: Worker, plan: Plan) -> Figures:
    """The second question about an image against the first."""
    rounds = [ours.ask("same_image", new_tokens=8) for _ in range(plan.rounds)]
    figures = medians(rounds) | {"second_over_first": median(r["second_s"] / r["first_s"] for r in rounds)}
    progress("same image", figures)
    return figures


def host_overhead(ours: Worker, plan: Plan) -> Figures:
    """The handler's time around the model's."""
    figures: Figures = {}
    for kind, tokens in (("image", plan.image_tokens), ("text", plan.text_tokens)):
        rounds = [ours.ask("overhead", kind=kind, new_tokens=tokens) for _ in range(plan.rounds)]
        for r in rounds:
            r["over_model"] = (r["total_s"] - r["model_s"]) / r["model_s"]
            r["decode_image_and_tiles"] = sum(r.get(s, 0) for s in ("image_fetch", "image_decode", "preprocess"))
        figures[kind] = medians(rounds)
        progress(f"host overhead, {kind}", figures[kind])
    return figures


def targets(figures: Figures) -> Figures:
    """Each requirement with the figure, the bound and whether it holds."""
    held: Figures = {}

    def hold(name: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> None:
        met = value >= at_least if at_least is not None else at_most is not None and value <= at_most
        held[name] = {"value": value, "at_least": at_least, "at_most": at_most, "met": met}

    if "official_over_ours" in figures["image_answer"]:
        hold("image_answer_official_over_ours", figures["image_answer"]["official_over_ours"], at_least=2.0)
    hold("together_speedup", figures["together"]["speedup"], at_least=3.0)
    hold("same_image_second_over_first", figures["same_image"]["second_over_first"], at_most=0.10)
    hold("host_overhead_image", figures["host_overhead"]["image"]["over_model"], at_most=0.02)
    hold("host_overhead_text", figures["host_overhead"]["text"]["over_model"], at_most=0.02)
    return held


def measure(plan: Plan, official: Path | None) -> Figures:
    """All of it, in one run."""
    WORK.mkdir(parents=True, exist_ok=True)
    print(f"checkpoint {plan.name}, {plan.threads} threads", flush=True)
    folder = checkpoint(plan.shape, plan.name)
    settings = environment(
        PULSE_DEVICE="cpu",
        PULSE_DTYPE="float32",
        PULSE_MAX_CONCURRENT_REQUESTS="16",
        OMP_NUM_THREADS=str(plan.threads),
        HF_HUB_OFFLINE="1",
    )

    def side(interpreter: Path, module: str) -> Worker:
        return Worker(interpreter, f"benchmarks.{module}", folder, plan.threads, environment=settings)

    with side(Path(sys.executable), "engine_answers") as ours:
        with others(side, official) as sides:
            figures: Figures = {"image_answer": compare(sides | {"ours": ours}, plan)}
        figures["together"] = together(ours, plan)
        figures["same_image"] = same_image(ours, plan)
        figures["host_overhead"] = host_overhead(ours, plan)
        for kind in ("text", "image") if plan.sweep else ():
            figures[kind] = sweep(ours, kind, plan)
        started = {name: rounded(value) for name, value in ours.ready.items()}
        figures["start"] = started | {"peak_rss_bytes": ours.ask("peak")}
    figures["targets"] = targets(figures)
    return figures | {"python": sys.version.split()[0], "threads": plan.threads, "checkpoint": plan.name}


@contextmanager
def others(side: Callable[[Path, str], Worker], official: Path | None) -> Iterator[dict[str, Worker]]:
    """The sides that ours is compared with, while they are needed."""
    with ExitStack() as running:
        sides = {"official": running.enter_context(side(official, "official_answers"))} if official else {}
        sides["plain"] = running.enter_context(side(Path(sys.executable), "plain_answers"))
        yield sides


def median(values: Any) -> float:
    return rounded(statistics.median(values))


def medians(rounds: list[dict[str, float]]) -> Figures:
    return {name: median(r[name] for r in rounds) for name in rounds[0]}


def rounded(value: float) -> float:
    return round(value, 5)


def progress(title: str, figures: Figures) -> None:
    print(f"{title}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="a tiny checkpoint, everything once")
    parser.add_argument("--without-official", action="store_true", help="leave the official code out")
    parser.add_argument("--without-sweep", action="store_true", help="leave the rising concurrency out")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw the figures (needs matplotlib)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON document there too")
    options = parser.parse_args()
    if options.plot:
        importlib.import_module("matplotlib")  # missing: better known before the run than after it
    official = None
    if not options.without_official:
        from tests.parity.oracle import python

        official = python()
    plan = quick() if options.quick else Plan(options.rounds, threads=options.threads)
    figures = measure(replace(plan, sweep=not options.without_sweep), official)
    if options.out:
        options.out.write_text(json.dumps(figures) + "\n", "utf-8")
    if options.plot:
        from benchmarks.plots import draw

        draw(figures, options.plot)
    print(json.dumps(figures))
    if not figures["image_answer"]["tokens_equal"]:
        raise SystemExit("The sides did not say the same tokens: the figures compare different work.")


if __name__ == "__main__":
    main()
