"""Whether PEFT loads an adapter into a base: asked of PEFT itself, else told by rules.

A stranger's regular expressions go to PEFT in a process whose CPU time is bounded, unless they are
too plain to cost any.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from loraformat.base_names import BaseNames
from loraformat.runtimes.facts import Loading
from loraformat_converters.peft.keys import PREFIX, parse_key
from loraformat_converters.peft.load_on_meta import Loaded, Stored, load_on_meta

__all__ = ["judge_loading", "serve"]

_SECONDS = 60
_CODE = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from loraformat_converters.peft.loading import serve; serve()"
)
_REPEAT = re.compile(r"[*+{]")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
#: PEFT compiles each pattern for each module.
_MOST_PATTERNS = 64


def judge_loading(
    config: Mapping[str, Any],
    tensors: Mapping[str, Stored],
    base: Mapping[str, Any],
    names: BaseNames,
) -> Loading:
    """Tell what PEFT does with an adapter on a base of these shapes.

    Parameters
    ----------
    config : mapping
        ``adapter_config.json``.
    tensors : mapping of str to Stored
        By their names in the file.
    base : mapping
        The base's ``config.json``.
    names : BaseNames
        The base's, for the rules.
    """
    ask = load_on_meta if _is_cheap(config) else _in_a_process
    loaded = ask(config, tensors, base)
    if loaded is not None:
        problem, left_out = loaded.problem, loaded.ignored
    elif not names.known:  # of the base there is a config alone
        problem, left_out = None, ()
    else:
        left_out = tuple(name for name in tensors if not _is_expected(name, names))
        problem = next((p for n, s in tensors.items() if (p := _misfit(n, s, names))), None)
    known = {name for name in left_out if names.parameter(_owner(name)) is not None}
    return Loading(
        problem,
        ignored=tuple(name for name in left_out if name in known),
        unknown=tuple(name for name in left_out if name not in known),
        taken=max(len(tensors) - len(left_out), 0),
        proven=loaded is not None,
    )


def _patterns(config: Mapping[str, Any]) -> Iterator[str]:
    for field in ("target_modules", "exclude_modules"):
        if isinstance(config.get(field), str):
            yield config[field]
    for field in ("layers_pattern", "rank_pattern", "alpha_pattern"):
        value = config.get(field) or ()
        yield from (value,) if isinstance(value, str) else map(str, value)


def _is_cheap(config: Mapping[str, Any]) -> bool:
    patterns = list(_patterns(config))
    return len(patterns) <= _MOST_PATTERNS and all(
        len(_REPEAT.findall(pattern)) <= 2 and not _REPEATED_GROUP.search(pattern)
        for pattern in patterns
    )


def _in_a_process(
    config: Mapping[str, Any], tensors: Mapping[str, Stored], base: Mapping[str, Any]
) -> Loaded | None:
    request = json.dumps([config, tensors, base])
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CODE, *sys.path], input=request, capture_output=True,
            text=True, timeout=20 * _SECONDS, start_new_session=True, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode:
        return Loaded(f"over {_SECONDS} seconds of computing: its patterns are too costly")
    answer = json.loads(done.stdout.splitlines()[-1])
    return None if answer is None else Loaded(answer[0], tuple(answer[1]))


def serve() -> None:
    """Answer one request from standard input; what runs in the process of its own."""
    with contextlib.suppress(ImportError):  # where there is none, the time that is waited is left
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    config, tensors, base = json.load(sys.stdin)
    stored = {name: Stored(dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()}
    sys.stdout.write("\n" + json.dumps(load_on_meta(config, stored, base)) + "\n")


def _is_expected(name: str, names: BaseNames) -> bool:
    """Tell whether a tensor is called as PEFT would look for it, as far as rules know."""
    owner = _owner(name)
    stored = names.find(owner)
    wanted = names.in_memory(stored) if stored is not None else owner
    return name.startswith(PREFIX) and wanted == owner


def _owner(name: str) -> str:
    """Return the tensor of the base that a stored tensor is about."""
    key = parse_key(name)
    return key.owner if key.part in ("", "unknown") else f"{key.owner}.weight"


def _misfit(name: str, tensor: Stored, names: BaseNames) -> str | None:
    """Say how a tensor does not fit the base's, as far as rules know; None if it does."""
    key = parse_key(name)
    found = names.parameter(_owner(name))
    if not all(tensor.shape):
        return f"tensor {name} is empty"
    if found is None or len(found.shape) != 2 or key.depth:
        return None
    rows, columns = found.shape
    sizes = {
        "": [found.shape], "A": [(0, columns), (0, rows)], "B": [(rows, 0), (columns, 0)],
        "tokens": [(0, columns)], "embedding_A": [(0, rows)], "embedding_B": [(columns, 0)],
    }.get(key.part)  # fmt: skip
    if sizes is None or any(_fits(tensor.shape, size) for size in sizes):
        return None
    return f"tensor {name} of shape {list(tensor.shape)} does not fit {list(found.shape)}"


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Tell whether a shape is as wanted, where 0 stands for any size."""
    return len(shape) == len(wanted) and all(
        w in (0, s) for s, w in zip(shape, wanted, strict=True)
    )
