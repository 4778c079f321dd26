"""Whether PEFT wraps a module or a parameter for a delta.

A module is named in ``target_modules``. Some can only be adapted by a parameter of theirs, named
in ``target_parameters``: fused experts; routers, which transformers 5 computes without a linear;
and in families whose experts had tensors of their own once, every linear that is called like one
of theirs, because PEFT takes its name for the experts' and doubles their rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from loraformat.errors import UnsupportedError, printable
from loraformat.families.expert_names import is_router, parameter_order
from loraformat.families.table import family_of
from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.model.architecture import module_of
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.expert_layouts import is_of_one_expert
from loraformat.model.tied_head import config_of
from loraformat_converters.peft.keys import PREFIX
from loraformat_converters.peft.pattern_table import tails

__all__ = ["Wrapping"]

_MOST_NAMES = 4096


class Wrapping:
    """How PEFT wraps the modules of an adapter, under the names of the model in memory.

    ``parameters`` are the targets that are adapted as such, sorted. What PEFT cannot hold together
    is refused.
    """

    def __init__(self, adapter: Adapter, base: Checkpoint | None) -> None:
        config = config_of(base) if base is not None else {}
        self._family = family_of(config)
        #: What the source's config targets, matched by suffix as in PEFT.
        self._modules = _strings(adapter.config.get("target_modules"))
        self._parameters = _strings(adapter.config.get("target_parameters"))
        self._deltas = list(adapter.deltas.values())
        self._depths = _depths(d.target for d in self._deltas if self._needs_parameter(d))
        self._wrapped = Counter(target.rpartition(".")[0] for target in self._depths)
        self.parameters = sorted(self._family.in_memory(target) for target in self._depths)
        self._check(adapter)

    def _needs_parameter(self, delta: LoraDelta) -> bool:
        target, module = delta.target, module_of(delta.target)
        if len(delta.a.shape) == 3 or module == target:
            return True
        if is_of_one_expert(target):  # PEFT itself makes the parameter's delta of all of them
            return False
        if module.rpartition(".")[2] in self._family.expert_leaves | self._family.own_leaves:
            return True
        if not self._parameters.isdisjoint(tails(target)):
            return True
        return is_router(module) and self._modules.isdisjoint(tails(module))

    def _check(self, adapter: Adapter) -> None:
        unable = [d for d in self._deltas if d.magnitude is not None or d.bias is not None]
        if not self.parameters or not unable:
            return
        what = "magnitudes (DoRA)" if unable[0].magnitude is not None else "biases (lora_bias)"
        raise UnsupportedError(
            f"has {what}, and PEFT can adapt {printable(self.parameters[0])} only as a parameter, "
            "which it rejects in combination",
            path=adapter.path,
            hint="merge it into its base; or train it again without them",
        )

    def name_of(self, delta: LoraDelta) -> str:
        """Return the name that rank patterns match."""
        name = self._family.in_memory(delta.target)
        return name if delta.target in self._depths else module_of(name)

    def is_parameter(self, delta: LoraDelta) -> bool:
        """Tell whether a delta belongs to a parameter rather than a module."""
        return delta.target in self._depths

    def stem_of(self, delta: LoraDelta) -> str:
        """Return the stored name of a delta's tensors, up to ``.lora_A.weight``."""
        depth = self._depths.get(delta.target)
        module = module_of(delta.target) if depth is None else delta.target.rpartition(".")[0]
        return PREFIX + self._family.peft_key(self._inside(module)) + ".base_layer" * (depth or 0)

    def _inside(self, module: str) -> str:
        """Return a module's name inside the wrappers of its parents."""
        parts = module.split(".")
        for length in range(len(parts) - 1, 0, -1):
            wrappers = self._wrapped.get(".".join(parts[:length]), 0)
            parts[length:length] = ["base_layer"] * wrappers
        return ".".join(parts)

    def target_modules(self) -> list[str]:
        """Return the target modules by full name, or by last part if they are very many.

        What PEFT wraps beyond them has no tensors, begins with B = 0, and changes nothing.
        """
        deltas = [delta for delta in self._deltas if delta.target not in self._depths]
        names = sorted(self.name_of(delta) for delta in deltas)
        if len(names) > _MOST_NAMES:
            return sorted({name.rsplit(".", 1)[-1] for name in names})
        return names


def _strings(value: object) -> set[str]:
    return {one for one in value if isinstance(one, str)} if isinstance(value, list) else set()


def _depths(parameters: Iterable[str]) -> dict[str, int]:
    """Return the wrapping depth of each parameter; the last is the outermost."""
    by_module: dict[str, list[str]] = {}
    for target in parameters:
        module, _, leaf = target.rpartition(".")
        by_module.setdefault(module, []).append(leaf)
    found = {}
    for module, leaves in by_module.items():
        # Where the order is not known it is that in which they were read.
        for depth, leaf in enumerate(reversed(parameter_order(leaves) or leaves)):
            found[f"{module}.{leaf}"] = depth
    return found
