"""Commands that load an adapter whose PEFT task is not to generate text.

Lines stand here for programs in which they were run; the others have none.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from loraformat.runtimes.use import Snippet, Use, shell_path

__all__ = ["TASK_USAGE", "TaskUsage", "labels_of", "loading_lines"]

#: Where the classes of transformers keep the weight that gives a number for each label.
_HEAD = re.compile(r"(^|\.)(score|(classifier|classification_head)(\.out_proj)?)\.weight$")


@dataclass(frozen=True, slots=True)
class TaskUsage:
    """Usage of adapters of one task.

    Attributes
    ----------
    does : str
        A verb: "embeds".
    auto : str
        transformers' class that opens the base.
    output : str
        The line that computes.
    shown : tuple of str
        Those that show what it computed.
    question : str or None
        A text before the one that the model is given.
    has_labels : bool
        The base's head gets as many labels as the adapter's has.
    others : mapping of str to callable
        Snippets for other runtimes than transformers.
    """

    does: str
    auto: str
    output: str
    shown: tuple[str, ...]
    question: str | None = None
    has_labels: bool = False
    others: Mapping[str, Callable[[Use], Snippet]] = field(default_factory=dict)

    @property
    def snippets(self) -> Mapping[str, Callable[[Use], Snippet]]:
        """Snippets by runtime."""
        return {"transformers": self.transformers, **self.others}

    def transformers(self, use: Use) -> Snippet:
        r"""Return Python code that computes with transformers and PEFT.

        Examples
        --------
        >>> use = Use("kind", "org/base", "org/kind", 8, labels=3)
        >>> print(TASK_USAGE["SEQ_CLS"].transformers(use).text.split("\n")[6])
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype="auto")
        """
        sized = self.has_labels and use.labels is not None
        loading = loading_lines(
            use, self.auto, options=f", num_labels={use.labels}" if sized else ""
        )
        texts = ", ".join(json.dumps(text) for text in (self.question, use.prompt) if text)
        lines = [
            f'import torch\n{loading}inputs = tokenizer({texts}, return_tensors="pt")',
            "with torch.no_grad():",
            f"    {self.output}",
            *self.shown,
            "",
        ]
        return Snippet("transformers", "run_transformers.py", "python", "\n".join(lines))


def loading_lines(
    use: Use, auto: str, *, imports: str = "", prepared: str = "", options: str = ""
) -> str:
    """Return the Python lines that load an adapter on its base.

    Parameters
    ----------
    use : Use
    auto : str
        transformers' class that opens the base.
    imports, prepared : str
        Lines after the imports, and between tokenizer and model; each ends with a line break.
    options : str
        Of the model, each with a comma before it.

    Examples
    --------
    >>> lines = loading_lines(Use("near", "org/base", "org/near", 8), "AutoModel")
    >>> print(lines.splitlines()[5])
    model = AutoModel.from_pretrained(base, dtype="auto")
    """
    said = f"\nrevision = {json.dumps(use.revision)}" if use.revision else ""
    pinned = ", revision=revision" if use.revision else ""
    return f"""\
from peft import PeftModel
from transformers import {auto}, AutoTokenizer
{imports}
base = {json.dumps(use.base)}{said}
tokenizer = AutoTokenizer.from_pretrained(base{pinned})
{prepared}model = {auto}.from_pretrained(base{pinned}{options}, dtype="auto")
model = PeftModel.from_pretrained(model, {json.dumps(use.adapter)})
"""


def _llama_cpp_embeddings(use: Use) -> Snippet:
    """Return the command line of the server, and a request.

    Examples
    --------
    >>> print(_llama_cpp_embeddings(Use("near", "org/base", "A", 8)).text.splitlines()[0])
    llama-server -m model.gguf --lora lora.gguf --embeddings
    """
    body = shlex.quote(json.dumps({"content": use.prompt}))
    text = f"""\
llama-server -m {shell_path(use.base_gguf)} --lora {shell_path(use.gguf)} --embeddings

curl http://127.0.0.1:8080/embeddings -H 'Content-Type: application/json' \\
  -d {body}
"""
    return Snippet("llama.cpp", "run_llama_cpp.sh", "sh", text)


def labels_of(replaced: Iterable[tuple[str, tuple[int, ...]]]) -> int | None:
    """Return the number of labels of a classifier, from the tensors it replaces.

    Examples
    --------
    >>> labels_of([("model.norm.weight", (8,)), ("score.weight", (3, 8))])
    3
    """
    return next((s[0] for name, s in replaced if len(s) == 2 and _HEAD.search(name)), None)


#: By PEFT's ``task_type``. An adapter of any other generates.
TASK_USAGE = {
    "FEATURE_EXTRACTION": TaskUsage(
        does="embeds",
        auto="AutoModel",
        output="states = model(**inputs).last_hidden_state",
        shown=("print(states.shape)  # a vector for each token, to be pooled as the base's are",),
        others={"llama.cpp": _llama_cpp_embeddings},
    ),
    "QUESTION_ANS": TaskUsage(
        does="marks answers in texts",
        auto="AutoModelForQuestionAnswering",
        output="output = model(**inputs)",
        shown=(
            "first, last = (int(one.argmax()) for one in (output.start_logits, output.end_logits))",
            'print(tokenizer.decode(inputs["input_ids"][0, first : last + 1]))',
        ),
        question="What was upon a time?",
    ),
    "SEQ_2_SEQ_LM": TaskUsage(
        does="is of an encoder and a decoder",
        auto="AutoModelForSeq2SeqLM",
        output="output = model.generate(**inputs, max_new_tokens=64)",
        shown=("print(tokenizer.decode(output[0], skip_special_tokens=True))",),
    ),
    "SEQ_CLS": TaskUsage(
        does="classifies texts",
        auto="AutoModelForSequenceClassification",
        output="logits = model(**inputs).logits",
        shown=("print(logits)  # a number for each label",),
        has_labels=True,
    ),
    "TOKEN_CLS": TaskUsage(
        does="classifies tokens",
        auto="AutoModelForTokenClassification",
        output="labels = model(**inputs).logits.argmax(-1)[0].tolist()",
        shown=(
            'print(list(zip(tokenizer.convert_ids_to_tokens(inputs["input_ids"][0]), labels)))',
        ),
        has_labels=True,
    ),
}
