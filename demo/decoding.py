"""Greedy answers to several questions about one image at once, for the evaluation's thousands of them.

The same tokens as the endpoint chooses with ``do_sample`` off and ``repetition_penalty`` 1; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from pulse_ecg.checkpoint import LoadedModel
from pulse_ecg.prompt import IMAGE_TOKEN_INDEX, Conversation, Turn, prompt_ids

_HIDDEN = -1e9


@torch.inference_mode()
def answers(model: LoadedModel, pixels_TCHW: Tensor, questions: Sequence[str], *, limit: int = 64) -> list[str]:
    """The model's answers to ``questions`` about the image with these normalised tiles, in order."""
    network, tokenizer = model.network, model.tokenizer
    prompts = [
        prompt_ids(
            Conversation((Turn("user", text),)),
            with_image=True,
            tokenizer=tokenizer,
            context_length=model.config.context_length,
        )
        for text in questions
    ]
    slot = prompts[0].index(IMAGE_TOKEN_INDEX)
    image = network.encode_tiles(pixels_TCHW).flatten(0, 1)
    shared = network.embed([*prompts[0][:slot], IMAGE_TOKEN_INDEX], image)
    cache = DynamicCache()
    network.language_model.model(inputs_embeds=shared, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(questions))
    own = [ids[slot + 1 :] for ids in prompts]
    longest, lengths = max(map(len, own)), torch.tensor([len(ids) for ids in own], device=model.device)
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in own], device=model.device)
    prefix = shared.shape[1]
    order = torch.arange(longest, device=model.device)
    seen = torch.cat([torch.ones(len(own), prefix, device=model.device), (order < lengths[:, None]).float()], 1).bool()
    causal = torch.cat([torch.ones(longest, prefix, device=model.device).bool(), order[:, None] >= order], 1)
    positions = prefix + order.expand(len(own), -1)
    hidden = _forward(model, tokens, cache, seen[:, None] & causal, positions)
    chosen = _chosen(model, hidden[torch.arange(len(own)), lengths - 1])
    said = [chosen]
    ended = torch.zeros(len(own), dtype=torch.bool, device=model.device)
    for step in range(limit - 1):
        ended |= chosen == tokenizer.eos_id
        if bool(ended.all()):
            break
        seen = torch.cat([seen, torch.ones(len(own), 1, device=model.device).bool()], 1)
        hidden = _forward(model, chosen[:, None], cache, seen[:, None], prefix + lengths[:, None] + step)
        chosen = _chosen(model, hidden[:, 0])
        said.append(chosen)
    return [_text(model, row) for row in torch.stack(said, 1).tolist()]


def _forward(model: LoadedModel, tokens: Tensor, cache: DynamicCache, seen_BQK: Tensor, positions: Tensor) -> Tensor:
    mask = torch.zeros(seen_BQK.shape, device=model.device).masked_fill_(~seen_BQK, _HIDDEN)[:, None]
    hidden: Tensor = model.network.language_model.model(
        inputs_embeds=model.network.embed_tokens(tokens),
        attention_mask=mask.to(model.dtype),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return hidden


def _chosen(model: LoadedModel, hidden: Tensor) -> Tensor:
    logits: Tensor = model.network.language_model.lm_head(hidden)
    return logits.argmax(-1)


def _text(model: LoadedModel, ids: list[int]) -> str:
    eos = model.tokenizer.eos_id
    return model.tokenizer.decode(ids[: ids.index(eos)] if eos in ids else ids).strip()
