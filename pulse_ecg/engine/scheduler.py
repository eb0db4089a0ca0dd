"""Continuous batching: answers join and leave between tokens.

One thread owns the device.  It takes turns as long as there are answers; a turn is at most one chunk of prefilling
(or one pass of the vision tower) and one decode step of all answers that are past their prompts.  So a newcomer never
holds the others up for longer than a chunk.  On a GPU the host is a turn ahead: it hands out the tokens of one turn
while the device computes the next, and waits for nothing else.
"""

from __future__ import annotations

import atexit
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from threading import Condition, Event, Thread
from typing import ClassVar, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from pulse_ecg.checkpoint import LoadedModel
from pulse_ecg.device import NO_MEMORY_LEFT, Download, Span, current, lost, out_of_memory
from pulse_ecg.engine.memory import free_bytes, plan
from pulse_ecg.engine.packed_linear import pack_linear_layers
from pulse_ecg.engine.prefixes import PrefixCache, after_image, prefix_length
from pulse_ecg.engine.runner import ModelRunner
from pulse_ecg.engine.sampling import BatchSampler
from pulse_ecg.engine.slots import KeyValueSlots, slot_bytes
from pulse_ecg.engine.vision import ImageEncoder, first_pass
from pulse_ecg.errors import EngineStoppedError, OutOfMemoryError
from pulse_ecg.generation import Answer, EncodedPrompt, ImagePrompt, Timings

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LOST = "The device has failed and answers nothing more; the server has to be started anew."
_IDLE_SECONDS = 5.0  # the thread ends after so long without work; the next answer starts another
_interpreter_ends = Event()


class _EngineThread(Thread):
    """An engine's thread, which sleeps on ``changed``.  The interpreter ends after it, see :func:`_end_threads`."""

    all: ClassVar[WeakSet[_EngineThread]] = WeakSet()

    def __init__(self, work: Callable[[], None], changed: Condition) -> None:
        super().__init__(target=work, name="pulse-engine", daemon=True)
        self.changed = changed

    def start(self) -> None:
        super().start()  # raises where no more threads are to be had
        self.all.add(self)


@atexit.register
def _end_threads() -> None:
    """Wait for the engines' threads, at the interpreter's end: one that is killed inside torch aborts the process.

    A thread that has had its last turn counts too: it may be the one that frees the engine, tensor by tensor.
    """
    _interpreter_ends.set()
    for thread in list(_EngineThread.all):
        with thread.changed:
            thread.changed.notify()
        thread.join()


@dataclass(eq=False)
class _Sequence:
    """An answer in a slot."""

    answer: Answer
    slot: int
    began: float
    waited: float
    vision: Span | None = None
    image_embeddings: Tensor | None = field(default=None, repr=False)
    prompt_1LD: Tensor | None = field(default=None, repr=False)
    """Embeddings of the prompt, or of what follows a remembered prefix, until the last chunk is prefilled."""
    prefilled: bool = False
    chosen: int = 0
    first_token: float | None = None
    over: bool = False

    @property
    def image_to_encode(self) -> ImagePrompt | None:
        """Its image, as long as the tower has to see it."""
        known = self.prefilled or self.prompt_1LD is not None or self.image_embeddings is not None
        return None if known else self.answer.prompt.image

    def timings(self, now: float) -> Timings:
        """Seconds so far; called when a token arrives."""
        self.first_token = self.first_token or now
        vision = self.vision.seconds() if self.vision else 0.0
        return Timings(self.waited, vision, self.first_token - self.began - vision, now - self.first_token)


@dataclass(frozen=True)
class _Chosen:
    """Tokens on their way to the host."""

    sequences: list[_Sequence]
    tokens_B: Download


