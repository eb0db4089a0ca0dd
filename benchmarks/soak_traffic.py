"""What the soak test sends, and what it holds against the answers."""

from __future__ import annotations

import io
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from benchmarks.bad_bodies import bad_bodies
from benchmarks.workload import data_uri, drawing_png, text_question
from pulse_ecg.errors import DeadlineExceededError
from pulse_ecg.request import parse_input

SIZES = ((700, 500), (1000, 400), (400, 900), (336, 336), (1241, 704))
COMMENTARY_TIMEOUT_S = 10  # the shortest that callers may ask for

PARAMETERS: tuple[dict[str, Any], ...] = (
    {"do_sample": False, "max_new_tokens": 24, "repetition_penalty": 1.0},
    {"do_sample": False, "max_new_tokens": 48, "repetition_penalty": 1.3},
    {"do_sample": False, "max_new_tokens": 90, "stop": ["a", "ST"]},
    {"do_sample": True, "max_new_tokens": 32, "temperature": 1.0, "seed": 7},
    {"do_sample": True, "max_new_tokens": 16, "temperature": 1.7, "top_p": 0.8, "top_k": 0, "seed": 2**31},
    {"do_sample": False, "max_new_tokens": 1},
)


class ViolationError(AssertionError):
    """Something that must hold did not."""


def check(holds: bool, what: str) -> None:
    """Raise :class:`ViolationError` unless it holds."""
    if not holds:
        raise ViolationError(what)


@dataclass(frozen=True)
class Known:
    """A request whose answer is the same every time: what it was when nothing else ran."""

    inputs: Any = field(repr=False)
    parameters: dict[str, Any]
    text: str = field(repr=False)
    token_ids: tuple[int, ...] = field(repr=False)


