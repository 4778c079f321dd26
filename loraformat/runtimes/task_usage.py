"""Loading commands for adapters by PEFT task type.

Lines stand here for programs in which they were run; the others have none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from loraformat.runtimes.embedding_usage import EMBEDDING_SNIPPETS
from loraformat.runtimes.loading_lines import loading_lines
from loraformat.runtimes.use import Snippet, Use

__all__ = ["TASK_USAGE", "TaskUsage", "labels_of", "task_snippet"]

#: Where the classes of transformers keep the weight that gives a number for each label.
_HEAD = re.compile(r"(^|\.)(score|(classifier|classification_head)(\.out_proj)?)\.weight$")


@dataclass(frozen=True, slots=True)
class TaskUsage:
    """Usage of adapters of one task: description and loading code.

    Attributes
    ----------
    does : str
        A verb: "embeds".
    snippets : mapping of str to callable
        By runtime.
    """

    does: str
    snippets: Mapping[str, Callable[[Use], Snippet]]


def task_snippet(runtime: str, task: str | None) -> Callable[[Use], Snippet] | None:
    r"""Return the snippet function for a runtime; None for generation or unsupported tasks.

    Examples
    --------
    >>> make = task_snippet("transformers", "SEQ_CLS")
    >>> print(make(Use("kind", "org/base", "org/kind", 8, labels=3)).text.split("\n")[6])
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype="auto")
    """
    usage = TASK_USAGE.get(task or "")
    return None if usage is None else usage.snippets.get(runtime)


def labels_of(replaced: Iterable[tuple[str, tuple[int, ...]]]) -> int | None:
    """Return the number of labels of a classifier, from the tensors it replaces.

    Examples
    --------
    >>> labels_of([("model.norm.weight", (8,)), ("score.weight", (3, 8))])
    3
    """
    return next((s[0] for name, s in replaced if len(s) == 2 and _HEAD.search(name)), None)


def _classify_text(use: Use) -> Snippet:
    return _computed(use, "AutoModelForSequenceClassification", _labels(use), (
        f'inputs = tokenizer({json.dumps(use.prompt)}, return_tensors="pt")',
        "logits = model(**inputs).logits",
        "print(logits)  # a number for each label",
    ))  # fmt: skip


def _classify_tokens(use: Use) -> Snippet:
    return _computed(use, "AutoModelForTokenClassification", _labels(use), (
        f'inputs = tokenizer({json.dumps(use.prompt)}, return_tensors="pt")',
        "labels = model(**inputs).logits.argmax(-1)[0].tolist()",
        'print(list(zip(tokenizer.convert_ids_to_tokens(inputs["input_ids"][0]), labels)))',
    ))  # fmt: skip


def _answer(use: Use) -> Snippet:
    return _computed(use, "AutoModelForQuestionAnswering", "", (
        f'inputs = tokenizer("What was upon a time?", {json.dumps(use.prompt)}, '
        'return_tensors="pt")',
        "output = model(**inputs)",
        "first, last = (int(one.argmax()) for one in (output.start_logits, output.end_logits))",
        'print(tokenizer.decode(inputs["input_ids"][0, first : last + 1]))',
    ))  # fmt: skip


def _translate(use: Use) -> Snippet:
    return _computed(use, "AutoModelForSeq2SeqLM", "", (
        f'inputs = tokenizer({json.dumps(use.prompt)}, return_tensors="pt")',
        "output = model.generate(**inputs, max_new_tokens=64)",
        "print(tokenizer.decode(output[0], skip_special_tokens=True))",
    ))  # fmt: skip


def _labels(use: Use) -> str:
    """Return the option that sizes the base's head for the adapter."""
    return "" if use.labels is None else f", num_labels={use.labels}"


def _computed(use: Use, auto: str, options: str, lines: tuple[str, ...]) -> Snippet:
    inputs, output, *shown = lines
    loading = loading_lines(use, auto, options=options)
    text = "\n".join([
        f"import torch\n{loading}{inputs}", "with torch.no_grad():", f"    {output}", *shown, "",
    ])  # fmt: skip
    return Snippet("transformers", "run_transformers.py", "python", text)


#: By PEFT's ``task_type``. An adapter of any other generates.
TASK_USAGE = {
    "FEATURE_EXTRACTION": TaskUsage("embeds", EMBEDDING_SNIPPETS),
    "QUESTION_ANS": TaskUsage("marks answers in texts", {"transformers": _answer}),
    "SEQ_2_SEQ_LM": TaskUsage("is of an encoder and a decoder", {"transformers": _translate}),
    "SEQ_CLS": TaskUsage("classifies texts", {"transformers": _classify_text}),
    "TOKEN_CLS": TaskUsage("classifies tokens", {"transformers": _classify_tokens}),
}
