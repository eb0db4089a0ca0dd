"""8-bit and 4-bit weights for linear layers, with bitsandbytes, which this module alone imports, and only when asked.

Weights alone are quantised, in blocks that share one scale: activations keep the model's dtype, and so does the
arithmetic.  No shape depends on values and no row on another, so decode steps can be batched, and recorded as CUDA
graphs, as they are without quantisation.  (``Linear8bitLt`` of the same library quantises activations too, and takes
columns with outliers out of the product: how many there are depends on all the answers of a batch.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from pulse_ecg.errors import ConfigurationError

REQUIREMENTS = "requirements-quantization.txt"
BLOCK_8BIT, BLOCK_4BIT = 256, 64  # weights that share a 32-bit scale: 8.125 and 4.5 bits a weight in all


class QuantizedLinear(nn.Module):
    """Takes the place of a linear layer; its weight is as empty as that layer's until :meth:`quantize`."""

    def __init__(self, linear: nn.Linear, *, library: Any) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.scales: Any = None  # bitsandbytes' QuantState, on the weight's device
        self._library = library

    def quantize(self, weight: Tensor) -> None:
        """Keep ``weight`` ``(out, in)`` quantised, on the device on which it is."""
        quantized, self.scales = self._quantized(weight)
        self.weight = nn.Parameter(quantized, requires_grad=False)

    def _quantized(self, weight: Tensor) -> tuple[Tensor, Any]:
        raise NotImplementedError


class Int8Linear(QuantizedLinear):
    """255 evenly spaced levels; the weight is dequantised for each product."""

    def _quantized(self, weight: Tensor) -> tuple[Tensor, Any]:
        levels = self._library.functional.create_linear_map()
        quantized, scales = self._library.functional.quantize_blockwise(weight, code=levels, blocksize=BLOCK_8BIT)
        return quantized, scales

    def forward(self, x: Tensor) -> Tensor:
        """The product, in the dtype of ``x``."""
        weight = self._library.functional.dequantize_blockwise(self.weight, self.scales)
        return functional.linear(x, weight, self.bias)


class Int4Linear(QuantizedLinear):
    """NF4's 16 levels, quantiles of a normal distribution; for few rows, a GPU dequantises within the product.

    Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, section 3.
    """

    def _quantized(self, weight: Tensor) -> tuple[Tensor, Any]:
        quantized, scales = self._library.functional.quantize_4bit(weight, quant_type="nf4", blocksize=BLOCK_4BIT)
        return quantized, scales

    def forward(self, x: Tensor) -> Tensor:
        """The product, in the dtype of ``x``."""
        product: Tensor = self._library.matmul_4bit(x, self.weight, self.scales, bias=self.bias)
        return product


LAYERS: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "int4": Int4Linear}


def quantized_layer(kind: str) -> Callable[[nn.Linear], QuantizedLinear] | None:
    """What makes a layer of the kind that ``PULSE_QUANTIZATION`` names; None for ``none``.

    Raises:
        ConfigurationError: the library is not installed; the message says how it can be.
    """
    if kind == "none":
        return None
    try:
        library = import_module("bitsandbytes")
    except ImportError as error:
        raise ConfigurationError(
            f"PULSE_QUANTIZATION is '{kind}', which needs bitsandbytes: add the line of {REQUIREMENTS} to "
            "requirements.txt, or install that file."
        ) from error
    return partial(LAYERS[kind], library=library)


def replace_linears(module: nn.Module, layer: Callable[[nn.Linear], QuantizedLinear]) -> None:
    """Put an empty quantised layer in the place of every linear layer within ``module``."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, layer(child))
        else:
            replace_linears(child, layer)
