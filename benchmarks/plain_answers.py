"""The same network under transformers' plain ``generate`` with ``sdpa`` attention, answering on command.

    python -m benchmarks.plain_answers CHECKPOINT THREADS

What anyone would write first around :class:`pulse_ecg.model.PulseModel`: tiles, prompt, embeddings, ``generate``.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.device_limits import synchronize
from benchmarks.worker import TokenClock, serve
from pulse_ecg.anyres import merge_order, tile_image
from pulse_ecg.checkpoint import LoadedModel, load_model
from pulse_ecg.config import Settings
from pulse_ecg.generation import EncodedPrompt, ImagePrompt
from pulse_ecg.prompt import Conversation, Turn, prompt_ids


class Plain:
    """Answers with a network that needs no engine."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._device = model.device

    @torch.inference_mode()
    def answer(self, png: bytes, question: str, new_tokens: int) -> dict[str, Any]:
        """One question about an image file, from its bytes in memory to the text."""
        model = self._model
        started, cpu = time.perf_counter(), time.process_time()
        prompt = self._prompt(png, question)
        preprocessed = time.perf_counter()
        embeddings_1LD = self._embed(prompt)
        synchronize(self._device)
        encoded = time.perf_counter()
        clock = TokenClock(time.perf_counter)
        language_model: Any = model.network.language_model  # the types of `generate` do not fit its own class
        with self._sdpa():
            sequence = language_model.generate(
                inputs_embeds=embeddings_1LD,
                attention_mask=torch.ones(embeddings_1LD.shape[:2], dtype=torch.long, device=self._device),
                do_sample=False,
                max_new_tokens=new_tokens,
                pad_token_id=0,
                eos_token_id=sorted(model.config.eos_ids),
                streamer=clock,
            )
        token_ids = sequence[0].tolist()
        text = model.tokenizer.decode(token_ids).strip()
        ended = time.perf_counter()
        first = clock.times[-new_tokens]  # before it, some versions hand over the (empty) prompt
        return {
            "seconds": ended - started,
            "cpu_s": time.process_time() - cpu,
            "text": text,
            "token_ids": token_ids,
            "stages": {
                "preprocess": preprocessed - started,
                "vision": encoded - preprocessed,
                "prefill": first - encoded,
                "decode": ended - first,
            },
        }

    @torch.inference_mode()
    def judge(self, png: bytes, question: str, token_ids: Sequence[int]) -> tuple[float, float]:
        """Hold a greedy answer against this network's logits, all its tokens in one forward pass.

        Returns:
            The share of tokens that are the best here too, and by how much the worst is below the best, in logits.
        """
        network = self._model.network
        given_1LD = torch.cat([self._embed(self._prompt(png, question)), network.embed(token_ids[:-1], None)], dim=1)
        with self._sdpa():
            hidden_LD = network.language_model.model(inputs_embeds=given_1LD, use_cache=False).last_hidden_state[0]
        logits_NV = network.language_model.lm_head(hidden_LD[-len(token_ids) :]).float()
        said = logits_NV.gather(1, torch.tensor(token_ids, device=self._device)[:, None])[:, 0]
        gaps = logits_NV.max(dim=-1).values - said
        return float((gaps == 0).float().mean()), float(gaps.max())

    def _prompt(self, png: bytes, question: str) -> EncodedPrompt:
        config = self._model.config
        tiles = tile_image(Image.open(io.BytesIO(png)).convert("RGB"), config.preprocessing)
        order = merge_order(
            config.merge_type, grid=tiles.grid, side=config.patches_per_side, image_size=tiles.image_size
        )
        conversation = Conversation((Turn("user", question),))
        ids = prompt_ids(
            conversation, with_image=True, tokenizer=self._model.tokenizer, context_length=config.context_length
        )
        return EncodedPrompt(ids, ImagePrompt("", tiles.image_size, order, tiles))

    def _embed(self, prompt: EncodedPrompt) -> torch.Tensor:
        network, image = self._model.network, prompt.image
        assert image is not None and image.tiles is not None
        features_TPD = network.encode_tiles(torch.from_numpy(image.tiles.pixels_TCHW))
        order = torch.from_numpy(image.order).to(self._device)
        return network.embed(prompt.ids, network.merge(features_TPD, order))

    @contextmanager
    def _sdpa(self) -> Iterator[None]:
        """transformers' default attention, whatever an engine on the same network has chosen."""
        config = self._model.network.language_model.config
        chosen, config._attn_implementation = config._attn_implementation, "sdpa"
        try:
            yield
        finally:
            config._attn_implementation = chosen


def _load() -> tuple[dict[str, Any], dict[str, Any]]:
    torch.set_num_threads(int(sys.argv[2]))
    started = time.perf_counter()
    plain = Plain(load_model(sys.argv[1], Settings(device="cpu", dtype="float32")))
    loaded = time.perf_counter() - started
    return {"load_s": loaded}, {"answer": lambda image, **rest: plain.answer(Path(image).read_bytes(), **rest)}


if __name__ == "__main__":
    serve(_load)
