"""What a decode step spends its time on, at a GPU's memory bandwidth: weights times one row, and attention to slots.

cuBLAS reaches four fifths of it, and attention of single positions as two products with a softmax between takes twice
as long as its keys and values do.  Triton comes with torch wherever that has CUDA; elsewhere this module cannot be
imported.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

# Sizes of blocks by measurement on an H100.
OUTPUTS, INPUTS, MATVEC_WARPS = 2, 2048, 8
PARTS, POSITIONS, ATTENTION_WARPS = 32, 32, 2


def serve(tensor: Tensor) -> bool:
    """Whether these kernels run where the tensor lies."""
    return tensor.is_cuda


def matvec(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear`` of a single row ``(..., K)``, summed in float32; ``weight_NK`` is contiguous."""
    outputs, inputs = weight_NK.shape
    product = x.new_empty((*x.shape[:-1], outputs))
    _matvec[(triton.cdiv(outputs, OUTPUTS),)](
        x.contiguous(),
        weight_NK,
        weight_NK if bias_N is None else bias_N,
        product,
        outputs,
        inputs,
        BIAS=bias_N is not None,
        WHOLE=outputs % OUTPUTS == 0 and inputs % INPUTS == 0,
        N=OUTPUTS,
        K=INPUTS,
        num_warps=MATVEC_WARPS,
    )
    return product


@triton.jit
def _matvec(
    x_pointer,
    weight_pointer,
    bias_pointer,
    product_pointer,
    outputs,
    inputs,
    BIAS: tl.constexpr,
    WHOLE: tl.constexpr,  # nothing lies outside of the blocks
    N: tl.constexpr,
    K: tl.constexpr,
):
    rows_N = tl.program_id(0) * N + tl.arange(0, N)
    starts_N = rows_N.to(tl.int64) * inputs
    sums_NK = tl.zeros([N, K], tl.float32)
    for start in range(0, inputs, K):
        columns_K = start + tl.arange(0, K)
        places_NK = weight_pointer + starts_N[:, None] + columns_K[None, :]
        if WHOLE:
            x_K = tl.load(x_pointer + columns_K)
            weight_NK = tl.load(places_NK, eviction_policy="evict_first")
        else:
            within_K = columns_K < inputs
            x_K = tl.load(x_pointer + columns_K, mask=within_K, other=0.0)
            within_NK = (rows_N < outputs)[:, None] & within_K[None, :]
            weight_NK = tl.load(places_NK, mask=within_NK, other=0.0, eviction_policy="evict_first")
        sums_NK += weight_NK.to(tl.float32) * x_K.to(tl.float32)[None, :]
    sums_N = tl.sum(sums_NK, axis=1)
    if BIAS:
        sums_N += tl.load(bias_pointer + rows_N, mask=rows_N < outputs, other=0.0).to(tl.float32)
    tl.store(product_pointer + rows_N, sums_N.to(product_pointer.dtype.element_ty), mask=rows_N < outputs)


def attends(query_BHND: Tensor, key_BHND: Tensor) -> bool:
    """Whether :func:`attend` knows these shapes: one new position, as many heads of keys, their width a power of 2."""
    width = query_BHND.shape[3]
    return query_BHND.shape[1:] == key_BHND.shape[1:] and query_BHND.shape[2] == 1 and width in (16, 32, 64, 128, 256)


def attend(query_BH1D: Tensor, keys_SHLD: Tensor, values_SHLD: Tensor, last_B: Tensor, scaling: float) -> Tensor:
    """Attention of row b to slot b, up to position ``last_B[b]``; returns ``(B, H, 1, D)``.  Arithmetic is in float32.

    A slot's positions are shared out among programs, whose results are then put together.
    Source: "Flash-Decoding for long-context inference", Dao, Haziza, Massa and Sizov, 2023.
    """
    rows, heads, _, width = query_BH1D.shape
    attended = query_BH1D.new_empty((rows, heads, 1, width))
    parts = query_BH1D.new_empty((rows, heads, PARTS, width), dtype=torch.float32)
    best = query_BH1D.new_empty((rows, heads, PARTS), dtype=torch.float32)
    sums = query_BH1D.new_empty((rows, heads, PARTS), dtype=torch.float32)
    _attend_to_part[(rows * heads, PARTS)](
        query_BH1D.contiguous(),
        keys_SHLD,
        values_SHLD,
        last_B,
        parts,
        best,
        sums,
        scaling,
        keys_SHLD.stride(0),
        keys_SHLD.stride(1),
        heads,
        D=width,
        PARTS=PARTS,
        L=POSITIONS,
        num_warps=ATTENTION_WARPS,
    )
    _put_together[(rows * heads,)](parts, best, sums, attended, D=width, PARTS=PARTS, num_warps=ATTENTION_WARPS)
    return attended


@triton.jit
def _attend_to_part(
    query_pointer,
    keys_pointer,
    values_pointer,
    last_pointer,
    parts_pointer,
    best_pointer,
    sums_pointer,
    scaling,
    slot_stride,
    head_stride,
    heads,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    L: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, head = row // heads, row % heads
    end = tl.load(last_pointer + slot) + 1
    share = tl.cdiv(tl.cdiv(end, PARTS), L) * L
    start = part * share
    end = tl.minimum(end, start + share)
    inner_D = tl.arange(0, D)
    query_D = (tl.load(query_pointer + row * D + inner_D).to(tl.float32) * scaling).to(tl.float32)  # it may be float64
    first = slot * slot_stride + head * head_stride
    best = float("-inf")
    total = 0.0
    sums_D = tl.zeros([D], tl.float32)
    for at in range(start, end, L):
        positions_L = at + tl.arange(0, L)
        within_L = positions_L < end
        places_LD = first + positions_L[:, None] * D + inner_D[None, :]
        keys_LD = tl.load(keys_pointer + places_LD, mask=within_L[:, None], other=0.0).to(tl.float32)
        scores_L = tl.where(within_L, tl.sum(keys_LD * query_D[None, :], axis=1), float("-inf"))
        values_LD = tl.load(values_pointer + places_LD, mask=within_L[:, None], other=0.0).to(tl.float32)
        better = tl.maximum(best, tl.max(scores_L, axis=0))
        weights_L = tl.exp(scores_L - better)
        fade = tl.exp(best - better)
        sums_D = sums_D * fade + tl.sum(weights_L[:, None] * values_LD, axis=0)
        total = total * fade + tl.sum(weights_L, axis=0)
        best = better
    place = row * PARTS + part
    tl.store(parts_pointer + place * D + inner_D, sums_D)
    tl.store(best_pointer + place, best)
    tl.store(sums_pointer + place, total)


@triton.jit
def _put_together(
    parts_pointer,
    best_pointer,
    sums_pointer,
    attended_pointer,
    D: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0)
    places_P = row * PARTS + tl.arange(0, PARTS)
    inner_D = tl.arange(0, D)
    best_P = tl.load(best_pointer + places_P)  # minus infinity for a part without positions
    fade_P = tl.exp(best_P - tl.max(best_P, axis=0))
    total = tl.sum(tl.load(sums_pointer + places_P) * fade_P, axis=0)
    parts_PD = tl.load(parts_pointer + places_P[:, None] * D + inner_D[None, :])
    attended_D = tl.sum(parts_PD * fade_P[:, None], axis=0) / total
    tl.store(attended_pointer + row * D + inner_D, attended_D.to(attended_pointer.dtype.element_ty))
