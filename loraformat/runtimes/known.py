"""Known behaviour of each runtime, with the version that was examined.

- transformers with PEFT: where most adapters come from.
- vLLM: https://docs.vllm.ai, ``vllm/lora`` and ``vllm/config/lora.py``.
- SGLang: https://docs.sglang.io, ``sglang/srt/lora``.
- LoRAX: https://github.com/predibase/lorax, ``server/lorax_server/adapters/lora.py``.
- llama.cpp: ``src/llama-adapter.cpp``, and its converter ``convert_lora_to_gguf.py``.
- Ollama: llama.cpp's rules for GGUF files, and an import of PEFT directories of its own:
  ``convert/convert.go`` (``ConvertAdapter``) and ``convert_llama_adapter.go``. From 0.34.1 on
  ``ollama create`` is reported to refuse a Modelfile with ``ADAPTER``
  (generative-computing/mellea#1651, of ollama/ollama#14969): the merged model is what is left
  there. Models that were built with it before are served on.
- mlx-lm: ``mlx_lm/tuner/utils.py``. Its adapters have a format of their own.
"""

from __future__ import annotations

from dataclasses import replace

from loraformat.runtimes.ranks import VLLM_DEFAULT, VLLM_RANKS
from loraformat.runtimes.record import Runtime, caution, differs, refuses, unknown
from loraformat.runtimes.scaling import (
    as_trained,
    by_config,
    by_config_with_rslora,
    by_file_alpha,
)

__all__ = ["RUNTIMES"]

_INIT = "save it again with path_initial_model_for_weight_conversion, as PEFT's documentation shows"
_ONE_SCALING = "SGLang multiplies every module by lora_alpha / r of the config"
_BY_NAME = (
    "LoRAX takes base_model.model.MODULE.lora_A.weight and lora_B.weight and warns about the rest"
)
_ONE_ALPHA = (
    "a GGUF file has a single alpha, which is divided by each tensor's rank; llama.cpp's own "
    "converter always writes lora_alpha, while loraformat folds the remaining factor into B"
)
_IMPORT = (
    "Ollama's import of PEFT directories writes lora_alpha as the single alpha of a GGUF file; "
    "loraformat folds the remaining factor into B"
)
# vLLM: class attribute is_3d_moe_weight, LoRAModelManager._stack_moe_lora_weights and pack_moe in
# vllm/lora/model_manager.py (commit 01533aa, read in December 2026).
_VLLM_EXPERTS = (
    "vLLM takes target_parameters only of models whose experts it keeps fused (gpt-oss, Qwen3.5, "
    "Qwen3-VL), and of others a LoRA for each expert (vllm-project/vllm#41384, #52194)"
)
# SGLang, by its pull requests 25528 and 27381, its present loader not read: it resolves
# experts.N.gate_proj and stacks experts.w1, and PEFT's fused names
# match neither (pull requests 25528 and 27381, closed; read in December 2026).
_SGLANG_EXPERTS = (
    "deltas of target_parameters are silently dropped (sgl-project/sglang#25528); a LoRA for each "
    "expert is loaded"
)
_MERGED = "a merged model has the tokenizer files of the base"

TRANSFORMERS = Runtime(
    name="transformers",
    title="transformers + PEFT",
    version="PEFT 0.21.2, tested",
    format="peft",
    format_why="PEFT reads directories with adapter_config.json",
    scaling=as_trained,
    asks_peft=True,
    treats={
        "METHOD": caution("depends on the method in PEFT; not checked", "advice"),
        "INIT_MUTATES_BASE": caution(
            "PEFT modifies the base on every load of the adapter, which needs the base in full "
            "precision",
            "advice",
        ),
        "KEY_PREFIX": differs(
            "PEFT leaves these at their initial values, with a warning", "rewrite"
        ),
        "EXPERTS_STACKED": differs(
            "PEFT has no modules of these names, and ignores them", "experts-fused"
        ),
        "LOAD_FAILS": refuses("PEFT raises this error", "rewrite"),
        "LOAD_RESIZED": refuses(
            "PEFT raises this error",
            "merge",
            "merge it, which resizes the base; or resize the base before PEFT loads it: "
            "model.resize_token_embeddings",
        ),
        "LOAD_OTHER_BASE": refuses("PEFT raises this error", "other-base"),
        "LOAD_IGNORES": differs(
            "PEFT ignores them, at most with a warning",
            "rewrite",
        ),
        "LOAD_UNKNOWN": differs(
            "PEFT ignores them, at most with a warning",
            "other-base",
        ),
        "LOAD_UNPROVEN": unknown(
            "how PEFT loads an adapter into each transformers class can only be tested with PEFT",
            "advice",
            "install both and check again: pip install 'loraformat[demo]'",
        ),
        "DTYPE": None,  # cast as they are loaded
        "TIED_HEAD": caution(
            "it is correct unmerged; PEFT's merge_and_unload also changes the tied tensor",
            "merge",
        ),
        "SHARED_BLOCK": caution(
            "it is right unmerged; merged, a delta of one layer would act in all that share the "
            "weight",
            "advice",
            "use it beside its base, without merge_and_unload",
        ),
        "TOKENIZER_CHANGED": caution(
            "PEFT loads no tokenizer", "advice", "load the tokenizer from the adapter's directory"
        ),
        "CHAT_TEMPLATE_CHANGED": caution(
            "PEFT loads no tokenizer, which has the chat template",
            "advice",
            "set the tokenizer's chat_template to the text of the adapter's",
        ),
    },
)

