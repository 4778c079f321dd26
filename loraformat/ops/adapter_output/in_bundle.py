"""Adapters in bundles: into a bundle that is there, and into one that is being written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from loraformat import plugins
from loraformat.bundle import converter
from loraformat.bundle.integrity import check_adapter
from loraformat.bundle.reader import open_bundle
from loraformat.bundle.update import BundleSlot, add_adapter, parse_bundle_slot, records_of
from loraformat.errors import UsageError
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat.ops.adapter_output.form import (
    AdapterOutput,
    BaseIdentity,
    check_fits,
    check_values,
    plan_output,
)
from loraformat.plugins import WriteOptions
from loraformat.shards.records import FileRecord
from loraformat.shards.write_directory import WrittenModel
from loraformat.storage.atomic_output import AtomicOutput
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.storage.safe_paths import is_adapter_name

__all__ = ["NewAdapter", "add_adapters", "write_bundle"]


@dataclass(frozen=True, slots=True)
class NewAdapter:
    """An adapter that shall be in a bundle.

    Attributes
    ----------
    adapter : Adapter
        Opened against the bundle's base. If it was changed in memory, its ``verbatim`` is
        False.
    canonical : bool
        Write it anew, even if its files could be copied.
    dtype : str or None
        ``f32``, ``f16`` or ``bf16`` for its factors; it is written anew then.
    allow_base_mismatch : bool
        Take it although it says that it was made for another base.
    """

    adapter: Adapter
    canonical: bool = False
    dtype: str | None = None
    allow_base_mismatch: bool = False


def add_adapters(
    path: Path, adapters: Mapping[str, NewAdapter], *, force: bool = False
) -> list[str]:
    """Add adapters to a bundle, one after the other; each appears whole or not at all.

    Parameters
    ----------
    path : Path
        The bundle.
    adapters : mapping of str to Incoming
        By name.
    force : bool
        Replace adapters of these names.

    Returns
    -------
    list of str
        What a user should know.

    Raises
    ------
    LoraFormatError
        If one does not fit the base, was made for another one, or exists.
    """
    notes = []
    with open_bundle(path) as opened:
        home = BaseIdentity(opened.manifest.fingerprint, opened.manifest.source)
        for name, incoming in adapters.items():
            place = _place(path, name)
            output = plan_incoming(incoming, opened.checkpoint, home)
            put(output, place, home.fingerprint, force=force)
            notes += [f"adapter {name}: {note}" for note in output.notes]
    return notes


def _place(path: Path, name: str) -> BundleSlot:
    place = parse_bundle_slot(path / "adapters" / name)
    if place is None or place.name != name:
        raise UsageError(f"{name!r} cannot be the name of an adapter")
    return place


def plan_incoming(incoming: NewAdapter, base: Checkpoint, home: BaseIdentity) -> AdapterOutput:
    """Hold an adapter against its bundle, and decide how it is written."""
    output = plan_output(
        incoming.adapter,
        plugins.get("peft"),
        canonical=incoming.canonical,
        dtype=incoming.dtype,
        base=base,
        home=home,
        allow_base_mismatch=incoming.allow_base_mismatch,
    )
    notes = check_incoming(incoming.adapter, base)
    return replace(output, notes=(*output.notes, *notes))


def check_incoming(adapter: Adapter, base: Checkpoint) -> list[str]:
    """Check that an adapter fits a base, and that all its values are finite; see `check_fits`."""
    notes = check_fits(adapter, base)
    check_values(adapter)
    return notes


def put(
    output: AdapterOutput,
    place: BundleSlot,
    fingerprint: str,
    *,
    force: bool,
    finish: Callable[[], None] = lambda: None,
) -> dict[str, FileRecord]:
    """Write a planned adapter to its place; the manifest lists it then.

    Parameters
    ----------
    output : AdapterOutput
    place : BundleSlot
    fingerprint : str
        Of the bundle.
    force : bool
        Replace an adapter of that name.
    finish : callable
        Called when all is read; what it raises leaves the bundle as it was.
    """

    def write(stage: AtomicOutput) -> None:
        output.write(stage)
        check_adapter(SafeDirectory(stage.work), ".", fingerprint)
        finish()

    inputs = [output.adapter.path, *output.adapter.sources]
    return add_adapter(place, write, inputs=inputs, force=force)


def write_bundle(
    checkpoint: Checkpoint,
    publication: AtomicOutput,
    options: WriteOptions,
    adapters: Mapping[str, NewAdapter],
) -> WrittenModel:
    """Write a new bundle with adapters in it, in one publication.

    Parameters
    ----------
    checkpoint : Checkpoint
        As `loraformat.bundle.converter.write` takes it.
    publication : AtomicOutput
    options : WriteOptions
    adapters : mapping of str to Incoming
        By name; opened against a base of the same tensors.

    Raises
    ------
    LoraFormatError
        If an adapter does not fit the base, or was made for another one.
    """
    notes: list[str] = []
    _check_distinct(adapters)
    for incoming in adapters.values():  # before the base is written, which takes longer
        check_incoming(incoming.adapter, checkpoint)

    def add(fingerprint: str) -> converter.AdapterRecords:
        home = BaseIdentity(fingerprint, checkpoint.provenance.to_json())
        records = {}
        for name, incoming in adapters.items():
            output = plan_incoming(incoming, checkpoint, home)
            directory = publication.work / "adapters" / name
            directory.parent.mkdir(exist_ok=True)
            with AtomicOutput(directory, plan="adapter", work_name=f".{name}.partial") as stage:
                output.write(stage)
                check_adapter(SafeDirectory(stage.work), ".", fingerprint)
                stage.commit()
            records[name] = records_of(directory)
            notes.extend(f"adapter {name}: {note}" for note in output.notes)
        return records

    written = converter.write(checkpoint, publication, options, add_adapters=add)
    written.notes += notes
    return written


def _check_distinct(names: Iterable[str]) -> None:
    """Refuse names that break M09 or M12."""
    seen: set[str] = set()
    for name in names:
        if not is_adapter_name(name) or name.lower() in seen:
            raise UsageError(
                f"{name!r} cannot be the name of an adapter: wanted letters, digits, '.', '_' "
                "and '-', and no other adapter of that name (rules M09, M12)"
            )
        seen.add(name.lower())
