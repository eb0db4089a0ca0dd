"""Packed linear layers: the same products, the weight once, and nothing touched that they are not made for."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter

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


class Attention(nn.Module):
    """As transformers names its layers; the key's is narrower where heads share keys."""

    def __init__(self, bias: bool = False, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        for name, width in (("q_proj", 96), ("k_proj", 32), ("v_proj", 32), ("o_proj", 64)):
            self.add_module(name, nn.Linear(64, width, bias=bias, dtype=dtype if name == "k_proj" else None))


def test_the_weight_is_kept_once() -> None:
    network = nn.ModuleDict({"plain": nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)]), "joint": Attention(True)})
    size = sum(parameter.nbytes for parameter in network.parameters())
    weights = [weakref.ref(parameter) for name, parameter in network.named_parameters() if name.endswith("weight")]
    assert pack_linear_layers(network) == 6
    gc.collect()
    assert [weight() for weight in weights] == [None] * 6
    assert sum(buffer.nbytes for buffer in network.buffers()) == size
    assert pack_linear_layers(network) == 0  # they are already


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 64), (5, 1, 64), (1, 300, 64)])
def test_layers_with_the_same_input_are_one_product_in_whatever_order_they_are_asked(
    shape: tuple[int, ...], bias: bool
) -> None:
    torch.manual_seed(0)
    network = Attention(bias)
    plain, x, y = copy.deepcopy(network), torch.randn(shape), torch.randn(shape)
    assert pack_linear_layers(network) == 4
    asked = [("q_proj", x), ("k_proj", x), ("v_proj", x), ("o_proj", x), ("v_proj", y), ("q_proj", x), ("k_proj", y)]
    with torch.inference_mode():
        for name, given in asked:
            found, expected = network.get_submodule(name)(given), plain.get_submodule(name)(given)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    counted = Counter(type(module) for module in network.modules())
    assert counted[PackedLinear] == 2


def test_layers_of_one_input_that_differ_are_packed_alone_or_stay() -> None:
    network = Attention(dtype=torch.float16)
    assert pack_linear_layers(network) == 3
    kinds = [type(layer) for layer in network.children()]
    assert kinds == [PackedLinear, nn.Linear, PackedLinear, PackedLinear]
    network = Attention()
    network.k_proj = nn.Linear(64, 32, bias=True)
    assert pack_linear_layers(network) == 4
    assert {type(layer) for layer in network.children()} == {PackedLinear}


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
