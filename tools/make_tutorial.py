"""Write the outputs in docs/adapters.md anew, by running its commands on the small model.

A test holds the page to what the commands print; run this after their words have changed::

    python tools/make_tutorial.py

In a long table of modules only the first two rows and the last are shown.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from loraformat.demo import ADAPTERS, SMALL_MODEL

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adapters.md"
SHOWN = re.compile(r"^```sh\n(loraformat .*)\n```\n\n```text\n((?:.*\n)*?)```$", re.MULTILINE)


def output(line: str, folder: Path) -> str:
    """Run a command in a folder and return what it prints, without the middle of a table."""
    command = [sys.executable, "-m", "loraformat", *shlex.split(line)[1:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    rows = done.stdout.rstrip("\n").split("\n")
    modules = [number for number, row in enumerate(rows) if row.startswith("model.layers.")]
    if len(modules) > 4:
        rows[modules[2] : modules[-1]] = ["..."]
    return "\n".join(rows) + "\n"


def main() -> None:
    """Rewrite the page."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, source in {"my-model": SMALL_MODEL, **ADAPTERS}.items():
            shutil.copytree(source, folder / name)
        text = SHOWN.sub(
            lambda m: f"```sh\n{m[1]}\n```\n\n```text\n{output(m[1], folder)}```",
            PAGE.read_text(encoding="utf-8"),
        )
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
