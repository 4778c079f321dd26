"""llama.cpp: ``src/llama-adapter.cpp``, and its converter ``convert_lora_to_gguf.py``."""

from __future__ import annotations

from loraformat.runtimes.known.advice import INIT
from loraformat.runtimes.record import Runtime, caution, differs, refuses, unknown
from loraformat.runtimes.scaling import by_file_alpha

__all__ = ["LLAMA_CPP"]

_ONE_ALPHA = (
    "a GGUF file has a single alpha, which is divided by each tensor's rank; llama.cpp's own "
    "converter always writes lora_alpha, while loraformat folds the remaining factor into B"
)

LLAMA_CPP = Runtime(
    name="llama.cpp",
    title="llama.cpp",
    version="b11549, tested (xllamacpp), and its converter",
    format="gguf-lora",
    format_remedy="gguf",
    format_why="llama.cpp reads GGUF files",
    scaling=by_file_alpha,
    treats={
        "INIT_MUTATES_BASE": differs("the base is not modified", "advice", INIT),
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
