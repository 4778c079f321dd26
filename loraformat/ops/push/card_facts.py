"""Card facts from descriptions of files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loraformat.bundle.manifest import Manifest
from loraformat.card import AdapterFacts, Base, BundleFacts, FileFact, Training
from loraformat.model.quantization_history import spelled
from loraformat.model.tied_head import lacks_head
from loraformat.ops.info.report import AdapterInfo, ModelInfo
from loraformat.ops.push.files import CONFIG_NAME, UploadFile, read_record
from loraformat.runtimes.chat import Chat

__all__ = ["adapter_facts", "bundle_facts"]


def adapter_facts(
    said: AdapterInfo,
    task: object,
    repo: str,
    base: Base,
    files: list[UploadFile],
    wrong_in: Iterable[str],
    chat: Chat | None = None,
    labels: int | None = None,
) -> AdapterFacts:
    """Return what a card says of an adapter.

    Parameters
    ----------
    said : AdapterInfo
    task : object
        ``task_type`` of its config, whatever that is.
    repo : str
    base : Base
    files : list of UploadFile
    wrong_in : iterable of str
        Runtimes that would refuse it or compute something else.
    chat : Chat, optional
        How it is prompted.
    labels : int, optional
        Of one that classifies.
    """
    ggufs = [file.path for file in files if file.path.endswith(".gguf")]
    return AdapterFacts(
        repo=repo,
        base=base,
        ranks=said.ranks,
        alphas=said.alphas,
        scalings=said.scalings,
        targets=said.targets,
        modules=len(said.modules),
        parameters=said.parameters,
        dtypes=said.dtypes,
        files=_files(files),
        peft=any(file.path == CONFIG_NAME for file in files),
        gguf=ggufs[0] if ggufs else None,
        task=task if isinstance(task, str) else None,
        labels=labels,
        dora=said.dora,
        biases=said.biases,
        replacements=[*said.replacements, *said.replaced_rows],
        fingerprint=said.base_fingerprint,
        training=Training(read_record(files)),
        wrong_in=frozenset(wrong_in),
        chat=chat,
    )


def bundle_facts(
    said: ModelInfo,
    manifest: Manifest,
    repo: str,
    base: Base,
    files: list[UploadFile],
    config: Mapping[str, Any],
) -> BundleFacts:
    """Return what a card says of a bundle with this config; other parameters as above."""
    errors = [
        record.relative_rms_error
        for record in manifest.tensors.values()
        if record.relative_rms_error is not None
    ]
    return BundleFacts(
        repo=repo,
        base=base,
        architecture=said.architecture,
        layers=said.layers,
        parameters=said.parameters,
        quantized_parameters=said.quantized_parameters,
        weight_bytes=said.weight_bytes,
        bits_per_weight=said.bits_per_weight,
        block_sizes=said.block_sizes,
        double_quant=said.double_quant,
        fingerprint=manifest.fingerprint,
        errors=(min(errors), max(errors)) if errors else (),
        files=_files(files),
        headless=lacks_head(manifest.tensors, config),
        quantized_before=spelled(said.quantized_before) if said.quantized_before else None,
        adapters={
            adapter.name: AdapterFacts(
                repo=repo,
                base=base,
                ranks=list(adapter.ranks),
                alphas=[],
                scalings=[],
                targets=adapter.targets,
                modules=0,
                parameters=adapter.parameters,
                dtypes={},
                files=[],
            )
            for adapter in said.adapters
        },
    )


def _files(files: list[UploadFile]) -> list[FileFact]:
    ordered = sorted(files, key=lambda file: file.path)
    return [FileFact(file.path, file.nbytes, file.sha256) for file in ordered]
