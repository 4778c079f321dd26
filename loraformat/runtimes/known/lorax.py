"""LoRAX: https://github.com/predibase/lorax, ``server/lorax_server/adapters/lora.py``."""

from __future__ import annotations

from loraformat.runtimes.known.advice import INIT
from loraformat.runtimes.record import Runtime, caution, differs
from loraformat.runtimes.scaling import by_config_with_rslora

__all__ = ["LORAX"]

_BY_NAME = (
    "LoRAX takes base_model.model.MODULE.lora_A.weight and lora_B.weight and warns about the rest"
)

LORAX = Runtime(
    name="lorax",
    title="LoRAX",
    version="a7394ba of 2026-05-28, from its source",
    format="peft",
    format_remedy="peft",
    format_why="LoRAX reads directories with adapter_config.json",
    scaling=by_config_with_rslora,
    one_rank=True,
    kernel_rank=128,
    even_ranks=True,
    whole_types=True,
    treats={
        "INIT_MUTATES_BASE": differs("LoRAX ignores the field", "advice", INIT),
        "ALORA": differs("LoRAX ignores the field: the adapter would act on all tokens", "advice"),
        "DORA": differs(f"use_dora is not read; {_BY_NAME}", "merge"),
        "BIAS": differs(_BY_NAME, "merge"),
        "MODULES_TO_SAVE": differs(_BY_NAME, "merge"),
        "TRAINED_TOKENS": differs(_BY_NAME, "merge"),
        "PATTERN_IGNORED": differs(
            "LoRAX scales every module by lora_alpha and r of the config, and stacks the factors "
            "of all layers, which must have one rank",
            "fix",
        ),
        "RANK_LIMIT": caution(
            "its kernels support ranks up to 128; higher ranks are slow", "reduce"
        ),
        "RANK_NOT_IN_SET": differs(
            "LoRAX pads such a rank for its kernels and divides alpha by the padded rank in every "
            "module type after the first",
            "fix",
        ),
        "KEY_PREFIX": differs(_BY_NAME, "rewrite"),
        "LAYERS_MISSING": differs(
            "LoRAX drops a module type entirely if one layer lacks it, at most with a warning",
            "fill",
        ),
        "EMBEDDING": differs(_BY_NAME, "merge"),
        "MOE": differs(_BY_NAME, "merge"),
        "TIED_HEAD": differs("LoRAX supports the head but not the embedding", "merge"),
        "TOKENIZER_CHANGED": caution(
            "LoRAX has one tokenizer for the base and all adapters (predibase/lorax#538)",
            "advice",
            "replace the base's tokenizer files with the adapter's",
        ),
        "CHAT_TEMPLATE_CHANGED": caution(
            "LoRAX has one chat template for the base and all adapters (predibase/lorax#538)",
            "advice",
            "start it with --tokenizer-config-path and a tokenizer_config.json that has the "
            "adapter's template",
        ),
    },
)
