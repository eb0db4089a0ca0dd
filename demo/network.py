"""The demo model's shape, its trainable network, and the checkpoint folder that comes of it."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from demo.build_checkpoint import build_checkpoint, train_tokenizer
from demo.questions import corpus
from demo.random_weights import CheckpointShape
from demo.signals import draw_ecg
from pulse_ecg.anyres import Preprocessing
from pulse_ecg.checkpoint import LoadedModel, load_model
from pulse_ecg.config import Settings
from pulse_ecg.model import PulseModel
from pulse_ecg.prompt import LLAVA_V1_SYSTEM

MODEL_NAME = "PULSE-demo"
SHAPE = CheckpointShape(
    layers=3,
    hidden=128,
    heads=2,
    kv_heads=2,
    intermediate=384,
    vision_layers=5,  # the last one is in the layout and never computed: the features come from the layer before it
    vision_hidden=128,
    vision_heads=4,
    vision_intermediate=512,
    patch_size=28,
)


def fresh_model(device: str = "cpu", seed: int = 0) -> LoadedModel:
    """The network with untrained weights, ready to train."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(_skeleton(Path(folder)), _settings(device))
    for name, module in model.network.named_modules():
        _initialise(name, module)
    return model


def trained_model(folder: Path, device: str = "cpu") -> LoadedModel:
    """A checkpoint of the demo, ready to be trained on."""
    return load_model(folder, _settings(device))


def _settings(device: str) -> Settings:
    return Settings(device=device, dtype="float32")


def _skeleton(folder: Path) -> Path:
    """A checkpoint folder in the layout, with this tokenizer and name and with weights that are replaced later."""
    build_checkpoint(folder, shape=SHAPE, dtype="float16", shards=1)
    (folder / "tokenizer.model").write_bytes(_tokenizer())
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["pulse_model_name"] = MODEL_NAME
    config["_name_or_path"] = "pulse-demo"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return folder


def _tokenizer() -> bytes:
    """Pieces for the questions and answers, and for the other texts that the random demo's corpus covers."""
    rng = np.random.default_rng(0)
    lines = corpus([draw_ecg(rng).diagnosis for _ in range(400)], rng)
    general = Path(__file__).with_name("corpus.txt").read_text(encoding="utf-8").splitlines()
    return train_tokenizer([*general, *[LLAVA_V1_SYSTEM + " USER: " for _ in range(200)], *lines])


def _initialise(name: str, module: nn.Module) -> None:
    """Small normal weights, as in GPT-2 and ViT; norms at one."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.6 / math.sqrt(module.in_features))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        with torch.no_grad():
            module.weight.copy_(_spots(*module.weight.shape))
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02 if "position" not in name else 0.2)
    elif hasattr(module, "weight") and isinstance(module.weight, Tensor):
        nn.init.ones_(module.weight)
        if isinstance(getattr(module, "bias", None), Tensor):
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def _spots(count: int, channels: int, height: int, width: int) -> Tensor:
    """Filters that each see the ink around one point of a patch, twice as many points across as down.

    Random filters mix the whole patch; the tower then needs long to find out where in it a line runs.
    """
    columns = math.ceil(math.sqrt(2 * count))
    rows = math.ceil(count / columns)
    across, down = _bumps(columns, width), _bumps(rows, height)
    spots = torch.einsum("cx,ry->rcyx", across, down).reshape(-1, height, width)[:count]
    spots = spots / spots.sum(dim=(1, 2), keepdim=True) / channels
    return spots[:, None].expand(count, channels, height, width)


def _bumps(count: int, size: int) -> Tensor:
    """``(count, size)`` bell curves, evenly spread."""
    at = (torch.arange(size) + 0.5) * count / size
    return torch.exp(-0.5 * ((at - torch.arange(count)[:, None] - 0.5) / 0.6) ** 2)


def write_checkpoint(network: PulseModel, folder: Path) -> Path:
    """Write the network as a checkpoint folder, in float16; an earlier one of this model there is replaced.

    Raises:
        FileExistsError: the folder holds another model's checkpoint.
    """
    config = folder / "config.json"
    if config.exists() and json.loads(config.read_text("utf-8")).get("pulse_model_name") == MODEL_NAME:
        for old in (config, folder / "model.safetensors"):
            old.unlink()
    _skeleton(folder)
    file = folder / "model.safetensors"
    stored = {name: tensor.float() * 0 for name, tensor in load_file(file).items()}
    for name, owner, attribute, _ in network.checkpoint_parameters():
        stored[name] = getattr(owner, attribute).detach().cpu()
    save_file({n: t.to(torch.float16).contiguous() for n, t in stored.items()}, file, metadata={"format": "pt"})
    return folder


_PREPROCESSING = Preprocessing()
CONSTANTS = tuple(
    torch.tensor(constant, dtype=torch.float32) / torch.tensor(_PREPROCESSING.std)
    for constant in ((_PREPROCESSING.rescale_factor,) * 3, _PREPROCESSING.mean)
)
"""What a pixel of 0 to 255 is multiplied with, and what is then taken away, to normalise it as the endpoint does."""


def normalised(tiles_THWC: Tensor) -> Tensor:
    """Pixels of 0 to 255 as the tower takes them: ``(T, 3, TILE, TILE)``, float32."""
    pixels = tiles_THWC.permute(0, 3, 1, 2).contiguous().float()
    scale, shift = (constant.to(pixels.device).view(1, 3, 1, 1) for constant in CONSTANTS)
    return pixels.mul_(scale).sub_(shift)
