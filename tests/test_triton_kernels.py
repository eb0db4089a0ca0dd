"""Our GPU kernels against torch's arithmetic: without a GPU in Triton's interpreter, block by block (see conftest)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton", reason="Triton has no package for this system")
from pulse_ecg.engine import triton_kernels as kernels
from pulse_ecg.engine.fast_decoder import fast_decoder
from tests.test_fast_decoder import a_runner, assert_steps_agree

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def on_the_device() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64, 2048), (64, 4096), (301, 777), (5, 3), (1, 2049), (3, 2048)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_product_of_a_row(shape: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
    weight, x = torch.randn(shape) / shape[1] ** 0.5, torch.randn(1, 1, shape[1])
    offset = torch.randn(shape[0]) if bias else None
    expected = functional.linear(x, weight, offset)
    given = (t if t is None else t.to(dtype) for t in (x, weight, offset))
    product = kernels.matvec(*given)
    assert product.shape == expected.shape and product.dtype == dtype
    error = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(product.float(), expected, atol=error, rtol=error)


SLOT = 1100
PLACES = [[0], [31], [32], [1023], [1024], [SLOT - 1], [5, 0, 700], [SLOT - 1, 64, 1]]


@pytest.mark.parametrize("positions", PLACES, ids=str)
@pytest.mark.parametrize(
    ("width", "dtype"), [(16, torch.float32), (64, torch.float32), (128, torch.float16), (128, torch.bfloat16)], ids=str
)
def test_each_row_attends_to_its_own_positions_alone(positions: list[int], width: int, dtype: torch.dtype) -> None:
    rows, heads = len(positions), 2
    keys, values = (torch.randn(rows + 1, heads, SLOT, width) * 2).to(dtype), torch.randn(rows + 1, heads, SLOT, width)
    values = values.to(dtype)
    query = torch.randn(rows, 1, heads, width).transpose(1, 2).to(dtype)  # as transformers gives it
    for row, position in enumerate(positions):  # what an earlier answer left is not seen
        keys[row, :, position + 1 :], values[row, :, position + 1 :] = 1e4, float("nan")
    attended = kernels.attend(query, keys, values, torch.tensor(positions), 0.25)
    assert attended.shape == (rows, heads, 1, width)
    for row, head in itertools.product(range(rows), range(heads)):
        end = positions[row] + 1
        weights = (keys[row, head, :end].float() @ query[row, head, 0].float() * 0.25).softmax(0)
        expected = weights @ values[row, head, :end].float()
        error = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(attended[row, head, 0].float(), expected, atol=error, rtol=1e-4 + error)


def test_large_scores_do_not_overflow() -> None:
    keys, values = torch.full((1, 1, 200, 16), 60.0), torch.ones(1, 1, 200, 16)
    keys[0, 0, 150] = 90.0
    values[0, 0, 150] = 7.0
    attended = kernels.attend(torch.full((1, 1, 1, 16), 60.0), keys, values, torch.tensor([180]), 1.0)
    torch.testing.assert_close(attended, torch.full((1, 1, 1, 16), 7.0))


def test_the_shapes_that_are_known() -> None:
    def attends(query: tuple[int, ...], key: tuple[int, ...]) -> bool:
        return bool(kernels.attends(torch.empty(query), torch.empty(key)))

    assert attends((3, 32, 1, 128), (3, 32, 1, 128))
    assert not attends((3, 32, 1, 128), (3, 8, 1, 128)), "grouped heads"
    assert not attends((3, 32, 1, 80), (3, 32, 1, 80)), "a width that is no power of two"
    assert not attends((3, 32, 2, 128), (3, 32, 2, 128)), "several positions"


@pytest.mark.skipif(DEVICE == "cuda", reason="what the engine checks itself whenever it starts on a GPU")
def test_a_step_through_the_kernels_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        runner = a_runner("flat")
        decoder = fast_decoder(runner._decoder, backend=None)
        assert decoder is not None
        monkeypatch.setattr(kernels, "serve", lambda _: True)
        used = list[str]()
        for name in ("matvec", "attend"):
            kernel = getattr(kernels, name)
            monkeypatch.setattr(kernels, name, lambda *given, n=name, k=kernel: used.append(n) or k(*given))
        for rows in (1, 3):
            assert_steps_agree(runner, decoder, rows, 1024)
    layers = len(runner._decoder.layers)
    assert (used.count("matvec"), used.count("attend")) == (4 * layers, 2 * layers)
