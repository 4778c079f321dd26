"""Make the small real model that ships in ``loraformat/demo/small_model``.

A Llama-architecture model of about two million parameters with its own
byte-level BPE tokenizer, trained on the source text of the standard library of
the Python that runs this script. Nothing is downloaded. To make it again::

    python tools/make_small_model.py --out build/small_model

It takes half an hour on two idle cores. ``--minutes 2`` gives a worse model quickly: it
measures the speed of the machine and sets the number of steps by it. The same
Python, the same torch, the same number of threads and of steps give the same
weights; ``training_record.json`` names all of them.

The held-out text is ``loraformat/demo/heldout.txt``: whole modules that are kept
out of the training text by name. It is fixed, so that a perplexity means the
same under every version of Python; ``--write-heldout`` writes it anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loraformat.demo.perplexity import Perplexity, load, perplexity_of

DEMO = Path(__file__).resolve().parents[1] / "loraformat" / "demo"
HELDOUT = DEMO / "heldout.txt"

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VOCABULARY = 2048
WINDOW = 512

#: Modules that make the held-out text, in this order.
HELDOUT_MODULES = (
    "colorsys.py",
    "csv.py",
    "filecmp.py",
    "fnmatch.py",
    "graphlib.py",
    "linecache.py",
    "queue.py",
    "sched.py",
    "tempfile.py",
)
#: Directories that are tests, tables, other people's work or products of the build.
_LEFT_OUT_PARTS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "encodings"}
)
_LEFT_OUT_NAMES = re.compile(r"_sysconfigdata|^config-|^_bundled$|^__phello__|^lib-dynload$")
#: Files with permission notices of their own, beside the licence of Python.
_OWN_LICENCE = re.compile(
    r"Permission to use|Permission is hereby|Redistribution and use|Apache License|"
    r"under the Apache|General Public License",
    re.IGNORECASE,
)


# --- the text -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """One file of the standard library: its path below the library, and its text."""

    name: str
    text: str


def standard_library() -> Path:
    """Return the directory of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def is_wanted(name: str) -> bool:
    """Tell whether a file, named by its path below the library, may be trained on."""
    parts = name.split("/")
    return (
        name not in HELDOUT_MODULES
        and not _LEFT_OUT_PARTS.intersection(parts)
        and not any(_LEFT_OUT_NAMES.search(part) for part in parts)
    )


def read_source(path: Path) -> str | None:
    """Read a file; ``None`` when it is empty, not UTF-8 or under a licence of its own."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    return None if not text.strip() or _OWN_LICENCE.search(text) else text


def training_documents(library: Path) -> list[Document]:
    """Collect the training text: sorted by path, each content once, nothing held out."""
    names = sorted(path.relative_to(library).as_posix() for path in library.rglob("*.py"))
    held_out = {read_source(library / name) for name in set(HELDOUT_MODULES).intersection(names)}
    documents: dict[str, Document] = {}
    for name in filter(is_wanted, names):
        text = read_source(library / name)
        if text is not None and text not in held_out and str(library) not in text:
            documents.setdefault(text, Document(name, text))
    return list(documents.values())


def describe(documents: list[Document]) -> dict[str, Any]:
    """Count the training text and hash it: names and contents, in order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.name}\0{document.text}\0".encode())
    return {
        "source": "Python standard library, .py files without tests",
        "licence": "PSF-2.0",
        "files": len(documents),
        "bytes": sum(len(document.text.encode()) for document in documents),
        "sha256": digest.hexdigest(),
        "held_out": list(HELDOUT_MODULES),
    }


def write_heldout_text(library: Path) -> None:
    """Write the held-out modules of the running interpreter into one file."""
    texts = [read_source(library / name) for name in HELDOUT_MODULES]
    HELDOUT.write_bytes("\n".join(text for text in texts if text).encode())


# --- the tokenizer ------------------------------------------------------------------------------


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, cut like GPT-2's, that begins each text with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    wrap: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = wrap(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )
    return made


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> torch.Tensor:
    """Encode all documents into one stream, each between BOS and EOS."""
    encoded = tokenizer([document.text for document in documents], verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (*ids, tokenizer.eos_token_id)])


def unigram(stream: torch.Tensor, tokenizer: PreTrainedTokenizerFast, text: str) -> Perplexity:
    """Measure the model that knows only how frequent each token is (add-one smoothing)."""
    frequency = Counter(stream.tolist())
    total = len(stream) + VOCABULARY
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    nats = -sum(math.log((frequency[token] + 1) / total) for token in ids)
    return Perplexity(nats_per_token=nats / len(ids), tokens=len(ids), bytes=len(text.encode()))


