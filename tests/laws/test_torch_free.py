"""A law of imports: only training, generating and evaluating need torch, which takes a second."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraformat.demo import ADAPTERS, SMALL_MODEL
from tests.conftest import environment
from tests.hub.fake_hub import TOKEN, Repository, files_of, serve

#: Command lines by group. Each group runs in one process and one directory, in this order; a
#: verb is added as one line.
COMMANDS = {
    "adapters": [
        "check manual --runtime transformers --base base",
        "check manual --fix -o fixed",
        "check fixed --write run",
        "info manual",
        "verify manual",
        "spectrum manual",
        "reduce manual -o reduced --rank 4 --base base",
        "combine manual tests -o combined --dtype bf16",
        "combine manual tests -o elected --method ties --rank 8",
        "combine manual tests -o dropped --method dare_linear --rank 8",
        "extract base tuned -o extracted --rank 4",
        "merge base manual tests -o merged --undo merged.lfu",
        "unmerge merged --undo merged.lfu -o restored",
        "unmerge merged --adapter manual --adapter tests -o subtracted",
        "merge base manual -o merged.gguf --dtype q8_0",
        "convert base bundle",
        "convert manual bundle/adapters/one",
        "convert tests bundle/adapters/other",
        "check bundle/adapters/one --runtime transformers",
        "reduce bundle/adapters/one -o bundle/adapters/reduced --rank 4",
        "merge bundle manual -o dense",
        "merge bundle manual tests -o separate --to loraformat",
        "merge bundle manual -o requantized --to loraformat --requantize",
        "combine bundle/adapters/one bundle/adapters/other -o bundle/adapters/combined",
        "extract bundle tuned -o bundle/adapters/extracted --rank 4",
        "info bundle",
        "verify bundle",
        "formats",
    ],
    "bases": [
        "convert base base.gguf --dtype q8_0",
        "info base.gguf",
        "convert base.gguf dense --to safetensors",
        "convert base bitsandbytes --to bitsandbytes",
        "convert bitsandbytes bundle",
        "convert bundle again --to safetensors",
    ],
    "gguf": [
        "convert manual manual.gguf --base base",
        "check manual.gguf --runtime llama.cpp",
        "spectrum manual.gguf",
        "info manual.gguf",
        "reduce manual.gguf -o reduced.gguf --rank 4 --base base",
        "combine manual.gguf tests -o combined --base base",
        "convert reduced.gguf reduced --base base",
        "merge base reduced.gguf -o merged",
        "merge base manual -o merged.gguf --dtype q4_0",
        "merge merged.gguf manual.gguf -o twice --to safetensors",
    ],
    "inputs": [
        "convert float8 plain --to safetensors",
        "convert float8 quantized",
        "convert mxfp4 experts --to safetensors",
        "convert mixture mixed",
        "verify mixed",
        "convert mixture mixed-plain --skip *.experts.*",
        "convert mixed mixed-dense --to safetensors",
        "convert compressed-tensors integers --to safetensors",
        "convert modelopt nvfp4 --to safetensors",
        "convert gptq from-gptq --to safetensors",
        "convert awq from-awq --to safetensors",
        "convert mlx from-mlx --to safetensors",
        "convert torchao from-torchao --to safetensors",
        "convert hqq from-hqq --to safetensors",
        "convert int8 from-int8 --to safetensors",
        "convert fp4 from-fp4 --to safetensors",
        "info float8 --tensors",
        "verify float8",
        "extract base plain -o extracted --rank 4",
    ],
    "hub": [
        "push manual me/new --base-model org/base",
        "pull me/new pulled",
    ],
}

#: Runs command lines until one fails or has imported what it should not.
_RUN = """
import json, shlex, sys
from loraformat.cli import main

for line in json.loads(sys.argv[1]):
    sys.argv = ["loraformat", *shlex.split(line)]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, f"{line}: exit {stop.code}"
    found = {"torch", "transformers", "peft"} & sys.modules.keys()
    assert not found, f"{line} imported {found}"
