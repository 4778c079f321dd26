"""Make the small real adapters that ship in ``loraformat/demo/small_adapters``.

Two LoRA adapters of the small model, trained as QLoRA trains them: on its NF4 values, with
PEFT. Each teaches a kind of text that the model has not been trained on and that comes with
Python, so that nothing is downloaded::

    manual    rank 24: the language reference, as ``help("import")`` prints it
    tests     rank 16: unit tests of the standard library

    python tools/make_small_adapter.py --out build/adapters

It takes a few minutes on one idle core. The same Python and the same torch give the same
weights; ``training_record.json`` names them. The held-out texts, ``heldout_manual.txt`` and
``heldout_tests.txt``, are whole topics and whole test files that are kept out of the training
text; ``--write-heldout`` writes them anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import click
import peft
import torch
import transformers
from make_small_model import (
    LICENCE,
    Document,
    Recipe,
    batches,
    encode,
    measured,
    read_source,
    standard_library,
)
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from loraformat.demo import SMALL_ADAPTERS, SMALL_MODEL
from loraformat.demo.perplexity import Perplexity, perplexity_of
from loraformat.demo.texts import KINDS, heldout, heldout_path
from loraformat.ops.convert.convert import convert

#: Topics of the manual, and test files, that are held out; in this order.
HELDOUT_TOPICS = ("assert", "import", "raise", "with")
HELDOUT_TESTS = ("test_sched.py", "test_fnmatch.py")

#: Test files that are trained on: of those up to this size, every so manieth by name.
_LARGEST_TEST, _EVERY = 40_000, 4


@dataclass(frozen=True)
class AdapterRecipe:
    """What decides an adapter, beside the text and the versions."""

    name: str
    rank: int
    alpha: int
    recipe: Recipe


def _recipe(steps: int, seed: int) -> Recipe:
    return Recipe(
        steps=steps,
        learning_rate=3e-4,
        warmup_steps=20,
        weight_decay=0.0,
        seed=seed,
        threads=1,
        autocast="float32",
    )


# --- the texts ----------------------------------------------------------------------------------


def manual_documents() -> list[Document]:
    """Collect the topics: each paragraph once, none of those that are held out."""
    seen = {part for name in HELDOUT_TOPICS for part in topics[name].split("\n\n")}
    documents = []
    for name in sorted(set(topics).difference(HELDOUT_TOPICS)):
        parts = [part for part in topics[name].split("\n\n") if part not in seen]
        seen.update(parts)
        if parts:
            documents.append(Document(name, "\n\n".join(parts) + "\n"))
    return documents


def test_documents() -> list[Document]:
    """Collect test files of the standard library that have no licence of their own."""
    folder = standard_library() / "test"
    paths = [
        path
        for path in sorted(folder.glob("test_*.py"))
        if path.name not in HELDOUT_TESTS and path.stat().st_size <= _LARGEST_TEST
    ]
    texts = [(path.name, read_source(path)) for path in paths[::_EVERY]]
    return [Document(name, text) for name, text in texts if text is not None]


def write_heldout_texts() -> None:
    """Write the held-out topics and test files of the running interpreter."""
    folder = standard_library() / "test"
    texts = {
        "manual": [topics[name] for name in HELDOUT_TOPICS],
        "tests": [read_source(folder / name) or "" for name in HELDOUT_TESTS],
    }
    for name, parts in texts.items():
        heldout_path(name).write_bytes("\n".join(parts).encode())


TEXTS: dict[str, Callable[[], list[Document]]] = {
    "manual": manual_documents,
    "tests": test_documents,
}
SOURCES = {
    "manual": "Python's language reference, from pydoc_data/topics.py",
    "tests": "unit tests of the Python standard library, from test/",
}


def text_record(name: str, documents: Iterable[Document], tokens: int) -> dict[str, Any]:
    """Count the training text and hash it: names and contents, in order."""
    digest, size, count = hashlib.sha256(), 0, 0
    for document in documents:
        digest.update(f"{document.name}\0{document.text}\0".encode())
        size, count = size + len(document.text.encode()), count + 1
    return {
        "source": SOURCES[name],
        "licence": "PSF-2.0",
        "documents": count,
        "bytes": size,
        "tokens": tokens,
        "sha256": digest.hexdigest(),
        "held_out": list(HELDOUT_TOPICS if name == "manual" else HELDOUT_TESTS),
    }


# --- the training -------------------------------------------------------------------------------


def nf4_values() -> LlamaForCausalLM:
    """Load the small model with the values that its weights have in NF4, in float32."""
    with tempfile.TemporaryDirectory() as scratch:
        bundle, dense = Path(scratch, "bundle"), Path(scratch, "dense")
        convert(SMALL_MODEL, bundle)
        convert(bundle, dense, to_format="safetensors", dtype="f32")
        loaded: Any = LlamaForCausalLM.from_pretrained(dense, dtype=torch.float32)
    model: LlamaForCausalLM = loaded
    return model


def with_adapter(model: LlamaForCausalLM, chosen: AdapterRecipe) -> Any:
    """Put an untrained adapter on every linear of the layers."""
    torch.manual_seed(chosen.recipe.seed)
    config = peft.LoraConfig(
        r=chosen.rank,
        lora_alpha=chosen.alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)


def train(model: Any, stream: torch.Tensor, recipe: Recipe) -> list[tuple[int, float]]:
    """Train the adapter in place, in float32; return the loss curve."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=recipe.betas, weight_decay=recipe.weight_decay)
    curve: list[tuple[int, float]] = []
    recent: list[float] = []
    model.train()
    for step, rows in zip(range(recipe.steps), batches(stream, recipe), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % 10 == 0 or step + 1 == recipe.steps:
            curve.append((step + 1, round(sum(recent) / len(recent), 4)))
            recent.clear()
            click.echo(f"step {step + 1}/{recipe.steps}  loss {curve[-1][1]}", err=True)
    return curve


# --- the files ----------------------------------------------------------------------------------


def save(model: Any, out: Path) -> None:
    """Save the adapter as PEFT does, in bfloat16 and with nothing that varies between runs."""
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        tensors = load_file(Path(scratch, "adapter_model.safetensors"))
        config = json.loads(Path(scratch, "adapter_config.json").read_text())
    config["base_model_name_or_path"] = SMALL_MODEL.name
    config["target_modules"] = sorted(config["target_modules"])
    out.mkdir(parents=True, exist_ok=True)
    halves = {name: tensors[name].bfloat16() for name in sorted(tensors)}
    save_file(halves, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_model.safetensors").chmod(0o644)
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def measure(model: Any, tokenizer: Any) -> dict[str, Perplexity]:
    """Measure a model on all held-out texts."""
    return {kind: perplexity_of(model, tokenizer, heldout(kind)) for kind in KINDS}


def relative_norm(model: Any) -> float:
    """Return √(Σ‖D‖² / Σ‖W‖²) over the linears with an adapter."""
    deltas = weights = 0.0
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "lora_A"):
                deltas += float(module.get_delta_weight("default").square().sum())
                weights += float(module.base_layer.weight.square().sum())
    return math.sqrt(deltas / weights)


def make(chosen: AdapterRecipe, out: Path) -> dict[str, Any]:
    """Train one adapter, save it, load it again as a user would and measure it."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(SMALL_MODEL)
    documents = TEXTS[chosen.name]()
    stream = encode(tokenizer, documents)
    click.echo(f"{chosen.name}: {len(documents)} documents, {len(stream)} tokens", err=True)
    model = with_adapter(nf4_values(), chosen)
    started = time.perf_counter()
    curve = train(model, stream, chosen.recipe)
    seconds = time.perf_counter() - started
    save(model, out / chosen.name)
    loaded: Any = peft.PeftModel.from_pretrained(nf4_values(), out / chosen.name)
    after = measure(loaded, tokenizer)
    with loaded.disable_adapter():
        before = measure(loaded, tokenizer)
    content = (out / chosen.name / "adapter_model.safetensors").read_bytes()
    return {
        "text": text_record(chosen.name, documents, len(stream)),
        "recipe": {"rank": chosen.rank, "alpha": chosen.alpha, **asdict(chosen.recipe)},
        "wall_seconds": round(seconds),
        "weights": {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)},
        "relative_norm": round(relative_norm(loaded), 5),
        "held_out": {
            kind: {
                "sha256": hashlib.sha256(heldout(kind).encode()).hexdigest(),
                "bytes": after[kind].bytes,
                "tokens": after[kind].tokens,
                "base": measured(before[kind]),
                "adapter": measured(after[kind]),
            }
            for kind in KINDS
        },
        "loss_curve": curve,
    }


CARD = """\
---
license: apache-2.0
library_name: peft
---

# The small adapters of loraformat

LoRA adapters of `small_model`, trained on the NF4 values of its weights. They exist so that
merging, reducing and combining can be shown and tested on deltas that have really learned
something. Perplexity on held-out text of each kind, of the NF4 base alone and with an adapter:

{table}

Made by `tools/make_small_adapter.py`; `training_record.json` says how. `library` is the
beginning of `heldout.txt`. Weights: Apache-2.0, as the rest of loraformat; see `LICENSE`.
"""


def card(records: dict[str, Any]) -> str:
    """Write the model card."""
    first = next(iter(records.values()))["held_out"]
    rows = [["model", *KINDS], ["---"] * (len(KINDS) + 1)]
    rows.append(["base", *(f"{first[kind]['base']['perplexity']:.2f}" for kind in KINDS)])
    for adapter, record in records.items():
        found = [record["held_out"][kind]["adapter"]["perplexity"] for kind in KINDS]
        words = f"`{adapter}`, rank {record['recipe']['rank']}"
        rows.append([words, *(f"{value:.2f}" for value in found)])
    return CARD.format(table="\n".join("| " + " | ".join(row) + " |" for row in rows))


def versions() -> dict[str, str]:
    """Name the programs that decide the result."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=SMALL_ADAPTERS,
    help="Directory to write [default: the shipped one].",
)
@click.option("--steps", default=120, show_default=True, help="Steps of 2048 tokens, of each.")
@click.option("--seed", default=Recipe.seed, show_default=True)
@click.option("--write-heldout", is_flag=True, help="Write the held-out texts first.")
def main(out: Path, steps: int, seed: int, write_heldout: bool) -> None:
    """Make the small real adapters that ship with loraformat."""
    if write_heldout:
        write_heldout_texts()
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    chosen = [
        AdapterRecipe("manual", 24, 24, _recipe(steps, seed)),
        AdapterRecipe("tests", 16, 16, _recipe(steps, seed)),
    ]
    records = {one.name: make(one, out) for one in chosen}
    record = {
        "versions": versions(),
        "base": {
            "model": SMALL_MODEL.name,
            "sha256": hashlib.sha256((SMALL_MODEL / "model.safetensors").read_bytes()).hexdigest(),
            "values": "NF4, block size 64, double quantization",
        },
        "adapters": records,
    }
    (out / "training_record.json").write_text(json.dumps(record, indent=2) + "\n")
    (out / "README.md").write_text(card(records))
    notice = "\n".join(sys.copyright.splitlines()[:2])
    (out / "LICENSE").write_text(LICENCE.format(notice=notice))
    click.echo(card(records))


if __name__ == "__main__":
    main()
