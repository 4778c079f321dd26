"""Demo, part 2: separate adapters, merging and unmerging.

The adapter ``manual`` was trained as QLoRA does, on the NF4 values of the base. Merged into
these values it is what it was; merged and quantized again it is nearly gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from loraformat.demo import ADAPTERS, SMALL_MODEL
from loraformat.demo.step import Step, Workspace
from loraformat.errors import LoraFormatError
from loraformat.model.checkpoint import DenseTensor
from loraformat.ops.convert.adapter import AdapterConversion
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge
from loraformat.ops.opening.model import open_model
from loraformat.ops.unmerge.unmerge import unmerge

__all__ = ["add_adapters", "merge_and_undo", "tensor_hashes"]


def add_adapters(work: Workspace) -> Iterator[Step]:
    """Put both adapters into the bundle, separate from the base."""
    for name, source in ADAPTERS.items():
        work.say(f"adding {name} to the bundle")
        target = work.bundle / "adapters" / name
        report = convert(source, target, force=work.force)
        assert isinstance(report, AdapterConversion)
        how = "byte for byte" if report.verbatim else "anew"
        yield Step(
            f"{name}, separate from the base",
            f"convert {name} bundle/adapters/{name}",
            f"{report.modules} modules, {report.parameters:,} parameters, copied {how}",
            target,
            report.seconds,
            {"parameters": report.parameters},
            "adapter",
            ("library", name),
        )


def merge_and_undo(work: Workspace) -> Iterator[Step]:
    """Merge ``manual`` into the bundle and into the original, and undo the latter.

    Raises
    ------
    LoraFormatError
        If a verb fails, or a tensor is not the original's after all.
    """
    record = work.directory / "merge.lfu"

    def merged(title: str, base: Path, name: str, words: str = "", **options: Any) -> Step:
        work.say(f"merging manual into {base.name}")
        target = work.directory / name
        report = merge(base, [work.manual], target, force=work.force, **options)
        assert report.total is not None
        kept, delta = report.total.gain, report.total.relative
        line = f"keeps {kept:.1%} of a delta that is {delta:.1%} of the weights"
        figures = {"relative_delta": delta, "kept": kept, "error": report.total.error}
        if report.undo is not None:
            line += f"; the undo record takes {report.undo.bits_per_weight:.3f} bits per weight"
            figures["undo_bits_per_weight"] = report.undo.bits_per_weight
        command = f"merge {base.name} bundle/adapters/manual -o {name} {words}".rstrip()
        return Step(title, command, line, target, report.seconds, figures, "model")

    yield merged("merged into the NF4 values", work.bundle, "merged")
    yield merged(
        "merged, then NF4 again", work.bundle, "requantized", "--to loraformat --requantize",
        to="loraformat", requantize=True,
    )  # fmt: skip
    yield merged(
        "merged into the original", SMALL_MODEL, "merged-original", "--undo merge.lfu", undo=record
    )
    work.say("undoing the merge")
    target = work.directory / "unmerged"
    report = unmerge(work.directory / "merged-original", target, undo=record, force=work.force)
    found = tensor_hashes(target)
    if found != tensor_hashes(SMALL_MODEL):
        raise LoraFormatError("does not match the original after undoing the merge", path=target)
    yield Step(
        "merge undone",
        "unmerge merged-original --undo merge.lfu -o unmerged",
        f"all {len(found)} tensors have the SHA-256 of the original's",
        target,
        report.seconds,
        {"tensors": len(found), "restored": report.restored},
    )


def tensor_hashes(model: Path) -> dict[str, str]:
    """Return the SHA-256 of every tensor of a dense model, by name."""
    with open_model(model) as checkpoint:
        return {
            name: sha256(tensor.load()).hexdigest()
            for name, tensor in checkpoint.tensors.items()
            if isinstance(tensor, DenseTensor)
        }
