"""Request bodies of which every input must be refused."""

from __future__ import annotations

from typing import Any

from benchmarks.workload import data_uri, drawing_png


def bad_bodies() -> list[tuple[Any, int]]:
    """The bodies, and how many records each makes: one for a body that is refused as a whole."""
    png = data_uri(drawing_png(1, (200, 200)))
    images = (
        "",
        "no image",
        png[:-800],
        "data:image/png;base64,AAAA",
        "ftp://example.org/a",
        "http://127.0.0.1:9/a",
        7,
    )
    parameters: list[Any] = [
        {"max_new_tokens": 0},
        {"temprature": 1},
        {"top_p": "x"},
        {"seed": -1},
        {"stop": ["a"] * 9},
        [],
    ]
    inputs: list[Any] = [
        *(None, [], "", 5, "\ud800", "heart " * 5000, png, ["Rate?"] * 65),
        *({"query": "Rate?", "image": image} for image in images),
        {"image": None},
        {"query": "a", "text": "b"},
        {"messages": []},
        {"messages": [{"role": "assistant", "content": "Hello"}]},
    ]
    whole: list[Any] = [None, [], {}, "text", {"input": "Rate?"}, *({"inputs": given} for given in inputs)]
    whole += [{"inputs": "Rate?", "parameters": given} for given in parameters]
    mixed = {"inputs": ["", {"query": 5}, {"query": "Rate?", "image": "no image"}]}
    return [*((body, 1) for body in whole), (mixed, 3), ({"inputs": ["a", "b"], "parameters": {"top_k": -1}}, 2)]
