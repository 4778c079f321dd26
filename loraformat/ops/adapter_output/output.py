"""Adapter output: a file or directory of some format, a slot in a bundle, or a new bundle.

`reduce`, `combine` and `extract` open their output first, so that what cannot be written is
refused before minutes of work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from loraformat import plugins
from loraformat.bundle import converter
from loraformat.bundle.integrity import check_adapter
from loraformat.bundle.update import (
    BundleSlot,
    add_adapter,
    parse_bundle_slot,
    records_of,
    refuse_listed,
)
from loraformat.errors import UsageError
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.expert_layouts import ExpertLayout
from loraformat.model.written import WrittenModel
from loraformat.ops.adapter_output.base import AdapterBase, open_adapter_base
from loraformat.ops.adapter_output.form import (
    AdapterForm,
    PlannedAdapter,
    check_fits,
    check_values,
)
from loraformat.plugins import AdapterFormat, Forecast, WriteOptions
from loraformat.storage.atomic_file import open_publication
from loraformat.storage.atomic_output import AtomicOutput
from loraformat.storage.output_rules import refuse_existing, refuse_existing_file
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.storage.safe_paths import is_adapter_name

__all__ = [
    "AdapterOutput",
    "ensure_not_exists",
    "open_adapter_output",
    "write_adapter",
    "write_bundle",
]


@dataclass(frozen=True, slots=True)
class AdapterOutput(AdapterForm):
    """An output for one adapter, in a bundle's slot or not; made by `open_adapter_output`."""

    path: Path
    slot: BundleSlot | None
    force: bool
    dry_run: bool

    def check(self, adapter: Adapter) -> None:
        """Check a source adapter against the base and the output format.

        Raises
        ------
        LoraFormatError
            If it was made for another base, does not fit this one, or has what the format
            cannot hold.
        """
        if self.base is not None and self.base.checkpoint.tensors:
            check_fits(adapter, self.base.checkpoint)
        self.forecast(self.plan(replace(adapter, verbatim=False)))

    def write(self, adapter: Adapter) -> list[str]:
        """Write an adapter atomically; in a dry run only check that it could be written.

        Returns what a user should know.
        """
        planned = self.plan(replace(adapter, verbatim=False))
        notes = list(planned.notes)
        if self.dry_run:
            forecast = self.forecast(planned)
            return notes if forecast is None else [*notes, *forecast.notes]
        if self.slot is not None:
            notes += self.check_fits(adapter)
        _, said = self.publish(planned)
        return [*notes, *said]

    def check_fits(self, adapter: Adapter) -> list[str]:
        """Check an adapter against the base's tensors; for a bundle also its values.

        Returns what a user should know.
        """
        if self.base is None or (self.slot is None and not self.base.checkpoint.tensors):
            return []
        notes = check_fits(adapter, self.base.checkpoint)
        if self.slot is not None:
            check_values(adapter)
        return notes

    def forecast(self, planned: PlannedAdapter) -> Forecast | None:
        """Return the writer's forecast; raises what the writer would refuse."""
        if planned.verbatim:
            return None
        return self.writer.estimate(planned.adapter, self.path, planned.options)

    def publish(
        self, planned: PlannedAdapter, *, finish: Callable[[], None] = lambda: None
    ) -> tuple[int, list[str]]:
        """Write a planned adapter atomically and list it in the bundle's manifest.

        ``finish`` is called when all is read; what it raises leaves everything as it was. Returns
        the bytes written and the writer's notes.
        """
        inputs = [planned.adapter.path, *planned.adapter.sources]
        notes: list[str] = []
        if self.slot is not None:

            def write(stage: AtomicOutput) -> None:
                assert self.base is not None
                notes.extend(planned.write(stage))
                check_adapter(SafeDirectory(stage.work), ".", self.base.fingerprint)
                finish()

            records = add_adapter(self.slot, write, inputs=inputs, force=self.force)
            return sum(record.bytes for record in records.values()), notes
        if planned.options.base is not None:  # an adapter may lie beside its base
            inputs += planned.options.base.sources
        with open_publication(
            self.writer.output, self.path, plan="adapter", inputs=inputs, force=self.force
        ) as stage:
            notes = planned.write(stage)
            finish()
            nbytes = sum(f.stat().st_size for f in stage.work.rglob("[!.]*") if f.is_file())
            stage.commit()
        return nbytes, notes


