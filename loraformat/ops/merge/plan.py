"""Which tensors of a base an adapter changes: names of deltas to edits of stored tensors.

An adapter speaks of the model in memory, an edit of the tensors on disk. They differ where
a head is tied to the embedding (and stored once), and where experts are one parameter in
memory and many tensors on disk. Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from loraformat.errors import UnsupportedError, nearest, printable
from loraformat.families.expert_names import EXPERT_LEAVES, spelled_in_memory, spelled_on_disk
from loraformat.families.table import family_of
from loraformat.model.adapter import Adapter, LoraDelta, RowReplacement
from loraformat.model.architecture import module_of
from loraformat.model.base_names import BaseNames, names_of
from loraformat.model.base_names.sources import Chunk
from loraformat.model.checkpoint import Checkpoint, DenseTensor, LazyTensor
from loraformat.model.config_json import parse
from loraformat.model.tied_head import HEAD, TiedHead, contradicting_head, tied_head
from loraformat.model.vocabulary import Resize, per_token
from loraformat.ops.merge.tokenizers import wanted_size
from loraformat.ops.opening.adapter_weights import effective_scaling

__all__ = ["DeltaTerm", "MergePlan", "TensorEdit", "plan_edits"]


@dataclass(frozen=True, slots=True)
class DeltaTerm:
    """One low-rank term added to a stored tensor.

    Attributes
    ----------
    adapter : int
        Number of the adapter.
    target : str
        Its delta.
    weight : float
        The user's factor.
    part : {"delta", "bias"}
    block : int
        Which matrix of a stored stack.
    expert : int or None
        Which expert of the delta.
    rows : tuple of int or None
        Which of the delta's output features; None is all.
    into : tuple of int or None
        Which rows of the stored matrix get them; None is all.
    """

    adapter: int
    target: str
    weight: float
    part: Literal["delta", "bias"] = "delta"
    block: int = 0
    expert: int | None = None
    rows: tuple[int, int] | None = None
    into: tuple[int, int] | None = None


@dataclass(slots=True)
class TensorEdit:
    """The edit of one stored tensor.

    Attributes
    ----------
    name : str
        Of the tensor in the output.
    source : str or None
        Of the tensor that it starts from: another one if a tied head is written; None if it
        is new.
    terms : list of Term
    replacement : tuple of (int, DenseTensor) or None
        Adapter number and new values.
    rows : list of int
        Numbers of the adapters that replace rows.
    height : int or None
        Rows of the tensor, where the vocabulary grows or shrinks; None for the source's own.
    in_turn : bool
        An adapter rescales what others add to: each changes what those before it made.
    """

    name: str
    source: str | None
    terms: list[DeltaTerm] = field(default_factory=list)
    replacement: tuple[int, DenseTensor] | None = None
    rows: list[int] = field(default_factory=list)
    height: int | None = None
    in_turn: bool = False

    @property
    def only_deltas(self) -> bool:
        """Whether the edit consists of low-rank terms only."""
        return not (self.replacement or self.rows or self.height)


@dataclass(slots=True)
class MergePlan:
    """The edits of a merge.

    Attributes
    ----------
    edits : dict of str to Edit
        By the name of the tensor in the output.
    untied : bool
        The head is a tensor of its own, and the base's config says that it is not.
    resize : Resize or None
        The vocabulary becomes another.
    notes : list of str
    """

    edits: dict[str, TensorEdit] = field(default_factory=dict)
    untied: bool = False
    resize: Resize | None = None
    notes: list[str] = field(default_factory=list)


def plan_edits(
    base: Checkpoint, adapters: Sequence[Adapter], weights: Sequence[float]
) -> MergePlan:
    """Find the stored tensors that adapters, with one weight each, change.

    Raises
    ------
    UnsupportedError
        If a target is not in the base, naming the nearest; if shapes differ; if an adapter
        changes nothing; if adapters want different vocabularies.
    """
    planner = _Planner(base)
    planner.plan.resize = wanted_size(base.tensors, adapters, planner.tied)
    for number, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        if not (adapter.deltas or adapter.replacements or adapter.rows):
            raise UnsupportedError("changes no module", path=adapter.path)
        planner.add(number, adapter, weight)
    return planner.finish(adapters)


class _Planner:
    def __init__(self, base: Checkpoint) -> None:
        self.tensors: Mapping[str, LazyTensor] = base.tensors
        self.names: BaseNames = names_of(base)
        self.plan = MergePlan()
        self.tied: TiedHead | None = tied_head(base)
        self.contradicting = None if self.tied else contradicting_head(base)
        self.per_token = per_token(self.tensors)
        self.family = family_of(parse(base.config or b"{}"))

    def add(self, number: int, adapter: Adapter, weight: float) -> None:
        for target, delta in adapter.deltas.items():
            effective_scaling(adapter, target, weight)
            self._check_shared(adapter, target)
            for term, name in self._places(number, adapter, delta, weight):
                self._check(adapter, delta, term, name)
                self._edit(name).terms.append(term)
            if delta.bias is not None:
                bias = module_of(target) + ".bias"
                if bias not in self.tensors:
                    raise UnsupportedError(
                        f"adds a bias to {printable(module_of(target))}, which has none in the "
                        "base",
                        path=adapter.path,
                        hint="the architecture does not support it; train without lora_bias",
                    )
                self._edit(bias).terms.append(DeltaTerm(number, target, weight, "bias"))
        for name, tensor in adapter.replacements.items():
            self._replace(number, adapter, name, tensor)
        for name, rows in adapter.rows.items():
            edit = self._edit(self._known(adapter, name))
            self._check_rows(adapter, rows, self._shape(edit))
            edit.rows.append(number)

    def _check_shared(self, adapter: Adapter, target: str) -> None:
        if self.family.is_shared(target):
            raise UnsupportedError(
                f"changes {printable(target)}, a weight shared by several layers: PEFT adapts "
                "only the layer that is named, but a merge would change all of them",
                path=adapter.path,
                hint="use it unmerged in PEFT; or train one without such layers, as loraformat "
                "train does",
            )

    def _check_rows(self, adapter: Adapter, rows: RowReplacement, shape: tuple[int, ...]) -> None:
        if rows.rows.shape != (len(rows.indices), *shape[1:]):
            raise _misshapen(adapter, "rows", rows.rows.shape, rows.target, shape)
        largest = max(rows.indices, default=0)
        if largest >= shape[0]:
            raise UnsupportedError(
                f"has a row for token {largest}, and {printable(rows.target)} has {shape[0]} rows",
                path=adapter.path,
                hint="it was trained on a base with more tokens: grow the base with transformers "
                "(model.resize_token_embeddings, save_pretrained), and name that one",
            )

    def _replace(self, number: int, adapter: Adapter, name: str, tensor: DenseTensor) -> None:
        if name not in self.tensors and not self._is_tied_head(name):
            saved = adapter.config.get("modules_to_save") or ()
            if not any(part in saved for part in module_of(name).split(".")):
                raise self._unmatched(adapter, name)
            self.plan.notes.append(f"{printable(name)} is new: the base does not have it")
            self.plan.edits[name] = TensorEdit(name, None, replacement=(number, tensor))
            return
        edit = self._edit(name)
        if edit.replacement is not None:
            raise UnsupportedError(
                f"replaces {printable(name)}, and so does another adapter", path=adapter.path,
                hint="merge only one of them",
            )  # fmt: skip
        if tensor.shape != self._shape(edit):
            raise UnsupportedError(
                f"replaces {printable(name)} by shape {tensor.shape}, the base has "
                f"{self._shape(edit)}",
                path=adapter.path,
                hint="was it made for another base?",
            )
        edit.replacement = (number, tensor)

    def _edit(self, name: str) -> TensorEdit:
        source = self.tied.embedding if self.tied and self._is_tied_head(name) else name
        height = self._height(source)
        return self.plan.edits.setdefault(name, TensorEdit(name, source, height=height))

    def _height(self, source: str | None) -> int | None:
        """Return a tensor's new number of rows, if the vocabulary changes."""
        resize = self.plan.resize
        known = resize is not None and self.per_token.get(source or "") == resize.before
        return resize.after if resize is not None and known else None

    def _shape(self, edit: TensorEdit) -> tuple[int, ...]:
        assert edit.source is not None
        shape = self.tensors[edit.source].shape
        return shape if edit.height is None else (edit.height, *shape[1:])

    def _is_tied_head(self, name: str) -> bool:
        """Tell whether a name is that of a tied head without a tensor of its own."""
        return self.tied is not None and name.endswith(HEAD) and name not in self.tensors

    def _known(self, adapter: Adapter, name: str) -> str:
        if name in self.tensors or self._is_tied_head(name):
            return name
        raise self._unmatched(adapter, name)

    def _unmatched(self, adapter: Adapter, name: str) -> UnsupportedError:
        if (how := self.names.computed(name)) is not None:
            return UnsupportedError(
                f"changes {printable(name)}, which transformers assembles from the base's tensors "
                f"on loading ({how}), and merging cannot reverse that",
                path=adapter.path,
                hint="merge it with PEFT: model.merge_and_unload(), then save_pretrained()",
            )
        return UnsupportedError(
            f"changes {printable(name)}, which the base does not have"
            + nearest(name, self.tensors),
            path=adapter.path,
            hint="was it made for another base?",
        )

    def _places(
        self, number: int, adapter: Adapter, delta: LoraDelta, weight: float
    ) -> Iterator[tuple[DeltaTerm, str]]:
        name, experts = delta.target, delta.a.shape[0] if len(delta.a.shape) == 3 else None
        if experts is None:
            fused = None if name in self.tensors else self._fused(delta)
            if fused is not None:
                home, block, into = fused
                yield DeltaTerm(number, name, weight, block=block, into=into), home
                return
            if name not in self.tensors and (chunk := self.names.chunk(name)) is not None:
                into = self._chunk_rows(adapter, delta, chunk)
                yield DeltaTerm(number, name, weight, into=into), chunk.tensor
                return
            yield DeltaTerm(number, name, weight), self._known(adapter, name)
        elif name in self.tensors:
            for expert in range(experts):
                yield DeltaTerm(number, name, weight, block=expert, expert=expert), name
        else:
            yield from self._split(number, adapter, delta, weight, experts)

    def _split(
        self, number: int, adapter: Adapter, delta: LoraDelta, weight: float, experts: int
    ) -> Iterator[tuple[DeltaTerm, str]]:
        """Split the delta of a fused parameter over the experts' separate tensors."""
        stack = self._expert_tensors(delta.target, experts)
        if not stack or delta.orientation != "linear":
            raise self._unmatched(adapter, delta.target)
        if len(stack) != experts:
            raise UnsupportedError(
                f"has {experts} experts for {printable(delta.target)}, the base {len(stack)}",
                path=adapter.path,
                hint="was it made for another base?",
            )
        for expert, tensors in enumerate(stack):
            start = 0
            for tensor in tensors:
                name = self._known(adapter, tensor)
                stop = start + self.tensors[name].shape[0]
                term = DeltaTerm(number, delta.target, weight, expert=expert, rows=(start, stop))
                yield term, name
                start = stop
            if start != delta.out_features:
                raise UnsupportedError(
                    f"has {delta.out_features} output features for {printable(delta.target)}, "
                    f"the experts on disk {start}",
                    path=adapter.path,
                )

    def _fused(self, delta: LoraDelta) -> tuple[str, int, tuple[int, int]] | None:
        """Locate one expert's delta in a base that stores experts as a stack.

        Found are the stored tensor, the matrix of it, and the rows of that matrix.
        """
        path, _, leaf = delta.target.removesuffix(".weight").rpartition(".")
        disk, _, number = path.rpartition(".")
        if not (number.isascii() and number.isdigit() and len(number) < 10):
            return None
        for home in (disk, spelled_in_memory(disk)):
            for name, spellings in EXPERT_LEAVES.items():
                found = f"{home}.{name}"
                stack = self.tensors.get(found)
                leaves = next((leaves for leaves in spellings if leaf in leaves), None)
                if stack is None or leaves is None or delta.orientation != "linear":
                    continue
                height = delta.out_features
                start = leaves.index(leaf) * height
                if stack.shape[1:] == (len(leaves) * height, delta.in_features):
                    return found, int(number), (start, start + height)
        return None

    def _chunk_rows(self, adapter: Adapter, delta: LoraDelta, chunk: Chunk) -> tuple[int, int]:
        """Return the rows of a stored tensor that form a delta's parameter."""
        stored = self.tensors[chunk.tensor]
        rows = stored.shape[0] // chunk.of
        wanted = (rows, *stored.shape[1:])
        shape = delta.out_features, delta.in_features
        if delta.orientation != "linear" or shape != wanted:
            raise _misshapen(adapter, "a delta", shape, delta.target, wanted)
        return chunk.number * rows, (chunk.number + 1) * rows

    def _expert_tensors(self, target: str, experts: int) -> Sequence[Sequence[str]]:
        """Return the tensors of a fused parameter, expert by expert."""
        fused, _, leaf = target.removesuffix(".weight").rpartition(".")
        for home in (fused, spelled_on_disk(fused)):
            for leaves in EXPERT_LEAVES.get(leaf, ()):
                if f"{home}.0.{leaves[0]}.weight" in self.tensors:
                    return [[f"{home}.{e}.{leaf}.weight" for leaf in leaves]
                            for e in range(experts)]  # fmt: skip
        return self.names.stack(target)

    def _check(self, adapter: Adapter, delta: LoraDelta, term: DeltaTerm, name: str) -> None:
        edit = self._edit(name)
        assert edit.source is not None
        stored = self._shape(edit)
        if term.into is not None:  # `_fused` has compared the rest
            if term.block >= stored[0] or delta.magnitude is not None:
                raise UnsupportedError(
                    f"cannot change {printable(delta.target)} inside {printable(name)} of shape "
                    f"{stored}" + (" with DoRA" if delta.magnitude is not None else ""),
                    path=adapter.path,
                    hint="merge into a checkpoint that stores each expert by itself",
                )
            return
        start, stop = term.rows or (0, delta.out_features)
        wanted = (stop - start, delta.in_features)
        wanted = wanted if delta.orientation == "linear" else wanted[::-1]
        fits = stored[-2:] == wanted and len(stored) in (2, 3)
        stack = stored[0] if len(stored) == 3 else 1
        if not fits or term.block >= stack or (len(stored) == 3 and term.expert is None):
            raise _misshapen(adapter, "a delta", wanted, name, stored)

    def finish(self, adapters: Sequence[Adapter]) -> MergePlan:
        """Untie a head that differs from the embedding, and resize the other vocabulary tensors."""
        if self.contradicting is not None:
            self._untie(
                f"{printable(self.contradicting)} differs from the embedding, although "
                "config.json ties them: the tensor is kept and tie_word_embeddings is set to "
                "false"
            )
        if self.tied is not None:
            self._finish_tied(self.tied, adapters)
        for name in self.tensors:
            if self._height(name) is not None:
                self._edit(name)
        self._order(adapters)
        return self.plan

    def _order(self, adapters: Sequence[Adapter]) -> None:
        """Apply adapters in sequence if one of several uses DoRA, with a note."""
        ordered = 0
        for edit in self.plan.edits.values():
            deltas = [t for t in edit.terms if t.part == "delta"]
            edit.in_turn = len({term.adapter for term in deltas}) > 1 and any(
                adapters[term.adapter].deltas[term.target].magnitude is not None for term in deltas
            )
            ordered += edit.in_turn
        if ordered:
            self.plan.notes.append(
                f"{ordered} tensors are changed by DoRA and another adapter: each rescales the "
                "result of the previous ones, as in PEFT, so the order matters"
            )

    def _finish_tied(self, tied: TiedHead, adapters: Sequence[Adapter]) -> None:
        head = tied.copy or next(filter(self._is_tied_head, self.plan.edits), HEAD)
        embedding, own = self.plan.edits.get(tied.embedding), self.plan.edits.get(head)
        changed = embedding is not None and bool(embedding.terms or embedding.replacement)
        if embedding is not None and own is None and (saved := _resaved(embedding, adapters)):
            # PEFT's tied head is the embedding as it was saved, without what was trained of it.
            own = self._edit(head)
            own.replacement = saved
        together = all(adapter.config.get("ensure_weight_tying") for adapter in adapters)
        together = together or (embedding is not None and _alike(embedding, own))
        if embedding is not None and changed and together:
            self._follow(tied, head, embedding)
        elif own is not None or changed:
            own = self._edit(head)
            if embedding is not None and not own.rows:
                own.rows = list(embedding.rows)  # PEFT shows new tokens to a tied head, too
            self._untie(
                f"{printable(head)} was tied to {printable(tied.embedding)}; they now differ, so "
                "it is written and tie_word_embeddings is set to false"
            )
        elif embedding is not None:
            self._follow(tied, head, embedding)

    def _follow(self, tied: TiedHead, head: str, embedding: TensorEdit) -> None:
        """Give a tied head the edit of its embedding."""
        self.plan.edits.pop(head, None)
        if tied.copy is not None:
            self.plan.edits[head] = replace(embedding, name=head, source=head)

    def _untie(self, note: str) -> None:
        self.plan.untied = True
        self.plan.notes.append(note)


