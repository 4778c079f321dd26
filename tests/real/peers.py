"""Programs that messages send users to, in ``.venv/peers``: ``make real`` puts them there."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["commands", "follow", "peer_module", "start"]

_PEERS = Path(sys.prefix) / "peers"
_ROOT = Path(__file__).parents[2]
_COMMAND = re.compile(r"(?:mlx_lm\.\w+|loraformat|python) [^;,(]*[^;,( ]")


def commands(hint: str) -> list[list[str]]:
    """Return the command lines that a hint names, as words.

    Examples
    --------
    >>> commands("merge it: loraformat merge BASE A -o OUT (of it); mlx_lm.fuse --model BASE")
    [['loraformat', 'merge', 'BASE', 'A', '-o', 'OUT'], ['mlx_lm.fuse', '--model', 'BASE']]
    """
    return [shlex.split(found) for found in _COMMAND.findall(hint)]


def follow(command: list[str], **given: Path | str) -> None:
    """Run a command of a hint with a path or number in the place of each word in capitals."""
    assert all(word in given for word in command if word.isupper()), command
    words = [str(given.get(word, word)) for word in command]
    program, rest = words[0], words[1:]
    if program.startswith("mlx_lm."):
        start("-m", "mlx_lm", program.removeprefix("mlx_lm."), *rest)
    elif program == "loraformat":
        start("-m", "loraformat", *rest)
    else:
        start(*rest)


def start(*arguments: str | Path, times: int = 1) -> None:
    """Run Python with the peers, ``times`` processes of one group at once; all must succeed."""
    assert _PEERS.is_dir(), "the peers are not installed; `make real` does"
    running = []
    for rank in range(times):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(times)}
        path = os.pathsep.join([str(_PEERS), str(_ROOT)])
        environment = os.environ | {"PYTHONPATH": path} | (ranks if times > 1 else {})
        words = [sys.executable, *map(str, arguments)]
        running.append(
            subprocess.Popen(
                words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    for process in running:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said


def peer_module(name: str) -> ModuleType:
    """Import a module of a peer without running its packages' own files, which import much more."""
    package, _, _ = name.partition(".")
    parents = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
    for parent in parents:
        empty = ModuleType(parent)
        empty.__path__ = [str(_PEERS.joinpath(*parent.split(".")))]
        sys.modules[parent] = empty
    try:
        return importlib.import_module(name)
    finally:
        for known in [one for one in sys.modules if one.partition(".")[0] == package]:
            del sys.modules[known]
