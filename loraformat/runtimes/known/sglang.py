"""SGLang: https://docs.sglang.io, ``sglang/srt/lora``."""

from __future__ import annotations

from loraformat.runtimes.known.advice import INIT
from loraformat.runtimes.record import Runtime, caution, differs, refuses, unknown
from loraformat.runtimes.scaling import by_config

__all__ = ["SGLANG"]

_ONE_SCALING = "SGLang multiplies every module by lora_alpha / r of the config"

SGLANG = Runtime(
    name="sglang",
    title="SGLang",
    version="0.5.23, from its source",
    format="peft",
    format_remedy="peft",
    format_why="SGLang reads directories with adapter_config.json",
    scaling=by_config,
    one_rank=True,
    couples=(("q_proj", "v_proj"),),
    treats={
        "INIT_MUTATES_BASE": differs("SGLang ignores the field", "advice", INIT),
        "ALORA": differs("SGLang ignores the field: the adapter would act on all tokens", "advice"),
        "DORA": refuses("SGLang rejects use_dora", "merge"),
        "BIAS": unknown("support for biases was not checked", "merge"),
        "MODULES_TO_SAVE": unknown("support for replaced modules was not checked", "merge"),
        "TRAINED_TOKENS": refuses("SGLang rejects added tokens", "merge"),
        "RSLORA_IGNORED": differs(f"{_ONE_SCALING} (sgl-project/sglang#40835)", "fix"),
        "PATTERN_IGNORED": differs(_ONE_SCALING, "fix"),
        "QV_COUPLED": refuses(
            "SGLang fuses q, k and v and fails without v_proj (KeyError)", "fill"
        ),
        "KEY_PREFIX": unknown("only the names that PEFT writes were checked", "rewrite"),
        "EMBEDDING": unknown("support for embedding deltas was not checked", "merge"),
        "MOE": differs(
            "deltas of target_parameters are silently dropped (sgl-project/sglang#25528)",
            "merge",
        ),
        "TIED_HEAD": unknown("support for tied heads was not checked", "merge"),
        "TOKENIZER_CHANGED": caution(
            "SGLang has one tokenizer for the base and all adapters, and refuses tokens beyond the "
            "base's vocabulary",
            "advice",
            "start it with --tokenizer-path and the adapter's directory",
        ),
        "CHAT_TEMPLATE_CHANGED": caution(
            "SGLang has one chat template for the base and all adapters",
            "advice",
            "start it with --chat-template and the adapter's template",
        ),
    },
)
