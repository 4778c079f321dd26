"""Files of other programs, damaged in every way, end in acceptance or in an error of our own."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy
import pytest
import torch
import transformers
from bases import MODELS
from loraformat_converters.gguf import tokenizers
from loraformat_converters.gguf.architectures import of_config
from mutations import spoil

from loraformat import check, info, plugins
from loraformat.card import front_matter
from loraformat.demo import ADAPTERS
from loraformat.errors import InputError, LoraFormatError
from loraformat.model.config_json import join, model_dtype, parse, split, with_dtype
from loraformat.model.tied_head import settled, untied_config
from loraformat.model.tokenizer_files import CarriedTokenizer
from loraformat.shards.read_directory import open_model
from loraformat.tensors.arrays import numpy_dtype
from loraformat.testing.models import carried, checkpoint, dense
from loraformat.train.data.row import BadRowError, parse_object
from loraformat.train.data.row_formats import KindError, meaning
from tests.tiny_models import model_type

CASES = int(os.environ.get("LORAFORMAT_FUZZ_CASES", "20000"))
SEED = int(os.environ.get("LORAFORMAT_FUZZ_SEED", "1"))
#: What only Python's parser reads, and what no number, text or memory holds.
ODD = [
    b"Infinity", b"-Infinity", b"NaN", b"1e999", b"9" * 31, b"9" * 400, b"-" + b"9" * 4000,
    b"9" * 4301, b'{"__float__": "Infinity"}', b'{"__float__": "x"}', b'"\\ud800"',
    b"[" * 200 + b"]" * 200, b'"\\u001b[2J"', b"[[256]]", b"{}", b'"256"', b"true", b"null",
]  # fmt: skip
Files = dict[str, bytes]


def damaged(data: bytes, rng: Random) -> bytes:
    """Return a file with some bytes, a value, or a whole member changed."""
    if rng.random() < 0.25:
        return raw(data, rng)
    try:
        tree = json.loads(data)
        if rng.random() < 0.5:
            return spoil(tree, rng)[1]
        return odd(tree, rng)
    except (ValueError, TypeError, IndexError, OverflowError):
        return raw(data, rng)


def odd(tree: object, rng: Random) -> bytes:
    """Put one of the odd values in the place of any value."""
    node, places = tree, []
    while isinstance(node, dict | list) and node and (not places or rng.random() < 0.6):
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        places.append((node, key))
        node = node[key]
    if not places:
        return rng.choice(ODD)
    parent, key = places[-1]
    parent[key] = "@@odd@@"
    return json.dumps(tree).encode().replace(b'"@@odd@@"', rng.choice(ODD))


def raw(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            changed[at : at + 1] = rng.randbytes(1)
        elif kind == 1:
            del changed[at : at + rng.choice([1, 4, 100])]
        elif kind == 2:
            changed[at:at] = rng.choice([*ODD, b"\xff", b"\x00", b"---\n", b"!!bool ", b"&a *a"])
        else:
            changed[at:at] = changed[: rng.choice([1, 9, 60])]
    return bytes(changed)


# --- config.json -----------------------------------------------------------------------------


def configs() -> dict[str, Files]:
    found = {}
    for name, values in MODELS.items():
        kind = model_type(name)
        made = transformers.AutoConfig.for_model(kind, **values)
        classes = {"architectures": [f"{kind}ForCausalLM"], "dtype": "float32"}
        found[name] = {"config.json": json.dumps(made.to_diff_dict() | classes).encode()}
    return found


def judge_config(files: Files, place: Path) -> None:
    data, quantization = split(files["config.json"])
    for text in (data, join(data, quantization or {"bits": 4}), with_dtype(data, "float16")):
        parse(text)
    model_dtype(untied_config(data))
    model = checkpoint(
        dense("model.embed_tokens.weight", torch.ones(2, 2)), dense("lm_head.weight", torch.ones(1))
    )
    model.config = data
    settled(model)
    architecture, config = of_config(parse(data))
    architecture.metadata(config)
    architecture.tensors(config)


# --- tokenizers ------------------------------------------------------------------------------


def tokenizer_files() -> dict[str, Files]:
    letters = ["a", "b", "c", "ab", "abc", "Ġ", "Ġa"]
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    special = {"id": 7, "content": "<s>", "special": True, "normalized": False, "lstrip": False,
               "rstrip": False, "single_word": False}  # fmt: skip
    around = {"type": "TemplateProcessing",
              "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
              "special_tokens": {"<s>": {"id": "<s>", "ids": [7], "tokens": ["<s>"]}}}  # fmt: skip
    model = {"type": "BPE", "vocab": {text: n for n, text in enumerate(letters)},
             "merges": [["a", "b"], ["ab", "c"], ["Ġ", "a"]], "ignore_merges": False}  # fmt: skip
    bpe = {"added_tokens": [special], "normalizer": {"type": "NFC"}, "pre_tokenizer": level,
           "post_processor": around, "model": model}  # fmt: skip
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "a", "b", "ab"]
    spm = {"added_tokens": [{**special, "id": 1}], "post_processor": around,
           "normalizer": {"type": "Sequence", "normalizers": [
               {"type": "Prepend", "prepend": "▁"},
               {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
           "pre_tokenizer": None, "model": {
               "type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>",
               "vocab": {text: n for n, text in enumerate(pieces)},
               "merges": ["a b"]}}  # fmt: skip
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b"]
    unknown = {**special, "id": 1, "content": "[UNK]"}
    wordpiece = {"added_tokens": [unknown],
                 "normalizer": {"type": "BertNormalizer", "lowercase": True, "clean_text": True,
                  "handle_chinese_chars": True, "strip_accents": None},
                 "pre_tokenizer": {"type": "BertPreTokenizer"},
                 "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3],
                                    "cls": ["[CLS]", 2]},
                 "model": {"type": "WordPiece", "vocab": {w: n for n, w in enumerate(words)},
                           "unk_token": "[UNK]", "continuing_subword_prefix": "##"}}  # fmt: skip
    beside = {
        "tokenizer_config.json": {
            "bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True,
            "model_max_length": int(1e30), "tokenizer_class": "LlamaTokenizer",
            "chat_template": [{"name": "default", "template": "{{ messages }}"}],
            "added_tokens_decoder": {"7": special}},
        "special_tokens_map.json": {"unk_token": "<unk>", "additional_special_tokens": ["<s>"]},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None},
        "chat_template.json": {"chat_template": "{{ messages }}"},
        "config.json": {"model_type": "llama", "bos_token_id": 1, "eos_token_id": [2]},
    }  # fmt: skip
    encoded = {name: json.dumps(value).encode() for name, value in beside.items()}
    encoded |= {"chat_template.jinja": b"{{ messages }}"}
    made = {"byte-level": bpe, "SentencePiece": spm, "WordPiece": wordpiece}
    found = {
        name: {"tokenizer.json": json.dumps(value).encode(), **encoded}
        for name, value in made.items()
    }
    found["WordPiece"]["tokenizer_config.json"] = b'{"cls_token": "[CLS]", "sep_token": "[SEP]"}'
    return found


def judge_tokenizer(files: Files, place: Path) -> None:
    model = checkpoint(files={name: data for name, data in files.items() if name != "config.json"})
    model.config = files["config.json"]
    found = CarriedTokenizer([carried(name, data) for name, data in files.items()], place)
    assert isinstance(found.special, dict) and isinstance(found.chat_templates, dict)
    tokenizers.read(model, vocabulary=300)


# --- directories: adapters, sharded models ---------------------------------------------------


def adapters() -> dict[str, Files]:
    source = ADAPTERS["manual"]
    names = ["q_proj", "v_proj"]
    tensors = {}
    for name in names:
        key = f"base_model.model.model.layers.0.self_attn.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.ones(2, 4)
        tensors[f"{key}.lora_B.weight"] = torch.ones(4, 2)
    config = json.loads((source / "adapter_config.json").read_text())
    config |= {"r": 2, "alpha_pattern": {"q_proj": 4, "layers.[0-9]+.self_attn.v_proj": 8},
               "rank_pattern": {"v_proj": 2}, "target_parameters": None,
               "trainable_token_indices": None}  # fmt: skip
    return {"adapter": {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": _saved(tensors),
        "tokenizer_config.json": b'{"chat_template": "{{ messages }}", "model_max_length": 8}',
    }}  # fmt: skip


def _saved(tensors: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save(tensors, metadata={"format": "pt"})


def judge_adapter(files: Files, place: Path) -> None:
    _write(files, place)
    info(place)
    check(place)


def shards() -> dict[str, Files]:
    one, other = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index = {"metadata": {"total_size": 32}, "weight_map": {"a.weight": one, "b.weight": other}}
    return {"shards": {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "config.json": b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}',
        one: _saved({"a.weight": torch.ones(2, 2)}),
        other: _saved({"b.weight": torch.ones(2, 2)}),
    }}  # fmt: skip


def judge_shards(files: Files, place: Path) -> None:
    _write(files, place)
    open_model(place, "safetensors").close()
    info(place)


def _write(files: Files, place: Path) -> None:
    for name, data in files.items():
        if not (place / name).is_file() or (place / name).read_bytes() != data:
            (place / name).write_bytes(data)


# --- weights that others quantized -----------------------------------------------------------

_WEIGHTS = {"num_bits": 4, "group_size": 32, "symmetric": False, "block_structure": [32, 16]}
_GROUPS = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": _WEIGHTS}},
}
#: By form: its settings, and the dtype, shape and (not of all) numbers of a weight's parts.
QUANTIZED = {
    "packed integers": (_GROUPS, {
        "weight_packed": ["I32", [64, 8]], "weight_scale": ["BF16", [64, 2]],
        "weight_zero_point": ["I32", [8, 2]], "weight_shape": ["I64", [2], [64, 64]],
        "weight_g_idx": ["I32", [64]]}),
    "int8 in blocks": (_GROUPS, {
        "weight": ["I8", [64, 64]], "weight_scale": ["F32", [2, 4]],
        "weight_zero_point": ["I8", [2, 4]]}),
    "NVFP4": (_GROUPS, {
        "weight_packed": ["U8", [8, 32]], "weight_scale": ["F8_E4M3", [8, 4]],
        "weight_global_scale": ["F32", [1], [9]]}),
    "modelopt": ({"quant_method": "modelopt"}, {
        "weight": ["U8", [8, 32]], "weight_scale": ["F8_E4M3", [8, 4]],
        "weight_scale_2": ["F32", []], "pre_quant_scale": ["BF16", [64]]}),
    "int4 of modelopt": ({"quant_method": "modelopt"}, {
        "weight": ["U8", [4, 64]], "weight_scale": ["F32", [8, 2]]}),
    "GPTQ": ({"quant_method": "gptq", "bits": 3, "checkpoint_format": "gptq_v2", "sym": False}, {
        "qweight": ["I32", [6, 32]], "qzeros": ["I32", [2, 3]], "scales": ["F16", [2, 32]],
        "g_idx": ["I32", [64]]}),
    "AWQ": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, {
        "qweight": ["I32", [64, 4]], "qzeros": ["I32", [2, 4]], "scales": ["F16", [2, 32]]}),
    "float8": ({"quant_method": "fp8", "weight_block_size": [32, 32]}, {
        "weight": ["F8_E4M3", [64, 64]], "weight_scale_inv": ["F32", [2, 2]]}),
    "MLX": ({"bits": 3, "group_size": 32, "mode": "affine"}, {
        "weight": ["U32", [8, 6]], "scales": ["F16", [8, 2]], "biases": ["F16", [8, 2]]}),
    "experts of MLX": ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, {
        "switch_mlp.up_proj.weight": ["U32", [3, 8, 8]],
        "switch_mlp.up_proj.scales": ["U8", [3, 8, 2]]}),
    "int8 of torchao": ({"quant_method": "torchao"}, {
        "_weight_qdata": ["I8", [8, 64]], "_weight_scale": ["F32", [8, 2]],
        "_weight_zero_point": ["I8", [8, 2]]}),
    "int4 of torchao": ({"quant_method": "torchao"}, {
        "_weight_qdata": ["I8", [8, 32]], "_weight_scale": ["BF16", [2, 8]],
        "_weight_zero_point": ["BF16", [2, 8]]}),
    "HQQ": ({"quant_method": "hqq"}, {
        "W_q": ["U8", [8, 32]], "scale": ["F16", [16, 1]], "zero": ["F16", [16, 1]],
        "shape": ["I64", [2], [8, 64]], "group_size": ["I32", [], 32], "axis": ["I32", [], 1],
        "packing": ["U8", [7], [*b"4bit_u8"]], "quant_zero": ["U8", []]}),
    "bitsandbytes int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, {
        "weight": ["I8", [8, 64]], "SCB": ["F32", [8]], "weight_format": ["U8", []]}),
}  # fmt: skip


def quantized() -> dict[str, Files]:
    return {
        name: {
            "config.json": join(b'{"model_type": "qwen3_moe"}', settings),
            "tensors": json.dumps({f"up_proj.{part}": of for part, of in parts.items()}).encode(),
        }
        for name, (settings, parts) in QUANTIZED.items()
    }


def judge_quantized(files: Files, place: Path) -> None:
    try:
        tensors = {name: _numbers(*spec) for name, spec in json.loads(files["tensors"]).items()}
        header, end = {}, 0
        for name, (dtype, numbers) in tensors.items():
            begin, end = end, end + numbers.nbytes
            header[name] = {
                "dtype": dtype, "shape": numbers.shape, "data_offsets": [begin, end]
            }  # fmt: skip
        text = json.dumps(header).encode()
    except (ValueError, TypeError, AttributeError, OverflowError, KeyError):
        raise InputError("no tensors were made of it") from None
    data = b"".join(numbers.tobytes() for _, numbers in tensors.values())
    weights = {"model.safetensors": len(text).to_bytes(8, "little") + text + data}
    _write(weights | {"config.json": files["config.json"]}, place)
    with plugins.sniff(place).read(place, plugins.ReadOptions()) as model:
        for tensor in model.tensors.values():
            tensor.array()


def _numbers(dtype: str, shape: list[int], fill: object = 0) -> tuple[str, numpy.ndarray]:
    if not all(type(size) is int and 0 <= size < 100 for size in shape) or len(shape) > 3:
        raise ValueError
    return dtype, numpy.full(shape, fill, numpy_dtype(dtype))


# --- cards, rows -----------------------------------------------------------------------------

CARD = b"""---
license: apache-2.0
license_link: https://example.org
language: [en, de]
tags: [a, b]
base_model:
- org/base
model-index:
- name: x
  results: [{value: 0.5, date: 2026-01-02}]
