"""How each runtime is told to load an adapter: commands and files with this adapter's own names.

Pure text from a few facts: no file is looked at, so that a card, a terminal and a directory of
files show the same lines.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from loraformat.errors import UsageError, printable
from loraformat.runtimes.ranks import vllm_limit

__all__ = [
    "SNIPPETS",
    "Snippet",
    "Use",
    "llama_cpp",
    "lorax",
    "mlx",
    "ollama",
    "sglang",
    "snippet",
    "transformers",
    "vllm",
]

_PROMPT = "Once upon a time"


@dataclass(frozen=True, slots=True)
class Use:
    """What the lines below are made of.

    Attributes
    ----------
    name : str
        What the adapter is called in requests.
    base : str
        Its base as transformers, vLLM and SGLang load it: a Hub id or a path.
    adapter : str
        Its PEFT directory: a path, or a Hub id.
    rank : int
        The largest of its ranks.
    gguf : str
        Its GGUF file for llama.cpp and Ollama.
    base_gguf : str
        The base's.
    prompt : str
        For the examples.
    revision : str, optional
        Commit of the base, which is a Hub id then.

    Raises
    ------
    UsageError
        If one of them holds a line break or another control character, which no shell line and
        no Modelfile can quote safely.
    """

    name: str
    base: str
    adapter: str
    rank: int
    gguf: str = "lora.gguf"
    base_gguf: str = "model.gguf"
    prompt: str = _PROMPT
    revision: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and not (value and value.isprintable()):
                raise UsageError(
                    f"{field.name} is {printable(repr(value))}, wanted text without control "
                    "characters",
                    hint="give the adapter, or its base, another name",
                )

    @property
    def pinned_base(self) -> str:
        """The base as loraformat loads it: ``org/name@commit``, where the commit is known."""
        return f"{self.base}@{self.revision}" if self.revision else self.base

    @property
    def revision_option(self) -> str:
        """``--revision`` with a blank before it, for a shell; empty where none is known."""
        return f" --revision {shlex.quote(self.revision)}" if self.revision else ""


@dataclass(frozen=True, slots=True)
class Snippet:
    """Text to copy.

    Attributes
    ----------
    runtime : str
    file : str
        A name for it, ``Modelfile`` for example.
    language : str
        For a fence in Markdown: python, sh, or text.
    text : str
        Ends with a line break.
    """

    runtime: str
    file: str
    language: str
    text: str


def _path(word: str) -> str:
    """Return a path that no program takes for an option, quoted for a shell."""
    return shlex.quote(f"./{word}" if word.startswith("-") else word)


def _file(word: str) -> str:
    """Return a path as a Modelfile has it: with a slash, so that it is no model's name."""
    return word if word.startswith(("/", "./", "../")) else f"./{word}"


def transformers(use: Use) -> Snippet:
    r"""Return Python that generates with transformers and PEFT.

    Examples
    --------
    >>> print(transformers(Use("polite", "org/base", "org/polite", 8)).text.split("\n")[3])
    base = "org/base"
    """
    said = f"\nrevision = {json.dumps(use.revision)}" if use.revision else ""
    pinned = ", revision=revision" if use.revision else ""
    text = f"""\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = {json.dumps(use.base)}{said}
tokenizer = AutoTokenizer.from_pretrained(base{pinned})
model = AutoModelForCausalLM.from_pretrained(base{pinned}, dtype="auto")
model = PeftModel.from_pretrained(model, {json.dumps(use.adapter)})
inputs = tokenizer({json.dumps(use.prompt)}, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""
    return Snippet("transformers", "run_transformers.py", "python", text)


def _request(url: str, body: Mapping[str, object]) -> str:
    header = "-H 'Content-Type: application/json'"
    return f"curl {url} {header} \\\n  -d {shlex.quote(json.dumps(body))}\n"


def vllm(use: Use) -> Snippet:
    r"""Return the server's command line, with a rank limit that vLLM accepts, and a request.

    Raises
    ------
    UsageError
        If its rank is above the largest that vLLM accepts.

    Examples
    --------
    >>> print(vllm(Use("polite", "org/base", "org/polite", 20)).text.split("curl")[0], end="")
    vllm serve org/base --enable-lora \
      --max-lora-rank 32 --lora-modules polite=org/polite
    <BLANKLINE>
    """
    limit = vllm_limit(use.rank)
    if limit is None:
        raise UsageError(
            f"rank {use.rank} is more than vLLM serves",
            hint="reduce it first: loraformat reduce ADAPTER -o REDUCED --rank 512",
        )
    request = {"model": use.name, "prompt": use.prompt, "max_tokens": 64}
    text = f"""\
