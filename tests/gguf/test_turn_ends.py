"""Tokens that end a model's turns besides EOS: llama.cpp stops there, and they come back."""

from __future__ import annotations

import json
import shutil

import gguf
import pytest
from llama_runtime import complete
from loraformat_converters.gguf.container.reader import open_gguf
from loraformat_converters.gguf.tokenizers.turn_ends import turn_end_keys

from loraformat.demo import ADAPTERS, SMALL_MODEL
from loraformat.model.tokenizer_files import CarriedTokenizer
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge
from loraformat.testing.models import carried

PROMPT = list(range(300, 312))
KEYS = gguf.Keys.Tokenizer
EOS = json.loads((SMALL_MODEL / "config.json").read_bytes())["eos_token_id"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What the model writes without other stops."""
    path = tmp_path_factory.mktemp("plain") / "m.gguf"
    convert(SMALL_MODEL, path, dtype="f32")
    with open_gguf(path) as file:
        assert KEYS.EOT_ID not in file.metadata
    tokens, why = complete(path, PROMPT, 24)
    assert why == "limit" and len(set(tokens)) > 4
    return tokens


def stopping(folder, ids):
    path = shutil.copytree(SMALL_MODEL, folder)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return path


def stop_of(tokens):
    """The first token after some that are others."""
    return next(n for n in range(3, len(tokens)) if tokens[n] not in tokens[:n])


@pytest.mark.parametrize("place", ["eot", "eom"])
def test_llama_cpp_stops_where_a_turn_was_learned_to_end(written, tmp_path, place):
    at = stop_of(written)
    unused = next(n for n in range(400, 500) if n not in written)
    ids = {"eot": [EOS, written[at]], "eom": [EOS, unused, written[at]]}[place]
    convert(stopping(tmp_path / "m", ids), tmp_path / "m.gguf", dtype="f32")
    with open_gguf(tmp_path / "m.gguf") as file:
        assert file.integer(KEYS.EOS_ID) == EOS
        assert file.integer({"eot": KEYS.EOT_ID, "eom": KEYS.EOM_ID}[place]) == written[at]
    tokens, why = complete(tmp_path / "m.gguf", PROMPT, 24)
    assert why == "eos"
    assert [n for n in tokens if n != written[at]] == written[:at]


def test_a_merged_adapter_brings_its_own(written, tmp_path):
    lora = shutil.copytree(ADAPTERS["manual"], tmp_path / "lora")
    (lora / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 400]}))
    merge(SMALL_MODEL, [lora], tmp_path / "m.gguf", dtype="f16")
    with open_gguf(tmp_path / "m.gguf") as file:
        assert file.integer(KEYS.EOT_ID) == 400


def test_they_come_back_from_files_that_others_wrote(tmp_path):
    """Gemma's files have EOS and <end_of_turn>; transformers stops at both, then."""
    convert(stopping(tmp_path / "m", [EOS, 401]), tmp_path / "m.gguf", dtype="f16")
    reader = gguf.GGUFReader(tmp_path / "m.gguf", "r+")
    hidden = reader.fields["loraformat.generation_config"]
    hidden.parts[1][:] = list(b"x" * len(hidden.parts[1]))  # its key, of which nobody knows
    reader.data.flush()
    del reader
    convert(tmp_path / "m.gguf", tmp_path / "back", to_format="safetensors")
    found = json.loads((tmp_path / "back" / "generation_config.json").read_bytes())
    assert found["eos_token_id"] == [EOS, 401]


@pytest.mark.parametrize(
    ("stops", "keys", "notes"),
    [
        ([0], {}, 0),
        ([0, 1], {"eot": 1}, 0),  # known to llama.cpp, and said to others
        ([0, 2], {}, 0),  # the end of a text, not of a turn
        ([0, 3, 1], {"eot": 1, "eom": 3}, 0),
        ([0, 3, 1, 4], {"eot": 3, "eom": 4}, 0),  # llama.cpp knows the third
        ([0, 3, 4], {"eot": 3, "eom": 4}, 0),
        ([0, 3, 4, 5], {"eot": 3, "eom": 4}, 1),
        ([0, 99, -1, True], {}, 0),
    ],
)
def test_which_token_gets_which_place(stops, keys, notes):
    texts = ["<eos>", "<|im_end|>", "<|endoftext|>", "<turn>", "<tool>", "<more>"]
    file = carried("generation_config.json", json.dumps({"eos_token_id": stops}).encode())
    found, said = turn_end_keys(CarriedTokenizer([file], "m"), 0, texts)
    assert {key.split(".")[-1][:3]: value.value for key, value in found.items()} == keys
    assert len(said) == notes