---
# Title
"""


def judge_card(files: Files, place: Path) -> None:
    fields, _ = front_matter.split(files["README.md"].decode("utf-8", "replace"))
    front_matter.licence_of(fields)
    front_matter.compose(front_matter.merge(fields, {"tags": ["x"]}, facts=set()))


ROWS = [
    {"text": "a b"},
    {"prompt": "a", "completion": "b"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b",
     "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}], "tools": []},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
]  # fmt: skip


def judge_row(files: Files, place: Path) -> None:
    try:
        meaning(parse_object(files["row"], "line 1", "rows.jsonl"))
    except (KindError, BadRowError) as error:
        raise InputError(str(error)) from None


Judge = Callable[[Files, Path], None]
#: What is damaged, by whom it is judged, and the share of the cases.
KINDS: dict[str, tuple[Callable[[], dict[str, Files]], Judge, float]] = {
    "config": (configs, judge_config, 0.4),
    "tokenizer": (tokenizer_files, judge_tokenizer, 0.3),
    "adapter": (adapters, judge_adapter, 0.06),
    "shards": (shards, judge_shards, 0.06),
    "quantized": (quantized, judge_quantized, 0.06),
    "card": (lambda: {"card": {"README.md": CARD}}, judge_card, 0.1),
    "row": (
        lambda: {str(n): {"row": json.dumps(row).encode()} for n, row in enumerate(ROWS)},
        judge_row,
        0.08,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_accepted_or_refused_in_our_own_words(kind: str, tmp_path: Path) -> None:
    make, judge, share = KINDS[kind]
    originals, rng, outcomes = make(), Random(f"{SEED}/{kind}"), Counter[bool]()
    for files in originals.values():
        _try(judge, files, tmp_path, "undamaged")
    for number in range(round(CASES * share)):
        name = rng.choice(list(originals))
        files = dict(originals[name])
        target = rng.choice(list(files))
        for _ in range(rng.choice([1, 1, 1, 2])):
            files[target] = damaged(files[target], rng)
        case = f"{name}, seed {SEED}, case {number}: {target} is {files[target][:3000]!r}"
        outcomes[_try(judge, files, tmp_path, case)] += 1
    assert min(outcomes[True], outcomes[False]) > 0.02 * outcomes.total(), outcomes


def _try(judge: Judge, files: Files, place: Path, case: str) -> bool:
    try:
        judge(files, place)
    except LoraFormatError as error:
        assert case != "undamaged", error
        assert error.exit_code in (3, 4) and str(error).isprintable(), case
        assert len(str(error)) < 1200, f"{case}: {error}"
        return False
    except Exception as error:
        raise AssertionError(f"{case}: {error!r}") from error
    return True
