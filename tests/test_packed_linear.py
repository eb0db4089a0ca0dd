"""Packed linear layers: the same products, the weight once, and nothing touched that they are not made for."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from pulse_ecg.engine.packed_linear import PackedLinear, pack_linear_layers


class Other(nn.Linear):
    """A layer that does something else with its weight."""


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 96), (2, 96), (7, 96), (3, 5, 96), (700, 96), (1, 1, 96)])
def test_products_are_those_of_the_plain_layer(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(96, 1000, bias=bias), nn.GELU(), nn.Linear(1000, 33, bias=bias)).eval()
    x, plain = torch.randn(shape), copy.deepcopy(network)
    assert pack_linear_layers(network) == 2
    assert [type(layer) for layer in network] == [PackedLinear, nn.GELU, PackedLinear]
    with torch.inference_mode():
        torch.testing.assert_close(network(x), plain(x), rtol=1e-5, atol=1e-5)
        strided = torch.randn(*shape[:-1], 96, 2)[..., 0]
        torch.testing.assert_close(network(strided), plain(strided), rtol=1e-5, atol=1e-5)


def test_the_weight_is_kept_once() -> None:
    network = nn.ModuleDict({"inner": nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])})
    weights = [weakref.ref(layer.weight) for layer in network["inner"]]
    assert pack_linear_layers(network) == 2
    gc.collect()
    assert [weight() for weight in weights] == [None, None]
    assert sum(buffer.nbytes for buffer in network.buffers()) == 2 * 64 * 64 * 4
    assert pack_linear_layers(network) == 0  # they are already


def test_layers_of_another_kind_or_dtype_stay() -> None:
    network = nn.ModuleList([Other(8, 8), nn.Linear(8, 8, dtype=torch.float16), nn.Linear(8, 8, device="meta")])
    before = list(network)
    assert pack_linear_layers(network) == 0
    assert all(now is then for now, then in zip(network, before, strict=True))


def test_a_torch_without_the_kernels_keeps_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", missing)
    network = nn.Sequential(nn.Linear(8, 8))
    assert pack_linear_layers(network) == 0
    assert type(network[0]) is nn.Linear
