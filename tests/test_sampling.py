"""The sampler chooses as transformers' ``generate`` does, from what was generated alone, and as its seed says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from pulse_ecg.engine.sampling import BatchSampler
from pulse_ecg.params import GenerationParams

BOS, CPU = 1, torch.device("cpu")
# Half of the smallest numbers of all is zero: those are no logits of any model.
LOGITS = st.lists(st.floats(-20, 20, width=32, allow_subnormal=False), min_size=3, max_size=12)


def drawn(params: GenerationParams, logits: Sequence[float] | Tensor, count: int, *, seed: int = 0) -> list[int]:
    """Tokens chosen one after the other from the same logits, alone in its batch."""
    logits_1v = torch.as_tensor(logits)[None]
    sampler = BatchSampler(1, vocabulary=logits_1v.shape[1], bos_id=BOS, device=CPU)
    sampler.begin(0, params, seed)
    return [int(sampler.choose(logits_1v, [0])) for _ in range(count)]


@pytest.fixture(scope="module")
def plain(default_params: GenerationParams) -> GenerationParams:
    """Sampling from the softmax itself: every filter off."""
    return default_params.updated({"temperature": 1, "top_k": 0, "top_p": 1, "repetition_penalty": 1})


# --- greedy


@given(logits=LOGITS, how=st.sampled_from([{"do_sample": False}, {"temperature": 0}]))
def test_greedy_is_argmax(plain: GenerationParams, logits: list[float], how: dict[str, object]) -> None:
    assert drawn(plain.updated(how), logits, 2) == [int(torch.tensor(logits).argmax())] * 2


@given(logits=LOGITS.filter(lambda values: values.count(max(values)) == 1), seed=st.integers(0, 2**63 - 1))
@pytest.mark.parametrize("how", [{"top_k": 1}, {"top_p": 0.01}, {"top_k": "1", "top_p": 0.01, "temperature": 2}])
def test_one_candidate_is_greedy(
    plain: GenerationParams, logits: list[float], seed: int, how: dict[str, object]
) -> None:
    params = plain.updated(how)
    assert drawn(params, logits, 3, seed=seed) == [int(torch.tensor(logits).argmax())] * 3


def test_half_precision_is_widened_first(plain: GenerationParams) -> None:
    """9.8125 / 1.05 is 9.345, which bfloat16 (steps of 1/16) would round up to a tie with 9.375, and win."""
    logits = torch.tensor([0.0, 9.8125, 9.375, 0.0], dtype=torch.bfloat16)
    assert drawn(plain.updated({"do_sample": False, "repetition_penalty": 1.05}), logits, 1) == [2]


# --- the repetition penalty


def test_penalty_counts_bos_and_what_was_generated_and_nothing_else(plain: GenerationParams) -> None:
    params = plain.updated({"do_sample": False, "repetition_penalty": 2})
    assert drawn(params, [0.0, 8.0, 7.0, 5.0, 3.0, -1.0], 4) == [2, 3, 1, 1]  # BOS is 1: 8/2 is 4 from the start
    assert drawn(params, [-9.0, -1.0, -1.9, -3.0], 2) == [2, 1]  # negative ones are multiplied: -2, then -3.8


def test_penalty_of_one_changes_nothing(plain: GenerationParams) -> None:
    assert drawn(plain.updated({"do_sample": False}), [0.0, 8.0, 7.9], 5) == [1] * 5


def test_penalty_does_not_grow_with_repeats(plain: GenerationParams) -> None:
    """As in transformers: a token is penalised for having been said, however often."""
    params = plain.updated({"do_sample": False, "repetition_penalty": 2})
    assert drawn(params, [8.0, 0.0, 1.0, 1.0], 20) == [0] * 20


# --- the draws


def test_same_seed_same_draws_and_another_seed_others(default_params: GenerationParams) -> None:
    params = default_params.updated({"temperature": 1.5})
    logits = torch.randn(100, generator=torch.Generator().manual_seed(5))
    first = drawn(params, logits, 40, seed=7)
    assert drawn(params, logits, 40, seed=7) == first
    others = {tuple(drawn(params, logits, 40, seed=seed)) for seed in (0, 1, 8, 2**63 - 1)}
    assert len(others - {tuple(first)}) == 4


def test_draws_do_not_touch_the_shared_random_state(plain: GenerationParams) -> None:
    """Requests side by side would change each other's draws."""
    before = torch.random.get_rng_state()
    mine = drawn(plain, [0.0] * 10, 20, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(7)
    assert drawn(plain, [0.0] * 10, 20, seed=3) == mine


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(plain: GenerationParams, temperature: float) -> None:
    logits, count = [1.0, 0.0, -0.5, 2.0, -3.0], 4000
    counts = Counter(drawn(plain.updated({"temperature": temperature}), logits, count))
    expected = torch.tensor(logits).div(temperature).softmax(0).tolist()
    for token, share in enumerate(expected):
        assert abs(counts[token] / count - share) < 5 * math.sqrt(share * (1 - share) / count) + 1e-9


@pytest.mark.parametrize(
    ("how", "possible"),
    [
        ({"top_k": 2}, {3, 0}),
        ({"top_k": 3}, {3, 0, 1}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.6}, {3}),  # token 3 alone has 0.61
        ({"top_p": 0.7}, {3, 0}),
        ({"top_p": 0.7, "temperature": 0.5}, {3}),  # temperature comes before top-p
        ({"top_k": 2, "top_p": 0.8}, {3, 0}),
        ({"top_k": 2, "top_p": 0.7}, {3}),  # top-k comes before top-p: of the two left, token 3 has 0.73
    ],
)
def test_which_tokens_can_be_drawn(plain: GenerationParams, how: dict[str, object], possible: set[int]) -> None:
    assert set(drawn(plain.updated(how), [1.0, 0.0, -0.5, 2.0, -0.6], 400)) == possible


