"""vLLM: https://docs.vllm.ai, ``vllm/lora`` and ``vllm/config/lora.py``."""

from __future__ import annotations

from loraformat.runtimes.known.advice import INIT
from loraformat.runtimes.ranks import VLLM_DEFAULT, VLLM_RANKS
from loraformat.runtimes.record import Runtime, caution, differs, refuses, unknown
from loraformat.runtimes.scaling import as_trained

__all__ = ["VLLM"]

VLLM = Runtime(
    name="vllm",
    title="vLLM",
    version="0.33.0, from its source",
    format="peft",
    format_remedy="peft",
    format_why="vLLM reads directories with adapter_config.json",
    scaling=as_trained,
    most=VLLM_RANKS[-1],
    default_rank=VLLM_DEFAULT,
    replaces=("score", "classifier"),
    treats={
        "INIT_MUTATES_BASE": refuses("vLLM rejects these initialisations", "advice", INIT),
        "ALORA": unknown("support for invocation tokens was not checked", "advice"),
        "DORA": refuses("vLLM rejects use_dora", "merge"),
        "BIAS": refuses("vLLM rejects biases", "merge"),
        "MODULES_TO_SAVE": refuses(
            "vLLM allows an adapter to replace only score and classifier", "merge"
        ),
        "TRAINED_TOKENS": refuses("vLLM does not support trained embedding rows", "merge"),
        "RANK_LIMIT": refuses("the rank exceeds the largest --max-lora-rank", "reduce"),
        "RANK_NOT_IN_SET": caution(
            "vLLM rejects ranks above --max-lora-rank, which is 16 by default and accepts only "
            "certain values",
            "advice",
            "start it with --max-lora-rank {limit}",
        ),
        "KEY_PREFIX": differs(
            "a module with a known suffix but an unknown prefix is loaded without effect "
            "(vllm-project/vllm#39278)",
            "rewrite",
        ),
        "FOREIGN_NAMES": differs(
            "a module with a known suffix but an unknown prefix is loaded without effect "
            "(vllm-project/vllm#39278)",
            "rewrite",
        ),
        "EMBEDDING": unknown("support for embedding deltas was not checked", "merge"),
        "MOE": refuses(
            "adapters of target_parameters are not loaded (vllm-project/vllm#41384, #52194)",
            "merge",
        ),
        "TIED_HEAD": unknown("support for tied heads was not checked", "merge"),
        "TOKENIZER_CHANGED": caution(
            "vLLM has one tokenizer for the base and all adapters (vllm-project/vllm#24078)",
            "advice",
            "start it with --tokenizer and the adapter's directory",
        ),
        "CHAT_TEMPLATE_CHANGED": caution(
            "vLLM has one chat template for the base and all adapters",
            "advice",
            "start it with --chat-template and the adapter's template",
        ),
    },
)
