"""Known behaviour of each runtime, with the version that was examined."""

from __future__ import annotations

from loraformat.runtimes.known.llama_cpp import LLAMA_CPP
from loraformat.runtimes.known.lorax import LORAX
from loraformat.runtimes.known.mlx import MLX
from loraformat.runtimes.known.ollama import OLLAMA
from loraformat.runtimes.known.sglang import SGLANG
from loraformat.runtimes.known.transformers_peft import TRANSFORMERS
from loraformat.runtimes.known.vllm import VLLM
from loraformat.runtimes.record import Runtime

__all__ = ["RUNTIMES"]

#: By name, in the order in which they are shown.
RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime for runtime in (TRANSFORMERS, VLLM, SGLANG, LORAX, LLAMA_CPP, OLLAMA, MLX)
}
