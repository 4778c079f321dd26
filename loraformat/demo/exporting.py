"""Demo, part 5: the trained adapter in llama.cpp, merged and separate.

What llama.cpp computes is held against what the trainer computes on the mapped bundle: the whole
distribution after each token of a held-out text, and the tokens that each writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraformat.demo import llama_cpp
from loraformat.demo.step import Step
from loraformat.demo.texts import heldout
from loraformat.demo.training import PROMPT
from loraformat.ops.convert.adapter import AdapterConversion
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Agreement", "compare_with_llama_cpp", "export"]

#: Tokens of held-out text after which distributions are compared.
_COMPARED = 64

#: Tokens that both write, the likeliest each time.
_WRITTEN = 32


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement between llama.cpp and loraformat.

    Attributes
    ----------
    title : str
        What it has loaded.
    same_tokens : bool
        Whether its tokenizer cuts the text as ours.
    positions, vocabulary : int
        Distributions that were compared, and the tokens that each is over.
    difference : float
        The largest of a log-probability, in nats.
    same_next : bool
        Whether the likeliest next token is the same at every position.
    perplexity, ours : float
        Of the tokens of the text that follow one another there, as it and as we compute it.
    same_text : bool
        Whether both write on with the same tokens, the likeliest each time.
    prompt, text : str
        What it writes on from, and what it writes.
    """

    title: str
    same_tokens: bool
    positions: int
    vocabulary: int
    difference: float
    same_next: bool
    perplexity: float
    ours: float
    same_text: bool
    prompt: str
    text: str

    def to_json(self) -> dict[str, Any]:
        """Return the members for ``--json``."""
        return {name: getattr(self, name) for name in self.__slots__}


def export(directory: Path, *, force: bool, say: Callable[[str], None]) -> Iterator[Step]:
    """Write the adapter into a GGUF model, and base and adapter into GGUF files of their own.

    Parameters
    ----------
    directory : Path
        Holds ``bundle`` and ``learned``; gets ``merged.gguf``, ``base.gguf``, ``learned.gguf``.
    force : bool
    say : callable

    Yields
    ------
    Step
    """
    bundle, learned = directory / "bundle", directory / "learned"
    say("merging it into a GGUF file")
    target = directory / "merged.gguf"
    merged = merge(bundle, [learned], target, dtype="f32", force=force)
    assert merged.total is not None
    kept, delta = merged.total.gain, merged.total.relative
    yield Step(
        "merged, for llama.cpp",
        "merge bundle learned -o merged.gguf --dtype f32",
        f"keeps {kept:.1%} of a delta that is {delta:.1%} of the weights",
        target,
        merged.seconds,
        {"kept": kept, "relative_delta": delta},
    )
    say("converting base and adapter to GGUF")
    base = convert(bundle, directory / "base.gguf", dtype="f32", force=force)
    yield Step(
        "its base, for llama.cpp",
        "convert bundle base.gguf --dtype f32",
        "the values of its NF4 weights, as they are",
        directory / "base.gguf",
        base.seconds,
    )
    target = directory / "learned.gguf"
    adapter = convert(learned, target, dtype="f32", base=bundle, force=force)
    assert isinstance(adapter, AdapterConversion)
    yield Step(
        "itself, for llama.cpp",
        "convert learned learned.gguf --dtype f32 --base bundle",
        f"{adapter.modules} modules, {adapter.parameters:,} parameters",
        target,
        adapter.seconds,
        {"parameters": adapter.parameters},
    )


def compare_with_llama_cpp(
    directory: Path, notes: list[str], say: Callable[[str], None]
) -> list[Agreement]:
    """Run the files in llama.cpp and compare with the bundle's results.

    Parameters
    ----------
    directory : Path
        Holds what `export` has made.
    notes : list of str
        Told if xllamacpp is not installed.
    say : callable

    Returns
    -------
    list of Agreement
        Of ``merged.gguf``, and of ``base.gguf`` with ``learned.gguf``; empty without xllamacpp.

    Raises
    ------
    LoraFormatError
        If llama.cpp refuses a file.
    """
    if not llama_cpp.is_installed():
        notes.append("llama.cpp was skipped; run: pip install 'loraformat[demo]'")
        return []
    say("computing distributions on the bundle")
    question, ours = _asked_of_us(directory)
    found = []
    for title, model, adapter in (
        ("merged.gguf", "merged.gguf", None),
        ("base.gguf with learned.gguf", "base.gguf", directory / "learned.gguf"),
    ):
        say(f"running {title} in llama.cpp")
        theirs = llama_cpp.ask(directory / model, question, adapter)
        found.append(_agreement(title, question, ours, theirs))
    return found


@dataclass(frozen=True, slots=True)
class _Ours:
    """loraformat's answers and the tokenizer."""

    tokens: list[int]
    log_probabilities: np.ndarray
    written: list[int]
    decode: Callable[[list[int]], str]


def _asked_of_us(directory: Path) -> tuple[llama_cpp.Question, _Ours]:
    """Return the questions and loraformat's answers."""
    import torch

    from loraformat.train import load
    from loraformat.train.data.tokenizer import open_tokenizer
    from loraformat.train.loop.evaluation import evaluating
    from loraformat.train.run.text_generation import GenerationOptions, continuation, stop_tokens

    bundle = directory / "bundle"
    encoder = open_tokenizer(bundle)
    text = heldout("manual")[: 8 * _COMPARED]
    tokens = encoder.tokenize(text).ids
    ids = [*encoder.prefix, *tokens][:_COMPARED]
    prompt = [*encoder.prefix, *encoder.tokenize(PROMPT).ids]
    with load(bundle, adapter=directory / "learned") as model:
        with evaluating(model):
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        written = continuation(
            model, encoder.tokenizer, prompt, GenerationOptions(_WRITTEN, temperature=0.0),
            stops=stop_tokens(bundle, encoder.tokenizer),
        )  # fmt: skip
    question = llama_cpp.Question(
        text, ids, prompt, _WRITTEN, vocabulary=logits.shape[-1],
        ordinary=encoder.tokenize("a").ids[0],
    )  # fmt: skip
    values = logits.double().log_softmax(-1).numpy()
    return question, _Ours(tokens, values, written.tokens, encoder.tokenizer.decode)


def _agreement(
    title: str, question: llama_cpp.Question, ours: _Ours, theirs: llama_cpp.Answer
) -> Agreement:
    import numpy as np

    expected, found = ours.log_probabilities, np.array(theirs.log_probabilities)
    positions, vocabulary = expected.shape
    following = (np.arange(positions - 1), np.array(question.ids[1:]))
    return Agreement(
        title,
        same_tokens=theirs.tokens == ours.tokens,
        positions=positions,
        vocabulary=vocabulary,
        difference=float(np.abs(found - expected).max()),
        same_next=bool((found.argmax(-1) == expected.argmax(-1)).all()),
        perplexity=float(np.exp(-found[following].mean())),
        ours=float(np.exp(-expected[following].mean())),
        same_text=theirs.written == ours.written,
        prompt=PROMPT,
        text=ours.decode(theirs.written),
    )
