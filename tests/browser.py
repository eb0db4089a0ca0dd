"""A headless Chromium for the tests of the page: the machine's own, else one that npm or apt-get can install.

Playwright drives it; its own download of a browser is not used.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import playwright
from filelock import FileLock
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).parents[1]
NODE = Path(playwright.__file__).parent / "driver" / "node"
"""Playwright brings its own Node.js; the tests run JavaScript with it."""

NPM_PACKAGE = "@sparticuz/chromium@153.0.0"
_INSTALLED = ROOT / "build" / "browser"
_ON_PATH = ("chromium", "chromium-headless-shell", "google-chrome", "google-chrome-stable", "chromium-browser")
_TOLD: dict[str, Any] = {"capture_output": True, "text": True}
_UNPACK = (
    "const [from, to] = process.argv.slice(1), fs = require('fs'), zlib = require('zlib');"
    "require('stream').pipeline(fs.createReadStream(from), zlib.createBrotliDecompress(), fs.createWriteStream(to),"
    "(error) => { if (error) throw error; })"
)


class NoBrowserError(Exception):
    """There is no Chromium and no way to get one; the message says what to do."""


@dataclass(frozen=True)
class Chromium:
    """An executable, and what its environment needs besides the caller's."""

    executable: Path
    environment: dict[str, str] = field(default_factory=dict)

    def works(self) -> bool:
        """Whether it starts at all: libraries can be missing."""
        command = [str(self.executable), "--version"]
        try:
            return not subprocess.run(command, env=os.environ | self.environment, **_TOLD, check=False).returncode
        except OSError:
            return False


@contextmanager
def launched(chromium: Chromium) -> Iterator[Browser]:
    """A browser that speaks to this machine alone: none of its services calls home."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium.executable,
            env={**os.environ, **chromium.environment},
            args=["--disable-background-networking", "--disable-component-update"],
        )
        try:
            yield browser
        finally:
            browser.close()


def chromium() -> Chromium:
    """A Chromium that works; where several processes test at once, one of them installs it.

    Raises:
        NoBrowserError: none is installed, npm got none, and apt-get is not ours to use.
        RuntimeError: apt-get failed.
    """
    (ROOT / "build").mkdir(exist_ok=True)
    with FileLock(ROOT / "build" / "browser.lock"):
        return _chromium()


def _chromium() -> Chromium:
    on_path = [path for name in _ON_PATH if (path := shutil.which(name))]
    for candidate in (os.environ.get("CHROMIUM_PATH"), *on_path):
        if candidate and (found := Chromium(Path(candidate))).works():
            return found
    if shutil.which("npm") and (found := _from_npm()).works():
        return found
    if os.geteuid() == 0 and shutil.which("apt-get"):
        return _from_apt()
    raise NoBrowserError(
        "No Chromium: install one (Debian: apt-get install chromium-headless-shell), or npm, which the tests then use "
        "to install one into build/, or set CHROMIUM_PATH to its executable."
    )


def _from_npm() -> Chromium:
    """A Chromium from inside an npm package, with the libraries and the font that a bare machine lacks."""
    unpacked = _INSTALLED / NPM_PACKAGE.rpartition("@")[2]
    if not unpacked.exists():
        shutil.rmtree(_INSTALLED, ignore_errors=True)
        options = ["--no-save", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        _INSTALLED.mkdir(parents=True)
        (_INSTALLED / "package.json").write_text("{}")
        subprocess.run(["npm", "install", *options, NPM_PACKAGE], cwd=_INSTALLED, **_TOLD, check=False)
        packed = _INSTALLED / "node_modules" / NPM_PACKAGE.rpartition("@")[0] / "bin"
        if packed.exists():
            _unpack(packed, _INSTALLED / "unpacking").rename(unpacked)
    libraries = [str(unpacked / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
    environment = {
        "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
        "FONTCONFIG_FILE": str(unpacked / "fonts.conf"),
    }
    return Chromium(unpacked / "chromium", environment)


def _unpack(packed: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in ("chromium", "al2023.tar", "fonts.tar"):
        subprocess.run([str(NODE), "-e", _UNPACK, str(packed / f"{name}.br"), str(folder / name)], check=True)
    for name in ("al2023.tar", "fonts.tar"):
        with tarfile.open(folder / name) as archive:
            archive.extractall(folder, filter="data")
        (folder / name).unlink()
    (folder / "chromium").chmod(0o755)
    # The path that the file will have once the folder has its final name.
    fonts = _INSTALLED / NPM_PACKAGE.rpartition("@")[2] / "fonts"
    (folder / "fonts.conf").write_text(
        '<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd"><fontconfig>'
        f'<include ignore_missing="yes">/etc/fonts/fonts.conf</include><dir>{fonts}</dir>'
        '<alias binding="strong"><family>sans-serif</family><prefer><family>Open Sans</family></prefer></alias>'
        "</fontconfig>"
    )
    return folder


def _from_apt() -> Chromium:
    for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium-headless-shell"]):
        done = subprocess.run(["apt-get", "-q", "-o", "DPkg::Lock::Timeout=120", *command], **_TOLD, check=False)
        if done.returncode:
            raise RuntimeError(f"apt-get {command[0]} failed: {done.stderr.strip()[-300:]}")
    return Chromium(Path(shutil.which("chromium-headless-shell") or "/usr/bin/chromium-headless-shell"))