class Tally:
    """Counts what was sent and came back; callers share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.actions: Counter[str] = Counter()
        self.records = 0
        self.violations: list[str] = []

    def done(self, action: str) -> None:
        with self._lock:
            self.actions[action] += 1

    def received(self, records: int) -> None:
        with self._lock:
            self.records += records

    def violated(self, action: str, error: BaseException) -> None:
        with self._lock:
            self.violations.append(f"{action}: {type(error).__name__}: {error}"[:300])


class Endpoint:
    """The two ways into the endpoint, each counting what it gave."""

    def __init__(self, handler: Any, tally: Tally) -> None:
        self._handler, self.tally = handler, tally
        self._analyzer, self._defaults = handler._analyzer, handler._defaults

    def ask(self, inputs: Any, parameters: dict[str, Any]) -> list[dict[str, Any]]:
        """Records of one body, commentary off unless the parameters say otherwise."""
        return self.send({"inputs": inputs, "parameters": {"enable_turkish_commentary": False} | parameters})

    def send(self, body: Any) -> list[dict[str, Any]]:
        """Records of any body."""
        records: list[dict[str, Any]] = self._handler(body)
        self.tally.received(len(records))
        return records

    def prepare(self, known: Known) -> Any:
        return self._analyzer.prepare(parse_input(known.inputs, self._defaults.updated(known.parameters)))

    def stream(self, known: Known, cancel: threading.Event | None = None) -> Any:
        return self._analyzer.stream(self.prepare(known), cancel=cancel)

    def answer(self, known: Known, **limits: Any) -> Any:
        return self._analyzer.answer(self.prepare(known), **limits)

    def learn(self, inputs: Any, parameters: dict[str, Any]) -> Known:
        """Ask when nothing else runs, both ways, and remember."""
        (record,) = self.ask(inputs, parameters)
        check("error" not in record, f"a good request was refused: {record.get('error')}")
        known = Known(inputs, parameters, record["generated_text"], ())
        steps = list(self.stream(known))
        check("".join(step.text for step in steps) == known.text, "the stream said something else than the record")
        return Known(inputs, parameters, known.text, tuple(step.token_id for step in steps))


def known_requests(endpoint: Endpoint, count: int) -> list[Known]:
    """Questions and images of several shapes under all of :data:`PARAMETERS`, with their answers."""
    images = [data_uri(drawing_png(number, size)) for number, size in enumerate(SIZES[:4])]
    chosen: list[Known] = []
    for number, parameters in zip(range(count), itertools.cycle(PARAMETERS)):
        inputs: Any = text_question(number)
        if number % 3 == 0:
            inputs = {"query": inputs, "image": images[number % len(images)]}
        chosen.append(endpoint.learn(inputs, parameters))
    return chosen


class Caller:
    """Sends one kind of request after another, drawn by a generator of its own."""

    def __init__(self, endpoint: Endpoint, known: Sequence[Known], seed: int) -> None:
        self._endpoint, self._known = endpoint, known
        self._random = random.Random(seed)  # noqa: S311 - chooses traffic
        self._fresh = itertools.count(1_000_000 * (seed + 1))
        self._bad = bad_bodies()
        self._actions: dict[Callable[[], None], int] = {
            self.known_answer: 8,
            self.known_stream: 6,
            self.new_image: 3,
            self.batch: 2,
            self.cancelled_stream: 3,
            self.cancelled_answer: 2,
            self.closed_stream: 3,
            self.abandoned_stream: 3,
            self.deadline: 2,
            self.bad_body: 4,
            self.commented: 2,
        }

    def run(self, until: float) -> None:
        """Send until a reading of ``time.monotonic()``; what goes wrong is noted, and the traffic goes on."""
        actions, weights = list(self._actions), list(self._actions.values())
        while time.monotonic() < until:
            action = self._random.choices(actions, weights)[0]
            try:
                action()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
                self._endpoint.tally.violated(action.__name__, error)
            self._endpoint.tally.done(action.__name__)

    def known_answer(self) -> None:
        known = self._any()
        (record,) = self._endpoint.ask(known.inputs, known.parameters)
        _same(record, known)

    def known_stream(self) -> None:
        known = self._any()
        stream = self._endpoint.stream(known)
        steps = list(stream)
        check(tuple(step.token_id for step in steps) == known.token_ids, "a stream's tokens changed")
        check("".join(step.text for step in steps) == known.text, "a stream's text changed")
        ends = [step.finish_reason for step in steps if step.finish_reason]
        check(ends == [steps[-1].finish_reason] == [stream.finish_reason], f"a stream ended {len(ends)} times")
        check(next(iter(stream), None) is None, "a stream that had ended went on")

    def new_image(self) -> None:
        """An image that was never seen, twice: the second answer, whatever is remembered of the first, is the same."""
        png = drawing_png(next(self._fresh), self._random.choice(SIZES))
        first = {"query": "Rate?", "image": data_uri(png)}
        second = {"query": "Rate?", "image": Image.open(io.BytesIO(png))}
        texts = [self._endpoint.ask(inputs, PARAMETERS[0])[0].get("generated_text") for inputs in (first, second)]
        check(bool(texts[0]) and texts[0] == texts[1], "the same new image had two answers")

    def batch(self) -> None:
        """Several at once, one of them bad: each gets its own answer, in order."""
        first = self._any()
        same = [known for known in self._known if known.parameters == first.parameters]
        chosen = [first, *self._random.choices(same, k=self._random.randint(1, 4))]
        place = self._random.randint(0, len(chosen))
        inputs = [known.inputs for known in chosen]
        inputs.insert(place, {"query": "Rate?", "image": "no image"})
        records = self._endpoint.ask(inputs, first.parameters)
        check(len(records) == len(inputs), f"{len(inputs)} inputs, {len(records)} records")
        _refused(records.pop(place))
        for record, known in zip(records, chosen, strict=True):
            _same(record, known)

    def cancelled_stream(self) -> None:
        known, cancel = self._any(), threading.Event()
        wanted, said = self._random.randint(0, 12), list[int]()
        if not wanted:
            cancel.set()
        stream = self._endpoint.stream(known, cancel)
        for step in stream:
            said.append(step.token_id)
            if len(said) == wanted:
                cancel.set()
        check(tuple(said) == known.token_ids[: len(said)], "a cancelled stream said other tokens")
        whole = len(said) == len(known.token_ids)
        check(whole or (stream.finish_reason == "cancelled" and len(said) <= wanted + 1), "a cancelled stream went on")

    def cancelled_answer(self) -> None:
        known, cancel = self._any(), threading.Event()
        timer = threading.Timer(self._random.uniform(0, 0.2), cancel.set)
        timer.start()
        try:
            generation = self._endpoint.answer(known, cancel=cancel).generation
        finally:
            timer.cancel()
            timer.join()
        said = tuple(generation.token_ids)
        check(said == known.token_ids[: len(said)], "a cancelled answer said other tokens")
        check(said == known.token_ids or generation.finish_reason == "cancelled", "an answer was cut without a reason")

    def closed_stream(self) -> None:
        stream = self._begun()
        stream.close()
        check(next(iter(stream), None) is None, "a closed stream went on")

    def abandoned_stream(self) -> None:
        """Nobody asks for the rest, and nobody says so."""
        self._begun()

    def deadline(self) -> None:
        known = self._any()
        try:
            analysis = self._endpoint.answer(known, deadline=time.monotonic() + self._random.uniform(-0.01, 0.3))
        except DeadlineExceededError:
            return
        check(analysis.text == known.text, "an answer within its deadline changed")

    def bad_body(self) -> None:
        body, inputs = self._random.choice(self._bad)
        records = self._endpoint.send(body)
        check(len(records) == inputs, f"{inputs} bad inputs, {len(records)} records")
        for record in records:
            _refused(record)

    def commented(self) -> None:
        """With a commentary service that answers, errs, or says nothing for longer than it may take."""
        known = self._any()
        asked = {"enable_turkish_commentary": True, "deepseek_timeout": COMMENTARY_TIMEOUT_S, "details": True}
        (record,) = self._endpoint.ask(known.inputs, known.parameters | asked)
        _same(record, known)
        status = record["commentary_status"]
        check(status in (("success", "failed") if known.text else ("no_text",)), f"commentary status {status}")
        check(status != "failed" or (record["comment_text"] == "" and record["commentary_error"]), "an unsaid failure")
        seconds = record["details"]["timings"]["commentary"]
        check(seconds < COMMENTARY_TIMEOUT_S + 2, f"a commentary took {seconds:.1f} s")

    def _any(self) -> Known:
        return self._random.choice(self._known)

    def _begun(self) -> Any:
        """A stream of which some tokens, perhaps none, were asked for."""
        known = self._any()
        stream = self._endpoint.stream(known)
        said = [step.token_id for step in itertools.islice(iter(stream), self._random.randint(0, 12))]
        check(tuple(said) == known.token_ids[: len(said)], "a stream that was broken off said other tokens")
        return stream


def _same(record: dict[str, Any], known: Known) -> None:
    check("error" not in record, f"a good request was refused: {record.get('error')}")
    check(record["generated_text"] == known.text, "an answer changed")


def _refused(record: dict[str, Any]) -> None:
    check(record.get("success") is False and bool(record.get("error")), "a bad request was answered")
    check("internal error" not in record["error"], f"a bad request ended in {record['error']}")
