"""An answer in vLLM's terms: its prompt as embeddings, its parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.inputs.engine import embeds_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

from pulse_ecg.generation import Answer

_MOST_TOP_K = 2**31 - 1  # as good as off; vLLM's processes cannot tell each other what has more than 64 bits
_WHOLE_INTERVAL = 8  # tokens of an answer that nobody watches come so many at a time, after the first


def prompt_input(embeddings_LD: Tensor, bos_id: int) -> Any:
    """A prompt of embeddings, of which vLLM's repetition penalty sees a BOS and nothing else.

    The official code generates from embeddings: what its penalty counts is the tokens it generated, and a BOS that
    ``generate`` starts from for want of ids.  vLLM's penalty counts the prompt's ids too.  Given none, it counts those
    that an earlier request left in its batch; so every position is said to be BOS.  Its embedding is taken from
    ``embeddings_LD`` all the same, but for the first position, which is BOS.  (vLLM's second model runner, the one on
    GPUs, counts id 0 besides: ``<unk>``, which the model does not say.)
    """
    length = len(embeddings_LD)
    return embeds_input(embeddings_LD, prompt_token_ids=[bos_id] * length, is_token_ids=[True] + [False] * (length - 1))


def sampling_params(answer: Answer) -> SamplingParams:
    """The parameters of the same meaning.  Stop strings are not among them: :class:`Answer` cuts the text itself."""
    params = answer.params
    return SamplingParams(
        max_tokens=answer.limit,
        stop_token_ids=sorted(answer.eos_ids),
        ignore_eos=True,  # one that vLLM takes from the configuration's defaults; ours are the stop tokens
        temperature=0.0 if params.greedy else params.temperature,
        top_p=params.top_p,
        top_k=min(params.top_k, _MOST_TOP_K),
        repetition_penalty=params.repetition_penalty,
        seed=answer.seed,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        stream_interval=_WHOLE_INTERVAL if answer.whole else 1,
    )
