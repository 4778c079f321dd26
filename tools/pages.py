"""Pages whose commands are run: their blocks, how each is run, and what of its output counts.

In such a page every block of ``sh`` and ``python`` is run, from the first to the last, in one
directory. A block of ``text`` right behind one is what it printed. A command that is meant to
end otherwise than well says so: ``# exit code 4``. What is not run stands in ``text`` alone.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from loraformat.demo import SMALL_MODEL

__all__ = [
    "Example",
    "elided",
    "examples",
    "figures",
    "loopback_hub",
    "run",
    "with_outputs",
    "wording",
]

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(
    r"^```(?P<language>sh|python)\n(?P<code>.*?)^```\n(?:\n```text\n(?P<shown>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
_SHELL = 'loraformat() { "$PYTHON" -m loraformat "$@"; }\npython() { "$PYTHON" "$@"; }\n'
_MOST_SECONDS = 540


@dataclass(frozen=True, slots=True)
class Example:
    """One block, and what the page says that it prints; None: it says nothing of it."""

    language: str
    code: str
    shown: str | None

    @property
    def exit_code(self) -> int:
        """Return what the last command is meant to end with."""
        found = re.search(r"# exit code (\d+)", self.code)
        return int(found[1]) if found else 0


def examples(page: str) -> list[Example]:
    """Return a page's blocks that are run, in order."""
    return [Example(m["language"], m["code"], m["shown"]) for m in _BLOCK.finditer(page)]


def run(example: Example, folder: Path, variables: dict[str, str]) -> str:
    """Run a block in a folder and return what it prints on stdout.

    Raises
    ------
    AssertionError
        If it ends otherwise than the page says.
    """
    command = [sys.executable, "-c", example.code]
    if example.language == "sh":
        command = ["bash", "-euc", _SHELL + example.code]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=_MOST_SECONDS,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables},
    )  # fmt: skip
    if done.returncode != example.exit_code:
        raise AssertionError(f"{example.code}exit code {done.returncode}\n{done.stderr[-4000:]}")
    # Neither where it was run nor the port of a Hub of the tests is for the page.
    output = done.stdout.replace(f"{folder.resolve()}/", "").replace(f"{folder}/", "")
    endpoint = variables.get("HF_ENDPOINT", "https://huggingface.co")
    return output.replace(endpoint, "https://huggingface.co")


def elided(output: str) -> str:
    """Leave out the middle of a table of modules."""
    rows = output.rstrip("\n").split("\n")
    modules = [number for number, row in enumerate(rows) if row.startswith("model.layers.")]
    if len(modules) > 4:
        rows[modules[2] : modules[-1]] = ["..."]
    return "\n".join(rows) + "\n" if output else output


def with_outputs(page: str, folder: Path, variables: dict[str, str]) -> str:
    """Run a page and return it with what its blocks print now."""

    def renewed(found: re.Match[str]) -> str:
        example = Example(found["language"], found["code"], found["shown"])
        output = elided(run(example, folder, variables))
        block = f"```{example.language}\n{example.code}```\n"
        return block if example.shown is None else f"{block}\n```text\n{output}```\n"

    return _BLOCK.sub(renewed, page)


def wording(text: str) -> str:
    """Return a command's output without what another machine may print otherwise.

    Numbers, hashes, durations and the units of sizes are left out, and runs of white space.
    """
    text = re.sub(r"\b[0-9a-f]{7,64}\b", "0", text)
    text = re.sub(r"\d+ min( \d+ s)?", "0 s", text)
    text = re.sub(r"\b[kMG]B\b", "B", text)
    return " ".join(re.sub(r"\d[\d.,]*(e-\d+)?", "0", text).split())


def figures(text: str) -> list[float]:
    """Return the numbers of a command's output, but for durations."""
    text = re.sub(r"\d+ min|\d+(\.\d+)? s\b", "", text)
    return [float(number.replace(",", "")) for number in re.findall(r"\d+(?:,\d{3})*\.?\d*", text)]


@contextmanager
def loopback_hub(home: Path) -> Iterator[dict[str, str]]:
    """Serve the tests' Hub with the small model's config; yield the variables that lead to it."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    fake = import_module("tests.hub.fake_hub")
    server, thread = fake.serve()
    files = {"config.json": (SMALL_MODEL / "config.json").read_bytes()}
    base = fake.Repository(files, "d" * 40, card={"license": "apache-2.0"})
    server.repositories["org/small-python"] = base
    try:
        yield {
            "HF_ENDPOINT": server.endpoint,
            "HF_TOKEN": fake.TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
