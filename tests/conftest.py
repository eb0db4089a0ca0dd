"""What the tests share: the demo checkpoint, a handler on it, an image.  Torch waits for the fixtures that need it."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
from PIL import Image, ImageDraw

from pulse_ecg.params import GenerationParams, load_defaults
from pulse_ecg.tokenizer import Tokenizer

if TYPE_CHECKING:
    from handler import EndpointHandler

ROOT = Path(__file__).parents[1]

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: our kernels then run on a CPU

# The same examples on every machine; `pytest --hypothesis-profile=explore` looks for new ones.  The time that one takes
# says more about a shared machine than about the code.
for profile, derandomised in (("project", True), ("explore", False)):
    hypothesis.settings.register_profile(
        profile,
        deadline=None,
        derandomize=derandomised,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
        print_blob=True,
    )
hypothesis.settings.load_profile("project")


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint in the real layout."""
    from demo.build_checkpoint import build_checkpoint

    return build_checkpoint(tmp_path_factory.mktemp("checkpoint") / "demo")


@pytest.fixture(scope="session")
def demo_tokenizer(demo_checkpoint: Path) -> Tokenizer:
    """The demo checkpoint's tokenizer, as the handler reads it."""
    return Tokenizer.from_folder(demo_checkpoint)


@pytest.fixture(scope="session")
def handler(demo_checkpoint: Path) -> EndpointHandler:
    """A handler on the demo checkpoint, on CPU, without a commentary key or any other setting of the environment."""
    from handler import EndpointHandler

    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("PULSE_", "DEEPSEEK_")) or n == "deep_key"]:
            patch.delenv(name)
        patch.setenv("PULSE_DEVICE", "cpu")
        return EndpointHandler(str(demo_checkpoint))


@pytest.fixture(scope="session")
def default_params() -> GenerationParams:
    """The project's own defaults."""
    return load_defaults(ROOT)


@pytest.fixture(scope="session")
def sample_png() -> bytes:
    """A small drawing, 500 x 400: a grid and a trace, different in every quarter."""
    image = Image.new("RGB", (500, 400), (255, 250, 249))
    pen = ImageDraw.Draw(image)
    for at in range(0, 500, 20):
        pen.line((at, 0, at, 400), fill=(240, 180, 175))
        pen.line((0, at, 500, at), fill=(240, 180, 175))
    beat = [(0, 0), (20, -8), (40, 0), (50, 10), (56, -90), (62, 30), (70, 0), (100, -25), (125, 0)]
    for row in range(3):
        trace = [(125 * n + x, 100 + 120 * row + y * (row + 1) / 2) for n in range(4) for x, y in beat]
        pen.line(trace, fill=(20, 20, 20), width=2)
    pen.rectangle((400, 10, 480, 40), fill=(30, 60, 160))
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
