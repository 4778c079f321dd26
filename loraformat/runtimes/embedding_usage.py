"""Loading commands for adapters of embedding models."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable

from loraformat.runtimes.loading_lines import loading_lines
from loraformat.runtimes.use import Snippet, Use, shell_path

__all__ = ["EMBEDDING_SNIPPETS", "llama_cpp", "transformers"]


def transformers(use: Use) -> Snippet:
    r"""Return Python code that computes hidden states with transformers and PEFT.

    Examples
    --------
    >>> print(transformers(Use("near", "org/base", "org/near", 8)).text.split("\n")[4])
    base = "org/base"
    """
    text = f"""\
import torch
{loading_lines(use, "AutoModel")}inputs = tokenizer({json.dumps(use.prompt)}, return_tensors="pt")
with torch.no_grad():
    states = model(**inputs).last_hidden_state
print(states.shape)  # a vector for each token, to be pooled as the base's are
"""
    return Snippet("transformers", "run_transformers.py", "python", text)


def llama_cpp(use: Use) -> Snippet:
    """Return the command line of the server, and a request.

    Examples
    --------
    >>> print(llama_cpp(Use("near", "org/base", "A", 8)).text.splitlines()[0])
    llama-server -m model.gguf --lora lora.gguf --embeddings
    """
    body = shlex.quote(json.dumps({"content": use.prompt}))
    text = f"""\
llama-server -m {shell_path(use.base_gguf)} --lora {shell_path(use.gguf)} --embeddings

curl http://127.0.0.1:8080/embeddings -H 'Content-Type: application/json' \\
  -d {body}
"""
    return Snippet("llama.cpp", "run_llama_cpp.sh", "sh", text)


#: By runtime.
EMBEDDING_SNIPPETS: dict[str, Callable[[Use], Snippet]] = {
    "transformers": transformers,
    "llama.cpp": llama_cpp,
}
