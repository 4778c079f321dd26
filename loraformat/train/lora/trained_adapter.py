"""A trained adapter: branches to the neutral adapter, to a PEFT directory with its training record.

``training_record.json`` lies beside the adapter's weights, travels with them into bundles and to
the Hub, and is what a model card is written from. PEFT does not look at it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from loraformat.bundle.reader import Bundle
from loraformat.errors import LoraFormatError, printable
from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.model.checkpoint import CarriedFile, DenseTensor
from loraformat.model.vocabulary import tokenizer_files
from loraformat.ops.adapter_output.output import write_adapter
from loraformat.ops.deltas.factors import in_memory
from loraformat.runtimes.chat import RECORD_NAME
from loraformat.storage.safe_paths import MANIFEST_NAME
from loraformat.tensors.arrays import array_bytes
from loraformat.tensors.torch_arrays import array_of
from loraformat.train.lora.branch import LoraBranch
from loraformat.train.lora.options import LoraOptions
from loraformat.train.lora.replaced_weights import ReplacedWeights
from loraformat.version import __version__

__all__ = ["save_adapter", "trained_adapter"]

#: Members of PEFT's config that belong to replaced weights.
_REPLACED = ("modules_to_save", "trainable_token_indices", "ensure_weight_tying")


def trained_adapter(
    branches: Mapping[str, LoraBranch], bundle: Bundle, replaced: ReplacedWeights | None = None
) -> Adapter:
    """Return the adapter that branches are at the moment in which its tensors are loaded.

    Factors are float32, the scaling is resolved; with the second moments that were collected. The
    fingerprint and the source of the base go with the adapter, and `replaced` unchanged.
    """
    deltas = [_delta(branch) for branch in branches.values()]
    parameters = any(branch.target.is_parameter for branch in branches.values())
    dropouts = {branch.dropout for branch in branches.values()}
    config: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        # PEFT has no dropout where it adapts parameters.
        "lora_dropout": 0.0 if parameters else max(dropouts, default=0.0),
    }
    targets = [branch.target for branch in branches.values()]
    spellings = {t.weight_name: t.stored_name for t in targets if t.weight_name != t.stored_name}
    replacements, rows = {}, {}
    if replaced is not None:
        earlier = replaced.adapter
        config |= {key: earlier.config.get(key) for key in _REPLACED}
        spellings = {**earlier.spellings, **spellings}
        replacements, rows = earlier.replacements, earlier.rows
    return Adapter(
        path=bundle.folder.path / MANIFEST_NAME,
        format="trained",
        deltas={delta.target: delta for delta in deltas},
        replacements=replacements,
        rows=rows,
        spellings=spellings,
        config=config,
        base_model=bundle.checkpoint.provenance.repo or str(bundle.folder.path),
        base_fingerprint=bundle.manifest.fingerprint,
        base_source=json.dumps(dict(bundle.manifest.source), ensure_ascii=False),
    )


def _delta(branch: LoraBranch) -> LoraDelta:
    target = branch.target
    name = target.weight_name
    a_shape, b_shape = (tuple(factor.shape) for factor in branch.effective())
    moment = branch.moments.second_moment()
    magnitude = branch.magnitude
    return LoraDelta(
        target=name,
        a=_lazy(f"{name}.lora_A", a_shape, lambda: branch.effective()[0]),
        b=_lazy(f"{name}.lora_B", b_shape, lambda: branch.effective()[1]),
        scaling=branch.scaling,
        orientation="transposed" if target.transposed or target.kind == "embedding" else "linear",
        magnitude=None
        if magnitude is None
        else _lazy(f"{name}.lora_magnitude_vector", tuple(magnitude.shape), lambda: magnitude),
        second_moment=None
        if moment is None
        else in_memory(f"{name}.second_moment", array_of(moment.cpu())),
        alpha=branch.scaling * branch.rank,
    )


def _lazy(name: str, shape: tuple[int, ...], current: Callable[[], torch.Tensor]) -> DenseTensor:
    def load() -> memoryview:
        values = current().detach().float().cpu()
        if not bool(values.isfinite().all()):
            raise LoraFormatError(
                f"{printable(name)} holds NaN or infinity: the training diverged",
                hint="resume from an earlier checkpoint with a lower learning rate",
            )
        return array_bytes(array_of(values))

    return DenseTensor(name, "F32", shape, load)


def save_adapter(
    branches: Mapping[str, LoraBranch],
    bundle: Bundle,
    path: str | Path,
    *,
    options: LoraOptions | None = None,
    force: bool = False,
    facts: Mapping[str, Any] | None = None,
    files: tuple[CarriedFile, ...] = (),
    replaced: ReplacedWeights | None = None,
) -> Path:
    """Write what was trained as a PEFT adapter, whole or not at all, and return its path.

    Alpha and rank are written as they were trained with where one alpha says it all; else
    (rsLoRA, ranks of their own) the scaling is folded into B. `options` and `facts` are for the
    record; `files` are stored next to the weights, as is a tokenizer that is among `replaced`. All
    else is as in `TrainableModel.save_adapter`.

    Raises
    ------
    LoraFormatError
        If it cannot be written, or a factor is not finite. Nothing appears then.
    """
    adapter = trained_adapter(branches, bundle, replaced)
    if replaced is not None and replaced.tokenizer is not None:
        beside = {file.path for file in files}
        tokenizer = tokenizer_files(replaced.adapter.files)
        files = (*files, *(file for file in tokenizer if file.path not in beside))
    parameters = sum(p.numel() for branch in branches.values() for p in branch.named().values())
    adapter.files = (_training_record(options, bundle, facts or {}, parameters), *files)
    target = Path(path)
    write_adapter(adapter, target, base=bundle.checkpoint, force=force, canonical=False)
    return target


def _training_record(
    options: LoraOptions | None, base: Bundle, facts: Mapping[str, Any], parameters: int
) -> CarriedFile:
    """Return the record of a training as a file to be carried.

    `options` are what was asked for, None if an adapter was continued; `facts` is what the training
    says of itself, as JSON values.
    """
    manifest = base.manifest
    record = {
        "schema": "loraformat.training_record",
        "schema_version": 1,
        "created_by": f"loraformat {__version__}",
        "base": {"fingerprint": manifest.fingerprint, "source": dict(manifest.source)},
        "lora": None if options is None else {**asdict(options), "ranks": dict(options.ranks)},
        "trained_parameters": parameters,
        "training": dict(facts),
    }
    try:
        text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise LoraFormatError(f"the facts of the training are no JSON: {error}") from None
    return CarriedFile.of(RECORD_NAME, text.encode("utf-8"))
