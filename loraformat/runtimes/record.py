"""Data classes of rules and runtime behaviour.

A `Runtime` is a record. Its `treats` says, for each rule by id, what becomes of an adapter that
the rule finds: nothing is listed where the runtime computes what the adapter means. A rule that
is about every runtime alike brings its own `Treatment`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from loraformat.model.adapter_facts import AdapterFacts, ModuleFacts

__all__ = [
    "Finding",
    "Level",
    "Outcome",
    "Remedy",
    "Rule",
    "Runtime",
    "Treatment",
    "caution",
    "differs",
    "refuses",
    "unknown",
]

Level = Literal["warn", "fail"]
#: ``refuses``: it says no. ``differs``: it computes something else, mostly without a word.
#: ``caution``: right, if the user does or knows something. ``unknown``: nobody looked.
Outcome = Literal["refuses", "differs", "caution", "unknown"]
#: What fixes it: a command of loraformat's, or (advice) nothing that a command could do.
Remedy = Literal[
    "fix", "gguf", "peft", "merge", "merge-gguf", "reduce", "rewrite", "retype", "fill",
    "other-base", "advice", "experts", "experts-fused",
]  # fmt: skip

_LEVELS: dict[Outcome, Level] = {
    "refuses": "fail",
    "differs": "fail",
    "caution": "warn",
    "unknown": "warn",
}


@dataclass(frozen=True, slots=True)
class Treatment:
    """How a runtime handles what a rule finds.

    Attributes
    ----------
    outcome : Outcome
    why : str
        What the runtime does, in a sentence without a full stop.
    remedy : Remedy
    advice : str or None
        Beside the command, or instead of it.
    """

    outcome: Outcome
    why: str
    remedy: Remedy
    advice: str | None = None

    @property
    def level(self) -> Level:
        """``fail`` if it is refused or computes something else."""
        return _LEVELS[self.outcome]


refuses = partial(Treatment, "refuses")
differs = partial(Treatment, "differs")
caution = partial(Treatment, "caution")
unknown = partial(Treatment, "unknown")

#: What a runtime multiplies B A of a module by.
Scaling = Callable[[AdapterFacts, ModuleFacts], float]


@dataclass(frozen=True, slots=True)
class Runtime:
    """A program that runs adapters.

    Attributes
    ----------
    name : str
        The word for ``--runtime``.
    title : str
    version : str
        That whose facts these are, and how they were found.
    format : str
        Name of the converter whose files it reads, or "" if it reads none.
    format_why : str
        What happens if it is given another.
    scaling : callable
        What it multiplies B A by, from the config, the rank of the tensors, and nothing else.
    one_rank : bool
        All modules must have the rank of the config.
    most : int or None
        The largest rank that it serves.
    kernel_rank : int or None
        Beyond it, it is right but slow.
    default_rank : int or None
        Beyond it, an option is needed.
    even_ranks : bool
        Other ranks than 8 and multiples of 16 go wrong.
    couples : tuple of (str, str)
        Modules of which the first needs the second.
    whole_types : bool
        A type of module must be adapted in every layer, or in none.
    replaces : tuple of str
        Modules that it lets an adapter replace.
    asks_peft : bool
        It loads adapters with PEFT, so that what PEFT's own load says outranks rules about names
        and shapes.
    fused_experts : tuple of str
        Model types whose experts it keeps fused, so that it takes PEFT's ``target_parameters``.
    imports : tuple of str
        GGUF architectures whose PEFT adapters it converts itself.
    treats : mapping of str to Treatment or None
        By rule id; None where it is right about what is wrong everywhere else.
    """

    name: str
    title: str
    version: str
    format: str
    format_why: str
    scaling: Scaling
    one_rank: bool = False
    most: int | None = None
    kernel_rank: int | None = None
    default_rank: int | None = None
    even_ranks: bool = False
    couples: tuple[tuple[str, str], ...] = ()
    whole_types: bool = False
    replaces: tuple[str, ...] = ()
    asks_peft: bool = False
    fused_experts: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    treats: Mapping[str, Treatment | None] = field(default_factory=dict)

    def has_proof(self, adapter: AdapterFacts) -> bool:
        """Whether loading was tested rather than inferred."""
        return self.asks_peft and adapter.loading is not None and adapter.loading.proven


@dataclass(frozen=True, slots=True)
class Rule:
    """A property of adapters that some runtimes do not handle.

    Attributes
    ----------
    id : str
    about : str
        What it looks for, for the documents.
    detect : callable
        Returns what was found, as a sentence without a full stop; None if nothing was.
    everywhere : Treatment or None
        For every runtime alike that has none of its own.
    of_files : bool
        It is about how PEFT's files are loaded: not for a runtime that reads no adapter at all.
    """

    id: str
    about: str
    detect: Callable[[AdapterFacts, Runtime], str | None]
    everywhere: Treatment | None = None
    of_files: bool = False

    def treatment(self, runtime: Runtime) -> Treatment | None:
        """Return how a runtime treats it; None if correctly."""
        everywhere = self.everywhere if runtime.format or not self.of_files else None
        return runtime.treats.get(self.id, everywhere)


@dataclass(frozen=True, slots=True)
class Finding:
    """The finding of a rule for a runtime.

    Attributes
    ----------
    rule, runtime : str
    level : {"warn", "fail"}
    outcome : str
    what, why : str
    remedy : str
        What to do, in words.
    command : str or None
        The command that does it.
    kind : Remedy
        What sort of remedy that is.
    """

    rule: str
    runtime: str
    level: Level
    outcome: Outcome
    what: str
    why: str
    remedy: str
    command: str | None = None
    kind: Remedy = "advice"
