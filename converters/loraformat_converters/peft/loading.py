"""Whether PEFT loads an adapter into a base: known, tested with PEFT, or estimated by rules.

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
from dataclasses import dataclass
from typing import Any

from loraformat.model.adapter_facts import Loading
from loraformat.model.base_names import BaseNames, Parameter
from loraformat.model.tied_head import HEAD
from loraformat.model.vocabulary import is_per_token
from loraformat_converters.peft.keys import PREFIX, parse_key
from loraformat_converters.peft.load_on_meta import Loaded, Stored, load_on_meta
from loraformat_converters.peft.plain import is_plain

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
    adapter: str = "default",
    tied: str | None = None,
) -> Loading:
    """Tell what PEFT does with an adapter on a base, both by their configs.

    ``adapter`` is its own name, if that is in the tensors' names, and ``tied`` the base's
    embedding, if that is its head, too.
    """
    ask = load_on_meta if _is_cheap(config) else _in_a_process
    plain = is_plain(config, tensors, base, names)
    loaded = Loaded() if plain else ask(config, tensors, base)
    held = _Held(names, adapter, tied)
    misfits = {n: s for n, t in tensors.items() if (s := held.misfit(n, t)) is not None}
    if loaded is not None:
        problem, left_out = loaded.problem, loaded.ignored
    elif not names.known:  # of the base there is a config alone
        problem, left_out = None, ()
    else:
        left_out = tuple(name for name in tensors if not held.is_expected(name))
        problem = next(iter(misfits.values()), None)
    known = {name for name in tensors if held.parameter(name) is not None}
    placed = all(name in known or held.is_of_experts(name) for name in tensors)
    return Loading(
        problem,
        ignored=tuple(name for name in left_out if name in known or held.is_of_experts(name)),
        unknown=tuple(
            name for name in left_out if name not in known and not held.is_of_experts(name)
        ),
        taken=max(len(tensors) - len(left_out), 0),
        proven=loaded is not None,
        fits=placed and not misfits,
        vocabularies=held.vocabularies({n: tensors[n] for n in misfits}) if placed else None,
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
    """Answer one request from standard input; entry point of the child process."""
    with contextlib.suppress(ImportError):  # where there is none, the time that is waited is left
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    config, tensors, base = json.load(sys.stdin)
    stored = {name: Stored(dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()}
    sys.stdout.write("\n" + json.dumps(load_on_meta(config, stored, base)) + "\n")


@dataclass(frozen=True)
class _Held:
    """Comparison of an adapter's tensors with a base by rules."""

    names: BaseNames
    adapter: str
    tied: str | None

    def owner(self, name: str) -> str:
        """Return the base tensor of a stored tensor."""
        key = parse_key(name, self.adapter)
        return key.owner if key.part in ("", "original", "unknown") else f"{key.owner}.weight"

    def parameter(self, name: str) -> Parameter | None:
        """Return the base parameter of a stored tensor."""
        owner = self.owner(name)
        found = self.names.parameter(owner)
        if found is None and self.tied is not None and owner.endswith(HEAD):
            return self.names.parameter(self.tied)
        return found

    def is_of_experts(self, name: str) -> bool:
        """Tell whether a tensor belongs to fused experts."""
        key = parse_key(name, self.adapter)
        return key.depth > 0 or f"{key.owner}.".count(".experts.") > 0

    def is_expected(self, name: str) -> bool:
        """Tell whether a tensor has the name that PEFT expects."""
        owner = self.owner(name)
        stored = self.names.find(owner)
        wanted = self.names.in_memory(stored) if stored is not None else owner
        return name.startswith(PREFIX) and wanted == owner

    def misfit(self, name: str, tensor: Stored) -> str | None:
        """Return how a tensor's shape differs from the base's; None if it fits."""
        found = self.parameter(name)
        if not all(tensor.shape):
            return f"tensor {name} is empty"
        sizes = self._sizes(name, found)
        if found is None or sizes is None or any(_fits(tensor.shape, size) for size in sizes):
            return None
        return f"tensor {name} of shape {list(tensor.shape)} does not fit {list(found.shape)}"

    def vocabularies(self, misfits: Mapping[str, Stored]) -> tuple[int, int] | None:
        """Return the vocabulary sizes of adapter and base, if only they differ."""
        pairs = {self._tokens(name, tensor) for name, tensor in misfits.items()}
        return pairs.pop() if len(pairs) == 1 else None

    def _tokens(self, name: str, tensor: Stored) -> tuple[int, int] | None:
        found, part = self.parameter(name), parse_key(name, self.adapter).part
        place = {"": 0, "original": 0, "B": 0, "embedding_A": 1}.get(part)
        if found is None or place is None or not is_per_token(self.owner(name)):
            return None
        if len(tensor.shape) < 2 or (
            part in ("", "original") and tensor.shape[1:] != found.shape[1:]
        ):
            return None
        return tensor.shape[place], found.shape[0]

    def _sizes(self, name: str, found: Parameter | None) -> list[tuple[int, ...]] | None:
        """Return the shapes that a tensor may have, 0 for any size; None if no rule knows."""
        key = parse_key(name, self.adapter)
        if found is None or len(found.shape) != 2 or key.depth:
            return None
        rows, columns = found.shape
        sizes: dict[str, list[tuple[int, ...]]] = {
            "": [found.shape], "original": [found.shape], "A": [(0, columns), (0, rows)],
            "B": [(rows, 0), (columns, 0)], "tokens": [(0, columns)], "embedding_A": [(0, rows)],
            "embedding_B": [(columns, 0)],
        }  # fmt: skip
        return sizes.get(key.part)


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Tell whether a shape is as wanted, where 0 stands for any size."""
    return len(shape) == len(wanted) and all(
        w in (0, s) for s, w in zip(shape, wanted, strict=True)
    )
