"""Tokenizer files and metadata with something strange in them: a result, or an error of ours."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from loraformat_converters.gguf import tokenizers
from loraformat_converters.gguf.container.reader import open_gguf
from loraformat_converters.gguf.container.types import ValueType
from loraformat_converters.gguf.container.values import GGUFValue
from made_spm import add, tokenizer_json, trained
from made_tokenizers import model_of
from test_tokenizers_spm import source_of
from test_tokenizers_wordpiece import CONFIG
from test_tokenizers_wordpiece import trained as wordpiece
from tokenizers import Tokenizer

from loraformat.errors import InputError
from loraformat.model.checkpoint import CarriedFile, Checkpoint, Provenance
from loraformat.ops.convert.convert import convert

STRANGE = [
    None, True, False, 0, -1, 10**30, 1.5, "", "x", "▁", "\x00", "\ud800", [], {}, [[]], [None],
    {"a": 1}, {"type": "BPE"}, {"type": None}, "<0x00>", ["a", "b", "c"], {"String": " "},
]  # fmt: skip


def places(value, chance, at=()):
    """Yield paths into a JSON value, a few only into long tables."""
    yield at
    found = list(value.items() if isinstance(value, dict) else
                 enumerate(value) if isinstance(value, list) else ())  # fmt: skip
    for key, one in found if len(found) <= 12 else chance.sample(found, 4):
        yield from places(one, chance, (*at, key))


def mutated(value, chance):
    value = copy.deepcopy(value)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        found = [at for at in places(value, chance) if at]
        if not found:
            break
        *path, last = chance.choice(found)
        inner = value
        for key in path:
            inner = inner[key]
        if isinstance(inner, dict) and chance.random() < 0.3:
            del inner[last]
        else:
            inner[last] = copy.deepcopy(chance.choice(STRANGE))
    return value


def checkpoint_of(files):
    carried = tuple(CarriedFile(name, len(data), lambda data=data: data)
                    for name, data in files.items())  # fmt: skip
    return Checkpoint(
        path=Path("/model"), provenance=Provenance("safetensors"), tensors={}, files=carried,
        config=b'{"model_type": "llama", "bos_token_id": 1}',
    )  # fmt: skip


SETTINGS = {
    "bos_token": "<s>", "add_bos_token": True, "tokenizer_class": "LlamaTokenizer",
    "added_tokens_decoder": {"1": {"content": "<s>", "special": True}},
    "chat_template": [{"name": "default", "template": "x"}],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["spm", "wordpiece", "model"])
def test_files(kind):
    chance, ends = random.Random(kind), Counter()
    spm = add(tokenizer_json(trained()), "<|end|>")
    natural = {"spm": spm, "wordpiece": json.loads(wordpiece().to_str())}.get(kind)
    for _ in range(200):
        if natural is None:
            later = mutated({"a": {"<x>": 701}}, chance).get("a")
            files = {"tokenizer.model": trained(), "added_tokens.json": later}
            settings = mutated(SETTINGS, chance)
        else:
            files = {"tokenizer.json": mutated(natural, chance)}
            settings = CONFIG if kind == "wordpiece" else SETTINGS
            settings = mutated(settings, chance) if chance.random() < 0.2 else settings
        files["tokenizer_config.json"] = settings
        files = {name: one if isinstance(one, bytes) else json.dumps(one).encode()
                 for name, one in files.items()}  # fmt: skip
        try:
            tokenizers.read(checkpoint_of(files), vocabulary=720)
            ends["read"] += 1
        except InputError:
            ends["refused"] += 1
    assert min(ends["read"], ends["refused"]) > 20


def strange_value(chance):
    count = chance.choice([0, 1, 640, 720])
    return chance.choice([
        lambda: GGUFValue.of(ValueType.STRING, chance.choice(["", "llama", "bert", "gpt2", "▁"])),
        lambda: GGUFValue.of(ValueType.UINT32, chance.choice([0, 1, 5, 2**32 - 1])),
        lambda: GGUFValue.of(ValueType.INT32, -1),
        lambda: GGUFValue.of(ValueType.BOOL, chance.random() < 0.5),
        lambda: GGUFValue.of_array(ValueType.STRING, ["ab", "a", "b"] * (count // 3)),
        lambda: GGUFValue.of_array(ValueType.STRING, [""] * count),
        lambda: GGUFValue.of_array(ValueType.INT32, chance.choices(range(-2, 9), k=count)),
        lambda: GGUFValue.of_array(ValueType.FLOAT32, chance.choices(
            [0.0, -1.0, float("inf")], k=count)),
    ])()  # fmt: skip


@pytest.mark.parametrize("kind", ["spm", "wordpiece"])
def test_metadata(kind, tmp_path, monkeypatch):
    chance, ends = random.Random(kind), Counter()
    if kind == "spm":
        source = source_of(tmp_path / "source", add(tokenizer_json(trained()), "<|end|>"))
    else:
        source = model_of(tmp_path / "source", wordpiece(), CONFIG, rows=640, kind="bert")
    convert(source, tmp_path / "model.gguf")
    with open_gguf(tmp_path / "model.gguf") as file:
        natural = dict(file.metadata)
        keys = [key for key in natural if key.startswith("tokenizer.")]
        for number in range(300):
            changes = {key: strange_value(chance) for key in chance.choices(keys, k=2)}
            dropped = chance.choice([*keys, None, None])
            changed = {key: one for key, one in (natural | changes).items() if key != dropped}
            monkeypatch.setattr(file, "metadata", changed)
            try:
                made, _ = tokenizers.files(file)
            except InputError:
                ends["refused"] += 1
                continue
            ends["made" if made else "none"] += 1
            if made and number % 5 == 0:  # it opens
                Tokenizer.from_str(made[0].read().decode())
    assert min(ends["made"], ends["refused"], ends["none"]) > 10