vllm serve {_path(use.base)}{use.revision_option} --enable-lora \\
  --max-lora-rank {limit} --lora-modules {shlex.quote(f"{use.name}={use.adapter}")}

{_request("http://127.0.0.1:8000/v1/completions", request)}"""
    return Snippet("vllm", "run_vllm.sh", "sh", text)


def sglang(use: Use) -> Snippet:
    r"""Return the server's command line and a request.

    Examples
    --------
    >>> print(sglang(Use("polite", "org/base", "A", 8)).text.split("curl")[0], end="")
    python -m sglang.launch_server --model-path org/base --enable-lora \
      --max-lora-rank 8 --lora-paths polite=A
    <BLANKLINE>
    """
    request = {
        "text": use.prompt,
        "sampling_params": {"max_new_tokens": 64},
        "lora_path": use.name,
    }
    text = f"""\
python -m sglang.launch_server --model-path {_path(use.base)}{use.revision_option} --enable-lora \\
  --max-lora-rank {use.rank} --lora-paths {shlex.quote(f"{use.name}={use.adapter}")}

{_request("http://127.0.0.1:30000/generate", request)}"""
    return Snippet("sglang", "run_sglang.sh", "sh", text)


def lorax(use: Use, *, local: bool = True) -> Snippet:
    """Return the launcher's command line and a request that names the adapter.

    Parameters
    ----------
    use : Use
    local : bool
        The adapter is a path that the server sees; else it is a Hub id.

    Examples
    --------
    >>> '"adapter_source": "hub"' in lorax(Use("p", "org/base", "org/p", 8), local=False).text
    True
    """
    source = "local" if local else "hub"
    request = {
        "inputs": use.prompt,
        "parameters": {
            "max_new_tokens": 64,
            "adapter_id": use.adapter,
            "adapter_source": source,
        },
    }
    text = f"""\
lorax-launcher --model-id {_path(use.base)}{use.revision_option} --port 8080

{_request("http://127.0.0.1:8080/generate", request)}"""
    return Snippet("lorax", "run_lorax.sh", "sh", text)


def llama_cpp(use: Use) -> Snippet:
    """Return command lines of the server, once with a scale, and of the command-line program.

    Examples
    --------
    >>> print(llama_cpp(Use("polite", "org/base", "A", 8)).text.splitlines()[0])
    llama-server -m model.gguf --lora lora.gguf
    """
    model, lora = _path(use.base_gguf), _path(use.gguf)
    # llama.cpp splits at both, and has no way to quote them.
    scalable = not set(use.gguf) & set(":,")
    scaled = f"llama-server -m {model} --lora-scaled {_path(f'{use.gguf}:0.5')}\n"
    text = f"""\
llama-server -m {model} --lora {lora}
{scaled if scalable else ""}llama-cli -m {model} --lora {lora} -p {shlex.quote(use.prompt)}
"""
    return Snippet("llama.cpp", "run_llama_cpp.sh", "sh", text)


def ollama(use: Use) -> Snippet:
    """Return a Modelfile; its paths are relative to where it lies.

    Examples
    --------
    >>> print(ollama(Use("polite", "org/base", "A", 8)).text, end="")
    # ollama create polite -f Modelfile && ollama run polite
    FROM ./model.gguf
    ADAPTER ./lora.gguf
    """
    text = f"""\
# ollama create {shlex.quote(use.name)} -f Modelfile && ollama run {shlex.quote(use.name)}
FROM {_file(use.base_gguf)}
ADAPTER {_file(use.gguf)}
"""
    return Snippet("ollama", "Modelfile", "text", text)


def mlx(use: Use) -> Snippet:
    """Return how to merge and run: mlx-lm reads no PEFT adapter, but any merged model.

    Examples
    --------
    >>> print(mlx(Use("polite", "org/base", "A", 8)).text.splitlines()[0])
    loraformat merge org/base A -o polite-merged
    """
    merged = _path(f"{use.name}-merged")
    text = f"""\
loraformat merge {_path(use.pinned_base)} {_path(use.adapter)} -o {merged}
mlx_lm.generate --model {merged} --prompt {shlex.quote(use.prompt)}
"""
    return Snippet("mlx", "run_mlx.sh", "sh", text)


#: By runtime, in the order in which they are shown.
SNIPPETS: dict[str, Callable[[Use], Snippet]] = {
    "transformers": transformers,
    "vllm": vllm,
    "sglang": sglang,
    "lorax": lorax,
    "llama.cpp": llama_cpp,
    "ollama": ollama,
    "mlx": mlx,
}


def snippet(runtime: str, use: Use) -> Snippet:
    """Return the text for a runtime, by its name in `SNIPPETS`."""
    return SNIPPETS[runtime](use)
