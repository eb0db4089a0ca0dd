"""vLLM behind our handler, vLLM alone and the transformers engine, under the same traffic in one run.

    python -m benchmarks.bench_vllm [--rounds 7] [--quick] [--out FILE]

CPU, float32, greedy, on the checkpoint of ``bench_engine``; eight callers that ask anew once they are answered.  Each
engine computes on one core, which leaves another one to callers and layers, as a GPU does.  A round asks each side
once, in turns, questions that it has not seen.  Figures are medians over the rounds, a ratio is the median of the
rounds' ratios.  The last line is one JSON document:

- ``text``, ``known_image``: requests a second of ``ours`` (through the handler, on vLLM) and ``bare`` (the same vLLM
  given embeddings), and ``ours_over_bare``.  A known image was asked about before: no tower works in either.
- ``text`` also has ``transformers``; ``new_image``, measured once, has ``ours`` and ``transformers``: the handler on
  each engine.
- ``tokens_equal``: both engines said the same tokens.  ``start_s``: from import to the first answer, by engine.
- ``targets``: the bound on what our layer costs, and whether it holds (``--quick`` measures too little to tell).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.worker import Worker, environment
from benchmarks.workload import IMAGE_QUESTIONS, MIDDLING, SMALL, WORK, checkpoint, data_uri, ecg_png, text_question
from demo.random_weights import CheckpointShape

LEAST_OVER_BARE = 0.97
_KV_CACHE_BYTES = 2 * 2**30

Figures = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    shape: CheckpointShape = MIDDLING
    name: str = "middling"
    concurrency: int = 8
    requests: int = 16
    text_tokens: int = 128
    image_tokens: int = 64


def quick() -> Plan:
    """Everything once, on the demo's small checkpoint: shows that the benchmark runs."""
    return Plan(1, SMALL, "small", concurrency=2, requests=4, text_tokens=8, image_tokens=8)


def _settings(engine: str, plan: Plan) -> dict[str, str]:
    return environment(
        PULSE_DEVICE="cpu",
        PULSE_ENGINE=engine,
        PULSE_MAX_CONCURRENT_REQUESTS=str(plan.concurrency),
        PULSE_VLLM_ARGS=json.dumps({"kv_cache_memory_bytes": _KV_CACHE_BYTES}),
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
    )


def measure(plan: Plan) -> Figures:
    """All of it, in one run."""
    WORK.mkdir(parents=True, exist_ok=True)
    folder, python = checkpoint(plan.shape, plan.name), Path(sys.executable)
    vllm = Worker(python, "benchmarks.vllm_answers", folder, environment=_settings("vllm", plan))
    other = Worker(python, "benchmarks.engine_answers", folder, 1, environment=_settings("transformers", plan))
    with vllm, other:
        figures: Figures = {"tokens_equal": _tokens_equal(vllm, other, plan)}
        rounds: list[Figures] = []
        for number in range(plan.rounds + 1):
            measured = _round(vllm, other, plan, number)
            print(f"round {number}/{plan.rounds}: {json.dumps(measured)}", flush=True)
            rounds += [measured] if number else []  # the first one warms up
        new = {"kind": "image", "requests": plan.concurrency, "new_tokens": plan.image_tokens}
        new["concurrency"] = plan.concurrency
        sides = {"ours": vllm, "transformers": other}
        figures["new_image"] = {name: round(side.ask("throughput", **new), 4) for name, side in sides.items()}
        figures["start_s"] = {"vllm": round(vllm.ready["start_s"], 2), "transformers": _start(other)}
    for kind in ("text", "known_image"):
        figures[kind] = {side: median(r[kind][side] for r in rounds) for side in rounds[0][kind]}
    for kind in ("text", "known_image"):
        figures[kind]["ours_over_bare"] = median(r[kind]["ours"] / r[kind]["bare"] for r in rounds)
    figures["text"]["ours_over_transformers"] = median(r["text"]["ours"] / r["text"]["transformers"] for r in rounds)
    figures["targets"] = {
        f"{kind}_ours_over_bare": {
            "value": figures[kind]["ours_over_bare"],
            "at_least": LEAST_OVER_BARE,
            "met": figures[kind]["ours_over_bare"] >= LEAST_OVER_BARE,
        }
        for kind in ("text", "known_image")
    }
    plan_figures = {"rounds": plan.rounds, "concurrency": plan.concurrency, "requests": plan.requests}
    tokens = {"text_tokens": plan.text_tokens, "image_tokens": plan.image_tokens}
    return figures | plan_figures | tokens | {"checkpoint": plan.name, "python": sys.version.split()[0]}


def _round(vllm: Worker, other: Worker, plan: Plan, number: int) -> Figures:
    load = {"requests": plan.requests, "concurrency": plan.concurrency}
    text = {"kind": "text", "new_tokens": plan.text_tokens} | load
    image = {"kind": "image", "new_tokens": plan.image_tokens} | load
    figures: Figures = {
        "text": vllm.ask("layer", **text, bare_first=bool(number % 2)),
        "known_image": vllm.ask("layer", **image, bare_first=bool(number % 2)),
    }
    figures["text"]["transformers"] = other.ask("throughput", **text)
    return {kind: {side: round(value, 4) for side, value in sides.items()} for kind, sides in figures.items()}


def _tokens_equal(vllm: Worker, other: Worker, plan: Plan) -> bool:
    inputs = [text_question(1), {"query": IMAGE_QUESTIONS[0], "image": data_uri(ecg_png(1))}]
    said = [[side.ask("tokens", inputs=i, new_tokens=plan.image_tokens) for i in inputs] for side in (vllm, other)]
    return bool(said[0] == said[1])


def _start(other: Worker) -> float:
    return round(float(other.ready["import_s"] + other.ready["start_s"]), 2)


def median(values: Any) -> float:
    return round(float(statistics.median(values)), 4)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a tiny checkpoint, everything once")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON document there too")
    options = parser.parse_args()
    figures = measure(quick() if options.quick else Plan(options.rounds))
    if options.out:
        options.out.write_text(json.dumps(figures) + "\n", "utf-8")
    print(json.dumps(figures))
    if not figures["tokens_equal"]:
        raise SystemExit("The engines did not say the same tokens: the figures compare different work.")


if __name__ == "__main__":
    main()
