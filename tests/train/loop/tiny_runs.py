"""A tiny bundle with a tokenizer, data for it, and options of a run that takes a second."""

import json
import random
import shutil
from pathlib import Path

from loraformat.demo import SMALL_MODEL
from loraformat.ops.convert.convert import convert
from loraformat.train.loop.metrics import read_metrics
from loraformat.train.run.options import TrainOptions
from tests.tiny_models import make_model

CONTEXT = 128
WORDS = [
    "bell",
    "book",
    "bread",
    "clock",
    "cloud",
    "door",
    "field",
    "fire",
    "garden",
    "glass",
    "hill",
    "lamp",
    "leaf",
    "moon",
    "rain",
]


def make_bundle(directory: Path, **changes) -> Path:
    """Write a llama, of two layers by default, that knows the small model's tokens."""
    sizes = {"vocab_size": 2048, "max_position_embeddings": CONTEXT, **changes}
    make_model("llama-tied", directory / "dense", **sizes)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(SMALL_MODEL / name, directory / "dense" / name)
    convert(directory / "dense", directory / "bundle")
    convert(directory / "bundle", directory / "stored", to_format="safetensors", dtype="f32")
    return directory / "bundle"


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Write prompts with ragged completions: the prompt's words backwards."""
    chance = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            words = chance.choices(WORDS, k=chance.randint(1, 6))
            row = {"prompt": " ".join(words), "completion": " " + " ".join(reversed(words))}
            file.write(json.dumps(row) + "\n")
    return path


def options(bundle: Path, data: Path, output: Path, **changes) -> TrainOptions:
    """A run of eight steps with everything that can go wrong in a resume: dropout, two epochs."""
    return TrainOptions(**{
        "base": str(bundle), "data": (str(data),), "output": str(output), "rank": 4, "alpha": 8.0,
        "seq_len": 48, "grad_accum": 2, "epochs": 2, "lr": 5e-3, "dropout": 0.1, "plot": False,
        **changes,
    })  # fmt: skip


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file's bytes."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def losses(output):
    record = read_metrics(output.with_name(output.name + ".run") / "metrics.jsonl")
    return [line["loss"] for line in record if "loss" in line]
