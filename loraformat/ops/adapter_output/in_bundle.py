"""Writing a new bundle with adapters in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from loraformat import plugins
from loraformat.bundle import converter
from loraformat.bundle.integrity import check_adapter
from loraformat.bundle.update import records_of
from loraformat.errors import UsageError
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.written import WrittenModel
from loraformat.ops.adapter_output.base import AdapterBase
from loraformat.ops.adapter_output.form import AdapterForm, check_fits, check_values
from loraformat.plugins import WriteOptions
from loraformat.storage.atomic_output import AtomicOutput
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.storage.safe_paths import is_adapter_name

__all__ = ["write_bundle"]


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
        form, records = AdapterForm(peft, base, None, False, allow_base_mismatch), {}
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
