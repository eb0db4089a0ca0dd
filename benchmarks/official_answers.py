"""The official code, loaded once, answering on command.  Runs in its own environment (see tests/parity/oracle.py).

python -m benchmarks.official_answers CHECKPOINT THREADS
"""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import Any

import torch
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from PIL import Image
from transformers import AutoTokenizer

from benchmarks.worker import TokenClock, serve


class Official:
    """``LlavaLlamaForCausalLM`` and what its own evaluation scripts do around it."""

    def __init__(self, folder: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False)
        self._model = LlavaLlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
        if not self._model.get_vision_tower().is_loaded:
            self._model.get_vision_tower().load_model()
        self._vision_s = 0.0
        self._encode = self._model.encode_images
        self._model.encode_images = self._timed_encode

    def answer(self, image: str, question: str, new_tokens: int) -> dict[str, Any]:
        """One question about an image file, from its bytes in memory to the text."""
        data = Path(image).read_bytes()
        started, cpu = time.perf_counter(), time.process_time()
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        pixels = process_images([picture], self._model.get_vision_tower().image_processor, self._model.config)
        preprocessed = time.perf_counter()
        ids = tokenizer_image_token(_prompt(question), self._tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        clock = TokenClock(time.perf_counter)
        with torch.inference_mode():
            sequence = self._model.generate(
                ids[None],
                images=pixels,
                image_sizes=[picture.size],
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                max_new_tokens=new_tokens,
                use_cache=True,
                streamer=clock,
            )
        text = self._tokenizer.batch_decode(sequence, skip_special_tokens=True)[0].strip()
        ended = time.perf_counter()
        first = clock.times[1]  # the first call hands over the prompt
        return {
            "seconds": ended - started,
            "cpu_s": time.process_time() - cpu,
            "text": text,
            "token_ids": sequence[0, 1:].tolist(),  # without the BOS that `generate` starts from
            "stages": {
                "preprocess": preprocessed - started,
                "vision": self._vision_s,
                "prefill": first - preprocessed - self._vision_s,
                "decode": ended - first,
            },
        }

    def _timed_encode(self, images: Any) -> Any:
        started = time.perf_counter()
        features = self._encode(images)
        self._vision_s = time.perf_counter() - started
        return features


def _prompt(question: str) -> str:
    conversation = conv_templates["llava_v1"].copy()
    conversation.append_message(conversation.roles[0], f"<image>\n{question}")
    conversation.append_message(conversation.roles[1], None)
    return str(conversation.get_prompt())


def _load() -> tuple[dict[str, Any], dict[str, Any]]:
    torch.set_num_threads(int(sys.argv[2]))
    started = time.perf_counter()
    official = Official(sys.argv[1])
    return {"load_s": time.perf_counter() - started}, {"answer": official.answer}


if __name__ == "__main__":
    serve(_load)
