"""The shipped model is the one its record describes, small, and really trained."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from loraformat.demo import HELDOUT, SMALL_MODEL

RECORD: dict[str, Any] = json.loads((SMALL_MODEL / "training_record.json").read_text())
WEIGHTS = SMALL_MODEL / "model.safetensors"
TEXT = HELDOUT.read_bytes().decode()


def header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        found: dict[str, Any] = json.loads(file.read(length))
    return found


def tensors() -> dict[str, Any]:
    return {name: entry for name, entry in header(WEIGHTS).items() if name != "__metadata__"}


def test_all_of_it_is_at_most_five_megabytes() -> None:
    files = [path for path in SMALL_MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in (*files, HELDOUT)) <= 5_000_000


def test_it_has_the_files_of_a_hugging_face_checkpoint() -> None:
    assert {path.name for path in SMALL_MODEL.iterdir()} == {
        "LICENSE",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_record.json",
    }


def test_the_record_is_about_these_weights() -> None:
    content = WEIGHTS.read_bytes()
    assert RECORD["weights"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert RECORD["weights"]["bytes"] == len(content)


def test_the_record_is_about_this_text() -> None:
    assert RECORD["held_out"]["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert RECORD["held_out"]["bytes"] == len(TEXT.encode())


def test_parameters_are_counted_from_the_header() -> None:
    count = sum(math.prod(entry["shape"]) for entry in tensors().values())
    assert count == RECORD["weights"]["parameters"] == 2_197_248


def test_every_tensor_is_bfloat16() -> None:
    assert {entry["dtype"] for entry in tensors().values()} == {"BF16"}


def test_every_linear_suits_nf4_and_k_quants() -> None:
    """bitsandbytes wants rows of 64 and 32 of them; llama.cpp's k-quants want rows of 256."""
    linears = {n: e["shape"] for n, e in tensors().items() if "_proj." in n}
    assert len(linears) == 7 * 3
    assert all(rows % 32 == 0 and columns % 256 == 0 for rows, columns in linears.values())


def test_nothing_names_the_machine_it_was_made_on() -> None:
    places = ("/root/", "/home/", "/Users/", "/tmp/", "/opt/")
    for path in SMALL_MODEL.iterdir():
        content = path.read_bytes()
        assert not any(place.encode() in content for place in places), path.name


def test_the_loss_fell() -> None:
    losses = [loss for _, loss in RECORD["loss_curve"]]
    assert losses[0] > 4 > 2.5 > losses[-1]


def test_it_is_far_better_than_token_frequencies() -> None:
    model, unigram = RECORD["held_out"]["model"], RECORD["held_out"]["unigram"]
    assert model["perplexity"] < unigram["perplexity"] / 30


def test_perplexity_is_the_recorded_one() -> None:
    import_module("transformers")
    from loraformat.demo.perplexity import load, perplexity_of

    found = perplexity_of(*load(SMALL_MODEL), TEXT, window=RECORD["held_out"]["window"])
    assert found.tokens == RECORD["held_out"]["tokens"]
    assert found.perplexity == pytest.approx(RECORD["held_out"]["model"]["perplexity"], rel=0.01)
    assert found.bits_per_byte == pytest.approx(
        RECORD["held_out"]["model"]["bits_per_byte"], rel=0.01
    )


def test_the_tokenizer_round_trips() -> None:
    tokenizers = import_module("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(SMALL_MODEL / "tokenizer.json"))
    strange = TEXT + "\r\n\t  π 🐍 \x00 \u200b e\u0301"
    ids = tokenizer.encode(strange, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == strange
    assert tokenizer.get_vocab_size() == 2048


def test_the_tokenizer_knows_its_special_tokens() -> None:
    transformers = import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(SMALL_MODEL, local_files_only=True)
    config = json.loads((SMALL_MODEL / "config.json").read_text())
    assert tokenizer.bos_token_id == config["bos_token_id"]
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert tokenizer.pad_token_id == config["pad_token_id"]
    assert tokenizer("import os")["input_ids"][0] == config["bos_token_id"]
