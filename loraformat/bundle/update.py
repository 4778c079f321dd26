"""Adding and removing a bundle's adapters without touching its base.

An adapter is prepared in ``adapters/.NAME.partial``, which no reader looks at. Then, under
the bundle's lock (that of its directory; others wait for it)::

    1. the manifest is read again, and its successor written beside it
    2. if an adapter of that name is replaced: a manifest without it appears
    3. the directory appears as adapters/NAME (the old one leaves in the same step)
    4. the manifest that lists it appears

Each step is a rename between two fsyncs, so a kill or a power cut leaves the bundle valid:
a directory that no manifest lists is no part of it. After a kill between 2 and 4 the
adapter is missing in the manifest, never listed with another's hashes; the same command
again completes it. What a killed process has left over, the next one removes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from loraformat.bundle.integrity import file_record
from loraformat.bundle.manifest import FORMAT_VERSION, SEGMENTS_VERSION, Manifest
from loraformat.bundle.manifest_rules import MAX_MANIFEST_BYTES, parse_manifest
from loraformat.bundle.reader import is_bundle
from loraformat.errors import InputError, OutputError, UnsupportedError, UsageError, printable
from loraformat.model.written import FileRecord
from loraformat.storage.atomic_output import AtomicOutput, disk_full
from loraformat.storage.durable import (
    identity,
    lock,
    locked,
    new_file,
    open_directory,
    sync_directory,
    write_all,
)
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.storage.safe_paths import (
    MANIFEST_NAME,
    is_adapter_name,
    is_portable_path,
    unlistable,
)

__all__ = [
    "BundleSlot",
    "add_adapter",
    "parse_bundle_slot",
    "read_manifest",
    "records_of",
    "refuse_listed",
    "remove_adapter",
]

ADAPTERS = "adapters"
_MANIFEST_NEW = f".{MANIFEST_NAME}.new"
_MANIFEST_WITHOUT = f".{MANIFEST_NAME}.without"


@dataclass(frozen=True, slots=True)
class BundleSlot:
    """Location of an adapter in a bundle: the bundle's directory and a name."""

    bundle: Path
    name: str

    @property
    def path(self) -> Path:
        """``BUNDLE/adapters/NAME``."""
        return self.bundle / ADAPTERS / self.name


def parse_bundle_slot(path: Path) -> BundleSlot | None:
    """Parse ``BUNDLE/adapters/NAME``; None for any other path.

    Nothing need be there yet, but the bundle. Raises `UsageError` for ``BUNDLE/adapters`` itself,
    and for a name that breaks rule M09.
    """
    absolute = Path(os.path.abspath(path))
    if absolute.name == ADAPTERS and is_bundle(absolute.parent):
        raise UsageError(
            f"{path} is where the adapters of a bundle are", hint=f"name one: {path / 'NAME'}"
        )
    if absolute.parent.name != ADAPTERS or not is_bundle(absolute.parent.parent):
        return None
    if not is_adapter_name(absolute.name):
        raise UsageError(
            f"{printable(absolute.name)} cannot be the name of an adapter: wanted 1 to 96 letters, "
            "digits, '.', '_' and '-', a letter or digit first, and no device of Windows (rule M09)"
        )
    return BundleSlot(absolute.parent.parent, absolute.name)


def read_manifest(bundle: Path) -> Manifest:
    """Read and check a bundle's manifest, and nothing else."""
    raw = SafeDirectory(bundle).read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
    return parse_manifest(raw, bundle / MANIFEST_NAME)


def records_of(directory: Path) -> dict[str, FileRecord]:
    """Hash an adapter's files, without hidden ones.

    Raises `UnsupportedError` if a name breaks M08 or M12, so that the file cannot be part of a
    bundle.
    """
    folder = SafeDirectory(directory)
    names = folder.names()
    if (name := unlistable(names, is_portable_path)) is not None:
        problem = f"file name {printable(name)} cannot be part of a bundle"
        raise UnsupportedError(problem, path=directory, hint="rename or remove it")
    return {name: file_record(folder, name) for name in names}


