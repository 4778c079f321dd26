"""A model of transformers' own classes without weights: parameters on ``meta``, buffers real.

No code is ever taken from the model's directory. Where a module's weight stays on disk, a
placeholder answers for its shape and dtype, and raises if a class computes with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.overrides import TorchFunctionMode

from loraformat.errors import MissingDependencyError, UnsupportedError, printable
from loraformat.model.config_json import parse

__all__ = [
    "PlaceholderWeight",
    "WeightNotInMemoryError",
    "build_meta_model",
    "decoder_of",
    "find_layers",
    "head_name",
    "text_config",
]

#: What makes parameters. Whatever else makes tensors makes small buffers, which must be real.
_EMPTY = (torch.empty, torch.rand, torch.randn)
_REMOTE = ("auto_map", "quantization_config")


class _EmptyOnMeta(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _EMPTY:
            kwargs["device"] = "meta"
        if func is torch.Tensor.copy_ and isinstance(args[0], torch.nn.Parameter):
            return args[0]  # what a class initialises with random numbers that are not there
        return func(*args, **kwargs)


def build_meta_model(config: bytes, layers: int, path: object) -> Any:
    """Build a causal language model that has no weights yet: parameters on ``meta``, dtype float32.

    Attention is computed by torch's ``scaled_dot_product_attention``, or plainly where the class
    cannot use that. `config` is the text of ``config.json``; one that wants more layers than the
    bundle holds is refused before anything is built.

    Raises
    ------
    UnsupportedError
        If transformers knows no causal language model of this config.
    MissingDependencyError
        If transformers is not installed.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        raise MissingDependencyError(
            "training needs transformers, which is not installed; pip install 'loraformat[train]'"
        ) from None
    fields = {key: value for key, value in parse(config).items() if key not in _REMOTE}
    model_type = fields.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise _unsupported(f"transformers knows no model type {printable(model_type)}", path)
    try:
        made = CONFIG_MAPPING[model_type].from_dict(fields)
        wanted = getattr(text_config(made), "num_hidden_layers", None)
        fits = wanted is not None and wanted <= layers
    except Exception as error:
        raise _unsupported(f"transformers cannot read its config: {printable(error)}", path) from (
            error
        )
    if wanted is None:
        raise UnsupportedError(
            f"its config ({printable(type(made).__name__)}) has no num_hidden_layers, and a model "
            "is computed layer by layer here",
            path=f"{path}",
        )
    if not fits:
        raise UnsupportedError(
            f"its config wants {wanted} layers, and it holds {layers}",
            path=f"{path}",
            hint="if files of the checkpoint are missing, download them and convert it again; a "
            "class that computes one layer several times, or counts parts of it, is not "
            "trained here",
        )
    _refuse_other_tasks(made, path)
    return _build(AutoModelForCausalLM, made, path)


def _refuse_other_tasks(config: Any, path: object) -> None:
    """Refuse a model that transformers has, but not as one that predicts text alone."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if type(config) in AutoModelForCausalLM._model_mapping:
        return
    if type(config) in AutoModelForImageTextToText._model_mapping:
        raise UnsupportedError(
            f"is a model of images and text ({printable(config.model_type)}), and this trains and "
            "runs models of text",
            path=f"{path}",
            hint="PEFT trains on a bundle of it, opened by "
            "transformers.AutoModelForImageTextToText.from_pretrained(BUNDLE)",
        )


def _build(auto_class: Any, config: Any, path: object) -> Any:
    failures = []
    for attention in ("sdpa", "eager"):
        try:
            with _EmptyOnMeta():
                return auto_class.from_config(
                    config, dtype=torch.float32, attn_implementation=attention,
                    trust_remote_code=False,
                )  # fmt: skip
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
    raise _unsupported(f"transformers cannot build it: {printable(failures[-1])}", path)


def text_config(config: Any) -> Any:
    """Return the part of a config that describes the language model."""
    return config.get_text_config(decoder=True)


def decoder_of(model: Any) -> Any:
    """Return the part of a causal language model that turns tokens into hidden states."""
    found = model.get_decoder()
    if found is not model and found is not model.get_output_embeddings():
        return found  # ModernBERT calls its head the decoder
    from transformers import PreTrainedModel

    return next((m for m in model.children() if isinstance(m, PreTrainedModel)), model)


def find_layers(model: Any, path: object) -> tuple[str, list[torch.nn.Module]]:
    """Return the name of the list of decoder layers, and the layers.

    Raises
    ------
    UnsupportedError
        If the decoder has no list of as many modules as its config says it has layers.
    """
    decoder, count = decoder_of(model), text_config(model.config).num_hidden_layers
    lists = [
        (name, list(module))
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise UnsupportedError(
            f"{printable(type(model).__name__)} has no list of its {count} decoder layers",
            path=f"{path}",
        )
    name, layers = min(lists, key=lambda found: found[0].count("."))
    prefix = next((n for n, module in model.named_modules() if module is decoder), "")
    return ".".join(part for part in (prefix, name) if part), layers


def head_name(model: Any, path: object) -> str:
    """Return the name of the output head.

    Raises
    ------
    UnsupportedError
        If the model has none.
    """
    head = model.get_output_embeddings()
    names: list[str] = [name for name, module in model.named_modules() if module is head]
    if head is not None and names:
        return names[0]
    raise UnsupportedError(
        f"{printable(type(model).__name__)} has no output head to train with", path=f"{path}"
    )


def _unsupported(problem: str, path: object) -> UnsupportedError:
    return UnsupportedError(
        problem, path=f"{path}", hint="a newer transformers may: pip install -U transformers"
    )


class WeightNotInMemoryError(UnsupportedError, AttributeError):
    """A model's class computes with a weight, that of `module`, that is not in memory."""

    def __init__(self, module: str) -> None:
        self.module = module
        super().__init__(
            f"this model's class computes with the weight of {printable(module)} outside of its "
            "module, but training leaves that on disk"
        )


class PlaceholderWeight:
    """Placeholder of a module's weight: has its shape and dtype, and raises if computed with.

    Some classes look at a linear's dtype before they call it. A few, Mamba's among them, multiply
    by its weight themselves; that must fail, and not give just any number.

    Examples
    --------
    >>> weight = PlaceholderWeight("lm_head", (2, 3), torch.device("cpu"))
    >>> weight.dtype, weight.size(0), weight.numel()
    (torch.float32, 2, 6)
    >>> torch.ones(1, 3) @ weight
    Traceback (most recent call last):
    ...
    loraformat.train.engine.meta_model.WeightNotInMemoryError: this model's class computes ...
    """

    requires_grad = False
    is_meta = False

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name, self.shape, self.device = name, torch.Size(shape), device
        self.dtype, self.ndim = dtype, len(shape)

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one of its numbers."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Return the number of elements."""
        return self.shape.numel()

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.ndim

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        every = [*args, *(kwargs or {}).values()]
        raise WeightNotInMemoryError(
            next((x.name for x in every if isinstance(x, PlaceholderWeight)), "a module")
        )

    def __getitem__(self, index: Any) -> torch.Tensor:
        raise WeightNotInMemoryError(self.name)

    def __getattr__(self, attribute: str) -> NoReturn:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        raise WeightNotInMemoryError(self.name)