# --- the training -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, beside the text and the versions."""

    steps: int = 7000
    batch: int = 4
    window: int = WINDOW
    learning_rate: float = 1.5e-3
    warmup_steps: int = 100
    final_fraction: float = 0.05
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    seed: int = 20240229
    threads: int = 2
    autocast: str = "bfloat16"

    def rate(self, step: int) -> float:
        """Give the learning rate of a step: linear warm-up, then half a cosine."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        done = max(0, step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        floor = self.final_fraction
        return self.learning_rate * warm * (floor + (1 - floor) * cosine)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make the untrained model; every linear is a multiple of 256 wide, 64 high."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(stream: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Yield batches for ever: each pass cuts the stream at another offset and shuffles the cuts."""
    generator = torch.Generator().manual_seed(recipe.seed)
    length = recipe.window + 1
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        rows = stream[offset:].unfold(0, length, recipe.window)
        order = torch.randperm(len(rows), generator=generator)
        for chosen in torch.split(order, recipe.batch):
            if len(chosen) == recipe.batch:
                yield rows[chosen]


def optimizer_for(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """Make AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=recipe.betas, fused=True)


def take_step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, rows: torch.Tensor, recipe: Recipe
) -> float:
    """Take one step of gradient descent and return the loss before it, in nats per token."""
    with torch.autocast("cpu", getattr(torch, recipe.autocast)):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def seconds_per_step(model: LlamaForCausalLM, stream: torch.Tensor, recipe: Recipe) -> float:
    """Time a few steps on a model that is thrown away."""
    optimizer, source = optimizer_for(model, recipe), batches(stream, recipe)
    for step in range(12):
        if step == 4:
            start = time.perf_counter()
        take_step(model, optimizer, next(source), recipe)
    return (time.perf_counter() - start) / 8


def train(model: LlamaForCausalLM, stream: torch.Tensor, recipe: Recipe) -> list[tuple[int, float]]:
    """Train the model in place; return about 60 points of the loss curve."""
    optimizer = optimizer_for(model, recipe)
    every = max(1, recipe.steps // 60)
    curve: list[tuple[int, float]] = []
    recent: list[float] = []
    start = time.perf_counter()
    model.train()
    for step, rows in zip(range(recipe.steps), batches(stream, recipe), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        recent.append(take_step(model, optimizer, rows, recipe))
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            curve.append((step + 1, round(sum(recent) / len(recent), 4)))
            recent.clear()
            passed = time.perf_counter() - start
            done = f"step {step + 1}/{recipe.steps}"
            click.echo(f"{done}  loss {curve[-1][1]}  {passed:.0f} s", err=True)
    return curve


# --- the files ----------------------------------------------------------------------------------


CARD = """\
---
license: apache-2.0
language: [code]
library_name: transformers
pipeline_tag: text-generation
---

# The small model of loraformat

{parameters:,} parameters of Llama architecture with a vocabulary of {vocabulary}, trained from
nothing on {megabytes:.1f} MB of the Python standard library (PSF-2.0). It exists so that
quantizing, adapting and merging can be shown and tested on weights that have really learned
something, without a download. It writes what looks like Python and knows nothing.

| on `heldout.txt`, window {window} | perplexity | bits per byte |
|---|---|---|
| this model | {model[perplexity]:.2f} | {model[bits_per_byte]:.3f} |
| token frequencies alone | {unigram[perplexity]:.1f} | {unigram[bits_per_byte]:.3f} |

Made by `tools/make_small_model.py`; `training_record.json` says how. Weights: Apache-2.0, as
the rest of loraformat; see `LICENSE`.
"""

LICENCE = """\
The weights, the tokenizer and the configuration in this directory are part of
loraformat and are licensed under the Apache License 2.0.

They were made from the text of the Python standard library, which is licensed
under the PSF License Agreement (PSF-2.0):
{notice}
Files with permission notices of their own were left out; training_record.json
counts and hashes the rest.
"""


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save the weights in bfloat16, the configuration and the tokenizer."""
    model.generation_config = GenerationConfig.from_dict(
        {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    )
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings = out / "tokenizer_config.json"
    kept = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    kept.pop("backend", None)  # transformers 4 knows neither the backend nor its class name
    settings.write_text(json.dumps(kept, indent=2) + "\n")
    (out / "model.safetensors").chmod(0o644)


def sample(out: Path, prompt: str = "class Queue:\n    def __init__(self") -> str:
    """Continue a prompt with the saved model, drawing from the 20 likeliest tokens."""
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    model: Any = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")
    drawn = model.generate(**ids, max_new_tokens=128, do_sample=True, top_k=20, temperature=0.7)
    return str(tokenizer.decode(drawn[0], skip_special_tokens=True))


def measured(result: Perplexity) -> dict[str, float]:
    """Round a measurement for the record."""
    return {
        "perplexity": round(result.perplexity, 4),
        "bits_per_byte": round(result.bits_per_byte, 4),
        "nats_per_token": round(result.nats_per_token, 5),
    }


def held_out_record(out: Path, stream: torch.Tensor) -> dict[str, Any]:
    """Measure the saved model and the token frequencies on the held-out text."""
    text = HELDOUT.read_bytes().decode()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    result = perplexity_of(*load(out), text, window=WINDOW)
    return {
        "file": HELDOUT.name,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "bytes": result.bytes,
        "tokens": result.tokens,
        "window": WINDOW,
        "model": measured(result),
        "unigram": measured(unigram(stream, tokenizer, text)),
    }


def weights_record(out: Path, model: LlamaForCausalLM) -> dict[str, Any]:
    """Name the saved weights by their hash."""
    content = (out / "model.safetensors").read_bytes()
    return {
        "file": "model.safetensors",
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "dtype": "bfloat16",
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def versions() -> dict[str, str]:
    """Name the programs that decide the result."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def write_notes(out: Path, record: dict[str, Any]) -> None:
    """Write the record, the model card and the licence note."""
    (out / "training_record.json").write_text(json.dumps(record, indent=2) + "\n")
    card = CARD.format(
        parameters=record["weights"]["parameters"],
        vocabulary=VOCABULARY,
        megabytes=record["data"]["bytes"] / 1e6,
        **{key: record["held_out"][key] for key in ("window", "model", "unigram")},
    )
    (out / "README.md").write_text(card)
    (out / "LICENSE").write_text(LICENCE.format(notice="\n".join(sys.copyright.splitlines()[:2])))


# --- the command --------------------------------------------------------------------------------


def make(out: Path, options: dict[str, Any], minutes: float | None) -> dict[str, Any]:
    """Collect, tokenize, train, save and measure; return the record."""
    torch.set_num_threads(options["threads"])
    documents = training_documents(standard_library())
    tokenizer = train_tokenizer(documents)
    stream = encode(tokenizer, documents)
    click.echo(f"{len(documents)} files, {len(stream)} tokens", err=True)
    if minutes is not None:
        pace = seconds_per_step(new_model(tokenizer), stream, Recipe(**options))
        options = {**options, "steps": max(1, int(60 * minutes / pace))}
    recipe = Recipe(**options)
    torch.manual_seed(recipe.seed)
    model = new_model(tokenizer)
    start = time.perf_counter()
    curve = train(model, stream, recipe)
    seconds = time.perf_counter() - start
    save(model, tokenizer, out)
    record = {
        "versions": versions(),
        "data": {**describe(documents), "tokens": len(stream)},
        "recipe": asdict(recipe),
        "tokens_seen": recipe.steps * recipe.batch * recipe.window,
        "wall_seconds": round(seconds),
        "weights": weights_record(out, model),
        "held_out": held_out_record(out, stream),
        "loss_curve": curve,
    }
    write_notes(out, record)
    return record


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=DEMO / "small_model",
    help="Directory to write [default: the shipped one].",
)
@click.option("--steps", default=Recipe.steps, show_default=True, help="Steps of 2048 tokens.")
@click.option("--minutes", type=float, help="Choose the steps by the time they may take.")
@click.option("--seed", default=Recipe.seed, show_default=True, help="Seed of weights and order.")
@click.option("--learning-rate", default=Recipe.learning_rate, show_default=True)
@click.option("--threads", default=Recipe.threads, show_default=True, help="Threads of torch.")
@click.option("--write-heldout", is_flag=True, help="Write loraformat/demo/heldout.txt first.")
def main(out: Path, minutes: float | None, write_heldout: bool, **options: Any) -> None:
    """Make the small real model that ships with loraformat.

    Half an hour on two cores, no network. The head of this file says more.
    """
    if write_heldout:
        write_heldout_text(standard_library())
    out.mkdir(parents=True, exist_ok=True)
    record = make(out, options, minutes)
    click.echo(json.dumps({key: record[key] for key in ("weights", "held_out")}, indent=2))
    click.echo(sample(out))


if __name__ == "__main__":
    main()
