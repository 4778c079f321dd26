"""Detection of adapters in unsupported formats or wrong locations, with advice.

An adapter that loraformat reads is a directory with ``adapter_config.json`` as PEFT writes it, or
a GGUF file. Users have more: a file out of such a directory, the directory above it, and the files
of other programs, which only their tensors' names tell apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.tensors.mapped import MappedFile

__all__ = ["GATHER", "MLX_HINT", "adapters_below", "refuse_foreign_adapter"]

_CONFIG = "adapter_config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_MOST_LOOKED_AT = 8
_MOST_FOLDERS = 1000

#: The checkpoint's own script writes one file; names in it carry PEFT's adapter name, as read here.
_CONSOLIDATE = (
    "python zero_to_fp32.py CHECKPOINT OUT --safe_serialization --exclude_frozen_parameters (the "
    "script is in the checkpoint directory), then rename OUT/model.safetensors to "
    "adapter_model.safetensors and put the run's adapter_config.json beside it"
)

#: What fixes a file of empty tensors, or of none.
GATHER = (
    "gather and save again: with stage3_gather_16bit_weights_on_model_save (accelerate: "
    f"zero3_save_16bit_model) in the DeepSpeed config; or, out of a checkpoint: {_CONSOLIDATE}"
)
MLX_HINT = (
    "fuse it into a model, then extract an adapter from that: mlx_lm.fuse --model BASE "
    "--adapter-path ADAPTER --save-path FUSED --dequantize; loraformat extract BASE FUSED -o OUT "
    "--rank RANK (of its lora_parameters). If BASE is quantized, dequantize it first: "
    "mlx_lm.convert --hf-path BASE --mlx-path DENSE --dequantize; loraformat extract DENSE FUSED "
    "-o OUT --rank RANK"
)
_IMAGES = (
    "loraformat adapts language models of transformers: merge it where it was trained "
    "(fuse_lora() in diffusers, sd-scripts, ComfyUI)"
)
_TORCHTUNE_HINT = (
    "use the directory epoch_N of its FullModelHFCheckpointer, which also contains the PEFT form "
    "(adapter_config.json, adapter_model.safetensors); where it holds none (Phi) or a wrong one "
    "(q_proj and k_proj of Qwen 2), extract the adapter from the merged model there: loraformat "
    "extract BASE epoch_N -o OUT --rank RANK"
)
#: What names of tensors say, in this order: whose adapter it is, and what to do.
_KINDS = (
    (
        re.compile(r"^(lora_(unet|te\d?|transformer)_|lycoris_)|\.(lora_down|hada_w1_a|lokr_w1)\b"),
        "is an adapter in the form of kohya's sd-scripts",
        _IMAGES,
    ),
    (
        re.compile(
            r"^(unet|text_encoder(_2)?|transformer)\.(?!h\.).*lora|(_lora|\.processor)\.\w*\.?"
            r"(down|up)\.weight$|^(transformer|unet)\..*\.lora_[AB]\.weight$"
        ),
        "is an adapter in the form of diffusers",
        _IMAGES,
    ),
    (
        re.compile(r"^(decoder\.)?layers\.\d+\.(attn|mlp)\.\w+\.lora_[ab]\.weight$"),
        "is an adapter in the form of torchtune",
        _TORCHTUNE_HINT,
    ),
    (re.compile(r"\.lora_[ab]$"), "is an adapter in the form of mlx-lm", MLX_HINT),
)
_PEFT = re.compile(r"\.lora_([AB]|embedding_[AB]|magnitude_vector)\b")
_PEFT_FILE = re.compile(r"adapter_model(-\d+-of-\d+)?\.(safetensors|bin)|adapter_config\.json")
_TORCHTUNE_FILE = re.compile(r"adapter_(\d+\.(pt|bin|safetensors)|model\.pt)")


def refuse_foreign_adapter(path: Path, *, recognised: bool = False) -> None:
    """Refuse a path that is, or is next to, an adapter of another program.

    A `recognised` path looks like a model, so that adapters below it are its own. The
    `UnsupportedError` names what it is, or where the adapter lies, and what to do.
    """
    if path.is_file():
        _refuse_file(path)
    elif path.is_dir() and not (path / _CONFIG).is_file():
        if not (path / "config.json").is_file():
            for file in _weights(path):
                _refuse_file(file)
        if not recognised:
            _refuse_parent(path)


def adapters_below(path: Path) -> list[Path]:
    """Return the adapters in subdirectories, the latest last.

    A trainer writes them to ``checkpoint-N``, PEFT to one of the adapter's name, a bundle to
    ``adapters/NAME``.
    """
    if not path.is_dir():
        return []
    folders = [entry for entry in path.iterdir() if entry.is_dir()][:_MOST_FOLDERS]
    found = {entry for entry in folders if (entry / _CONFIG).is_file()}
    for holder in (entry for entry in folders if entry.name == "adapters"):
        found |= {inner for inner in holder.iterdir() if (inner / _CONFIG).is_file()}
    return sorted(found, key=_step)


def _refuse_file(path: Path) -> None:
    if _PEFT_FILE.fullmatch(path.name) and (path.parent / _CONFIG).is_file():
        raise UnsupportedError(
            "is a single file of an adapter; an adapter is a directory",
            path=path,
            hint=f"name that: {path.parent}",
        )
    names = _tensor_names(path)
    for pattern, problem, hint in _KINDS:
        if any(pattern.search(name) for name in names):
            raise UnsupportedError(problem, path=path, hint=hint)
    if _TORCHTUNE_FILE.fullmatch(path.name):
        raise UnsupportedError(
            "is an adapter in the form of torchtune", path=path, hint=_TORCHTUNE_HINT
        )
    if any(_PEFT.search(name) for name in names) or _PEFT_FILE.fullmatch(path.name):
        raise UnsupportedError(
            f"is one file of an adapter, but no {_CONFIG} is in its directory to describe its "
            "tensors",
            path=path,
            hint=f"add the {_CONFIG} saved with it, and give the directory that contains both",
        )


def _weights(folder: Path) -> list[Path]:
    files = (file for file in folder.iterdir() if file.suffix in _WEIGHTS and file.is_file())
    return sorted(files)[:_MOST_LOOKED_AT]


def _tensor_names(path: Path) -> list[str]:
    """Return the tensor names of a safetensors file; empty if it is unreadable."""
    if path.suffix != ".safetensors":
        return []
    try:
        with closing(MappedFile(SafeDirectory(path.parent), path.name)) as file:
            return list(file.header.entries)
    except InputError:
        return []


def _refuse_parent(path: Path) -> None:
    """Refuse a parent directory of adapters and name the latest one."""
    if below := adapters_below(path):
        names = _listed(str(one.relative_to(path)) for one in below)
        raise UnsupportedError(
            f"is a directory that contains adapters ({names})",
            path=path,
            hint=f"name one of them: {below[-1]}",
        )
    folders = [entry for entry in path.iterdir() if entry.is_dir()]
    sharded = [one for one in folders if re.fullmatch(r"global_step\d+", one.name)]
    if sharded and not any(path.glob("*.safetensors")):
        raise UnsupportedError(
            f"contains the shards of a DeepSpeed run ({printable(sharded[0].name)}) but no adapter",
            path=path,
            hint=f"consolidate them: {_CONSOLIDATE}",
        )


def _step(folder: Path) -> tuple[int, str]:
    number = re.search(r"-(\d{1,12})$", folder.name)
    return (int(number[1]) if number else -1, folder.name)


def _listed(names: Iterable[str]) -> str:
    names = [printable(name) for name in names]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, ..., {names[-1]}"
