"""Errors for unsupported fields of ``adapter_config.json``.

Whatever is not in one of these tables, and not known to be harmless, is noted; if it looks
as if it were switched on, it is refused, because a field that changes the mathematics must
never be passed over in silence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loraformat.errors import UnsupportedError, printable
from loraformat.model.foreign_adapters import MLX_HINT

__all__ = ["INVOCATION", "changing_start", "refuse_by_name", "unknown_fields"]

#: Fields that mlx-lm writes into a file of the same name.
_MLX = {"fine_tune_type", "lora_parameters", "lora_layers"}
#: Tokens from which on an aLoRA acts.
INVOCATION = "alora_invocation_tokens"

_EXTRACT = (
    "merge it with PEFT, PeftModel.from_pretrained(base, ADAPTER).merge_and_unload()"
    ".save_pretrained(MERGED), and use that, or the LoRA that loraformat extract BASE MERGED finds"
)
_UNMERGED = "use it in PEFT, unmerged: it does not change weights"

#: By field: what it does, and the remedy.
_REFUSED = {
    INVOCATION: (
        "aLoRA acts on some tokens only",
        "use it unmerged: in PEFT, or converted to GGUF in llama.cpp",
    ),
    "arrow_config": ("Arrow routes between adapters", "use it in PEFT, unmerged"),
    "use_bdlora": ("BD-LoRA's factors are block-diagonal", _EXTRACT),
    "kasa_config": ("KaSA truncates the base as PEFT loads it", _EXTRACT),
    "monteclora_config": ("MonteCLoRA samples its factors", _EXTRACT),
    "use_qalora": ("QALoRA pools its input", _EXTRACT),
    "layer_replication": (
        "the model has more layers than the base, which share weights",
        "write the replicated model out (each layer by itself), and use that as the base",
    ),
    "megatron_config": ("Megatron shards its factors", "export it to plain LoRA first"),
}

#: Starts of init_lora_weights by which PEFT changes the base whenever it loads the adapter.
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")

#: Methods that PEFT cannot merge: tokens or states are added, or the change depends on the input.
_NOT_MERGED = {
    *("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING"),
    *("PROMPT_TUNING", "P_TUNING", "LILY", "POLY", "SHADOW", "XLORA"),
}

#: Fields that are honoured, or that only matter while training or choosing modules.
_KNOWN = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha"),
    *("lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "megatron_core", "trainable_token_indices", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "use_dora", "velora_config", "qalora_group_size"),
    *("runtime_config", "lora_bias", "target_parameters", "ensure_weight_tying"),
    *_REFUSED,
}


def refuse_by_name(config: dict[str, Any], path: Path, *, conditional: bool = False) -> None:
    """Refuse methods beyond low-rank deltas and replacements; aLoRA unless ``conditional``."""
    kind = config.get("peft_type")
    if kind is None and _MLX & config.keys():
        raise UnsupportedError(
            "is an adapter in the form of mlx-lm, not PEFT's", path=path, hint=MLX_HINT
        )
    if kind != "LORA":
        raise UnsupportedError(
            f"peft_type is {printable(kind)}, and only LORA is a low-rank delta",
            path=path,
            hint=_method_remedy(str(kind)),
        )
    for field, (reason, remedy) in _REFUSED.items():
        if config.get(field) and not (conditional and field == INVOCATION):
            raise UnsupportedError(f"{field}: {reason}", path=path, hint=remedy)
    if (start := changing_start(config)) is not None:
        raise UnsupportedError(
            f"init_lora_weights is {printable(start)}: the factors belong to a base that PEFT "
            "changes as it loads them, not to the base itself",
            path=path,
            hint="save the modified base with the adapter, and set init_lora_weights to true"
            if start.lower().startswith("loftq")
            else "save it with path_initial_model_for_weight_conversion, as PEFT's documentation "
            "shows, and loraformat reduce lowers the doubled rank; if the training is over, "
            + _EXTRACT,
        )


def changing_start(config: dict[str, Any]) -> str | None:
    """Return ``init_lora_weights`` if it makes PEFT change the base on loading."""
    start = config.get("init_lora_weights")
    changes = isinstance(start, str) and start.lower().startswith(_CHANGES_BASE)
    return str(start) if changes else None


def _method_remedy(kind: str) -> str:
    if kind == "TRAINABLE_TOKENS":
        return "train it as LoRA with trainable_token_indices"
    return _UNMERGED if kind in _NOT_MERGED else _EXTRACT


def unknown_fields(config: dict[str, Any], path: Path) -> list[str]:
    """Return a note for each field that no known version of PEFT writes.

    One that looks as if it were switched on is refused.
    """
    notes = []
    for field, value in config.items():
        if field in _KNOWN or value in (None, False, "", [], {}):
            continue
        switch = field.startswith("use_") and value is True
        if switch or (field.endswith("_config") and isinstance(value, dict)):
            raise UnsupportedError(
                f"field {printable(field)} is unknown here and switched on, so that the factors "
                "may not mean what they seem to",
                path=path,
                hint=f"remove it if it has no effect that the adapter computes; else {_EXTRACT}",
            )
        notes.append(f"adapter_config.json: field {printable(field)} is unknown and was ignored")
    return notes
