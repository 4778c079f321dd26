"""Reading a PEFT adapter: every tensor is understood, or refused by name."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from loraformat.adapter import Adapter, LoraDelta
from loraformat.architecture import is_conv1d
from loraformat.checkpoint import CarriedFile, Checkpoint, DenseTensor, tensor_view
from loraformat.config_json import parse
from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.folder import Folder
from loraformat.integrity import BASE_FINGERPRINT, BASE_SOURCE
from loraformat.mapped import MappedFile
from loraformat.plugins import AdapterReadOptions
from loraformat_converters.peft.config import CONFIG_NAME, LoraSettings, read_settings
from loraformat_converters.peft.keys import parse_key

__all__ = ["WEIGHTS_NAME", "read_adapter", "sniff"]

WEIGHTS_NAME = "adapter_model.safetensors"

_FLOATS = ("F64", "F32", "F16", "BF16")


def sniff(path: Path) -> bool:
    """Tell whether a directory holds an adapter config."""
    return path.is_dir() and (path / CONFIG_NAME).is_file()


@dataclass(slots=True)
class _Module:
    parts: dict[str, DenseTensor] = field(default_factory=dict)


def read_adapter(path: Path, options: AdapterReadOptions) -> Adapter:
    """Open a PEFT adapter; its factors are mapped, and checked for NaN when they are loaded.

    Parameters
    ----------
    path : Path
    options : AdapterReadOptions
        The shapes of its base decide the orientation (``Conv1D``), and its names the prefix.

    Raises
    ------
    InputError
        If a file is missing or damaged, a factor lacks its pair, or shapes do not fit.
    UnsupportedError
        If the adapter is more than a low-rank delta and replacements.
    """
    base = options.base
    folder = Folder(path)
    settings = read_settings(folder)
    if not folder.has(WEIGHTS_NAME):
        problem = f"holds no {WEIGHTS_NAME}"
        hint = "save it again with safe_serialization=True; pickles (.bin) are not read"
        raise InputError(problem, path=path, hint=hint)
    with contextlib.ExitStack() as opened:
        file = MappedFile(folder, WEIGHTS_NAME)
        opened.callback(file.close)
        modules, replacements = _sort(file)
        if not modules and not replacements:
            raise InputError("holds no LoRA factors", path=file.path)
        deltas = {}
        for name, module in modules.items():
            delta = _delta(name, module, settings, base, file.path)
            deltas[delta.target] = delta
        return Adapter(
            path=path,
            format="peft",
            deltas=deltas,
            replacements={
                _in_base(name, base): replace(tensor, name=_in_base(name, base))
                for name, tensor in replacements.items()
            },
            config=settings.config,
            base_model=_text(settings.config.get("base_model_name_or_path")),
            base_fingerprint=file.header.metadata.get(BASE_FINGERPRINT),
            base_source=file.header.metadata.get(BASE_SOURCE),
            files=_files(folder),
            verbatim=True,
            sources=tuple(folder.path / name for name in folder.names()),
            close=opened.pop_all().close,
        )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _files(folder: Folder) -> tuple[CarriedFile, ...]:
    sizes = {name: folder.size(name) for name in folder.names()}
    return tuple(CarriedFile(n, s, partial(folder.read, n, s)) for n, s in sizes.items())


def _sort(file: MappedFile) -> tuple[dict[str, _Module], dict[str, DenseTensor]]:
    modules: dict[str, _Module] = {}
    replacements: dict[str, DenseTensor] = {}
    for name, entry in file.header.entries.items():
        owner, part = parse_key(name)
        if part == "unknown" or entry.dtype not in _FLOATS:
            raise UnsupportedError(
                f"tensor {printable(name)} of type {entry.dtype} is no part of a LoRA adapter",
                path=file.path,
                hint="its method cannot be read as a low-rank delta; merge it with PEFT",
            )
        load = partial(_load_finite, file, name, entry.dtype)
        tensor = DenseTensor(owner, entry.dtype, entry.shape, load, file.releaser(name))
        parts = replacements if part == "" else modules.setdefault(owner, _Module()).parts
        key = owner if part == "" else part
        if key in parts:
            raise InputError(f"tensor {printable(name)} stands there twice", path=file.path)
        parts[key] = tensor
    return modules, replacements


def _load_finite(file: MappedFile, name: str, dtype: str) -> memoryview:
    data = file.view(name)
    if not bool(tensor_view(data, dtype).isfinite().all()):
        raise InputError(f"tensor {printable(name)} holds NaN or infinity", path=file.path)
    return data


def _delta(
    name: str, module: _Module, settings: LoraSettings, base: Checkpoint | None, path: Path
) -> LoraDelta:
    parts = module.parts
    prefix = "embedding_" if "embedding_A" in parts or "embedding_B" in parts else ""
    a, b = parts.get(prefix + "A"), parts.get(prefix + "B")
    if a is None or b is None:
        lacks = "lora_B" if a else "lora_A"
        raise InputError(f"module {printable(name)} has no {prefix}{lacks}", path=path)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise InputError(
            f"module {printable(name)}: A {list(a.shape)} and B {list(b.shape)} do not fit, "
            "wanted (rank, in) and (out, rank)",
            path=path,
            hint="convolutions and experts cannot be read yet" if len(a.shape) > 2 else None,
        )
    target = _in_base(name + ".weight", base)
    transposed = bool(prefix) or _is_transposed(target, a, b, settings, base, path)
    rank = a.shape[0]
    return LoraDelta(
        target=target,
        a=a,
        b=b,
        scaling=settings.scaling(name, rank),
        orientation="transposed" if transposed else "linear",
        magnitude=parts.get("magnitude"),
        bias=parts.get("bias"),
        alpha=settings.alpha(name),
    )


def _is_transposed(
    target: str,
    a: DenseTensor,
    b: DenseTensor,
    settings: LoraSettings,
    base: Checkpoint | None,
    path: Path,
) -> bool:
    """Tell whether the base holds (in, out); its shapes are believed before the config's flag."""
    linear = (b.shape[0], a.shape[1])
    stored = base.tensors.get(target) if base is not None else None
    if stored is None:
        return settings.conv1d
    if stored.shape not in (linear, linear[::-1]):
        raise InputError(
            f"module {printable(target)}: the delta is {list(linear)}, the base's weight is "
            f"{list(stored.shape)}",
            path=path,
            hint="the adapter was made for another base",
        )
    if linear[0] != linear[1]:
        return stored.shape != linear
    config = parse(base.config) if base is not None and base.config else {}
    return settings.conv1d or is_conv1d(target, config.get("model_type"))


def _in_base(name: str, base: Checkpoint | None) -> str:
    """Return the base's name of a tensor: the same, or the only one that ends alike."""
    if base is None or name in base.tensors:
        return name
    tail = name.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")
    alike = [known for known in base.tensors if known == tail or known.endswith("." + tail)]
    return alike[0] if len(alike) == 1 else name
