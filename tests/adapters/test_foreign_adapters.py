"""Adapters of other programs, single files, and directories above an adapter: the error says which.

Files are made by hand, with the names that each program gives its tensors; of mlx-lm's the way
that the message shows is followed with its formula.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraformat.errors import InputError, LoraFormatError, UnsupportedError
from loraformat.ops.check.check import check
from loraformat.ops.convert.convert import convert
from loraformat.ops.info.model import info
from loraformat.ops.opening.adapter import open_adapter
from loraformat.ops.opening.model import open_model
from loraformat.plugins import sniff

A, B = torch.ones(4, 8), torch.ones(8, 4)
#: File, tensors, and words of the message.
FOREIGN = {
    "kohya": (
        "style.safetensors",
        {"lora_unet_down_blocks_0_attn.lora_down.weight": A,
         "lora_unet_down_blocks_0_attn.lora_up.weight": B,
         "lora_unet_down_blocks_0_attn.alpha": torch.tensor(4.0)},
        ["kohya", "sd-scripts"],
    ),
    "diffusers": (
        "pytorch_lora_weights.safetensors",
        {"unet.down_blocks.0.attn1.to_q.lora_A.weight": A,
         "unet.down_blocks.0.attn1.to_q.lora_B.weight": B},
        ["diffusers", "fuse_lora()"],
    ),
    "flux": (
        "pytorch_lora_weights.safetensors",
        {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": A,
         "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": B},
        ["diffusers"],
    ),
    "torchtune": (
        "adapter_0.safetensors",
        {"layers.0.attn.q_proj.lora_a.weight": A, "layers.0.attn.q_proj.lora_b.weight": B},
        ["torchtune", "FullModelHFCheckpointer", "loraformat extract BASE epoch_N"],
    ),
    "mlx": (
        "adapters.safetensors",
        {"model.layers.0.self_attn.q_proj.lora_a": A.T.contiguous(),
         "model.layers.0.self_attn.q_proj.lora_b": B.T.contiguous()},
        ["mlx-lm", "mlx_lm.fuse", "loraformat extract BASE FUSED", "mlx_lm.convert"],
    ),
}  # fmt: skip


def message(function, *arguments) -> str:
    with pytest.raises(UnsupportedError) as raised:
        function(*arguments)
    return str(raised.value)


@pytest.fixture
def peft_files(tmp_path) -> Path:
    """An adapter of one module as PEFT writes it."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("program", FOREIGN)
@pytest.mark.parametrize("whole", [False, True], ids=["file", "directory"])
def test_other_programs(program, whole, tmp_path):
    name, tensors, words = FOREIGN[program]
    folder = tmp_path / "given"
    folder.mkdir()
    save_file(tensors, folder / name)
    given = folder if whole else folder / name
    for verb in (open_adapter, info, check, sniff):
        said = message(verb, given)
        assert all(word in said for word in words), said
    said = message(convert, given, tmp_path / "out")
    assert words[0] in said
    assert not (tmp_path / "out").exists()


def test_mlx_with_its_config(tmp_path):
    save_file(FOREIGN["mlx"][1], tmp_path / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 20.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert "mlx_lm.fuse" in message(open_adapter, tmp_path)
    (finding,) = check(tmp_path, runtime=["vllm"]).findings
    assert (finding.rule, finding.level) == ("METHOD", "fail")
    assert "mlx-lm" in finding.what


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_one_file_of_an_adapter(peft_files, name):
    said = message(open_adapter, peft_files / name)
    assert f"name that: {peft_files}" in said
    assert open_adapter(peft_files).deltas


def test_a_pickle_of_an_adapter(peft_files):
    pickle = peft_files / "adapter_model.bin"
    pickle.write_bytes(b"PK")
    assert f"name that: {peft_files}" in message(open_adapter, pickle)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "renamed.safetensors"])
def test_weights_without_their_config(peft_files, name):
    (peft_files / "adapter_config.json").unlink()
    (peft_files / "adapter_model.safetensors").rename(peft_files / name)
    for given in (peft_files, peft_files / name):
        assert "no adapter_config.json is in its directory" in message(open_adapter, given)


