"""Messages about files of mlx-lm, torchtune and DeepSpeed are followed with those programs.

Each command is taken out of the message, run with paths in the place of its capitals, and must end
in an adapter that does what the program's own model does.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import loraformat.demo
from loraformat.errors import LoraFormatError
from loraformat.ops.convert.convert import convert
from loraformat.ops.extract.extract import extract
from loraformat.ops.merge.merge import merge
from loraformat.ops.opening.adapter import open_adapter
from tests.real.peers import commands, follow, peer_module, start

pytestmark = pytest.mark.real

IDS = torch.arange(20)[None]
PROGRAMS = Path(__file__).parent
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 2048, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny Llama in float32, with the demo's tokenizer."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(path)
    for file in (Path(loraformat.demo.__file__).parent / "small_model").glob("tokenizer*"):
        shutil.copy(file, path)
    return path


def hint_of(path):
    with pytest.raises(LoraFormatError) as refused:
        open_adapter(path)
    return refused.value.hint


def logits(path, adapter=None):
    model = LlamaForCausalLM.from_pretrained(path)
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("bits", [None, 4], ids=["dense", "4 bits"])
def test_mlx(bits, base, tmp_path):
    model, adapter = base, tmp_path / "adapter"
    if bits:
        model = tmp_path / "quantized"
        quantize = ["-q", "--q-bits", str(bits), "--q-group-size", "32"]
        start("-m", "mlx_lm", "convert", "--hf-path", base, "--mlx-path", model, *quantize)
    (tmp_path / "data").mkdir()
    rows = "".join(f'{{"text": "a song of the sea, number {n}"}}\n' for n in range(8))
    for name in ("train", "valid"):
        (tmp_path / "data" / f"{name}.jsonl").write_text(rows)
    start(
        "-m", "mlx_lm", "lora", "--train", "--model", model, "--data", tmp_path / "data",
        "--adapter-path", adapter, "--iters", "8", "--batch-size", "2", "--num-layers", "1",
        "--learning-rate", "1e-3",
    )  # fmt: skip
    rank = json.loads((adapter / "adapter_config.json").read_text())["lora_parameters"]["rank"]
    fuse, plain, dequantize, dense = commands(hint_of(adapter))
    given = {
        "BASE": model, "ADAPTER": adapter, "FUSED": tmp_path / "fused", "DENSE": tmp_path / "dense",
        "OUT": tmp_path / "found", "RANK": str(rank),
    }  # fmt: skip
    for command in (fuse, dequantize, dense) if bits else (fuse, plain):
        follow(command, **given)
    wanted, without = tmp_path / "wanted.npy", tmp_path / "without.npy"
    start(PROGRAMS / "mlx_logits.py", model, adapter, wanted)
    start(PROGRAMS / "mlx_logits.py", model, "", without)
    wanted, without = (torch.from_numpy(numpy.load(file)) for file in (wanted, without))
    found = logits(given["DENSE"] if bits else model, given["OUT"])
    assert (wanted - without).norm() > 0.01 * without.norm()
    assert (found - wanted).norm() < 0.01 * (wanted - without).norm()


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(stage, base, tmp_path):
    checkpoint, saved, made = (tmp_path / name for name in ("checkpoint", "saved", "made"))
    program, meeting = PROGRAMS / "zero_checkpoint.py", tmp_path / "meeting"
    start(program, base, str(stage), checkpoint, saved, meeting, times=2)
    hint = hint_of(checkpoint)
    (consolidate,) = commands(hint)
    here = {"zero_to_fp32.py": checkpoint / "zero_to_fp32.py"}
    follow(consolidate, CHECKPOINT=checkpoint, OUT=made, **here)
    assert "rename OUT/model.safetensors to adapter_model.safetensors" in hint
    (made / "model.safetensors").rename(made / "adapter_model.safetensors")
    assert "put the run's adapter_config.json beside it" in hint
    shutil.copy(saved / "adapter_config.json", made)
    merge(base, [made], tmp_path / "merged")
    convert(made, tmp_path / "written")  # with the names under which PEFT looks
    wanted = logits(base, saved)
    torch.testing.assert_close(logits(tmp_path / "merged"), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(base, tmp_path / "written"), wanted, atol=1e-5, rtol=0)


def torchtune_checkpoint(folder, kind, model_type):
    """Write what `FullModelHFCheckpointer` writes of a LoRA; return the merged weights, too.

    The functions that bring names and rows from torchtune's form to that of transformers are
    torchtune's own; the files have the names that the checkpointer gives them.
    """
    general = peer_module("torchtune.models.convert_weights")
    to_hf = general.tune_to_hf
    if kind is Qwen2ForCausalLM:
        to_hf = peer_module("torchtune.models.qwen2._convert_weights").qwen2_tune_to_hf
    heads = {"num_heads": 4, "num_kv_heads": 2, "dim": 64}
    torch.manual_seed(1)
    factors = {}
    for module, rows, columns in (("attn.q_proj", 64, 64), ("mlp.w2", 64, 96)):
        stem = f"layers.1.{module}"
        factors[f"{stem}.lora_a.weight"] = 0.2 * torch.randn(4, columns)
        factors[f"{stem}.lora_b.weight"] = 0.2 * torch.randn(rows, 4)
    model = folder / "base"
    kind(model_type(**SIZES)).save_pretrained(model)
    stored = load_file(model / "model.safetensors")
    names = {"attn.q_proj": "self_attn.q_proj", "mlp.w2": "mlp.down_proj"}
    merged = dict(stored)
    for module, name in names.items():
        a, b = (factors[f"layers.1.{module}.lora_{x}.weight"] for x in "ab")
        change = to_hf({f"layers.1.{module}.weight": 2 * b @ a}, **heads)
        merged[f"model.layers.1.{name}.weight"] += change[f"model.layers.1.{name}.weight"]
    epoch = folder / "epoch_0"
    epoch.mkdir()
    shutil.copy(model / "config.json", epoch)
    save_file(merged, epoch / "model-00001-of-00001.safetensors", {"format": "pt"})
    torch.save(factors, epoch / "adapter_model.pt")
    converted = general.tune_to_peft_adapter_weights(factors, **heads)
    save_file(converted, epoch / "adapter_model.safetensors", {"format": "pt"})
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "w2"], "peft_type": "LORA"}
    config = general.tune_to_peft_adapter_config(config)
    (epoch / "adapter_config.json").write_text(json.dumps(config))
    return model, epoch, merged


def test_torchtune(tmp_path):
    base, epoch, wanted = torchtune_checkpoint(tmp_path, LlamaForCausalLM, LlamaConfig)
    assert "use the directory epoch_N" in hint_of(epoch / "adapter_model.pt")
    merge(base, [epoch], tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)


def test_torchtune_writes_qwen2_wrongly(tmp_path):
    base, epoch, wanted = torchtune_checkpoint(tmp_path, Qwen2ForCausalLM, Qwen2Config)
    merge(base, [epoch], tmp_path / "wrong")
    found = load_file(tmp_path / "wrong" / "model.safetensors")
    query, down = (f"model.layers.1.{x}.weight" for x in ("self_attn.q_proj", "mlp.down_proj"))
    torch.testing.assert_close(found[down], wanted[down], atol=1e-6, rtol=0)
    assert (found[query] - wanted[query]).abs().max() > 0.1
    (command,) = commands(hint_of(epoch / "adapter_model.pt"))
    assert command == ["loraformat", "extract", "BASE", "epoch_N", "-o", "OUT", "--rank", "RANK"]
    extract(base, epoch, tmp_path / "found", rank=4)
    merge(base, [tmp_path / "found"], tmp_path / "right")
    found = load_file(tmp_path / "right" / "model.safetensors")
    torch.testing.assert_close(found[query], wanted[query], atol=1e-4, rtol=0)
