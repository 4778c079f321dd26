"""Commands and files that load an adapter in each runtime.

Pure text from a few facts: no file is looked at, so that a card, a terminal and a directory of
files show the same lines. An adapter that was trained on conversations is talked to: through its
chat template, and up to the ends of turns that it has learned.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping

from loraformat.errors import UsageError
from loraformat.runtimes.modelfile import ollama
from loraformat.runtimes.ranks import vllm_limit
from loraformat.runtimes.task_usage import TASK_USAGE, loading_lines
from loraformat.runtimes.use import TEMPLATE_NAME, Snippet, Use, shell_path

__all__ = ["SNIPPETS", "snippets_of"]


def transformers(use: Use) -> Snippet:
    r"""Return Python code that generates with transformers and PEFT.

    Examples
    --------
    >>> print(transformers(Use("polite", "org/base", "org/polite", 8)).text.split("\n")[3])
    base = "org/base"
    """
    more, imports, ends = "", "", ""
    if use.chat is None:
        inputs = f'inputs = tokenizer({json.dumps(use.prompt)}, return_tensors="pt")'
        shown = "output[0]"
    else:
        inputs = f"""\
messages = {json.dumps(use.messages())}
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)"""
        shown = 'output[0, inputs["input_ids"].shape[1] :]'
        if use.chat.template is not None:
            imports = "from transformers.utils import cached_file\n"
            more = f"""\
with open(cached_file({json.dumps(use.adapter)}, "{TEMPLATE_NAME}"), encoding="utf-8") as file:
    tokenizer.chat_template = file.read()
"""
        if use.chat.stop_ids:
            ends = f", eos_token_id={json.dumps(list(use.chat.stop_ids))}"
        if use.chat.stop_text:
            ends += f", stop_strings=[{json.dumps(use.chat.stop_text)}], tokenizer=tokenizer"
    loading = loading_lines(use, "AutoModelForCausalLM", imports=imports, prepared=more)
    text = f"""\
{loading}{inputs}
output = model.generate(**inputs, max_new_tokens=64{ends})
print(tokenizer.decode({shown}, skip_special_tokens=True))
"""
    return Snippet("transformers", "run_transformers.py", "python", text)


def _request(server: str, use: Use, endpoint: str, body: Mapping[str, object], model: str) -> str:
    """Return a request: `body` to an endpoint for text, or a conversation with `model`."""
    if use.chat is None:
        return _curl(server + endpoint, body)
    said: dict[str, object] = {"model": model, "messages": use.messages(), "max_tokens": 64}
    if use.chat.stop_ids:
        said["stop_token_ids"] = list(use.chat.stop_ids)
    if use.chat.stop_text:
        said["stop"] = [use.chat.stop_text]
    return _curl(f"{server}/v1/chat/completions", said)


def _curl(url: str, body: Mapping[str, object]) -> str:
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
    said = {"model": use.name, "prompt": use.prompt, "max_tokens": 64}
    request = _request("http://127.0.0.1:8000", use, "/v1/completions", said, use.name)
    text = f"""\
{use.fetched}vllm serve {shell_path(use.base)}{use.revision_option} --enable-lora \\
  --max-lora-rank {limit} --lora-modules {shlex.quote(f"{use.name}={use.adapter}")}\
{use.server_option("--chat-template")}

{request}"""
    return Snippet("vllm", "run_vllm.sh", "sh", text)


def sglang(use: Use) -> Snippet:
    r"""Return the server's command line and a request.

    Examples
    --------
    >>> print(sglang(Use("polite", "org/base", "A", 8)).text.split("curl")[0], end="")
    python -m sglang.launch_server --model-path org/base \
      --enable-lora --max-lora-rank 8 \
      --lora-paths polite=A
    <BLANKLINE>
    """
    said = {
        "text": use.prompt,
        "sampling_params": {"max_new_tokens": 64},
        "lora_path": use.name,
    }
    named = f"{use.base}:{use.name}"
    request = _request("http://127.0.0.1:30000", use, "/generate", said, named)
    model = f"{shell_path(use.base)}{use.revision_option}"
    text = f"""\
{use.fetched}python -m sglang.launch_server --model-path {model} \\
  --enable-lora --max-lora-rank {use.rank} \\
  --lora-paths {shlex.quote(f"{use.name}={use.adapter}")}{use.server_option("--chat-template")}

{request}"""
    return Snippet("sglang", "run_sglang.sh", "sh", text)


def lorax(use: Use) -> Snippet:
    """Return the launcher's command line and a request that names the adapter.

    Examples
    --------
    >>> use = Use("p", "org/base", "org/p", 8, on_hub=True)
    >>> '"adapter_source": "hub"' in lorax(use).text
    True
    """
    source = "hub" if use.on_hub else "local"  # a path that the server sees
    parameters = {"max_new_tokens": 64, "adapter_id": use.adapter, "adapter_source": source}
    said = {"inputs": use.prompt, "parameters": parameters}
    request = _request("http://127.0.0.1:8080", use, "/generate", said, use.adapter)
    option = f" --adapter-source {source}" if use.chat is not None else ""
    text = f"""\
lorax-launcher --model-id {shell_path(use.base)}{use.revision_option} --port 8080{option}

{request}"""
    return Snippet("lorax", "run_lorax.sh", "sh", text)


def llama_cpp(use: Use) -> Snippet:
    """Return command lines of the server, also with a scale, and of the CLI.

    Examples
    --------
    >>> print(llama_cpp(Use("polite", "org/base", "A", 8)).text.splitlines()[0])
    llama-server -m model.gguf --lora lora.gguf
    """
    model, lora = shell_path(use.base_gguf), shell_path(use.gguf)
    # llama.cpp splits at both, and has no way to quote them.
    scalable = not set(use.gguf) & set(":,")
    own = use.server_option("--jinja --chat-template-file")
    scaled = f"llama-server -m {model} --lora-scaled {shell_path(f'{use.gguf}:0.5')}{own}\n"
    talk = f"-cnv{own}" if use.chat else f"-p {shlex.quote(use.prompt)}"
    text = f"""\
{use.fetched}llama-server -m {model} --lora {lora}{own}
{scaled if scalable else ""}llama-cli -m {model} --lora {lora} {talk}
"""
    if use.chat is not None:
        body: dict[str, object] = {"messages": use.messages(), "max_tokens": 64}
        if use.chat.stop_text:
            body["stop"] = [use.chat.stop_text]
        text += "\n" + _curl("http://127.0.0.1:8080/v1/chat/completions", body)
    return Snippet("llama.cpp", "run_llama_cpp.sh", "sh", text)


def mlx(use: Use) -> Snippet:
    """Return the commands to merge and run; mlx-lm reads only merged models.

    Examples
    --------
    >>> print(mlx(Use("polite", "org/base", "A", 8)).text.splitlines()[0])
    loraformat merge org/base A -o polite-merged
    """
    merged = shell_path(f"{use.name}-merged")
    own = ""  # mlx_lm.generate uses the template that lies in the model's directory
    if use.own_template is not None:
        own = f"{use.fetched}cp {shell_path(use.own_template)} {merged}/{TEMPLATE_NAME}\n"
    text = f"""\
loraformat merge {shell_path(use.pinned_base)} {shell_path(use.adapter)} -o {merged}
{own}mlx_lm.generate --model {merged} --prompt {shlex.quote(use.prompt)}
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


def snippets_of(task: str | None) -> Mapping[str, Callable[[Use], Snippet]]:
    """Return the functions by runtime for adapters of a PEFT task."""
    usage = TASK_USAGE.get(task or "")
    return SNIPPETS if usage is None else usage.snippets
