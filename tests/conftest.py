"""What tests of files and processes share: a small model, and the command line as a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Two workers of pytest share the cores, so no thread may spin while it waits; see loraformat.cli.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tools.crash import digests, write_model


@pytest.fixture
def model(tmp_path):
    """A small dense model; five tensors outside layers and six layers, so that shards are many."""
    return write_model(tmp_path / "model")


@pytest.fixture
def snapshot():
    """Returns the SHA-256 of every file under a directory."""
    return digests


@pytest.fixture
def command(tmp_path):
    """Runs ``python -m loraformat`` in a process and returns it, finished."""

    def run(*arguments, **options):
        return subprocess.run(
            [sys.executable, "-m", "loraformat", *map(str, arguments)],
            capture_output=options.pop("capture_output", True),
            text=True, timeout=120, cwd=options.pop("cwd", tmp_path),
            env={**environment(tmp_path), **options.pop("env", {})}, **options,
        )  # fmt: skip

    return run


@pytest.fixture
def start(tmp_path):
    """Starts ``python ARGUMENTS`` and kills what is still running at the end."""
    running = []

    def begin(*arguments, **options):
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=options.pop("cwd", tmp_path),
            env={**environment(tmp_path), **options.pop("env", {})}, **options,
        )  # fmt: skip
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def environment(home: Path) -> dict[str, str]:
    """The environment of a child: never the real Hub, never the user's own cache."""
    return {
        **os.environ,
        "HF_HOME": str(home / "hf-home"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONWARNINGS": "ignore",
    }