def _misshapen(
    adapter: Adapter, what: str, shape: tuple[int, ...], target: str, stored: tuple[int, ...]
) -> UnsupportedError:
    return UnsupportedError(
        f"has {what} of shape {shape} for {printable(target)}, whose shape is {stored}",
        path=adapter.path,
        hint="was it made for another base?",
    )


def _resaved(edit: TensorEdit, adapters: Sequence[Adapter]) -> tuple[int, DenseTensor] | None:
    """Return the replacement of an embedding that was saved but not trained as a whole."""
    if edit.replacement is None:
        return None
    saved = adapters[edit.replacement[0]].config.get("modules_to_save") or ()
    trained = any(part in saved for part in module_of(edit.name).split("."))
    return None if trained else edit.replacement


def _alike(embedding: TensorEdit, head: TensorEdit | None) -> bool:
    """Tell whether an embedding and its head remain equal."""
    one, other = embedding.replacement, None if head is None else head.replacement
    if head is None or one is None or other is None or one[0] != other[0]:
        return False
    if embedding.terms or head.terms:
        return False
    if head.rows not in ([], embedding.rows) or one[1].dtype != other[1].dtype:
        return False
    same = one[1].shape == other[1].shape and one[1].load() == other[1].load()
    for _, tensor in (one, other):
        tensor.release()
    return same
