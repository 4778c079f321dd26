"""LoRA on parameters (``target_parameters``), such as fused experts.

PEFT wraps a module once for each of its parameters that it adapts. The tensors' names say
how deep a wrapper lies (``.base_layer``), not which parameter it is for: the innermost is for
the first parameter of the module. For E experts of rank r, A is (E r, in), expert after
expert, and B is (out, r E), the expert counting fastest; the scaling is by r. The weights are
(E, out, in) in most models and (E, in, out) in some, and PEFT before 0.19 took all for the
second kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import permutations
from pathlib import Path

from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.families.expert_names import EXPERT_LEAVES, parameter_order, spelled_in_memory
from loraformat.families.table import family_of
from loraformat.model.adapter import LoraDelta
from loraformat.model.base_names import BaseNames, Parameter
from loraformat.model.checkpoint import Checkpoint, DenseTensor
from loraformat.model.config_json import parse
from loraformat.tensors.arrays import array_bytes
from loraformat_converters.peft.config import LoraSettings

__all__ = ["ExpertReader", "stacked"]

_SINCE = (0, 19)
_GIVE_BASE = "name the base (--base), whose shapes decide it"
_GIVE_VERSION = (
    "its experts are square: add the version of PEFT that wrote it to adapter_config.json, for "
    'example "peft_version": "0.19.0"'
)

Pair = tuple[DenseTensor, DenseTensor]


class ExpertReader:
    """Reader that converts the factors of wrapped parameters to deltas."""

    def __init__(
        self, settings: LoraSettings, base: Checkpoint | None, names: BaseNames | None, path: Path
    ) -> None:
        self._settings, self._base, self._names, self._path = settings, base, names, path
        self._transposed = self._is_transposed()

    def _is_transposed(self) -> bool:
        """Tell whether the model stores experts as (E, in, out)."""
        if self._base is None or not self._base.config:
            named = str(self._settings.config.get("base_model_name_or_path") or "").lower()
            return "gpt-oss" in named or "gpt_oss" in named
        return family_of(parse(self._base.config)).transposed_experts

    def parameters(self, module: str, depths: Sequence[int]) -> list[str]:
        """Return the names of a module's wrapped parameters; [] if it is an ordinary layer."""
        named = self._settings.parameters_of(module)
        there = [leaf for _, leaf in named if self._find(module, leaf) is not None]
        sure = [leaf for home, leaf in named if home or module.endswith("experts") or max(depths)]
        found = list(dict.fromkeys(there or sure))
        if max(depths) and len(found) != len(depths):
            raise InputError(
                f"module {printable(module)} is wrapped for {len(depths)} parameters, and "
                f"target_parameters names {len(found)} of it ({printable(', '.join(found))})",
                path=self._path,
                hint=_GIVE_BASE if self._base is None else "was it made for another base?",
            )
        return found if len(found) == len(depths) else []

    def _find(self, module: str, leaf: str) -> Parameter | None:
        """Return a parameter as the base has it, if that is known."""
        name = f"{module}.{leaf}"
        if self._base is None or self._names is None:
            return None
        if (found := self._names.parameter(name)) is not None:
            return found
        for leaves in EXPERT_LEAVES.get(leaf, ()):
            first = self._names.find(f"{module}.0.{leaves[0]}.weight")
            if first is not None:
                return self._fused(first, leaf, leaves, name)
        return None

    def _shape(self, module: str, leaf: str) -> tuple[int, ...] | None:
        found = self._find(module, leaf)
        return None if found is None else found.shape

    def _fused(self, first: str, leaf: str, leaves: tuple[str, ...], name: str) -> Parameter | None:
        """Return the fused shape of the experts' separate tensors."""
        assert self._base is not None
        tensors = self._base.tensors
        home = first.removesuffix(f".0.{leaves[0]}.weight")
        experts = 0
        while f"{home}.{experts}.{leaves[0]}.weight" in tensors:
            experts += 1
        shapes = [tensors[n].shape for n in (f"{home}.0.{part}.weight" for part in leaves)
                  if n in tensors]  # fmt: skip
        if len(shapes) != len(leaves) or any(len(shape) != 2 for shape in shapes):
            return None
        rows = sum(shape[0] for shape in shapes)
        # Mixtral's name stays that of memory: the one that PEFT writes and merging expects.
        target = f"{spelled_in_memory(home) if '.mlp.' in name else home}.{leaf}"
        return Parameter(target, (experts, rows, shapes[0][1]))

    def deltas(self, module: str, pairs: Mapping[int, Pair]) -> Iterator[tuple[str, LoraDelta]]:
        """Yield the stored name and the delta of each parameter of a module, innermost first.

        ``pairs`` are A and B by depth; the innermost lies deepest.
        """
        depths = sorted(pairs, reverse=True)
        factors = [pairs[depth] for depth in depths]
        leaves = self._in_order(module, self.parameters(module, depths), factors)
        by_leaf = dict(zip(leaves, factors, strict=True))
        swap = self._reversed_in_file(module, by_leaf)
        for leaf, (a, b) in by_leaf.items():
            yield f"{module}.{leaf}", self._delta(module, leaf, a, b, swap=swap)

    def _in_order(self, module: str, leaves: list[str], factors: list[Pair]) -> list[str]:
        usual = parameter_order(leaves)
        orders = [usual] if usual else []
        orders += [list(order) for order in permutations(leaves[:4])] if len(leaves) < 5 else []
        fitting = [o for o in orders if all(map(partial(self._fits, module), o, factors))]
        if not fitting:
            shapes = [[list(a.shape), list(b.shape)] for a, b in factors]
            raise InputError(
                f"module {printable(module)}: the factors {shapes} do not fit its parameters",
                path=self._path,
                hint="the adapter was made for another base",
            )
        if usual is None and len(fitting) > 1:
            raise UnsupportedError(
                f"module {printable(module)}: nothing says which factors belong to which of "
                f"{printable(', '.join(leaves))}",
                path=self._path,
                hint=_GIVE_BASE if self._base is None else "train them one by one",
            )
        return fitting[0]

    def _fits(self, module: str, leaf: str, factors: Pair) -> bool:
        shape, (a, b) = self._shape(module, leaf), factors
        if shape is None:
            return True
        sizes = (b.shape[0], a.shape[1])
        if len(shape) == 3:
            return a.shape[0] % shape[0] == 0 and sizes in (shape[1:], shape[:0:-1])
        return sizes == shape

    def _reversed_in_file(self, module: str, by_leaf: Mapping[str, Pair]) -> bool:
        """Tell whether in and out are swapped, as in PEFT before 0.19."""
        if self._transposed:
            return False
        verdicts = set()
        for leaf, (a, b) in by_leaf.items():
            shape = self._shape(module, leaf)
            if shape is not None and len(shape) == 3 and shape[1] != shape[2]:
                verdicts.add((b.shape[0], a.shape[1]) != shape[1:])
        if not verdicts and self._base is None and {"gate_up_proj", "down_proj"} <= set(by_leaf):
            (a, b), (c, d) = by_leaf["gate_up_proj"], by_leaf["down_proj"]
            usual = (b.shape[0], a.shape[1]) == (2 * c.shape[1], d.shape[0])
            turned = (a.shape[1], b.shape[0]) == (2 * d.shape[0], c.shape[1])
            verdicts |= {turned} if usual != turned else set()
        if verdicts:
            return verdicts == {True}
        old = self._settings.version < _SINCE
        known = self._base is not None and self._settings.version != (0, 0)
        if old and not known and any(self._experts(module, leaf, a) > 1
                                     for leaf, (a, _) in by_leaf.items()):  # fmt: skip
            raise UnsupportedError(
                f"module {printable(module)}: PEFT before 0.19 wrote experts in another "
                "orientation, and the factors alone do not tell which",
                path=self._path,
                hint=_GIVE_BASE if self._base is None else _GIVE_VERSION,
            )
        return old

    def _experts(self, module: str, leaf: str, a: DenseTensor) -> int:
        shape = self._shape(module, leaf)
        if shape is not None:
            return shape[0] if len(shape) == 3 else 1
        rank = self._settings.rank(f"{module}.{leaf}")
        if a.shape[0] % rank:
            raise InputError(
                f"module {printable(module)}: A of {printable(leaf)} has {a.shape[0]} rows, no "
                f"multiple of the rank {rank}",
                path=self._path,
            )
        return a.shape[0] // rank

    def _delta(
        self, module: str, leaf: str, a: DenseTensor, b: DenseTensor, *, swap: bool
    ) -> LoraDelta:
        stored = f"{module}.{leaf}"
        found = self._find(module, leaf)
        experts = self._experts(module, leaf, a)
        rank = a.shape[0] // experts
        stack = experts > 1 or (found is not None and len(found.shape) == 3)
        delta = LoraDelta(
            target=stored if found is None else found.target,
            a=stacked(a, (experts, rank, a.shape[1])) if stack else a,
            b=stacked(b, (b.shape[0], rank, experts), (2, 0, 1)) if stack else b,
            scaling=self._settings.scaling(stored, rank),
            orientation="transposed" if stack and self._transposed else "linear",
            alpha=self._settings.alpha(stored),
        )
        if stack and swap:
            delta = replace(
                delta, a=stacked(delta.b, delta.b.shape, (0, 2, 1)),
                b=stacked(delta.a, delta.a.shape, (0, 2, 1)),
            )  # fmt: skip
        return delta


def stacked(
    tensor: DenseTensor, shape: tuple[int, ...], order: tuple[int, ...] | None = None
) -> DenseTensor:
    """Return a tensor reshaped and then permuted; bytes move when they are loaded."""
    if order is None:
        return replace(tensor, shape=shape)
    return DenseTensor(
        tensor.name,
        tensor.dtype,
        tuple(shape[axis] for axis in order),
        lambda: array_bytes(tensor.array().reshape(shape).transpose(order)),
        tensor.release,
    )