VLLM = Runtime(
    name="vllm",
    title="vLLM",
    version="0.33.0, from its source",
    format="peft",
    format_why="vLLM reads directories with adapter_config.json",
    scaling=as_trained,
    most=VLLM_RANKS[-1],
    default_rank=VLLM_DEFAULT,
    replaces=("score", "classifier"),
    fused_experts=("gpt_oss", "qwen3_5_moe", "qwen3_vl_moe"),
    treats={
        "INIT_MUTATES_BASE": refuses("vLLM rejects these initialisations", "advice", _INIT),
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
        "MOE": refuses(_VLLM_EXPERTS, "experts"),
        "MOE_ONLY_FUSED": refuses(_VLLM_EXPERTS, "merge"),
        "EXPERTS_EACH": refuses(
            "vLLM keeps the experts of this model fused, and takes a LoRA for each only with "
            "--enable-mixed-moe-lora-format; without it the weights land in wrong buffers",
            "advice",
            "start it with --enable-mixed-moe-lora-format, and name the adapter in --lora-modules "
            'with "is_3d_lora_weight": false',
        ),
        "EXPERTS_STACKED": refuses(
            "vLLM takes these names only with --enable-moe-shared-loras, and then one A of w1 and "
            "w3 and one B of w2 for all experts",
            "experts",
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

SGLANG = Runtime(
    name="sglang",
    title="SGLang",
    version="0.5.23, from its source",
    format="peft",
    format_why="SGLang reads directories with adapter_config.json",
    scaling=by_config,
    one_rank=True,
    couples=(("q_proj", "v_proj"),),
    treats={
        "INIT_MUTATES_BASE": differs("SGLang ignores the field", "advice", _INIT),
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
        "MOE": differs(_SGLANG_EXPERTS, "experts"),
        "MOE_ONLY_FUSED": differs(_SGLANG_EXPERTS, "merge"),
        "EXPERTS_STACKED": caution(
            "one A or B for all experts needs an option",
            "advice",
            "start it with --experts-shared-outer-loras if A of w1 and B of w2 are of one expert",
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

LORAX = Runtime(
    name="lorax",
    title="LoRAX",
    version="a7394ba of 2026-05-28, from its source",
    format="peft",
    format_why="LoRAX reads directories with adapter_config.json",
    scaling=by_config_with_rslora,
    one_rank=True,
    kernel_rank=128,
    even_ranks=True,
    whole_types=True,
    treats={
        "INIT_MUTATES_BASE": differs("LoRAX ignores the field", "advice", _INIT),
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
        "MOE_ONLY_FUSED": differs(_BY_NAME, "merge"),
        "EXPERTS_EACH": unknown("support for experts was not checked", "merge"),
        "EXPERTS_STACKED": differs(_BY_NAME, "merge"),
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

LLAMA_CPP = Runtime(
    name="llama.cpp",
    title="llama.cpp",
    version="b11549, tested (xllamacpp), and its converter",
    format="gguf-lora",
    format_why="llama.cpp reads GGUF files",
    scaling=by_file_alpha,
    treats={
        "INIT_MUTATES_BASE": differs("the base is not modified", "advice", _INIT),
        "ALORA": differs(
            "the GGUF file contains the tokens, but llama.cpp applies the adapter one token early",
            "advice",
            "use it in PEFT if one token matters",
        ),
        "DORA": refuses("GGUF adapters cannot store magnitudes", "merge-gguf"),
        "BIAS": refuses("GGUF adapters cannot store biases", "merge-gguf"),
        "MODULES_TO_SAVE": refuses(
            "GGUF adapters contain only low-rank deltas; trained norms are loaded and ignored",
            "merge-gguf",
        ),
        "CLASSIFIER": refuses(
            "its text models have no classifier head",
            "advice",
            "run it with transformers or vLLM",
        ),
        "TRAINED_TOKENS": refuses("GGUF adapters contain only low-rank deltas", "merge-gguf"),
        "VOCABULARY": refuses("llama.cpp cannot resize the vocabulary", "merge-gguf"),
        "RSLORA_IGNORED": differs(_ONE_ALPHA, "gguf"),
        "PATTERN_IGNORED": differs(_ONE_ALPHA, "gguf"),
        "ALPHA_ZERO": differs("an alpha of 0 means a scaling of 1 there", "gguf"),
        "KEY_PREFIX": unknown("only the names that PEFT writes were checked", "rewrite"),
        "CONV1D": differs(
            "llama.cpp's own converter treats Conv1D as a linear: a square weight gets the "
            "transposed delta, and others are rejected",
            "gguf",
        ),
        "MOE": refuses("llama.cpp's own converter maps no fused experts", "gguf"),
        "MOE_ONLY_FUSED": refuses("llama.cpp's own converter maps no fused experts", "gguf"),
        "EXPERTS_STACKED": refuses("llama.cpp's own converter maps no such names", "gguf"),
        "TIED_HEAD": refuses(
            "there is no tensor for a tied head, and a delta of its embedding aborts the process",
            "merge-gguf",
        ),
        "SHARED_BLOCK": refuses(
            "GGUF has no architecture whose layers share weights",
            "advice",
            "run it with transformers and PEFT",
        ),
        "ARCHITECTURE": refuses("llama.cpp compares general.architecture", "advice"),
        "TOKENIZER_CHANGED": caution(
            "the tokenizer is in the base's GGUF file",
            "advice",
            "convert the base with the adapter's tokenizer files in its directory",
        ),
        "CHAT_TEMPLATE_CHANGED": caution(
            "the chat template is in the base's GGUF file",
            "advice",
            "start it with --chat-template-file and the adapter's template",
        ),
    },
)

OLLAMA = replace(
    LLAMA_CPP,
    name="ollama",
    title="Ollama",
    version="fb30760 of 2026-08-21, from its source",
    format_why="Ollama reads GGUF files: merged models, and separate adapters before 0.34.1; it "
    "imports few PEFT directories, and Q and K incorrectly",
    imports=("llama", "gemma2"),
    treats={
        **LLAMA_CPP.treats,
        "RSLORA_IGNORED": differs(_IMPORT, "gguf"),
        "PATTERN_IGNORED": differs(_IMPORT, "gguf"),
        "ALPHA_NOT_INT": refuses(
            "Ollama's import of PEFT directories reads lora_alpha as an unsigned integer", "gguf"
        ),
        "CONV1D": refuses("Ollama's import supports only llama and gemma2", "gguf"),
        "MOE": refuses("Ollama's import maps no fused experts", "gguf"),
        "MOE_ONLY_FUSED": refuses("Ollama's import maps no fused experts", "gguf"),
        "ARCHITECTURE": caution(
            "Ollama's import of PEFT directories supports only llama and gemma2; GGUF adapters "
            "must have the base's architecture",
            "gguf",
        ),
        "CHAT_TEMPLATE_CHANGED": caution(
            "the chat template is in the base's GGUF file, or in a Modelfile, in Ollama's "
            "template language",
            "advice",
            "set the adapter's template with TEMPLATE in the Modelfile",
        ),
        "ROW_ORDER": caution(
            "Q and K of llama models are stored with reordered rows; Ollama's import of PEFT "
            "directories reorders A instead of B",
            "gguf",
        ),
    },
)

MLX = Runtime(
    name="mlx",
    title="mlx-lm",
    version="d78bf58 of 2026-08-22, from its source",
    format="",
    format_why="mlx-lm reads adapters.safetensors of its own, or any merged model",
    scaling=as_trained,
    treats={
        "INIT_MUTATES_BASE": differs("the factors belong to a modified base", "advice", _INIT),
        "ALORA": refuses("it acts on some tokens only and cannot be merged", "advice"),
        "TOKENIZER_CHANGED": caution(
            _MERGED, "advice", "copy the adapter's over those of the merged model"
        ),
        "CHAT_TEMPLATE_CHANGED": caution(
            _MERGED,
            "advice",
            "copy the adapter's chat_template.jinja to the merged model",
        ),
    },
)

#: By name, in the order in which they are shown.
RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime for runtime in (TRANSFORMERS, VLLM, SGLANG, LORAX, LLAMA_CPP, OLLAMA, MLX)
}
