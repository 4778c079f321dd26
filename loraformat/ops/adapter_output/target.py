"""Where a computed adapter goes: a format of its own, or a place in a bundle.

`reduce`, `combine` and `extract` open their target first, so that what cannot be written is
refused before minutes of work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from loraformat import plugins
from loraformat.bundle.update import BundleSlot, parse_bundle_slot
from loraformat.errors import UsageError
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat.ops.adapter_output.base import open_base
from loraformat.ops.adapter_output.form import AdapterOutput, BaseIdentity, check_fits, plan_output
from loraformat.ops.adapter_output.in_bundle import NewAdapter, add_adapters
from loraformat.plugins import Converter
from loraformat.storage.atomic_file import open_publication
from loraformat.storage.output_rules import refuse_existing, refuse_existing_file

__all__ = ["AdapterTarget", "ensure_not_exists", "open_target", "publish_adapter", "write_adapter"]


@dataclass(frozen=True, slots=True)
class AdapterTarget:
    """An output for one adapter; made by `open_target`.

    Attributes
    ----------
    path : Path
    writer : Converter
    place : BundleSlot or None
        In a bundle.
    base : Checkpoint or None
        What adapters are held against, and what the writer may need.
    home : BaseIdentity or None
        Of a base that is a bundle.
    dtype : str or None
        Of the factors.
    force, dry_run, allow_base_mismatch : bool
    canonical : bool
        Fold the scaling into B; else it stays apart where one alpha says every module's.
    """

    path: Path
    writer: Converter
    place: BundleSlot | None
    base: Checkpoint | None
    home: BaseIdentity | None
    dtype: str | None
    force: bool
    dry_run: bool
    allow_base_mismatch: bool
    canonical: bool = True

    def check(self, adapter: Adapter) -> None:
        """Hold an adapter that something will be made of against the base and the format.

        Raises
        ------
        LoraFormatError
            If it was made for another base, does not fit this one, or has what the format
            cannot hold.
        """
        if self.base is not None and self.base.tensors:
            check_fits(adapter, self.base)
        self._forecast(self._planned(adapter))

    def put(self, adapter: Adapter) -> list[str]:
        """Write an adapter, whole or not at all; in a dry run only see whether it could be.

        Returns
        -------
        list of str
            What a user should know.
        """
        if self.place is not None and not self.dry_run:
            incoming = NewAdapter(adapter, self.canonical, self.dtype, self.allow_base_mismatch)
            return add_adapters(self.place.bundle, {self.place.name: incoming}, force=self.force)
        output = self._planned(adapter)
        if self.dry_run:
            return [*output.notes, *self._forecast(output)]
        _, notes = publish_adapter(output, self.path, force=self.force)
        return [*output.notes, *notes]

    def _planned(self, adapter: Adapter) -> AdapterOutput:
        return plan_output(
            replace(adapter, verbatim=False),
            self.writer,
            canonical=self.canonical,
            dtype=self.dtype,
            base=self.base,
            home=self.home,
            allow_base_mismatch=self.allow_base_mismatch,
        )

    def _forecast(self, output: AdapterOutput) -> tuple[str, ...]:
        if self.writer.forecast_adapter is None:
            return ()
        return self.writer.forecast_adapter(output.adapter, self.path, output.options).notes


def open_target(
    stack: ExitStack,
    target: str | Path,
    sources: Iterable[str | Path] = (),
    *,
    base: str | Path | Checkpoint | None = None,
    dtype: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    allow_base_mismatch: bool = False,
    canonical: bool = True,
) -> AdapterTarget:
    """Open the output of an adapter that will be computed.

    Parameters
    ----------
    stack : ExitStack
        Closes the base.
    target : str or Path
        A PEFT directory unless the suffix says more, or ``BUNDLE/adapters/NAME``.
    sources : iterable of str or Path
        The adapters that it will be computed from. If they lie in one bundle, that is the base
        of an output in a format that needs one.
    base : str, Path or Checkpoint, optional
        The base. An open one stays the caller's.
    dtype, force, dry_run, allow_base_mismatch, canonical
        As in `AdapterTarget`.

    Raises
    ------
    OutputError
        If something stands at the target, unless ``force``.
    UsageError
        If a base is named for a target in a bundle.
    """
    path = Path(target)
    place = parse_bundle_slot(path)
    if place is not None and isinstance(base, str | Path):
        raise UsageError("--base: the bundle is the base", hint="leave it out")
    writer = _writer(path)
    if not dry_run:
        ensure_not_exists(path, force=force)
    found: Checkpoint | None
    home: BaseIdentity | None
    if isinstance(base, Checkpoint) and place is None:
        found, home = base, None
    else:
        named = None if isinstance(base, Checkpoint) else base
        origin = None if writer.name == "peft" else _common_origin(sources)
        found, home = open_base(stack, named, place, origin)
    return AdapterTarget(
        path, writer, place, found, home, dtype, force, dry_run, allow_base_mismatch, canonical
    )


def ensure_not_exists(target: str | Path, *, force: bool) -> None:
    """Refuse to replace what stands at an adapter's target, unless ``force`` says so.

    Raises
    ------
    OutputError
    """
    path = Path(target)
    refuse = refuse_existing_file if _writer(path).output == "file" else refuse_existing
    refuse(path, force=force)


def _writer(path: Path) -> Converter:
    if parse_bundle_slot(path) is not None:
        return plugins.get("peft")
    return plugins.for_output(path, None, "adapter")


def write_adapter(
    adapter: Adapter,
    target: str | Path,
    *,
    base: str | Path | Checkpoint | None = None,
    dtype: str | None = None,
    force: bool = False,
    canonical: bool = True,
) -> list[str]:
    """Write an open adapter, whole or not at all; see `open_target`.

    Returns
    -------
    list of str
        What a user should know.
    """
    with ExitStack() as stack:
        opened = open_target(
            stack, target, base=base, dtype=dtype, force=force, canonical=canonical
        )
        return opened.put(adapter)


def _common_origin(sources: Iterable[str | Path]) -> BundleSlot | None:
    """Return the place of an adapter in the bundle that holds all of them."""
    places = [parse_bundle_slot(Path(source)) for source in sources]
    bundles = {None if place is None else place.bundle.resolve() for place in places}
    return places[0] if len(bundles) == 1 else None


def publish_adapter(
    output: AdapterOutput, target: Path, *, force: bool, finish: Callable[[], None] = lambda: None
) -> tuple[int, list[str]]:
    """Write a planned adapter to an output of its own: whole or not at all.

    Parameters
    ----------
    output : AdapterOutput
    target : Path
    force : bool
    finish : callable
        Called before anything is published; closing the adapter raises if an input changed.

    Returns
    -------
    int
        Bytes.
    list of str
        The writer's notes.
    """
    adapter = output.adapter
    inputs = [adapter.path, *adapter.sources]
    if output.options.base is not None:  # an adapter may lie beside its base, not in its place
        inputs += output.options.base.sources
    with open_publication(
        output.writer.output, target, plan="adapter", inputs=inputs, force=force
    ) as stage:
        notes = output.write(stage)
        finish()
        nbytes = sum(f.stat().st_size for f in stage.work.rglob("[!.]*") if f.is_file())
        stage.commit()
    return nbytes, notes
