"""Facts about a PEFT adapter, for compatibility rules.

What `read` refuses by name is a fact here. Only damage is an error: a config that is no
JSON, a weights file that is no safetensors file.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraformat.bundle.integrity import BASE_FINGERPRINT, BASE_SOURCE
from loraformat.errors import UnsupportedError, printable
from loraformat.model.adapter_facts import AdapterFacts, Loading, ModuleFacts
from loraformat.model.base_names import names_of
from loraformat.model.checkpoint import Checkpoint, DenseTensor
from loraformat.model.tied_head import config_of, tied_embedding
from loraformat.plugins import AdapterReadOptions
from loraformat.runtimes.from_adapter import is_zero
from loraformat.runtimes.task_usage import labels_of
from loraformat.storage import strict_json
from loraformat.storage.safe_directory import SafeDirectory
from loraformat_converters.peft.config import CONFIG_NAME, LoraSettings, read_config, text
from loraformat_converters.peft.keys import adapter_in, is_usual, parse_key
from loraformat_converters.peft.load_on_meta import Stored
from loraformat_converters.peft.loading import judge_loading
from loraformat_converters.peft.refusals import changing_start, refuse_by_name, unknown_fields
from loraformat_converters.peft.rows import FIELD
from loraformat_converters.peft.weights import (
    INDEX_NAME,
    StoredTensors,
    open_tensors,
    other_weights,
)

__all__ = ["examine"]


def examine(path: Path, options: AdapterReadOptions) -> AdapterFacts:
    """Collect facts from an adapter's config, tensor names, shapes and values, and its base's."""
    folder = SafeDirectory(path)
    config = read_config(folder)
    refusal = _refusal(config, path)
    if refusal is not None and config.get("peft_type") != "LORA":  # its tensors have other names
        return AdapterFacts("peft", refusal=refusal.problem, refusal_hint=refusal.hint)
    settings = LoraSettings(config, folder.path / CONFIG_NAME)
    with contextlib.closing(open_tensors(folder, allow_pickle=options.allow_pickle)) as stored:
        facts = _Examiner(settings, stored, options.base).facts(refusal)
        return replace(facts, beside=tuple(other_weights(folder.names())))


def _refusal(config: dict[str, Any], path: Path) -> UnsupportedError | None:
    try:
        refuse_by_name(config, path, conditional=True)
        unknown_fields(config, path)
    except UnsupportedError as error:
        return error
    return None


class _Examiner:
    def __init__(
        self, settings: LoraSettings, stored: StoredTensors, base: Checkpoint | None
    ) -> None:
        self.settings, self.stored, self.base = settings, stored, base
        self.names = names_of(base, settings.config.get("task_type")) if base is not None else None
        self.adapter = adapter_in(stored.tensors)
        self.keys = {name: parse_key(name, self.adapter) for name in stored.tensors}
        # PEFT saves a trained embedding under two names.
        self.replaced = tuple(dict.fromkeys(self._owners("")))
        self.modules: dict[tuple[str, int], dict[str, DenseTensor]] = {}
        for name, key in self.keys.items():
            if key.part not in ("", "tokens", "original", "unknown"):
                parts = self.modules.setdefault((key.owner, key.depth), {})
                parts[key.part] = stored.tensors[name]
        self.nonfinite: list[str] = []
        self.zero = {n for n, t in stored.tensors.items() if is_zero(t, self.nonfinite)}

    def _owners(self, part: str) -> Iterator[str]:
        return (key.owner for key in self.keys.values() if key.part == part)

    def facts(self, refusal: UnsupportedError | None) -> AdapterFacts:
        config, tensors = self.settings.config, self.stored.tensors
        problem, hint = (refusal.problem, refusal.hint) if refusal else (None, None)
        strange = [name for name, key in self.keys.items() if key.part == "unknown"]
        if problem is None and strange:
            problem = f"tensor {printable(strange[0])} is not part of a LoRA adapter"
        rows = tuple(self._owners("tokens"))
        found = tuple(self._module(*key, parts) for key, parts in self.modules.items())
        return AdapterFacts(
            format="peft",
            modules=found,
            replaced=self.replaced,
            rows=rows,
            last_token=_last_token(config) if rows else None,
            task=text(config.get("task_type")),
            labels=labels_of((self.keys[name].owner, t.shape) for name, t in tensors.items()),
            config_rank=config.get("r", 8),
            config_alpha=config.get("lora_alpha", 8),
            rslora=self.settings.rslora,
            patterns=tuple(f for f in ("rank_pattern", "alpha_pattern") if config.get(f)),
            init=changing_start(config),
            invocation_tokens=bool(self.settings.invocation_tokens),
            dora=config.get("use_dora") is True or any(module.dora for module in found),
            bias=self._has_biases(config, found),
            odd_names=tuple(name for name in tensors if not is_usual(name, self.adapter)),
            empty=tuple(name for name, tensor in tensors.items() if not all(tensor.shape)),
            sharded=self.stored.path.name == INDEX_NAME,
            nonfinite=tuple(self.nonfinite),
            refusal=problem,
            refusal_hint=hint,
            base_model=text(config.get("base_model_name_or_path")),
            base_fingerprint=self.stored.metadata.get(BASE_FINGERPRINT),
            base_commit=_commit(self.stored.metadata.get(BASE_SOURCE), config.get("revision")),
            foreign=self._foreign(),
            loading=None if problem else self._loading(),
        )

    def _foreign(self) -> tuple[str, ...]:
        """Return the modules that the base has under other names."""
        if self.names is None or self.base is None:
            return ()
        modules = [f"{owner}.weight" for owner, _ in self.modules]
        found = {name: self.names.find(name) for name in (*modules, *self.replaced)}
        return tuple(
            name
            for name, stored in found.items()
            if stored is not None and name not in (stored, self.names.in_memory(stored))
        )

    def _loading(self) -> Loading | None:
        if self.base is None or self.names is None:
            return None
        tensors = {n: Stored(t.dtype, t.shape) for n, t in self.stored.tensors.items()}
        config, base = self.settings.config, config_of(self.base)
        tied = tied_embedding(self.base.tensors, base)
        return judge_loading(config, tensors, base, self.names, self.adapter, tied)

    def _has_biases(self, config: Mapping[str, Any], found: tuple[ModuleFacts, ...]) -> bool:
        said = config.get("bias") not in (None, "none") or config.get("lora_bias") is True
        stored = any(name.endswith(".bias") for name in self.replaced)
        return said or stored or any(module.bias for module in found)

    def _module(self, owner: str, depth: int, parts: dict[str, DenseTensor]) -> ModuleFacts:
        a = parts.get("A", parts.get("embedding_A"))
        b = parts.get("B", parts.get("embedding_B"))
        rank = a.shape[0] if a is not None and a.shape else 0
        experts = 0
        if a is not None and len(a.shape) == 3:  # a stack under the name of a linear
            rank, experts = a.shape[1], max(a.shape[0], b.shape[0] if b is not None else 0)
        elif depth or any(home for home, _ in self.settings.parameters_of(owner)):  # a parameter's
            config_rank = self.settings.rank(owner)
            rank, experts = config_rank, max(rank // config_rank, 1)
        return ModuleFacts(
            name=owner,
            rank=rank,
            in_features=a.shape[-1] if a is not None and a.shape else 0,
            out_features=b.shape[-2 if len(b.shape) > 1 else 0] if b is not None and b.shape else 0,
            alpha=self.settings.alpha(owner),
            scaling=self.settings.scaling(owner, rank) if rank else 0.0,
            dtypes=tuple(tensor.dtype for tensor in (a, b) if tensor is not None),
            missing="lora_A" if a is None else "lora_B" if b is None else None,
            dora="magnitude" in parts,
            bias="bias" in parts,
            experts=experts,
            embedding="embedding_A" in parts or "embedding_B" in parts,
            zero=b is not None and b.name in self.zero,
            base_shape=self._base_shape(owner),
        )

    def _base_shape(self, owner: str) -> tuple[int, ...] | None:
        found = self.names.find(f"{owner}.weight") if self.names is not None else None
        return self.base.tensors[found].shape if self.base is not None and found else None


def _last_token(config: Mapping[str, Any]) -> int | None:
    """Return the largest trained token; None if the config is invalid."""
    named = config.get(FIELD)
    lists = named.values() if isinstance(named, dict) else [named]
    tokens = [n for some in lists if isinstance(some, list) for n in some if type(n) is int]
    return max(tokens, default=None)


def _commit(source: str | None, revision: object) -> str | None:
    """Return the commit of the base, from the bundle's record or the config."""
    with contextlib.suppress(strict_json.StrictJsonError):
        found = strict_json.loads(source.encode("utf-8")) if source else None
        if isinstance(found, dict) and found.get("revision"):
            revision = found["revision"]
    is_commit = isinstance(revision, str) and re.fullmatch(r"[0-9a-f]{40}", revision)
    return str(revision) if is_commit else None
