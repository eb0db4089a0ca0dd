"""How the code is laid out: imports run downward, light modules stay light, everything public says what it is for."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "pulse_ecg"
MODULES = sorted(PACKAGE.rglob("*.py"))
SERVER = sorted((ROOT / "server").glob("*.py"))
SOURCES = [*MODULES, *SERVER, ROOT / "handler.py", ROOT / "serve.py"]
WITHOUT_TORCH = ["admission", "call", "cancellation", "config", "errors", "fetch", "images", "params", "prompt"]
WITHOUT_TORCH += ["request", "text_stream"]
# Every chain runs downward; this is the one that a reader follows.
READING_ORDER = ["analyzer", "engine.scheduler", "generation", "text_stream", "tokenizer", "errors"]


def dotted(file: Path) -> str:
    """A module's name within the package: ``generation``, ``engine.slots``."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def imported(file: Path) -> set[str]:
    """Every module that a file imports, wherever in it; of ``from a import b`` both ``a`` and ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno} has a relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def neighbours(file: Path) -> set[str]:
    """The modules of the package that a file imports."""
    names = imported(file)
    return {dotted(module) for module in MODULES if f"pulse_ecg.{dotted(module)}" in names}


def test_imports_run_downward_only() -> None:
    graph = {dotted(module): neighbours(module) for module in MODULES}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError where they run in a circle
    assert graph["errors"] == set()
    places = [order.index(name) for name in reversed(READING_ORDER)]
    assert places == sorted(places)
    assert not any("analyzer" in uses for uses in graph.values())


@pytest.mark.parametrize("module", MODULES, ids=lambda file: file.stem)
def test_the_package_knows_nothing_of_what_stands_on_it(module: Path) -> None:
    tops = {name.partition(".")[0] for name in imported(module)}
    assert not tops & {"handler", "utils", "serve", "commentary", "monitoring", "demo", "tests", "benchmarks"}


def test_the_servers_imports_run_downward_from_its_start() -> None:
    """And the handler is imported where the model is loaded alone: the port is open before."""
    uses = {module.stem: imported(module) for module in SERVER if module.stem != "__init__"}
    graph = {stem: {other for other in uses if f"server.{other}" in names} for stem, names in uses.items()}
    assert list(TopologicalSorter(graph).static_order())[-1] == "run"
    assert [stem for stem, names in uses.items() if "handler" in names] == ["service"]


def test_starting_the_server_imports_no_torch() -> None:
    code = "import sys, server.run; print(*sorted({'torch', 'transformers', 'handler', 'openai'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_light_modules_import_no_torch(name: str) -> None:
    code = (
        f"import sys, pulse_ecg.{name}; "
        "print(*sorted({'torch', 'transformers', 'accelerate', 'huggingface_hub'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_one_package_alone_knows_vllm_and_is_imported_when_it_is_asked_for() -> None:
    users = {dotted(module) for module in MODULES if any(n.partition(".")[0] == "vllm" for n in imported(module))}
    assert users and all(user.startswith("vllm_engine.") for user in users)
    code = "import sys, handler; print(*sorted(n for n in sys.modules if n == 'vllm' or 'vllm_engine.e' in n))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


SIGNALS = {"slots.Stored"}  # no errors: whoever starts what ends with one catches it


def test_errors_are_raised_from_one_tree() -> None:
    """No module but ``errors`` defines an exception: what is caught at the host's boundary is known."""
    for module in MODULES:
        if module.stem != "errors":
            for node in ast.walk(parsed(module)):
                if isinstance(node, ast.ClassDef) and f"{module.stem}.{node.name}" not in SIGNALS:
                    bases = [ast.unparse(base) for base in node.bases]
                    assert not any(base.endswith(("Error", "Exception")) for base in bases), (
                        f"{module.stem}.{node.name}"
                    )


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def public(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Definition]]:
    """Classes, functions and methods that others may use, by their full names."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield f"{prefix}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}.{node.name}")


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.stem)
def test_everything_public_has_a_docstring(file: Path) -> None:
    module = parsed(file)
    assert ast.get_docstring(module), f"{file.name} has no docstring"
    missing = [name for name, node in public(module.body, file.stem) if not ast.get_docstring(node)]
    assert not missing


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.stem)
def test_every_function_is_annotated(file: Path) -> None:
    """But kernels, whose arguments are pointers and numbers of another machine."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            assert not bare, f"{file.name}:{node.lineno}"
            assert node.returns is not None, f"{file.name}:{node.lineno}"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.stem)
def test_no_print_and_no_emoji(file: Path) -> None:
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) != "print", f"{file.name}:{node.lineno}"
    pictures = {
        c for c in file.read_text("utf-8") if ord(c) >= 0x1F000 or 0x2600 <= ord(c) <= 0x27BF or ord(c) == 0xFE0F
    }
    assert not pictures
