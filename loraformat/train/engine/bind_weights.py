"""Binding of stored weights to a model without weights: its modules become ones on mapped bytes.

Linears, ``Conv1D``, embeddings and fused experts become modules on the shards. What is left,
norms, biases and routers, is copied, as it is small; a large parameter of a class that nothing
here knows is refused, so that a model is never held in memory by accident, and so is a tensor
without a module or a parameter without a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from loraformat.errors import UnsupportedError, printable
from loraformat.train.engine.compute_dtype import activation_dtype
from loraformat.train.engine.embedding import MappedEmbedding
from loraformat.train.engine.experts import (
    ExpertStack,
    compute_from_stacks,
    is_fused_experts,
    projection_names,
)
from loraformat.train.engine.linear import FrozenLinear
from loraformat.train.engine.meta_model import find_layers
from loraformat.train.engine.stored_weights import (
    Sources,
    Span,
    StoredWeights,
    find_sources,
    share_of_spans,
)

__all__ = ["WeightBinder", "number_layers"]

#: Elements of a parameter that may be copied into memory: 16 MB, more than any router has.
_LARGEST_COPY = 1 << 22


class WeightBinder:
    """Replaces the modules of a model by ones that read stored weights.

    Attributes
    ----------
    used : dict of str to list of str
        The tensors that each mapped module reads, by its name in the model.
    copied : dict of str to list of str
        The tensor of each parameter that was copied, by its name in the model.
    """

    def __init__(
        self, model: Any, weights: StoredWeights, dtype: torch.dtype, path: object
    ) -> None:
        self._model, self._weights, self._dtype, self._path = model, weights, dtype, path
        # Parts of names whose parameters a class always keeps in float32.
        self._wide = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        self._sources: Sources = find_sources(model, weights.names(), path)
        tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self._ties = {**{kept: name for name, kept in tied.items()}, **tied}
        self._taken: set[str] = set()
        self._embeddings: list[str] = []
        self.used: dict[str, list[str]] = {}
        self.copied: dict[str, list[str]] = {}

    def run(self) -> WeightBinder:
        """Replace and copy everything; returns itself.

        Raises
        ------
        UnsupportedError
            Naming a module that is too large and unknown, a parameter without a tensor, or a
            tensor without a parameter.
        """
        for name, module in list(self._model.named_modules()):
            if (handler := self._handler(module)) is not None:
                handler(name, module)
        for name, module in list(self._model.named_modules()):
            self._copy_small(self._in_its_class(name), module)
        self._check_all_used()
        return self

    def _handler(self, module: torch.nn.Module) -> Callable[[str, Any], None] | None:
        from transformers.pytorch_utils import Conv1D

        if isinstance(module, torch.nn.Linear) and _multiplies_only(module):
            return self._linear
        if isinstance(module, Conv1D):
            return partial(self._linear, conv1d=True)
        if isinstance(module, torch.nn.Embedding) and _takes_tokens_only(module):
            return self._embedding
        return self._experts if is_fused_experts(module) else None

    def _source(self, name: str) -> str:
        """Return the tensor of a parameter, or of the one that it is tied to."""
        single = self._sources.single
        found = single.get(name) or single.get(self._ties.get(name, ""))
        if found is None:
            raise self._without_tensor(name)
        self._taken.add(found)
        return found

    def _linear(self, name: str, module: Any, *, conv1d: bool = False) -> None:
        source = self._source(f"{name}.weight")
        self._check_shape(f"{name}.weight", source, tuple(module.weight.shape))
        bias = None
        if module.bias is not None:
            bias = self._small(f"{name}.bias", self._source(f"{name}.bias"))
        matrix = self._weights.matrix(source, in_out_layout=conv1d)
        linear = FrozenLinear(matrix, name, bias, conv1d=conv1d, dtype=self._dtype)
        self._put(name, linear, [source])

    def _embedding(self, name: str, module: Any) -> None:
        source = self._source(f"{name}.weight")
        self._check_shape(f"{name}.weight", source, tuple(module.weight.shape))
        table, dtype = self._weights.rows(source), activation_dtype(self._dtype)
        self._put(name, MappedEmbedding(table, name, module, dtype), [source])
        self._embeddings.append(name)

    def _experts(self, name: str, module: Any) -> None:
        for leaf in projection_names(module):
            parameter = f"{name}.{leaf}"
            sources = self._sources.stacked.get(parameter)
            in_out_layout = bool(module.is_transposed)
            if sources is None:
                whole = self._source(parameter)
                self._check_shape(parameter, whole, tuple(getattr(module, leaf).shape))
                experts = self._weights.stack(whole, in_out_layout=in_out_layout)
                names = [whole]
            else:
                experts = [[self._weights.matrix(one) for one in parts] for parts in sources]
                names = [one for parts in sources for one in parts]
                self._taken.update(names)
            stack = ExpertStack(experts, parameter, in_out_layout=in_out_layout, dtype=self._dtype)
            stack.spans = self._spans_of_experts(names, stack.count)
            count, *sizes = getattr(module, leaf).shape
            wanted = (sizes[0], sizes[1]) if in_out_layout else (sizes[1], sizes[0])
            if (stack.count, stack.in_features, stack.out_features) != (count, *wanted):
                raise self._refusal(
                    f"parameter {printable(parameter)} wants {count} experts of {wanted[1]} x "
                    f"{wanted[0]}, and its tensors make {stack.count} of {stack.out_features} x "
                    f"{stack.in_features}"
                )
            delattr(module, leaf)
            self._put(parameter, stack, names)
        compute_from_stacks(module, self._path)

    def _spans_of_experts(self, names: list[str], count: int) -> list[list[Span]]:
        """Return the bytes of each expert: of one tensor, or of tensors in the experts' order."""
        spans = [self._weights.spans(name) for name in names]
        if len(names) == 1:
            return [share_of_spans(spans[0], i, i + 1, count) for i in range(count)]
        each = len(names) // count
        return [
            [span for some in spans[i * each : (i + 1) * each] for span in some]
            for i in range(count)
        ]

    def _put(self, name: str, module: torch.nn.Module, sources: list[str]) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self._model.get_submodule(parent), leaf, module)
        self.used[name] = sources

    def _copy_small(self, name: str, module: torch.nn.Module) -> None:
        if isinstance(module, (FrozenLinear, MappedEmbedding, ExpertStack)):
            return
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            full = f"{name}.{leaf}" if name else leaf
            if parameter.numel() > _LARGEST_COPY:
                raise self._refusal(
                    f"parameter {printable(full)} of {printable(type(module).__name__)} has "
                    f"{parameter.numel()} elements ({list(parameter.shape)}): too large to be "
                    "copied into memory, and of no class that is read from mapped bytes"
                )
            sources, values = self._whole_or_joined(full, tuple(parameter.shape))
            setattr(module, leaf, torch.nn.Parameter(values, requires_grad=False))
            self.copied[full] = sources
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            full = f"{name}.{leaf}" if name else leaf
            if full in self._sources.single:
                source = self._source(full)
                self._check_shape(full, source, tuple(buffer.shape))
                module.register_buffer(leaf, self._weights.copy(source, buffer.dtype))
            elif buffer.device.type == "meta":
                raise self._refusal(f"buffer {printable(full)} has no tensor in it")

    def _in_its_class(self, name: str) -> str:
        """Return what a module's class calls it, be it inside of an embedding that was replaced."""
        for mapped in self._embeddings:
            inside = f"{mapped}.original"
            if name == inside or name.startswith(f"{inside}."):
                return mapped + name.removeprefix(inside)
        return name

    def _whole_or_joined(self, name: str, shape: tuple[int, ...]) -> tuple[list[str], torch.Tensor]:
        """Copy a small parameter: a tensor, or several below each other; returns their names."""
        parts = self._sources.stacked.get(name, [])
        if len(parts) != 1:
            source = self._source(name)
            self._check_shape(name, source, shape)
            return [source], self._small(name, source)
        self._taken.update(parts[0])
        heights = [self._weights.shape(part)[0] for part in parts[0]]
        for part, height in zip(parts[0], heights, strict=True):
            self._check_shape(name, part, (height, *shape[1:]))
        if sum(heights) != shape[0]:
            raise self._refusal(
                f"parameter {printable(name)} wants {shape[0]} rows, and its tensors "
                f"({', '.join(map(printable, parts[0]))}) have {sum(heights)}"
            )
        return parts[0], torch.cat([self._small(name, part) for part in parts[0]])

    def _small(self, name: str, source: str) -> torch.Tensor:
        """Copy a small parameter in the dtype of hidden states, or float32 if its class says so."""
        wide = any(re.search(rf"(^|\.){re.escape(part)}($|\.)", name) for part in self._wide)
        dtype = torch.float32 if wide else activation_dtype(self._dtype)
        return self._weights.copy(source, dtype)

    def _check_shape(self, name: str, source: str, wanted: tuple[int, ...]) -> None:
        found = self._weights.shape(source)
        if found != wanted:
            raise self._refusal(
                f"tensor {printable(source)} is {list(found)}, and parameter {printable(name)} of "
                f"its config's model wants {list(wanted)}"
            )

    def _check_all_used(self) -> None:
        untaken = [name for name in self._sources.single.values() if name not in self._taken]
        ignored = getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ()
        left = [
            name
            for name in untaken + self._sources.unused
            if not any(re.search(pattern, name) for pattern in ignored)
        ]
        if left:
            shown = ", ".join(printable(name) for name in left[:3])
            raise self._refusal(
                f"{len(left)} of its tensors have no place in "
                f"{printable(type(self._model).__name__)}: {shown}"
            )

    def _without_tensor(self, name: str) -> UnsupportedError:
        """Return the refusal of a model that lacks a part: of its body, or of its head."""
        if name in self._sources.stacked:
            parts = [part for some in self._sources.stacked[name] for part in some]
            return self._refusal(
                f"parameter {printable(name)} is put together of {len(parts)} tensors "
                f"({printable(parts[0])}, ...) when transformers loads it, which training on "
                "mapped weights does not know"
            )
        problem = f"parameter {printable(name)} has no tensor in it"
        if name.startswith(f"{self._model.base_model_prefix}."):
            return self._refusal(problem)
        return UnsupportedError(
            f"has no output head to predict tokens with: {problem}",
            path=f"{self._path}",
            hint="an embedding model runs in transformers' AutoModel and in llama-server "
            "--embeddings, and PEFT trains it (task_type FEATURE_EXTRACTION); else name the "
            "checkpoint that has its head",
        )

    def _refusal(self, problem: str) -> UnsupportedError:
        return UnsupportedError(problem, path=f"{self._path}")


def number_layers(model: Any, path: object) -> None:
    """Set the layer number of each linear and each stack of experts of the decoder."""
    for number, layer in enumerate(find_layers(model, path)[1]):
        for module in layer.modules():
            if isinstance(module, FrozenLinear | ExpertStack):
                module.layer = number


def _multiplies_only(module: torch.nn.Linear) -> bool:
    """Tell whether a linear's class computes x Wᵀ + b and nothing more, by trial."""
    if type(module).forward is torch.nn.Linear.forward:
        return True
    x, weight = torch.ones(1, 2), torch.tensor([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]])
    bias = None if module.bias is None else torch.tensor([0.5, 0.25, 0.125])
    given = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    try:
        with torch.no_grad():
            found = torch.func.functional_call(module, given, (x,))
    except Exception:  # it wants other inputs, or more parameters
        return False
    return torch.is_tensor(found) and torch.equal(
        found, torch.nn.functional.linear(x, weight, bias)
    )


def _takes_tokens_only(module: torch.nn.Embedding) -> bool:
    """Tell whether an embedding is called with token numbers alone."""
    import inspect

    return len(inspect.signature(type(module).forward).parameters) == 2
