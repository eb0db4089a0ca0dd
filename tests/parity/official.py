"""Ask the official code.  Runs in its own environment: ``python official.py PLAN.json OUT``.

The plan names checkpoints, images and cases; the folder OUT gets ``answers.json`` (the prompt's token ids, the
generated ids, the text) and ``logits.npz`` (steps x vocabulary for each case).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from PIL import Image
from transformers import AutoTokenizer


def prompt_of(turns: list[str], with_image: bool) -> str:
    conversation = conv_templates["llava_v1"].copy()
    first, *others = turns
    for index, text in enumerate([f"<image>\n{first}" if with_image else first, *others, None]):
        conversation.append_message(conversation.roles[index % 2], text)
    return conversation.get_prompt()


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, case: dict[str, Any], images: dict[str, str]) -> tuple[dict[str, Any], Any]:
    ids = tokenizer_image_token(
        prompt_of(case["turns"], case["image"] is not None), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt"
    )
    pixels = sizes = None
    if case["image"]:
        image = Image.open(images[case["image"]]).convert("RGB")
        pixels = process_images([image], model.get_vision_tower().image_processor, model.config)
        sizes = [image.size]
    out = model.generate(
        ids[None],
        images=pixels,
        image_sizes=sizes,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        repetition_penalty=case["repetition_penalty"],
        max_new_tokens=case["max_new_tokens"],
        use_cache=True,
        output_scores=True,
        return_dict_in_generate=True,
    )
    said = {
        "prompt_ids": ids.tolist(),
        "token_ids": out.sequences[0, 1:].tolist(),  # without the BOS that `generate` starts from
        "text": tokenizer.batch_decode(out.sequences, skip_special_tokens=True)[0].strip(),
    }
    return said, torch.cat(out.scores).numpy()


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    result: dict[str, Any] = {"answers": {}, "tokenizers": {}}
    logits: dict[str, Any] = {}
    for name, folder in plan["checkpoints"].items():
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False)
        model = LlavaLlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
        tower = model.get_vision_tower()
        if not tower.is_loaded:
            tower.load_model()
        result["answers"][name] = {}
        for number, case in enumerate(plan["cases"][name], 1):
            said, logits[f"{name}/{case['name']}"] = answer(model, tokenizer, case, plan["images"])
            result["answers"][name][case["name"]] = said
            if number % 25 == 0:
                print(f"official code: {name}, {number} of {len(plan['cases'][name])} cases", flush=True)
    for name, folder in plan["tokenizers"].items():
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False)
        result["tokenizers"][name] = [tokenizer(text, add_special_tokens=False).input_ids for text in plan["texts"]]
    output = Path(sys.argv[2])
    np.savez(output / "logits.npz", **logits)
    (output / "answers.json").write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    main()
