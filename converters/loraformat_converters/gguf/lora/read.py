"""Reading a GGUF adapter as PEFT factors.

Numbers of F32, F16 and BF16 are the same bits as in the file, Q8_0 is dequantized to F32. The
base's config comes from ``--base``, or from the file if loraformat wrote it; without either
the names follow from the architecture, but not the order of rows within attention heads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraformat.errors import InputError, LoraFormatError, UnsupportedError, printable
from loraformat.families.expert_names import spelled_in_memory
from loraformat.model import config_json
from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.model.adapter_facts import AdapterFacts
from loraformat.model.checkpoint import Checkpoint, DenseTensor
from loraformat.model.expert_deltas import fused
from loraformat.model.tied_head import settled
from loraformat.plugins import AdapterReadOptions
from loraformat.tensors.arrays import Array, array_bytes, array_view, check_finite
from loraformat_converters.gguf.architectures import (
    Architecture,
    Config,
    LoraTarget,
    lora_module,
    lora_places,
    named_by,
    of_config,
)
from loraformat_converters.gguf.architectures.transforms import IDENTITY
from loraformat_converters.gguf.base.general_keys import CONFIG_KEY, FINGERPRINT_KEY
from loraformat_converters.gguf.container.header import GGUFTensor
from loraformat_converters.gguf.container.reader import GGUFFile, open_gguf
from loraformat_converters.gguf.lora.metadata import (
    ALPHA,
    SOURCE_KEY,
    base_model,
    invocation_tokens,
)
from loraformat_converters.gguf.quantization.blocks import dequantize

__all__ = ["examine", "read"]

_PLAIN = ("F32", "F16", "BF16")
_LAYER = re.compile(r"blk\.([0-9]{1,3})\.")


def read(path: Path, options: AdapterReadOptions) -> Adapter:
    """Open a GGUF adapter, of loraformat or of llama.cpp's own converter.

    Parameters
    ----------
    path : Path
    options : AdapterReadOptions

    Raises
    ------
    UnsupportedError
        If it is no LoRA, of an unknown architecture, an aLoRA that shall be computed with, or
        the order of rows is not known without the base.
    InputError
        If it is damaged, or of another architecture than the base.
    """
    gguf = open_gguf(path)
    try:
        return _Reader(gguf, options).adapter()
    except BaseException:
        gguf.close()
        raise


class _Reader:
    def __init__(self, gguf: GGUFFile, options: AdapterReadOptions) -> None:
        self.gguf, self.options, self.path = gguf, options, gguf.path
        self.notes: list[str] = []
        kind, subtype = gguf.text("general.type", "model"), gguf.text("adapter.type", "")
        if (kind, subtype) != ("adapter", "lora"):
            said = printable(f"{kind} {subtype}".strip())
            raise UnsupportedError(f"is of type {said}, not a LoRA adapter", path=self.path)
        self.tokens = invocation_tokens(gguf)
        if self.tokens and not options.conditional:
            raise UnsupportedError(
                "is an aLoRA, which acts on some tokens only",
                path=self.path,
                hint="use it unmerged: in llama.cpp, or converted to PEFT",
            )
        self.alpha = gguf.number(ALPHA, 0.0)
        self.architecture, self.config, self.heads = self._known()

    def _known(self) -> tuple[Architecture, Config, bool]:
        """Return what is known of the base, and whether the numbers of its heads are."""
        base, named = self.options.base, named_by(self.gguf)
        if base is not None and base.config is not None:
            config_of_base = settled(base)[0].config or b"{}"
            architecture, config = of_config(config_json.parse(config_of_base), base.tensors)
            if architecture is not named:
                raise InputError(
                    f"is for the architecture {named.name}, and the base is {architecture.name}",
                    path=self.path,
                    hint="use the base that it was trained on",
                )
            return architecture, config, True
        try:
            raw = self.gguf.text(CONFIG_KEY, "")
            if raw:
                architecture, config = of_config(config_json.parse(raw.encode()))
                if architecture is named:
                    return architecture, config, True
        except LoraFormatError:
            pass  # a stranger's key: go on without it
        return named, self._guessed(named), False

    def _guessed(self, architecture: Architecture) -> Config:
        """Return a config that gives the names: layers and experts as the tensors have them."""
        numbers = [int(m[1]) for m in map(_LAYER.match, self.gguf.tensors) if m]
        layers = max(numbers, default=0) + 1
        values: dict[str, Any] = {
            architecture.names.get("num_hidden_layers", "num_hidden_layers"): layers,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "tie_word_embeddings": "output.weight.lora_a" not in self.gguf.tensors,
        }
        for name, tensor in self.gguf.tensors.items():
            if "_exps." in name and len(tensor.shape) == 3:
                values["num_local_experts"] = tensor.shape[0]
        return architecture.of(values)

    def adapter(self) -> Adapter:
        names = self._base_names()
        found: dict[str, LoraDelta] = {}
        spellings: dict[str, str] = {}
        halves: dict[str, dict[int, LoraDelta]] = {}
        for tensor in self._pairs():
            place = lora_module(self.architecture, self.config, tensor)
            if place is None:
                raise UnsupportedError(
                    f"changes {printable(tensor)}, which is no weight of "
                    f"{self.architecture.name} that an adapter can change",
                    path=self.path,
                    hint="was it made for another base?",
                )
            delta = self._delta(tensor, place)
            if place.half is not None:
                halves.setdefault(place.module, {})[place.half] = delta
                continue
            if not place.experts:
                memory = f"{place.module}.weight"
                target = names.get(tensor, memory)
                if target != memory and spelled_in_memory(target) == memory:
                    spellings[target] = memory
                delta = replace(delta, target=target)
            found[delta.target] = delta
        found |= {module: fused(module, parts) for module, parts in halves.items()}
        if not found:
            raise InputError("holds no LoRA factors", path=self.path)
        return self._adapter(found, spellings)

    def _adapter(self, found: dict[str, LoraDelta], spellings: dict[str, str]) -> Adapter:
        return Adapter(
            path=self.path,
            format="gguf-lora",
            deltas=found,
            invocation_tokens=self.tokens,
            spellings=spellings,
            config=self._task(),
            base_model=base_model(self.gguf),
            base_fingerprint=self.gguf.text(FINGERPRINT_KEY, "") or None,
            base_source=self.gguf.text(SOURCE_KEY, "") or None,
            sources=self.gguf.sources,
            notes=tuple(self.notes),
            close=self.gguf.close,
        )

    def _task(self) -> dict[str, Any]:
        """Return the task, if the base has no head that generates; else the writer knows it."""
        headless = self.config.headless or not self.architecture.generates
        return {"task_type": "FEATURE_EXTRACTION"} if headless else {}

    def _base_names(self) -> Mapping[str, str]:
        """Return the base's own name of each weight of two dimensions, by GGUF name."""
        base: Checkpoint | None = self.options.base
        found: dict[str, str] = {}
        for name in base.tensors if base is not None else ():
            if name.endswith(".weight") and ".experts." not in name:
                module = name.removesuffix(".weight")
                for place in lora_places(self.architecture, self.config, module):
                    found.setdefault(place.tensor, name)
        return found

    def _pairs(self) -> list[str]:
        """Return the weights that have both factors, in file order; norms are noted."""
        found: dict[str, set[str]] = {}
        norms = 0
        for name in self.gguf.tensors:
            stem, _, part = name.rpartition(".lora_")
            if part in ("a", "b") and stem:
                found.setdefault(stem, set()).add(part)
            elif name.endswith("_norm.weight"):
                norms += 1
            else:
                raise InputError(
                    f"tensor {printable(name)} is not a LoRA factor",
                    path=self.path,
                    hint="llama.cpp rejects such a file, too; create it again",
                )
        for stem, parts in found.items():
            if len(parts) < 2:
                lacks = "b" if "a" in parts else "a"
                raise InputError(f"{printable(stem)} has no lora_{lacks}", path=self.path)
        if norms:
            self.notes.append(
                f"{norms} trained norms were left out, as llama.cpp does: it loads a file with "
                "them and passes them over"
            )
        return list(found)

    def _delta(self, tensor: str, place: LoraTarget) -> LoraDelta:
        a, b = (self.gguf.tensors[f"{tensor}.lora_{part}"] for part in "ab")
        self._check(tensor, place, a, b)
        rank = b.shape[-1]
        order = self._order(tensor, place)
        # The runtime takes alpha 0 for no scaling at all.
        return LoraDelta(
            target=place.module,
            a=self._factor(a, _transposed if place.embedding else None),
            b=self._factor(b, order),
            scaling=self.alpha / rank if self.alpha else 1.0,
            orientation="transposed" if place.transposed else "linear",
            alpha=self.alpha or float(rank),
        )

    def _check(self, tensor: str, place: LoraTarget, a: GGUFTensor, b: GGUFTensor) -> None:
        wanted = 3 if place.experts else 2
        shapes = f"A {list(a.shape)} and B {list(b.shape)}"
        rank = a.shape[-1] if place.embedding else a.shape[-2] if len(a.shape) > 1 else 0
        if (len(a.shape), len(b.shape)) != (wanted, wanted) or not rank or rank != b.shape[-1]:
            problem = f"{shapes} of {printable(tensor)} do not fit each other"
        elif place.experts and {a.shape[0], b.shape[0]} != {place.experts}:
            problem = f"{shapes} of {printable(tensor)} are not for {place.experts} experts"
        elif place.rows is not IDENTITY and self.heads and b.shape[0] % (
            2 * getattr(place.rows, "heads", 1)
        ):  # fmt: skip
            problem = f"{shapes} of {printable(tensor)} do not fit the base's heads"
        else:
            return
        raise InputError(problem, path=self.path, hint="was it made for another base?")

    def _order(self, tensor: str, place: LoraTarget) -> Callable[[Any], Any] | None:
        if place.rows is IDENTITY:
            return None
        if self.heads:
            return place.to_huggingface
        if self.options.inspect:
            return None
        raise UnsupportedError(
            f"the rows of {printable(tensor)} are in llama.cpp's order, and only the base's number "
            "of heads tells which that is",
            path=self.path,
            hint="name the base with --base: its config.json is enough",
        )

    def _factor(self, tensor: GGUFTensor, change: Callable[[Array], Array] | None) -> DenseTensor:
        gguf, path = self.gguf, self.path
        dtype = tensor.type.name if tensor.type.name in _PLAIN else "F32"
        shape = tensor.shape[::-1] if change is _transposed else tensor.shape
        stored = None if tensor.type.name == dtype else (tensor.type.name, tensor.nbytes)

        def load() -> memoryview:
            view = gguf.load(tensor.name)
            if tensor.type.name == dtype:
                values = array_view(view, dtype, tensor.shape)
            else:
                values = dequantize(view, tensor.type, tensor.shape, tensor.name)
            check_finite(values, tensor.name, path)
            if change is None and tensor.type.name == dtype:
                return view
            return array_bytes(values if change is None else change(values))

        return DenseTensor(tensor.name, dtype, shape, load, gguf.releaser(tensor.name), stored)


def _transposed(values: Array) -> Array:
    return values.T


def examine(path: Path, options: AdapterReadOptions) -> AdapterFacts:
    """Look at an adapter: its names, shapes and numbers, for rules of compatibility.

    llama.cpp refuses what `read` refuses. There is little to add: the architecture that the
    file names, which is held against the base's instead of being refused.

    Parameters
    ----------
    path : Path
    options : AdapterReadOptions
        With a base of the same architecture, its own names and shapes are looked up.

    Raises
    ------
    LoraFormatError
        If llama.cpp would not load it, whatever the base.
    """
    from loraformat.runtimes.from_adapter import facts_of

    with open_gguf(path) as gguf:
        architecture = named_by(gguf).name
    base = options.base
    same = base is not None and _architecture(base) == architecture
    known = AdapterReadOptions(base if same else None, conditional=True, inspect=True)
    with read(path, known) as adapter:
        facts = facts_of(adapter, known.base)
    return replace(facts, architecture=architecture)


def _architecture(base: Checkpoint) -> str | None:
    try:
        return of_config(config_json.parse(base.config or b"{}"))[0].name
    except LoraFormatError:
        return None
