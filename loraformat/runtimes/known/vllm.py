"""vLLM: https://docs.vllm.ai, ``vllm/lora`` and ``vllm/config/lora.py``."""

from __future__ import annotations

from loraformat.runtimes.known.advice import INIT
from loraformat.runtimes.ranks import VLLM_DEFAULT, VLLM_RANKS
from loraformat.runtimes.record import Runtime, differs, mind, refuses, unknown
from loraformat.runtimes.scaling import as_trained

__all__ = ["VLLM"]

VLLM = Runtime(
    name="vllm",
    title="vLLM",
    version="0.33.0, its source read",
    format="peft",
    format_remedy="peft",
    format_why="vLLM reads directories with adapter_config.json",
    scaling=as_trained,
    most=VLLM_RANKS[-1],
    default_rank=VLLM_DEFAULT,
    replaces=("score", "classifier"),
    treats={
        "INIT_MUTATES_BASE": refuses("vLLM names such starts and refuses them", "advice", INIT),
        "ALORA": unknown("whether it heeds invocation tokens was not looked at", "advice"),
        "DORA": refuses("vLLM refuses use_dora", "merge"),
        "BIAS": refuses("vLLM refuses biases", "merge"),
        "MODULES_TO_SAVE": refuses(
            "vLLM lets an adapter replace score and classifier, and nothing else", "merge"
        ),
        "TRAINED_TOKENS": refuses("vLLM knows no trained rows of embeddings", "merge"),
        "RANK_LIMIT": refuses("no --max-lora-rank is that large", "reduce"),
        "RANK_NOT_IN_SET": mind(
            "vLLM refuses ranks above --max-lora-rank, which is 16 by default and takes some "
            "values only",
            "advice",
            "start it with --max-lora-rank {limit}",
        ),
        "KEY_PREFIX": differs(
            "a module whose end is known under a prefix that is not is loaded without effect "
            "(vllm-project/vllm#39278)",
            "rewrite",
        ),
        "FOREIGN_NAMES": differs(
            "a module whose end is known under a prefix that is not is loaded without effect "
            "(vllm-project/vllm#39278)",
            "rewrite",
        ),
        "EMBEDDING": unknown("what becomes of an embedding's delta was not looked at", "merge"),
        "MOE": refuses(
            "adapters of target_parameters are not loaded (vllm-project/vllm#41384, #52194)",
            "merge",
        ),
        "TIED_HEAD": unknown("what becomes of a tied head was not looked at", "merge"),
        "TOKENIZER_CHANGED": mind(
            "vLLM has one tokenizer for the base and all adapters (vllm-project/vllm#24078)",
            "advice",
            "start it with --tokenizer and the adapter's directory",
        ),
        "CHAT_TEMPLATE_CHANGED": mind(
            "vLLM has one chat template for the base and all adapters",
            "advice",
            "start it with --chat-template and the adapter's template",
        ),
    },
)