def add_adapter(
    place: BundleSlot,
    write: Callable[[AtomicOutput], None],
    *,
    inputs: Iterable[Path] = (),
    force: bool = False,
) -> dict[str, FileRecord]:
    """Add an adapter to a bundle, or replace it; return its files as the manifest lists them.

    `write` writes the adapter's files into a publication, without committing it; `inputs` is what
    is read for it; `force` replaces an adapter of that name. Raises `OutputError` if there is one
    of that name, another process adds one of that name now, or the bundle cannot be changed.
    """
    manifest = read_manifest(place.bundle)
    _refuse(place, manifest, force)
    target = place.path
    try:
        _make_room(place.bundle)
        # An unlisted directory may be what a killed run left: whether it may go is seen below.
        unlisted = place.name not in manifest.adapters
        with AtomicOutput(
            target,
            plan="adapter",
            inputs=inputs,
            force=force or unlisted,
            work_name=f".{place.name}.partial",
        ) as stage:
            write(stage)
            records = records_of(stage.work)
            with _exclusive(place.bundle):
                _sweep(place.bundle, stage.work)
                _list(place, stage, records, force)
    except OSError as error:
        raise disk_full(error, target) from error
    return records


def refuse_listed(place: BundleSlot, *, force: bool) -> None:
    """Refuse a slot whose adapter the manifest lists, unless ``force`` says so.

    Raises `OutputError` also if the bundle cannot be changed.
    """
    _refuse(place, read_manifest(place.bundle), force)


def _refuse(place: BundleSlot, manifest: Manifest, force: bool) -> None:
    path = place.bundle / MANIFEST_NAME
    if path.is_symlink():
        raise OutputError(
            "is a link, as in a Hub cache, and cannot be changed there",
            path=path,
            hint="copy the bundle to a directory of its own first",
        )
    if manifest.format_version not in (FORMAT_VERSION, SEGMENTS_VERSION):
        raise UnsupportedError(
            f"has format version {manifest.format_version}, and this program writes "
            f"{FORMAT_VERSION} and {SEGMENTS_VERSION}",
            path=path,
            hint="install a newer loraformat",
        )
    for name in manifest.adapters:
        if name.lower() == place.name.lower() and name != place.name:
            raise OutputError(
                f"the bundle has an adapter {name}, which differs only in case",
                path=place.path,
                hint="choose another name",
            )
    if place.name in manifest.adapters and not force:
        raise OutputError("already exists", path=place.path, hint="use --force to replace it")


def _make_room(bundle: Path) -> None:
    adapters = bundle / ADAPTERS
    with contextlib.suppress(FileExistsError):
        os.mkdir(adapters)
        sync_directory(bundle)
    if adapters.is_symlink() or not adapters.is_dir():
        raise OutputError("is a link or not a directory", path=adapters, hint="remove it")


@contextlib.contextmanager
def _exclusive(bundle: Path) -> Iterator[None]:
    """Wait for the bundle's lock and hold it."""
    while True:
        descriptor = open_directory(bundle.resolve())
        try:
            lock(descriptor, wait=True)
            if identity(descriptor) == identity(bundle):  # not replaced meanwhile
                yield
                return
        finally:
            os.close(descriptor)


def _sweep(bundle: Path, own: Path) -> None:
    """Remove leftovers of killed processes: hidden directories without a lock."""
    for name in (_MANIFEST_NEW, _MANIFEST_WITHOUT):
        (bundle / name).unlink(missing_ok=True)
    for path in (bundle / ADAPTERS).glob(".*.partial"):
        if path == own or path.is_symlink() or not path.is_dir():
            continue
        try:
            os.rmdir(path)  # an empty one may be somebody's who is about to lock it: he retries
        except OSError:
            with locked(path) as alone:
                if alone:
                    shutil.rmtree(path)


