"""GGUF architectures: tensors and hyperparameters.

One record per architecture of llama.cpp, in a file named after its family. A record has two
tables, which are read in both directions: `metadata` rows (a key of GGUF, the member of
``config.json``) and `weights` rows (a tensor's name there and here, its shape in GGUF). Most rows
of a new architecture are those of `decoder`; what is no plain copy is a function for each
direction, as `rope`. Add the record to `ARCHITECTURES`, a tiny model of it to
``tests/tiny_models.py``, and the tests hold it against transformers, gguf-py and llama.cpp.

Read `config`, `metadata`, `weights`, `decoder` and `record`, then a family (`llama`), then
`tensor_map`; `lora` is for adapters. From outside:

- `of_config` finds the record for a ``config.json``, `of_gguf` for an open file; both return
  the record and a `Config`, typed access to the hyperparameters.
- `Architecture.metadata` gives llama.cpp's keys, or refuses what it would compute differently;
  `Architecture.tensors` the few tensors that stand for hyperparameters (RoPE factors);
  `Architecture.config` the members of ``config.json`` that a file implies.
- `to_gguf` and `to_huggingface` give a `TensorMapping` for every tensor: which parts of which
  tensors, transformed how (`transforms`), a tile of rows at a time.
- `lora_places` says where the delta of a module goes, `lora_module` whence a GGUF tensor's came:

>>> config = {"model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2,
...           "hidden_size": 64, "num_key_value_heads": 2}
>>> architecture, values = of_config(config)
>>> (place,) = lora_places(architecture, values, "model.layers.1.self_attn.k_proj")
>>> place.tensor, place.rows
('blk.1.attn_k.weight', HeadOrder(heads=2, interleaved=True))
>>> lora_module(architecture, values, "blk.1.ffn_up.weight").module
'model.layers.1.mlp.up_proj'

``place.to_gguf(b)`` gives GGUF's B, ``place.to_huggingface(b)`` PEFT's; A is the same on both
sides, but for embeddings (``place.embedding``), where GGUF wants it transposed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.model.config_json import CONFIG_NAME
from loraformat.model.tied_head import lacks_head
from loraformat_converters.gguf.architectures.bert import BERT
from loraformat_converters.gguf.architectures.config import Config
from loraformat_converters.gguf.architectures.gemma import GEMMA2, GEMMA3
from loraformat_converters.gguf.architectures.gpt2 import GPT2
from loraformat_converters.gguf.architectures.llama import LLAMA
from loraformat_converters.gguf.architectures.lora import LoraTarget, lora_module, lora_places
from loraformat_converters.gguf.architectures.phi3 import PHI3
from loraformat_converters.gguf.architectures.qwen import QWEN2, QWEN3, QWEN3MOE
from loraformat_converters.gguf.architectures.record import Architecture
from loraformat_converters.gguf.architectures.tensor_map import (
    TensorMap,
    TensorMapping,
    TensorSlice,
    to_gguf,
    to_huggingface,
)

if TYPE_CHECKING:
    from loraformat_converters.gguf.container.reader import GGUFFile

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Config",
    "LoraTarget",
    "TensorMap",
    "TensorMapping",
    "TensorSlice",
    "lora_module",
    "lora_places",
    "named_by",
    "of_config",
    "of_gguf",
    "to_gguf",
    "to_huggingface",
]

#: By llama.cpp's name.
ARCHITECTURES = {
    record.name: record
    for record in (LLAMA, QWEN2, QWEN3, QWEN3MOE, GEMMA2, GEMMA3, PHI3, BERT, GPT2)
}
_BY_MODEL_TYPE = {
    model_type: record for record in ARCHITECTURES.values() for model_type in record.models
}


def of_config(values: Mapping[str, Any], names: Iterable[str] = ()) -> tuple[Architecture, Config]:
    """Return the architecture that can run a model, and the model's hyperparameters.

    Parameters
    ----------
    values : mapping
        ``config.json``.
    names : iterable of str
        Of the model's tensors, as far as they are known: they tell whether it has a head.

    Raises
    ------
    UnsupportedError
        If there is none.
    """
    named = values.get("model_type")
    record = _BY_MODEL_TYPE.get(named) if isinstance(named, str) else None
    if record is None:
        raise UnsupportedError(
            f"{CONFIG_NAME} names model type {printable(str(named))}, which has no GGUF "
            "architecture here",
            hint="there is one for " + ", ".join(sorted(_BY_MODEL_TYPE)),
        )
    headless = record.generates and lacks_head(names, values)
    text = values.get("text_config")
    if text is not None and not isinstance(text, Mapping):
        raise InputError("text_config is not an object", path=CONFIG_NAME)
    if text is not None:
        # Whether the head is tied is asked of the whole model, if it says.
        outer = {key: values[key] for key in ("tie_word_embeddings",) if key in values}
        values = {**values, **text, **outer}
    return record, record.of(values, str(named), headless=headless)


def named_by(gguf: GGUFFile) -> Architecture:
    """Return the architecture that a GGUF file names.

    Raises
    ------
    UnsupportedError
        If it is not supported.
    """
    record = ARCHITECTURES.get(gguf.architecture)
    if record is None:
        raise UnsupportedError(
            f"is of architecture {printable(gguf.architecture)}, which is not supported",
            path=gguf.path,
            hint="known are " + ", ".join(sorted(ARCHITECTURES)),
        )
    return record


def of_gguf(gguf: GGUFFile) -> tuple[Architecture, Config]:
    """Return the architecture of a GGUF file, and the hyperparameters that it implies.

    Raises
    ------
    UnsupportedError
        If the architecture is not supported.
    InputError
        If the metadata are damaged.
    """
    record = named_by(gguf)
    values = record.config(gguf)
    return record, record.of(values, values["model_type"])
