"""Demo, part 5: the trained adapter in llama.cpp, merged and separate.

What llama.cpp computes is held against what the trainer computes on the mapped bundle: the whole
distribution after each token of a held-out text, and the tokens that each writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from loraformat.demo import llama_cpp
from loraformat.demo.step import Step, Workspace
from loraformat.demo.texts import heldout
from loraformat.demo.training import PROMPT
from loraformat.ops.convert.adapter import AdapterConversion
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge

__all__ = ["Agreement", "compare_with_llama_cpp", "export"]

#: Tokens of held-out text after which distributions are compared.
_COMPARED = 64

#: Tokens that both write, the likeliest each time.
_WRITTEN = 32


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement between llama.cpp, with what `title` names, and loraformat.

    `same_tokens` compares tokenizers, `same_next` the likeliest next token at every position,
    `same_text` what both write after `prompt`. `difference` is the largest of a log-probability
    (nats) in distributions over the `vocabulary`, one for each of the `positions`; `perplexity` of
    the tokens there is as llama.cpp computes it, and `ours` as we do.
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


def export(work: Workspace) -> Iterator[Step]:
    """Write the adapter into a GGUF model, and base and adapter into GGUF files of their own."""
    work.say("merging it into a GGUF file")
    target = work.directory / "merged.gguf"
    merged = merge(work.bundle, [work.learned], target, dtype="f32", force=work.force)
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
    work.say("converting base and adapter to GGUF")
    target = work.directory / "base.gguf"
    base = convert(work.bundle, target, dtype="f32", force=work.force)
    yield Step(
        "its base, for llama.cpp",
        "convert bundle base.gguf --dtype f32",
        "the values of its NF4 weights, as they are",
        target,
        base.seconds,
    )
    target = work.directory / "learned.gguf"
    adapter = convert(work.learned, target, dtype="f32", base=work.bundle, force=work.force)
    assert isinstance(adapter, AdapterConversion)
    yield Step(
        "itself, for llama.cpp",
        "convert learned learned.gguf --dtype f32 --base bundle",
        f"{adapter.modules} modules, {adapter.parameters:,} parameters",
        target,
        adapter.seconds,
        {"parameters": adapter.parameters},
    )


def compare_with_llama_cpp(work: Workspace) -> list[Agreement]:
    """Run the files of `export` in llama.cpp and compare with the bundle's results.

    Of ``merged.gguf``, and of ``base.gguf`` with ``learned.gguf``; empty without xllamacpp.

    Raises
    ------
    LoraFormatError
        If llama.cpp refuses a file.
    """
    if not llama_cpp.is_installed():
        work.notes.append("llama.cpp was skipped; run: pip install 'loraformat[demo]'")
        return []
    work.say("computing distributions on the bundle")
    question, ours, decode = _asked_of_us(work)
    found = []
    for title, model, adapter in (
        ("merged.gguf", "merged.gguf", None),
        ("base.gguf with learned.gguf", "base.gguf", work.directory / "learned.gguf"),
    ):
        work.say(f"running {title} in llama.cpp")
        theirs = llama_cpp.ask(work.directory / model, question, adapter)
        found.append(_agreement(title, question, ours, theirs, decode(theirs.written)))
    return found


def _asked_of_us(
    work: Workspace,
) -> tuple[llama_cpp.Question, llama_cpp.Answer, Callable[[list[int]], str]]:
    """Return the questions, loraformat's answers, and what makes text of tokens."""
    import torch

    from loraformat.train import load
    from loraformat.train.data.tokenizer import open_tokenizer
    from loraformat.train.loop.evaluation import evaluating
    from loraformat.train.run.text_generation import GenerationOptions, continuation, stop_tokens

    encoder = open_tokenizer(work.bundle)
    text = heldout("manual")[: 8 * _COMPARED]
    tokens = encoder.tokenize(text).ids
    ids = [*encoder.prefix, *tokens][:_COMPARED]
    prompt = [*encoder.prefix, *encoder.tokenize(PROMPT).ids]
    with load(work.bundle, adapter=work.learned) as model:
        with evaluating(model):
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        written = continuation(
            model, encoder.tokenizer, prompt, GenerationOptions(_WRITTEN, temperature=0.0),
            stops=stop_tokens(work.bundle, encoder.tokenizer),
        )  # fmt: skip
    question = llama_cpp.Question(
        text, ids, prompt, _WRITTEN, vocabulary=logits.shape[-1],
        ordinary=encoder.tokenize("a").ids[0],
    )  # fmt: skip
    values = logits.double().log_softmax(-1).tolist()
    answer = llama_cpp.Answer(tokens, values, written.tokens)
    return question, answer, encoder.tokenizer.decode


def _agreement(
    title: str, question: llama_cpp.Question, ours: llama_cpp.Answer, theirs: llama_cpp.Answer,
    text: str,
) -> Agreement:  # fmt: skip
    import numpy as np

    expected, found = np.array(ours.log_probabilities), np.array(theirs.log_probabilities)
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
        text=text,
    )
