"""Expected tensor shapes from hyperparameters, by GGUF name.

A file whose metadata do not fit its tensors would be refused by llama.cpp when it is loaded,
and by transformers filled with random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

from loraformat.errors import InputError, printable
from loraformat_converters.gguf.architectures.config import Config

__all__ = ["check_dimensions"]


def check_dimensions(
    architecture: str, config: Config, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare the tensors of a GGUF file with the model's hyperparameters.

    Parameters
    ----------
    architecture : str
    config : Config
    shapes : mapping of str to tuple of int
        By GGUF name, as numpy counts; what is not known is not checked.

    Raises
    ------
    InputError
        Which tensor has another shape, and which was wanted.
    """
    promised = _promised(architecture, config)
    for name, shape in shapes.items():
        kind, _, suffix = name.rpartition(".")
        module = kind.rpartition(".")[2]
        if module.isdecimal():  # blk.0.ffn_up.3.weight: one expert of an old file
            stacked = promised.get(f"{kind.split('.')[-2]}_exps")
            wanted = None if stacked is None else stacked[1:]
        else:
            wanted = promised.get(module)
        if wanted is None:
            continue
        if suffix == "bias":
            wanted = wanted[:1]
        if len(shape) != len(wanted) or any(
            size not in (None, found) for size, found in zip(wanted, shape, strict=True)
        ):
            said = ["any" if size is None else size for size in wanted]
            raise InputError(
                f"tensor {printable(name)} has shape {list(shape)}, and the hyperparameters say "
                f"[{', '.join(map(str, said))}]"
            )


def _promised(architecture: str, config: Config) -> dict[str, tuple[int | None, ...]]:
    hidden, head = config.hidden, config.head_dim
    queries, keys = config.heads * head, config.kv_heads * head
    inner = config.inner
    per_expert = config.integer("moe_intermediate_size", inner)
    both = 2 * inner if architecture == "phi3" else inner  # gate and up in one
    vectors = (
        "attn_norm", "ffn_norm", "output_norm", "post_attention_norm", "post_ffw_norm",
        "token_embd_norm", "attn_output_norm", "layer_output_norm",
    )  # fmt: skip
    return {
        **dict.fromkeys(vectors, (hidden,)),
        "token_embd": (None, hidden),
        "output": (None, hidden),
        "position_embd": (None, hidden),
        "token_types": (None, hidden),
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_qkv": (queries + 2 * keys, hidden),
        "attn_output": (hidden, queries),
        "attn_q_norm": (head,),
        "attn_k_norm": (head,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (both, hidden),
        "ffn_down": (hidden, inner),
        "ffn_gate_inp": (config.experts, hidden),
        "ffn_gate_exps": (config.experts, per_expert, hidden),
        "ffn_up_exps": (config.experts, per_expert, hidden),
        "ffn_down_exps": (config.experts, hidden, per_expert),
    }
