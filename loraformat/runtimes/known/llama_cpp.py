"""llama.cpp: ``src/llama-adapter.cpp``, and its converter ``convert_lora_to_gguf.py``."""

from __future__ import annotations

from loraformat.runtimes.known.advice import INIT
from loraformat.runtimes.record import Runtime, differs, mind, refuses, unknown
from loraformat.runtimes.scaling import by_file_alpha

__all__ = ["LLAMA_CPP"]

_ONE_ALPHA = (
    "a GGUF file has one alpha, divided by each tensor's rank; llama.cpp's own converter writes "
    "lora_alpha there whatever else the config says, and loraformat folds the rest into B"
)

LLAMA_CPP = Runtime(
    name="llama.cpp",
    title="llama.cpp",
    version="b11549, run (xllamacpp); its converter run",
    format="gguf-lora",
    format_remedy="gguf",
    format_why="llama.cpp reads GGUF files",
    scaling=by_file_alpha,
    treats={
        "INIT_MUTATES_BASE": differs("nobody changes the base there", "advice", INIT),
        "ALORA": differs(
            "the GGUF file carries the tokens, and llama.cpp begins one token early",
            "advice",
            "where a token matters, run it in PEFT",
        ),
        "DORA": refuses("a GGUF adapter has no place for magnitudes", "merge-gguf"),
        "BIAS": refuses("a GGUF adapter has no place for biases", "merge-gguf"),
        "MODULES_TO_SAVE": refuses(
            "a GGUF adapter holds low-rank deltas; trained norms are loaded and ignored",
            "merge-gguf",
        ),
        "CLASSIFIER": refuses(
            "its models of text have no place for the head of a classifier",
            "advice",
            "run it with transformers or vLLM",
        ),
        "TRAINED_TOKENS": refuses("a GGUF adapter holds low-rank deltas", "merge-gguf"),
        "VOCABULARY": refuses("llama.cpp resizes no vocabulary", "merge-gguf"),
        "RSLORA_IGNORED": differs(_ONE_ALPHA, "gguf"),
        "PATTERN_IGNORED": differs(_ONE_ALPHA, "gguf"),
        "ALPHA_ZERO": differs("an alpha of 0 means no scaling there: the delta acts", "gguf"),
        "KEY_PREFIX": unknown("its converter was run with the names that PEFT writes", "rewrite"),
        "CONV1D": differs(
            "llama.cpp's own converter takes Conv1D for a linear: a square weight gets the "
            "transposed delta, any other is refused",
            "gguf",
        ),
        "MOE": refuses("llama.cpp's own converter maps no fused experts", "gguf"),
        "TIED_HEAD": refuses(
            "there is no tensor for a tied head, and with a delta of its embedding the process "
            "aborts",
            "merge-gguf",
        ),
        "SHARED_BLOCK": refuses(
            "GGUF has no architecture whose layers share weights",
            "advice",
            "run it with transformers and PEFT",
        ),
        "ARCHITECTURE": refuses("llama.cpp compares general.architecture", "advice"),
        "TOKENIZER_CHANGED": mind(
            "the tokenizer is in the base's GGUF file",
            "advice",
            "convert the base with the adapter's tokenizer files beside its weights",
        ),
        "CHAT_TEMPLATE_CHANGED": mind(
            "the chat template is in the base's GGUF file",
            "advice",
            "start it with --chat-template-file and the adapter's template",
        ),
    },
)