"""


@pytest.fixture
def models(tmp_path):
    """A base, a fine-tune of it and two adapters, side by side."""
    shutil.copytree(SMALL_MODEL, tmp_path / "base")
    for name in ("manual", "tests"):
        shutil.copytree(ADAPTERS[name], tmp_path / name)
    shutil.copytree(SMALL_MODEL, tmp_path / "tuned")
    weights = load_file(tmp_path / "tuned" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name] + 0.01
    save_file(weights, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    _quantized(tmp_path)
    return tmp_path


def _quantized(top):
    """The base in float8, blocks of MXFP4, and one weight of each other method."""
    shutil.copytree(SMALL_MODEL, top / "float8")
    weights = load_file(SMALL_MODEL / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        weights[name] = (weights[name] * 64).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = torch.full((), 1 / 64)
    save_file(weights, top / "float8" / "model.safetensors", {"format": "pt"})
    (top / "mxfp4").mkdir()
    (top / "mxfp4" / "config.json").write_text('{"model_type": "gpt_oss"}')
    parts = {"blocks": torch.ones(2, 4, 2, 16, dtype=torch.uint8),
             "scales": torch.ones(2, 4, 2, dtype=torch.uint8)}  # fmt: skip
    stored = {f"model.layers.0.mlp.experts.down_proj_{part}": parts[part] for part in parts}
    save_file(stored, top / "mxfp4" / "model.safetensors", {"format": "pt"})
    (top / "mixture").mkdir()
    (top / "mixture" / "config.json").write_text('{"model_type": "qwen3_moe", "num_experts": 2}')
    owners = [f"model.layers.0.mlp.experts.{n}.{leaf}_proj.weight"
              for n in range(2) for leaf in ("gate", "up", "down")]  # fmt: skip
    experts = {owner: torch.ones(64, 64, dtype=torch.bfloat16) for owner in owners}
    save_file(experts, top / "mixture" / "model.safetensors", {"format": "pt"})
    words, scales = torch.ones(64, 8, dtype=torch.int32), torch.ones(64, 2)
    state = b'{"quant_type": "fp4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 64]}'
    magnitudes = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
    methods = {
        "mlx": {"weight": words.view(torch.uint32), "scales": scales, "biases": scales},
        "torchao": {"_weight_qdata": words.view(torch.int8), "_weight_scale": scales},
        "hqq": {
            "W_q": words.view(torch.uint8), "scale": torch.ones(64, 1), "zero": torch.ones(64, 1),
            "shape": torch.tensor([64, 64]), "packing": torch.tensor(list(b"4bit_u8")).byte(),
            "axis": torch.tensor(1).int(), "group_size": torch.tensor(64).int(),
        },
        "int8": {"weight": words.view(torch.int8), "SCB": torch.ones(64)},
        "fp4": {
            "weight": words.view(torch.uint8).reshape(2048, 1), "weight.absmax": torch.ones(64),
            "weight.quant_map": torch.cat([magnitudes, -magnitudes]),
            "weight.quant_state.bitsandbytes__fp4": torch.tensor(list(state), dtype=torch.uint8),
        },
        "compressed-tensors": {
            "weight_packed": words, "weight_scale": scales, "weight_shape": torch.tensor([64, 64])
        },
        "gptq": {"qweight": words.T, "qzeros": words[:2], "scales": torch.ones(2, 64)},
        "awq": {"qweight": words, "qzeros": words[:2], "scales": torch.ones(2, 64)},
        "modelopt": {
            "weight": words.view(torch.uint8), "weight_scale": torch.ones(64, 4).to(
                torch.float8_e4m3fn), "weight_scale_2": torch.ones(()),
        },
    }  # fmt: skip
    for method, parts in methods.items():
        (top / method).mkdir()
        settings = '"model_type": "llama", "quantization": {"bits": 4, "group_size": 32}'
        (top / method / "config.json").write_text("{" + settings + "}")
        owner = "model.layers.0.mlp.up_proj"
        stored = {f"{owner}.{part}": parts[part].clone().contiguous() for part in parts}
        save_file(stored, top / method / "model.safetensors", {"format": "pt"})


@pytest.fixture
def hub():
    """A Hub on the loopback interface, with ``org/base``."""
    server, thread = serve()
    server.repositories["org/base"] = Repository(files_of(SMALL_MODEL))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("group", COMMANDS)
def test_no_command_imports_torch(group, models, hub):
    found = subprocess.run(
        [sys.executable, "-c", _RUN, json.dumps(COMMANDS[group])],
        cwd=models, capture_output=True, text=True, check=False,
        env={**environment(models), "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