def _list(
    place: BundleSlot, stage: AtomicOutput, records: dict[str, FileRecord], force: bool
) -> None:
    """Perform steps 1 to 4 while holding the bundle's lock."""
    manifest = read_manifest(place.bundle)
    _refuse(place, manifest, force)
    listed = manifest.adapters.get(place.name)
    same = _holds(place.path, records)
    if same and listed == records:
        return
    if listed is None and not same and not force and _is_filled(place.path):
        raise OutputError(
            "already exists, but is not listed in the manifest",
            path=place.path,
            hint="use --force to replace it, or move it away",
        )
    others = {name: files for name, files in manifest.adapters.items() if name != place.name}
    complete = replace(manifest, adapters={**others, place.name: records})
    _prepare(place.bundle, _MANIFEST_NEW, complete)
    if listed is not None:
        _prepare(place.bundle, _MANIFEST_WITHOUT, replace(manifest, adapters=others))
        _appear(place.bundle, _MANIFEST_WITHOUT)
    if not same:  # else a killed run came as far as this
        with _manifest_stays_true(place, manifest):
            stage.commit()
    _appear(place.bundle, _MANIFEST_NEW)


def _holds(directory: Path, records: dict[str, FileRecord]) -> bool:
    """Tell whether a directory contains exactly these files."""
    if directory.is_symlink() or not directory.is_dir():
        return False
    folder = SafeDirectory(directory)
    return folder.names() == sorted(records) and all(
        file_record(folder, name) == record for name, record in records.items()
    )


def _is_filled(path: Path) -> bool:
    return os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir()))


@contextlib.contextmanager
def _manifest_stays_true(place: BundleSlot, before: Manifest) -> Iterator[None]:
    """If the swap fails, make the manifest list the adapter that is in place."""
    old = identity(place.path) if place.path.is_dir() else None
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            new = identity(place.path) if place.path.is_dir() else None
            if new is not None and new != old:
                _appear(place.bundle, _MANIFEST_NEW)
            elif place.name in before.adapters:
                _prepare(place.bundle, _MANIFEST_NEW, before)
                _appear(place.bundle, _MANIFEST_NEW)
        raise


def _prepare(bundle: Path, name: str, manifest: Manifest) -> None:
    """Write a new manifest under a temporary name."""
    raw = manifest.encode()
    parse_manifest(raw, bundle / MANIFEST_NAME)  # what we write, we read
    with new_file(bundle / name) as file:
        write_all(file, raw)
        os.fsync(file.fileno())


def _appear(bundle: Path, name: str) -> None:
    """Rename a prepared manifest to its final name."""
    os.replace(bundle / name, bundle / MANIFEST_NAME)
    sync_directory(bundle)


def _is_unlisted_adapter(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and (path / "adapter_config.json").is_file()


def remove_adapter(place: BundleSlot) -> None:
    """Remove an adapter from a bundle: first from the manifest, then from the disk.

    What a killed removal has left on the disk is removed, too. Raises `InputError` if the manifest
    does not list it, and what stands there, if anything, is no adapter.
    """
    # No adapter's name begins with a dot, so nobody prepares one under this one.
    leaving = place.path.with_name(f"..{place.name}.partial")
    try:
        with _exclusive(place.bundle):
            manifest = read_manifest(place.bundle)
            _refuse(place, manifest, force=True)
            if place.name in manifest.adapters:
                others = {n: files for n, files in manifest.adapters.items() if n != place.name}
                _prepare(place.bundle, _MANIFEST_NEW, replace(manifest, adapters=others))
                _appear(place.bundle, _MANIFEST_NEW)
            elif not leaving.is_dir() and not _is_unlisted_adapter(place.path):
                raise InputError("is not an adapter listed in the manifest", path=place.path)
            _sweep(place.bundle, leaving)
            if leaving.is_dir():
                shutil.rmtree(leaving)
            with contextlib.suppress(FileNotFoundError):  # its files may have gone before
                os.rename(place.path, leaving)
                sync_directory(place.path.parent)
                shutil.rmtree(leaving)
    except OSError as error:
        raise disk_full(error, place.path) from error
