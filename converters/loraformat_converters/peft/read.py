"""Reading a PEFT adapter."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from pathlib import Path

from loraformat.bundle.integrity import BASE_FINGERPRINT, BASE_SOURCE
from loraformat.errors import InputError, UnsupportedError, nearest, printable
from loraformat.model.adapter import STATISTICS_NAME, Adapter, LoraDelta
from loraformat.model.architecture import is_conv1d
from loraformat.model.base_names import names_of
from loraformat.model.checkpoint import CarriedFile, Checkpoint, DenseTensor
from loraformat.model.expert_layouts import is_named_stack, needs_fusing, with_fused_experts
from loraformat.model.foreign_adapters import GATHER
from loraformat.model.tied_head import config_of
from loraformat.model.vocabulary import per_token
from loraformat.plugins import AdapterReadOptions
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.tensors.mapped import MappedFile
from loraformat_converters.peft.config import CONFIG_NAME, LoraSettings, read_config, text
from loraformat_converters.peft.experts import ExpertReader
from loraformat_converters.peft.keys import adapter_in, is_usual, parse_key
from loraformat_converters.peft.moments import read_moments
from loraformat_converters.peft.refusals import refuse_by_name, unknown_fields
from loraformat_converters.peft.rows import read_rows
from loraformat_converters.peft.weights import StoredTensors, open_tensors, other_weights

__all__ = ["read", "sniff"]


def sniff(path: Path) -> bool:
    """Tell whether a directory holds an adapter config."""
    return path.is_dir() and (path / CONFIG_NAME).is_file()


def read(path: Path, options: AdapterReadOptions) -> Adapter:
    """Open a PEFT adapter; its factors are mapped, and checked for NaN when they are loaded.

    The shapes of its base decide the orientation (``Conv1D``, experts), its names the prefix. An
    adapter that is more than a low-rank delta and replacements is refused.
    """
    folder = SafeDirectory(path)
    config, place = read_config(folder), folder.path / CONFIG_NAME
    refuse_by_name(config, place, conditional=options.conditional)
    notes = unknown_fields(config, place)
    settings = LoraSettings(config, place)
    with contextlib.ExitStack() as opened:
        stored = open_tensors(folder, allow_pickle=options.allow_pickle)
        opened.callback(stored.close)
        reader = _Reader(settings, stored, options.base)
        by_module = reader.deltas()
        if folder.has(STATISTICS_NAME):
            file = MappedFile(folder, STATISTICS_NAME)
            opened.callback(file.close)
            for module, moment in read_moments(file, by_module).items():
                by_module[module] = replace(by_module[module], second_moment=moment)
        adapter = Adapter(
            path=path,
            format="peft",
            deltas={delta.target: delta for delta in by_module.values()},
            replacements=reader.replacements(),
            rows=read_rows(reader.tokens, config, stored.path, reader.in_base),
            invocation_tokens=settings.invocation_tokens,
            spellings=reader.spellings,
            config=config,
            base_model=text(config.get("base_model_name_or_path")),
            base_fingerprint=stored.metadata.get(BASE_FINGERPRINT),
            base_source=stored.metadata.get(BASE_SOURCE),
            files=_files(folder),
            verbatim=stored.verbatim and reader.usual,
            sources=tuple(folder.path / name for name in folder.names()),
            notes=(*notes, *settings.notes, *_beside(folder), *_by_torchtune(folder, options.base)),
        )
        adapter = _with_known_experts(adapter, options)
        reader.check(adapter)
        adapter.close = opened.pop_all().close
    return adapter


def _with_known_experts(adapter: Adapter, options: AdapterReadOptions) -> Adapter:
    """Return an adapter whose deltas of experts are those of weights that its base has."""
    stacks = [name for name, delta in adapter.deltas.items() if is_named_stack(delta)]
    if options.base is not None and needs_fusing(adapter, options.base):
        return replace(
            with_fused_experts(adapter, options.base), verbatim=adapter.verbatim and not stacks
        )
    if not stacks or options.inspect:
        return adapter
    raise UnsupportedError(
        f"{printable(stacks[0])} is of all experts at once, and only the base says which rows of "
        "which parameter it changes",
        path=adapter.path,
        hint="name the base with --base",
    )


def _beside(folder: SafeDirectory) -> list[str]:
    return [
        f"{printable(name)} is in the same directory and was not read; if it was trained with the "
        "adapter (a projector, a head), load it with the program that wrote it"
        for name in other_weights(folder.names())
    ]


def _by_torchtune(folder: SafeDirectory, base: Checkpoint | None) -> list[str]:
    """Return the error of torchtune 0.6.1 in an adapter that it wrote; None otherwise."""
    config = config_of(base) if base is not None else {}
    if not folder.has("adapter_model.pt") or config.get("model_type", "qwen2") != "qwen2":
        return []
    return [
        "torchtune wrote it, which writes the rows of q_proj and k_proj of Qwen 2 models in the "
        "wrong order in this form; if this is one, extract it from the merged model in the same "
        f"directory: loraformat extract BASE {printable(str(folder.path))} -o OUT"
    ]


def _files(folder: SafeDirectory) -> tuple[CarriedFile, ...]:
    sizes = {name: folder.size(name) for name in folder.names()}
    return tuple(CarriedFile(n, s, partial(folder.read, n, s)) for n, s in sizes.items())


def _is_wrapped(tensor: DenseTensor) -> bool:
    return ".modules_to_save." in tensor.name


def _is_copy(one: DenseTensor, other: DenseTensor) -> bool:
    """Tell whether two tensors are the copies that PEFT writes under two names."""
    return one.shape == other.shape and _is_wrapped(one) != _is_wrapped(other)


class _Reader:
    """Reader that groups stored tensors by module into deltas."""

    def __init__(
        self, settings: LoraSettings, stored: StoredTensors, base: Checkpoint | None
    ) -> None:
        self._settings, self._base, self._path = settings, base, stored.path
        self._names = None if base is None else names_of(base)
        self._per_token = {} if base is None else per_token(base.tensors)
        # By module, by depth (of a wrapped one), and by name of the part.
        self._modules: dict[str, dict[int, dict[str, DenseTensor]]] = {}
        self._replaced: dict[str, DenseTensor] = {}
        self._untrained: dict[str, str] = {}
        self.tokens: dict[str, DenseTensor] = {}
        self.spellings: dict[str, str] = {}
        self._refuse_empty(stored)
        self._adapter = adapter_in(stored.tensors)
        self.usual = all(is_usual(name, self._adapter) for name in stored.tensors)
        for name, tensor in stored.tensors.items():
            self._sort(name, tensor)
        self._check_trained()
        if not (self._modules or self._replaced or self.tokens):
            raise InputError(
                "holds no LoRA factors",
                path=stored.path,
                hint=None if stored.tensors else f"if the training was sharded, {GATHER}",
            )

    def _refuse_empty(self, stored: StoredTensors) -> None:
        empty = [name for name, tensor in stored.tensors.items() if not all(tensor.shape)]
        if empty:
            raise InputError(
                f"{len(empty)} of {len(stored.tensors)} tensors are empty "
                f"({printable(empty[0])}, {list(stored.tensors[empty[0]].shape)}): they were "
                "sharded (DeepSpeed ZeRO-3, FSDP), and saved without being gathered",
                path=self._path,
                hint=GATHER,
            )

    def _sort(self, name: str, tensor: DenseTensor) -> None:
        key = parse_key(name, self._adapter)
        if key.part == "unknown":
            raise UnsupportedError(
                f"tensor {printable(name)} is not part of a LoRA adapter",
                path=self._path,
                hint="its method cannot be read as a low-rank delta; merge it with PEFT",
            )
        if key.part == "original":
            self._untrained[key.owner] = name
            return
        if key.part in ("", "tokens"):
            parts, place = self.tokens if key.part else self._replaced, key.owner
        else:
            module = self._modules.setdefault(key.owner, {})
            parts, place = module.setdefault(key.depth, {}), key.part
        other = parts.setdefault(place, tensor)
        if other is tensor:
            return
        if key.part or not _is_copy(other, tensor):
            raise InputError(f"tensor {printable(name)} occurs twice", path=self._path)
        # PEFT saves a trained embedding once more under its wrapper's name, and loads this.
        parts[place] = min(other, tensor, key=_is_wrapped)

    def _check_trained(self) -> None:
        """Refuse a module whose original weight was saved instead of the trained one."""
        for owner, name in self._untrained.items():
            if owner not in self._replaced:
                raise InputError(
                    f"tensor {printable(name)} is a module as it was before its training, and what "
                    "was trained of it is missing",
                    path=self._path,
                    hint="the file is incomplete: save the adapter again",
                )

    def in_base(self, name: str) -> str:
        """Return the base's name of a tensor, or its own."""
        found = self._names.parameter(name) if self._names else None
        return self._spelled(found.target if found else name, name)

    def _spelled(self, target: str, name: str) -> str:
        if target != name:
            self.spellings[target] = name
        return target

    def replacements(self) -> dict[str, DenseTensor]:
        """Return the tensors that replace the base's own."""
        found = {self.in_base(name): tensor for name, tensor in self._replaced.items()}
        return {name: replace(tensor, name=name) for name, tensor in found.items()}

    def deltas(self) -> dict[str, LoraDelta]:
        """Return the deltas by the stored name of their module (and parameter)."""
        experts = ExpertReader(self._settings, self._base, self._names, self._path)
        found: dict[str, LoraDelta] = {}
        for name, module in self._modules.items():
            if experts.parameters(name, list(module)):
                pairs = {depth: self._pair(name, parts, "") for depth, parts in module.items()}
                for stored, delta in experts.deltas(name, pairs):
                    self._spelled(delta.target, stored)
                    found[stored] = delta
            elif len(module) == 1:
                found[name] = self._delta(name, *module.values())
            else:
                raise InputError(
                    f"module {printable(name)} is wrapped twice, and target_parameters does not "
                    "name it",
                    path=self._path,
                )
        return found

    def _pair(
        self, name: str, parts: dict[str, DenseTensor], kind: str
    ) -> tuple[DenseTensor, DenseTensor]:
        a, b = parts.get(kind + "A"), parts.get(kind + "B")
        if a is None or b is None:
            lacks = kind + ("A" if a is None else "B")
            others = {n: p for n, m in self._modules.items() for p in m.values() if lacks in p}
            alone = [n for n, p in others.items() if not {kind + "A", kind + "B"} <= p.keys()]
            raise InputError(
                f"module {printable(name)} has no lora_{lacks}" + nearest(name, alone or others),
                path=self._path,
                hint="the file is incomplete: save the adapter again",
            )
        stack = ".experts." in name and len(a.shape) == 3
        two = len(a.shape) == len(b.shape) == (3 if stack else 2)
        if not two or a.shape[-2] != b.shape[-1] or not a.shape[-2]:
            raise InputError(
                f"module {printable(name)}: A {list(a.shape)} and B {list(b.shape)} do not fit, "
                "wanted (rank, in) and (out, rank)",
                path=self._path,
                hint="convolutions cannot be read; merge it with PEFT" if not two else None,
            )
        return a, b

    def _delta(self, name: str, parts: dict[str, DenseTensor]) -> LoraDelta:
        embedding = "embedding_A" in parts or "embedding_B" in parts
        a, b = self._pair(name, parts, "embedding_" if embedding else "")
        magnitude = parts.get("magnitude")
        if magnitude is not None and magnitude.count != b.shape[0]:
            raise InputError(
                f"module {printable(name)}: the magnitude is {list(magnitude.shape)} for "
                f"{b.shape[0]} output features",
                path=self._path,
            )
        target = self.in_base(name + ".weight")
        transposed = embedding or self._is_transposed(target, a, b)
        return LoraDelta(
            target=target,
            a=a,
            b=b,
            scaling=self._settings.scaling(name, a.shape[-2]),
            orientation="transposed" if transposed else "linear",
            magnitude=magnitude,
            bias=parts.get("bias"),
            alpha=self._settings.alpha(name),
        )

    def _is_transposed(self, target: str, a: DenseTensor, b: DenseTensor) -> bool:
        """Tell whether the base stores (in, out), from its shapes or else the config."""
        linear = (b.shape[-2], a.shape[-1])
        stored = self._base.tensors.get(target) if self._base is not None else None
        if stored is None:
            return self._settings.conv1d and not target.endswith("lm_head.weight")
        shape = stored.shape
        if target in self._per_token and shape[1:] == linear[1:]:
            return False  # of any number of tokens: who applies it resizes the base
        if shape not in (linear, linear[::-1]):
            raise InputError(
                f"module {printable(target)}: the delta is {list(linear)}, the base's weight is "
                f"{list(shape)}",
                path=self._path,
                hint="the adapter was made for another base",
            )
        if linear[0] != linear[1]:
            return shape != linear
        config = config_of(self._base) if self._base is not None else {}
        return self._settings.conv1d or is_conv1d(target, config.get("model_type"))

    def check(self, adapter: Adapter) -> None:
        """Refuse an adapter none of whose modules the base has.

        A single one that it does not have is refused by whoever applies it.
        """
        targets = [*adapter.deltas, *adapter.rows]
        if self._base is None or self._names is None or not targets:
            return
        known = self._base.tensors
        if not known:  # a config alone
            return
        experts = [name for name, delta in adapter.deltas.items() if len(delta.a.shape) == 3]
        tied = [name for name in targets if name.endswith("lm_head.weight")]
        if experts or tied or any(name in known for name in targets):
            return
        raise InputError(
            f"none of its {len(targets)} modules is in the base: it changes "
            f"{printable(targets[0])}" + nearest(targets[0], known),
            path=adapter.path,
            hint="was it made for another base?",
        )