@pytest.mark.parametrize(
    ("folders", "last"),
    [
        (["checkpoint-90", "checkpoint-500"], "checkpoint-500"),
        (["polite"], "polite"),
        (["adapters/x", "adapters/y"], "adapters/y"),
    ],
)
def test_a_directory_above(peft_files, tmp_path, folders, last):
    above = tmp_path / "run"
    for folder in folders:
        shutil.copytree(peft_files, above / folder)
    (above / "trainer_state.json").write_text("{}")
    for verb in (open_adapter, info, check):
        said = message(verb, above)
        assert f"name one of them: {above / last}" in said
        assert all(folder in said for folder in folders)
    assert open_adapter(above / last).deltas


def test_a_directory_of_a_model_above(peft_files, tmp_path):
    above = tmp_path / "run"
    shutil.copytree(peft_files, above / "checkpoint-7")
    save_file({"model.norm.weight": torch.ones(8)}, above / "model.safetensors")
    (above / "config.json").write_text('{"model_type": "llama"}')
    assert f"an adapter of it is {above / 'checkpoint-7'}" in message(open_adapter, above)
    assert info(above).kind == "base"


def test_shards_of_deepspeed(tmp_path):
    (tmp_path / "global_step100").mkdir()
    assert "python zero_to_fp32.py CHECKPOINT OUT" in message(open_adapter, tmp_path)


def test_a_sharded_training_that_saved_no_tensor(peft_files):
    save_file({}, peft_files / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"holds no LoRA factors.*python zero_to_fp32\.py"):
        open_adapter(peft_files)
    (finding,) = (
        one for one in check(peft_files, runtime=["vllm"]).findings if one.rule == "NO_TENSORS"
    )
    assert "python zero_to_fp32.py" in finding.remedy


def test_what_torchtune_writes(peft_files, tmp_path):
    """The files of its epoch_N: PEFT's form, its own, and the merged model; see tests/real, too."""
    (peft_files / "adapter_model.pt").write_bytes(b"PK")
    assert "use the directory epoch_N" in message(open_adapter, peft_files / "adapter_model.pt")
    (note,) = open_adapter(peft_files).notes
    assert "q_proj and k_proj of Qwen 2" in note
    llama = tmp_path / "llama"
    llama.mkdir()
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({name: torch.ones(8, 8)}, llama / "model.safetensors")
    (llama / "config.json").write_text('{"model_type": "llama"}')
    with open_model(llama) as base, open_adapter(peft_files, base=base) as adapter:
        assert not any("Qwen" in note for note in adapter.notes)


def test_a_model_and_an_adapter_in_one_directory(peft_files, tmp_path):
    save_file({"model.norm.weight": torch.ones(8)}, peft_files / "model.safetensors")
    (peft_files / "config.json").write_text('{"model_type": "llama"}')
    assert "move the adapter's files" in message(info, peft_files)
    (tmp_path / "own").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (peft_files / name).rename(tmp_path / "own" / name)
    assert info(peft_files).kind == "base"
    assert open_adapter(tmp_path / "own").deltas


@pytest.mark.parametrize(
    "name", ["non_lora_trainables.bin", "mm_projector.pt", "model.safetensors", "sub/head.pth"]
)
def test_other_weights_beside_it_are_named(peft_files, name):
    (peft_files / name).parent.mkdir(exist_ok=True)
    (peft_files / name).write_bytes(b"PK")
    (note,) = open_adapter(peft_files).notes
    assert note.startswith(f"{name} is in the same directory and was not read")


def test_states_of_a_training_are_no_weights(peft_files):
    for name in ("optimizer.pt", "rng_state_0.pth", "training_args.bin", "scheduler.pt"):
        (peft_files / name).write_bytes(b"PK")
    (peft_files / "global_step7").mkdir()
    (peft_files / "global_step7" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"PK")
    assert not open_adapter(peft_files).notes


def test_a_damaged_file_is_called_damaged(tmp_path):
    (tmp_path / "adapters.safetensors").write_bytes(b"\x08" + b"\x00" * 7 + b"{broken}")
    with pytest.raises(LoraFormatError) as raised:
        open_adapter(tmp_path / "adapters.safetensors")
    assert "mlx" not in str(raised.value)