def open_adapter_output(
    stack: ExitStack,
    target: str | Path,
    sources: Iterable[str | Path] = (),
    *,
    base: str | Path | Checkpoint | None = None,
    to_format: str | None = None,
    dtype: str | None = None,
    canonical: bool = True,
    base_of_sources: bool = False,
    force: bool = False,
    dry_run: bool = False,
    allow_base_mismatch: bool = False,
    experts: ExpertLayout | None = None,
) -> AdapterOutput:
    """Open the output of an adapter; ``stack`` closes its base.

    Parameters
    ----------
    stack : ExitStack
    target : str or Path
        A PEFT directory unless the suffix says more, or ``BUNDLE/adapters/NAME``.
    sources : iterable of str or Path
        The adapters that it will be made from. If they lie in one bundle, that is the base of
        an output in a format that needs one, and with `base_of_sources` of a PEFT directory, too.
    base : str, Path or Checkpoint, optional
        An open one stays the caller's.
    to_format, dtype, canonical, base_of_sources, force, dry_run, allow_base_mismatch, experts
        As in `AdapterOutput`; the format is the writer's name.

    Raises
    ------
    UsageError
        If a base or a format is named for a target in a bundle.
    """
    path = Path(target)
    slot = parse_bundle_slot(path)
    writer = _writer(path, slot, to_format)
    if slot is not None and isinstance(base, str | Path):
        raise UsageError("--base is not needed: the bundle is the base", hint="omit it")
    if isinstance(base, Checkpoint):
        found = AdapterBase(base) if slot is None else open_adapter_base(stack, None, slot)
    else:
        needed = base_of_sources or writer.name != "peft"
        origin = _common_slot(sources) if needed else None
        found = open_adapter_base(stack, base, slot, origin)
    if experts is not None:
        _check_layout(writer, found)
    return AdapterOutput(
        writer, found, dtype, canonical, allow_base_mismatch, experts, path, slot, force, dry_run
    )


def _check_layout(writer: AdapterFormat, base: AdapterBase | None) -> None:
    if writer.name != "peft":
        raise UsageError(
            f"--experts is for PEFT adapters, and the output is {writer.name}, which has one form",
            hint="omit it",
        )
    if base is None:
        raise UsageError(
            "--experts needs the base: its names and shapes say what belongs to which expert",
            hint="add --base BASE",
        )


def ensure_not_exists(target: str | Path, *, force: bool) -> None:
    """Raise an OutputError if an adapter's target exists, unless ``force`` is set."""
    path = Path(target)
    slot = parse_bundle_slot(path)
    if slot is not None:
        refuse_listed(slot, force=force)
    elif _writer(path, slot, None).output == "file":
        refuse_existing_file(path, force=force)
    else:
        refuse_existing(path, force=force)


def _writer(path: Path, slot: BundleSlot | None, to_format: str | None) -> AdapterFormat:
    if slot is not None and to_format not in (None, "peft"):
        raise UsageError(
            f"--to {to_format}: a bundle holds PEFT adapters",
            hint="omit it, or choose an output outside the bundle",
        )
    return plugins.for_output(path, "peft" if slot else to_format, AdapterFormat, "peft")


def write_adapter(
    adapter: Adapter,
    target: str | Path,
    *,
    base: str | Path | Checkpoint | None = None,
    dtype: str | None = None,
    force: bool = False,
    canonical: bool = True,
) -> list[str]:
    """Write an open adapter atomically and return notes; see `open_adapter_output`."""
    with ExitStack() as stack:
        output = open_adapter_output(
            stack, target, base=base, dtype=dtype, force=force, canonical=canonical
        )
        return output.write(adapter)


def _common_slot(sources: Iterable[str | Path]) -> BundleSlot | None:
    """Return the slot in the one bundle that contains all sources; None if there is none."""
    slots = [parse_bundle_slot(Path(source)) for source in sources]
    bundles = {None if slot is None else slot.bundle.resolve() for slot in slots}
    return slots[0] if len(bundles) == 1 else None


def write_bundle(
    checkpoint: Checkpoint,
    publication: AtomicOutput,
    options: WriteOptions,
    adapters: Mapping[str, Adapter],
    *,
    allow_base_mismatch: bool = False,
) -> WrittenModel:
    """Write a new bundle with adapters, by name, as one atomic output.

    The adapters were opened against a base of the same tensors. Those that were changed in memory
    are written anew; those that were made for another base are taken with ``allow_base_mismatch``.

    Raises
    ------
    LoraFormatError
        If an adapter does not fit the base, or was made for another one.
    """
    notes: list[str] = []
    _check_distinct(adapters)
    fits = {}
    for name, adapter in adapters.items():  # before the base is written, which takes longer
        fits[name] = check_fits(adapter, checkpoint)
        check_values(adapter)

    peft = plugins.get("peft")
    assert isinstance(peft, plugins.AdapterFormat)

    def add(fingerprint: str) -> converter.AdapterRecords:
        base = AdapterBase(checkpoint, fingerprint, checkpoint.provenance.to_json())
        form, records = AdapterForm(peft, base, None, False, allow_base_mismatch, None), {}
        for name, adapter in adapters.items():
            planned = form.plan(adapter)
            directory = publication.work / "adapters" / name
            directory.parent.mkdir(exist_ok=True)
            with AtomicOutput(directory, plan="adapter", work_name=f".{name}.partial") as stage:
                planned.write(stage)
                check_adapter(SafeDirectory(stage.work), ".", fingerprint)
                stage.commit()
            records[name] = records_of(directory)
            notes.extend(f"adapter {name}: {note}" for note in (*planned.notes, *fits[name]))
        return records

    written = converter.write(checkpoint, publication, options, add_adapters=add)
    written.notes += notes
    return written


def _check_distinct(names: Iterable[str]) -> None:
    """Refuse names that violate M09 or M12."""
    seen: set[str] = set()
    for name in names:
        if not is_adapter_name(name) or name.lower() in seen:
            raise UsageError(
                f"{name!r} cannot be the name of an adapter: wanted letters, digits, '.', '_' "
                "and '-', and no other adapter of that name (rules M09, M12)"
            )
        seen.add(name.lower())