@pytest.mark.parametrize("how", [{}, {"do_sample": False}, {"top_k": 0, "top_p": 1}, {"top_k": 99, "temperature": 2}])
def test_logits_that_are_no_tokens_are_not_there(default_params: GenerationParams, how: dict[str, object]) -> None:
    """The rows that pad a table are cut off, as in the official code: nothing else is drawn either."""
    params, logits = default_params.updated(how), torch.tensor([1.0, 0.0, -0.5, 2.0, -0.6])
    padded = torch.cat([logits, torch.full((3,), 50.0)])
    sampler = BatchSampler(1, vocabulary=5, bos_id=BOS, device=CPU)
    sampler.begin(0, params, 7)
    assert [int(sampler.choose(padded[None], [0])) for _ in range(60)] == drawn(params, logits, 60, seed=7)


# --- against transformers itself


@pytest.fixture(scope="module")
def tiny_llama() -> Iterator[LlamaForCausalLM]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model spends its time on waking threads
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data.normal_(std=3)
    yield model
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"do_sample": False, "repetition_penalty": 1.5},
        {"temperature": 1.3, "top_k": 0, "top_p": 1, "repetition_penalty": 1},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 2.0, "top_p": 0.5, "repetition_penalty": 2},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 12345])
def test_tokens_are_those_of_generate(
    tiny_llama: LlamaForCausalLM, default_params: GenerationParams, how: dict[str, object], seed: int
) -> None:
    params = default_params.updated(how)
    sampling = (
        {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p} if params.do_sample else {}
    )
    config = GenerationConfig(
        do_sample=params.do_sample,
        repetition_penalty=params.repetition_penalty,
        max_new_tokens=16,
        pad_token_id=0,
        **sampling,
    )
    ids = torch.tensor([[BOS]])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        theirs = tiny_llama.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, 1:].tolist()
    ours = list[int]()
    chooser = BatchSampler(1, vocabulary=60, bos_id=BOS, device=CPU)
    chooser.begin(0, params, seed)
    with torch.inference_mode():
        for _ in range(16):
            logits = tiny_llama(torch.tensor([[BOS, *ours]])).logits[:, -1]
            ours.append(int(chooser.choose(logits, [0])))
    assert ours == theirs
    assert len(set(ours)) > 1


# --- several answers at once

MIXED: list[dict[str, object]] = [
    {"do_sample": False, "repetition_penalty": 1},
    {},
    {"do_sample": False, "repetition_penalty": 1.5},
    {"temperature": 1.3, "top_k": 0, "top_p": 1, "repetition_penalty": 1},
    {"temperature": 0.7, "top_k": 5, "repetition_penalty": 2},
    {"temperature": 2.0, "top_k": 0, "top_p": 0.5},
    {"temperature": 2.0, "top_k": 1000},
]


def test_company_changes_no_choice(default_params: GenerationParams) -> None:
    """Each row is chosen as it would be alone, whoever shares the step and whichever slot it has."""
    logits_sbv = torch.randn((20, len(MIXED), 300), generator=torch.Generator().manual_seed(1)) * 3
    params = [default_params.updated(how) for how in MIXED]
    slots = [5, 0, 3, 1, 6, 2, 4]
    together = BatchSampler(7, vocabulary=300, bos_id=BOS, device=CPU)
    for seed, (slot, row) in enumerate(zip(slots, params, strict=True)):
        together.begin(slot, row, seed)
    chosen = [together.choose(logits_bv, slots).tolist() for logits_bv in logits_sbv]
    for seed, row in enumerate(params):
        alone = BatchSampler(1, vocabulary=300, bos_id=BOS, device=CPU)
        alone.begin(0, row, seed)
        expected = [int(alone.choose(logits_bv[seed : seed + 1], [0])) for logits_bv in logits_sbv]
        assert [step[seed] for step in chosen] == expected


def test_a_slot_forgets_the_answer_before(default_params: GenerationParams) -> None:
    params = default_params.updated({"temperature": 1.5, "repetition_penalty": 2})
    logits = torch.randn(100, generator=torch.Generator().manual_seed(5))
    fresh = drawn(params, logits, 20, seed=7)
    sampler = BatchSampler(2, vocabulary=100, bos_id=BOS, device=CPU)
    for answer in (3, 7):
        sampler.begin(1, params, answer)
        again = [int(sampler.choose(logits[None], [1])) for _ in range(20)]
    assert again == fresh


def test_tokens_that_tie_with_the_last_of_the_top_k_stay(plain: GenerationParams) -> None:
    """As in transformers, which cuts by value and not by rank."""
    assert set(drawn(plain.updated({"top_k": 2}), [0.0, 1.0, 1.0, 1.0, 0.5], 200)) == {1, 2, 3}