class TransformersEngine:
    """Answers many prompts at once with one model on one device.  Implements :class:`pulse_ecg.generation.Engine`."""

    def __init__(self, model: LoadedModel, *, max_slots: int = 8) -> None:
        """Allocates the slots, ``max_slots`` or as many as the free memory allows; on a GPU, records CUDA graphs.

        The network is the engine's from now on: its attention reads slots, and on a CPU its decoder is packed.
        """
        if model.device.type == "cuda":
            # On new GPUs torch prefers cuDNN's attention, which takes tens of milliseconds to plan for each new length,
            # in each thread anew.
            torch.backends.cuda.enable_cudnn_sdp(False)
        pack_linear_layers(model.network.language_model)
        llama, positions = model.config.llama, model.config.context_length
        memory = plan(free_bytes(model.device), slot_bytes(llama, positions, model.dtype), max_slots)
        self.slots = KeyValueSlots(
            llama, count=memory.slots, positions=positions, device=model.device, dtype=model.dtype
        )
        self._model = model
        self._runner = ModelRunner(model, self.slots)
        self._encoder = ImageEncoder(model)
        self._prefixes = PrefixCache(self.slots, memory.prefix_bytes)
        self._sampler = BatchSampler(
            memory.slots, vocabulary=model.vocabulary, bos_id=model.tokenizer.bos_id, device=model.device
        )
        self._ahead = model.device.type == "cuda"
        self._free = list(range(memory.slots))
        self._running: list[_Sequence] = []
        self._on_the_way: list[_Chosen] = []
        self._waiting: deque[tuple[Answer, float]] = deque()
        self._changed = Condition()
        self._thread: _EngineThread | None = None
        self._lost = False
        with current(model.device), torch.inference_mode():
            self._runner.capture()

    def submit(self, answer: Answer) -> None:
        """Queue an answer; it gets the next free slot.

        Raises:
            EngineStoppedError: the device is lost.
        """
        if self._lost:
            raise EngineStoppedError(_LOST)
        with self._changed:
            if self._thread is None:
                thread = _EngineThread(self._work, self._changed)
                thread.start()  # if it raises, nothing is queued
                self._thread = thread
            self._waiting.append((answer, time.perf_counter()))
            self._changed.notify()

    def recall(self, image_key: str) -> ImagePrompt | None:
        """An image that was encoded lately, with its embeddings."""
        return self._encoder.recall(image_key)

    @property
    def alive(self) -> bool:
        """True unless the device is lost: a failed turn ends the answers at work, and the next one finds all ready."""
        return not self._lost

    def close(self) -> None:
        """Nothing: it has no process of its own."""

    # --- turns

    def _work(self) -> None:
        with current(self._model.device), torch.inference_mode():
            while self._wait_for_work():
                try:
                    self._take_turn()
                except Exception as error:  # noqa: BLE001 - the answers' callers get it
                    logger.error("The engine failed (%s); the answers at work end with it.", type(error).__name__)
                    self._fail_all(error)

    def _wait_for_work(self) -> bool:
        """Block until there is something to do; False after a while without, and at the interpreter's end."""
        with self._changed:
            busy = self._changed.wait_for(
                lambda: _interpreter_ends.is_set() or self._waiting or self._running or self._on_the_way,
                timeout=_IDLE_SECONDS,
            )
            if not busy:
                self._thread = None
            return bool(busy) and not _interpreter_ends.is_set()

    def _take_turn(self) -> None:
        if self._lost:  # one answer has found it out: the others need not try
            raise EngineStoppedError(_LOST)
        self._drop_those_over()
        self._admit()
        arrived, self._on_the_way = self._on_the_way, []
        try:
            for part in (self._prefill_turn, self._decode_turn):
                started = part()
                if self._ahead:
                    self._on_the_way += started
                else:
                    self._deliver(started)
        finally:  # whatever becomes of this turn, the last one's tokens are good
            self._deliver(arrived)

    def _drop_those_over(self) -> None:
        """Let go of answers that are cancelled or out of time, whether they have a slot or wait for one."""
        for sequence in [sequence for sequence in self._running if sequence.answer.over()]:
            self._release(sequence)
        with self._changed:
            if self._waiting:
                self._waiting = deque(entry for entry in self._waiting if not entry[0].over())

    def _admit(self) -> None:
        while self._waiting and self._free:
            with self._changed:
                answer, since = self._waiting.popleft()
            slot = min(self._free)  # the lowest: decode steps run over the first slots
            self._free.remove(slot)
            now = time.perf_counter()
            known = answer.prompt.image.embeddings if answer.prompt.image else None
            sequence = _Sequence(answer, slot, now, now - since, image_embeddings=known)
            self._running.append(sequence)
            with self._failing_alone(sequence):
                self.slots.clear(slot)
                self._sampler.begin(slot, answer.params, answer.seed)

    # --- prefill

    def _prefill_turn(self) -> list[_Chosen]:
        """One chunk's worth of the prompts that came first; the first tokens of those that are through."""
        budget, started = self._runner.chunk, list[_Chosen]()
        for sequence in [sequence for sequence in self._running if not sequence.prefilled]:
            with self._failing_alone(sequence):
                self._embed(sequence)
                if sequence.image_to_encode and budget == self._runner.chunk:
                    self._encode_images()
                    break
                while sequence.prompt_1LD is not None and (length := self._next_chunk(sequence)) <= budget:
                    budget -= length
                    started += self._prefill_chunk(sequence, length)
            if not (sequence.prefilled or sequence.over):
                break  # first come, first served
        return started

    def _embed(self, sequence: _Sequence) -> None:
        """Bring the prompt's embeddings about, unless the tower has to see its image first."""
        prompt = sequence.answer.prompt
        if sequence.prompt_1LD is not None:
            return
        if self._prefixes.restore(prompt, sequence.slot):
            self.slots.filled[sequence.slot] = prefix_length(prompt)
            sequence.prompt_1LD = self._runner.embed(after_image(prompt), None)
        elif not sequence.image_to_encode:
            sequence.prompt_1LD = self._runner.embed(prompt.ids, sequence.image_embeddings)

    def _encode_images(self) -> None:
        """One pass of the tower, with the images of as many sequences as fit."""
        waiting = [sequence for sequence in self._running if not sequence.prefilled and sequence.image_to_encode]
        images = first_pass([image for sequence in waiting if (image := sequence.image_to_encode)])
        span = Span(self._model.device)
        # The first alone, if need be: then it alone is to blame for an error, and the others have their own turns.
        encoded = self._encoded_together(images) or self._tried_twice(partial(self._encoder.encode, images[:1]))
        span.end()
        for sequence, embeddings in zip(waiting, encoded, strict=False):
            sequence.image_embeddings, sequence.vision = embeddings, span

    def _encoded_together(self, images: Sequence[ImagePrompt]) -> list[Tensor] | None:
        """The embeddings of several images, or None if that fails; nothing that the failed pass computed is kept."""
        try:
            return self._encoder.encode(images) if len(images) > 1 else None
        except Exception as error:  # noqa: BLE001 - whose error it is, is seen when they go one by one
            if out_of_memory(error):
                self._free_cached_memory()
            return None

    def _next_chunk(self, sequence: _Sequence) -> int:
        """Length of the next chunk.  It depends on the prompt alone, so that the answer does."""
        filled, prefix = self.slots.filled[sequence.slot], prefix_length(sequence.answer.prompt)
        end = prefix if filled < prefix else sequence.answer.prompt.length
        return min(self._runner.chunk, end - filled)

    def _prefill_chunk(self, sequence: _Sequence, length: int) -> list[_Chosen]:
        prompt, slot = sequence.answer.prompt, sequence.slot
        assert sequence.prompt_1LD is not None
        start = self.slots.filled[slot]
        offset = prompt.length - start  # counted from the end: a remembered prefix has no embeddings
        chunk_1ND = sequence.prompt_1LD[:, -offset:][:, :length]
        self.slots.filled[slot] += length  # also if it fails midway
        last = self.slots.filled[slot] == prompt.length
        logits_1V = self._tried_twice(partial(self._runner.prefill, chunk_1ND, slot, start, last=last))
        if self.slots.filled[slot] == prefix_length(prompt):
            self._remember(prompt, slot)
        if logits_1V is None:
            return []
        sequence.prefilled, sequence.prompt_1LD, sequence.image_embeddings = True, None, None
        return [self._choose(logits_1V, [sequence])]

    def _remember(self, prompt: EncodedPrompt, slot: int) -> None:
        """Keep the prefix for a later question; where there is no memory for it, this answer needs none."""
        try:
            self._prefixes.keep(prompt, slot)
        except Exception as error:
            if not out_of_memory(error):
                raise
            self._free_cached_memory()

    # --- decode

    def _decode_turn(self) -> list[_Chosen]:
        """One token for every answer that has read its prompt and may have another."""
        able = [s for s in self._running if s.prefilled and s.chosen < s.answer.limit]
        able.sort(key=lambda sequence: sequence.slot)
        if not able:
            return []
        logits_BV = self._tried_twice(partial(self._runner.decode, [sequence.slot for sequence in able]))
        for sequence in able:
            self.slots.filled[sequence.slot] += 1
        return [self._choose(logits_BV, able)]

    def _choose(self, logits_BV: Tensor, sequences: list[_Sequence]) -> _Chosen:
        """Choose on the device, for the next step to read there; the copy for the host is under way."""
        slots = [sequence.slot for sequence in sequences]
        tokens_B = self._sampler.choose(logits_BV, slots)
        self._runner.feed(slots, tokens_B)
        for sequence in sequences:
            sequence.chosen += 1
        return _Chosen(sequences, Download(tokens_B))

    def _deliver(self, arrived: Sequence[_Chosen]) -> None:
        for chosen in arrived:
            ids, now = chosen.tokens_B.wait().tolist(), time.perf_counter()
            for sequence, token_id in zip(chosen.sequences, ids, strict=True):
                if sequence.over:  # being a turn ahead, the device computes one token in vain
                    continue
                with self._failing_alone(sequence):
                    if not sequence.answer.push(token_id, sequence.timings(now)):
                        self._release(sequence)

    # --- ends

    def _release(self, sequence: _Sequence) -> None:
        sequence.over = True
        sequence.prompt_1LD = sequence.image_embeddings = None
        self._running.remove(sequence)
        self._free.append(sequence.slot)

    def _fail(self, sequence: _Sequence, error: Exception) -> None:
        if out_of_memory(error):
            self._free_cached_memory()
            error = OutOfMemoryError(NO_MEMORY_LEFT)
        else:
            self._lost = self._lost or lost(self._model.device)
        self._release(sequence)
        sequence.answer.fail(EngineStoppedError(_LOST) if self._lost else error)

    @contextmanager
    def _failing_alone(self, sequence: _Sequence) -> Iterator[None]:
        """What goes wrong with one prompt is that answer's end and nobody else's."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - its caller gets it
            self._fail(sequence, error)

    def _fail_all(self, error: Exception) -> None:
        """End the answers at work, and those that wait too once the device is lost."""
        self._on_the_way = []
        for sequence in list(self._running):
            self._fail(sequence, error)
        with self._changed:
            abandoned, self._waiting = (self._waiting, deque()) if self._lost else (deque(), self._waiting)
        for answer, _ in abandoned:
            answer.fail(EngineStoppedError(_LOST))

    def _tried_twice(self, work: Callable[[], T]) -> T:
        """What ``work`` gives; if there is no memory for it, it is tried once more without all that is remembered."""
        try:
            return work()
        except Exception as error:
            if not out_of_memory(error):
                raise
        self._free_cached_memory()  # only now: an exception holds its frames, and these their tensors
        return work()

    def _free_cached_memory(self) -> None:
        self._prefixes.clear()
        self._encoder.clear()
        if self._ahead:
            with suppress(RuntimeError):  # a device that is broken refuses this too, and is the next step's error
                torch.cuda.empty_cache()
