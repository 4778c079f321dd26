"""The verb ``load``: a bundle opened as a model that can be trained."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from loraformat.bundle.reader import Bundle, is_bundle, open_bundle
from loraformat.errors import LoraFormatError, UnsupportedError, printable
from loraformat.families.table import family_of
from loraformat.families.tensor_names import layer_of
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.config_json import parse
from loraformat.ops.opening.adapter import open_adapter
from loraformat.ops.opening.model import check_base, open_model
from loraformat.train.engine.bind_weights import WeightBinder, number_layers
from loraformat.train.engine.checkpointing import ActivationBudget, Checkpointing, checkpoint_layer
from loraformat.train.engine.compute_dtype import choose_dtype
from loraformat.train.engine.device import place_on
from loraformat.train.engine.experts import ExpertStack
from loraformat.train.engine.layer_prefetch import LayerPrefetcher
from loraformat.train.engine.meta_model import build_meta_model, find_layers, head_name
from loraformat.train.engine.stored_weights import ReadableBase, StoredWeights
from loraformat.train.loop import memory
from loraformat.train.lora.branch import LoraBranch
from loraformat.train.lora.branches import attach, attach_adapter
from loraformat.train.lora.options import LoraOptions
from loraformat.train.lora.replaced_weights import replaced_weights_of
from loraformat.train.lora.target_modules import TargetModule, find_target_modules
from loraformat.train.model import TrainableModel

__all__ = ["load"]


def load(
    bundle: str | Path | Bundle,
    *,
    lora: LoraOptions | None = None,
    adapter: str | Path | Adapter | None = None,
    device: str | torch.device = "cpu",
    device_memory: int | None = None,
    activation_memory: int | None = None,
    compute_dtype: torch.dtype | str | None = None,
    original: str | Path | Checkpoint | None = None,
    allow_base_mismatch: bool = False,
    to_train: bool = True,
) -> TrainableModel:
    """Open a bundle as a model of transformers' own classes that can be trained.

    Nothing of the weights is read: they stay mapped, and each layer is decoded when it is
    computed. The first call tells glibc's malloc, for the process, to keep what is freed: else a
    third of the time would go into giving memory back and asking for it again.

    Parameters
    ----------
    bundle : str, Path or Bundle
        A directory, or an open bundle, which stays the caller's to close.
    lora : LoraOptions, optional
        What is trained. With `adapter` only its dropout and statistics are heeded.
    adapter : str, Path or Adapter, optional
        An adapter of this base to compute with or to train on.
    device : str or torch.device
        Where it computes: ``cpu``, or a GPU, on which codes are decoded.
    device_memory : int, optional
        Bytes that the base may take on the GPU, a share of what is free by default; layers that
        do not fit are copied there for each use.
    activation_memory : int, optional
        Bytes for layers that keep what their backward pass wants instead of computing it again,
        which is a quarter of the work: the last layers do, as many as it is enough for. By
        default half of the memory that would be left if all of the base was cached. It does not
        change what is computed.
    compute_dtype : torch.dtype or "fastest", optional
        float32 by default, bfloat16 on a GPU. See `loraformat.train.engine.compute_dtype`.
    original : str, Path or Checkpoint, optional
        The dense model that the bundle was made from, for ``LoraOptions(init="loftq")``.
    allow_base_mismatch : bool
        Accept an adapter that was made for another base.
    to_train : bool
        Else it is opened to be computed with, and may be a model in any format that can be read:
        a directory of safetensors, a bitsandbytes checkpoint, a GGUF file.

    Returns
    -------
    TrainableModel
        In training mode.

    Raises
    ------
    InputError
        If the bundle is none, or breaks a rule, or the adapter is not one for it.
    UnsupportedError
        If transformers has no class for it, or a class here none for a large part of it.
    UsageError
        If a target or a rank means nothing.
    MissingDependencyError
        If transformers is not installed.
    """
    opened = ExitStack()
    try:
        here = bundle if isinstance(bundle, Bundle) else _open(Path(bundle), to_train=to_train)
        if here is not bundle:
            opened.callback(here.close)
        place = torch.device(device)
        dtype = choose_dtype(compute_dtype, place)
        notes: list[str] = []
        if adapter is not None:
            adapter = opened.enter_context(open_adapter(adapter, base=here.checkpoint))
            notes += check_base(adapter, here.checkpoint, allowed=allow_base_mismatch)
        replaced = None if adapter is None else replaced_weights_of(adapter, here.checkpoint)
        weights = StoredWeights(here, replaced.tensors if replaced is not None else None)
        config = replaced.config if replaced is not None else here.checkpoint.config
        path = here.checkpoint.path
        base, bound = _build(path, weights, config, dtype)
        used = bound.used
        resident: set[str] = set()
        if place.type != "cpu":
            resident = place_on(base, used, weights, place, device_memory)
        targets = find_target_modules(base, used | bound.copied, family_of(parse(config or b"{}")))
        branches = _branches(
            targets, here, lora, adapter, original, has_replaced=replaced is not None
        )
        if adapter is not None and replaced is None:
            adapter.close()  # its factors have been copied
        streamed = {name: names for name, names in used.items() if name not in resident}
        shared = _stream(base, weights, streamed, path)
        if activation_memory is None:
            size = sum(tensor.nbytes for tensor in here.checkpoint.tensors.values())
            activation_memory = memory.spare(size, str(place))
        head = [span for name in used[head_name(base, path)] for span in weights.spans(name)]
        model = TrainableModel(
            base, here, shared, head_spans=head, branches=branches,
            options=None if adapter else lora, compute_dtype=dtype, opened=opened,
            replaced=replaced, notes=notes,
        )  # fmt: skip
        model.activation_memory = activation_memory
        return model
    except BaseException:
        opened.close()
        raise


def _branches(
    targets: list[TargetModule],
    bundle: Bundle | ReadableBase,
    lora: LoraOptions | None,
    adapter: Adapter | None,
    original: str | Path | Checkpoint | None,
    *,
    has_replaced: bool,
) -> dict[str, LoraBranch]:
    if adapter is not None:
        return attach_adapter(targets, adapter, lora, has_replaced=has_replaced)
    if lora is None:
        return {}
    with ExitStack() as opened:
        if original is not None and not isinstance(original, Checkpoint):
            original = opened.enter_context(open_model(original))
        return attach(targets, lora, original=original)


def _open(path: Path, *, to_train: bool) -> Bundle | ReadableBase:
    if not path.exists() or is_bundle(path):
        return open_bundle(path)
    hint = f"make one: loraformat convert {path} my-bundle --to loraformat"
    if (path / "adapter_config.json").exists():
        hint = "that is an adapter: give its base here, and the adapter with --adapter"
    elif not path.is_dir() and path.suffix not in (".gguf", ".safetensors"):
        hint = "give the base first, then the data"
    elif not to_train:
        return ReadableBase(open_model(path))
    raise UnsupportedError("is not a bundle, and only bundles are trained on", path=path, hint=hint)


def _build(
    path: Path, weights: StoredWeights, config: bytes | None, dtype: torch.dtype
) -> tuple[Any, WeightBinder]:
    """Return the model, and the tensors that it was made of.

    Whatever a class of transformers trips over is a refusal.
    """
    if config is None:
        raise UnsupportedError("has no config.json, which says how to compute it", path=path)
    numbers = [found[1] for name in weights.names() if (found := layer_of(name))]
    try:
        base = build_meta_model(config, max(numbers, default=-1) + 1, path)
        bound = WeightBinder(base, weights, dtype, path).run()
        base.requires_grad_(False)
        number_layers(base, path)
        return base, bound
    except (LoraFormatError, MemoryError):
        raise
    except Exception as error:
        raise UnsupportedError(
            f"cannot be opened for training: {type(error).__name__}: {printable(error)}",
            path=path,
        ) from error


def _stream(
    base: Any, weights: StoredWeights, used: dict[str, list[str]], path: Path
) -> Checkpointing:
    """Make the decoder layers checkpointed and prefetched."""
    stem, layers = find_layers(base, path)
    stacks = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, ExpertStack) and module.layer is not None and name in used
    }
    spans = []
    for number in range(len(layers)):
        prefix = f"{stem}.{number}."
        names = [
            one
            for module, some in used.items()
            if module.startswith(prefix) and module not in stacks
            for one in some
        ]
        spans.append([span for name in names for span in weights.spans(name)])
    shared = Checkpointing(LayerPrefetcher(spans), ActivationBudget(len(layers)))
    for stack in stacks.values():
        stack.prefetcher = shared.prefetcher
    for number, layer in enumerate(layers):
        checkpoint_layer(layer, number, shared)
    return shared
