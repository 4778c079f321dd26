"""Loading an adapter with PEFT into a model on the meta device.

PEFT converts names, ranks and targets as it loads, in another way for each family of models, so
that only PEFT knows. It is given the base as transformers builds it on ``meta`` and tensors without
numbers, which costs seconds and no memory. Where PEFT or transformers is not installed, or does
not know the base, nothing is proven.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from loraformat.errors import printable
from loraformat.model.base_names.meta_model import TASKS, build_on_meta, task_of
from loraformat.tensors.dtypes import torch_dtype

__all__ = ["Loaded", "Stored", "load_on_meta"]

_ADAPTER = "default"
#: What changes the base's weights, or wants some, as PEFT puts its layers in: no matter of shapes.
_STARTS = {
    "init_lora_weights": True, "loftq_config": {}, "eva_config": None, "corda_config": None,
    "lora_ga_config": None, "inference_mode": True,
}  # fmt: skip

#: A head with one row for each label.
_HEAD = re.compile(r"(^|\.)(score|classifier|out_proj)(\.|$)")
_SIZE = r"torch\.Size\((\[[\d, ]*\])\)"
_MISMATCH = re.compile(rf"size mismatch for ([\w.]+):.*?{_SIZE}.*?{_SIZE}", re.DOTALL)


class Stored(NamedTuple):
    """Dtype and shape of an adapter's tensor."""

    dtype: str
    shape: tuple[int, ...]


class Loaded(NamedTuple):
    """What PEFT raised, and the tensors that it left out with no more than a warning or none."""

    problem: str | None = None
    ignored: tuple[str, ...] = ()


def load_on_meta(
    config: Mapping[str, Any], tensors: Mapping[str, Stored], base: Mapping[str, Any]
) -> Loaded | None:
    """Load an adapter into a base, both by their configs, as ``PeftModel.from_pretrained`` does.

    Returns None if PEFT or transformers is not installed, or transformers cannot build the base.
    """
    with _quiet():
        try:
            import peft
        except ImportError:
            return None
        answer = None
        for model in _models(config, tensors, base):
            try:
                answer = _load(peft, model, config, tensors)
            except Exception as error:  # whatever PEFT raises is the answer
                answer = Loaded(_sentence(error))
            if answer == Loaded():
                break
    return answer


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings of PEFT, transformers and bitsandbytes."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _models(
    config: Mapping[str, Any], tensors: Mapping[str, Stored], base: Mapping[str, Any]
) -> Iterator[Any]:
    """Yield the base as the class of the adapter's task, then as the class in its config."""
    task = config.get("task_type")
    task = task_of(base, task) if task == "CAUSAL_LM" else task
    heads = [t.shape[0] for n, t in tensors.items() if _HEAD.search(n) and t.shape and t.shape[0]]
    labels = min(heads, default=2)
    for wanted in (task, None):
        if wanted is None or wanted in TASKS:
            model = build_on_meta(base, task=wanted, labels=labels)
            if model is not None:
                yield model


def _load(
    peft: Any, model: Any, config: Mapping[str, Any], tensors: Mapping[str, Stored]
) -> Loaded:
    import torch
    from peft.utils import set_peft_model_state_dict

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "adapter_config.json").write_text(json.dumps({**config, **_STARTS}))
        settings = peft.LoraConfig.from_pretrained(folder)
    kinds = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    adapted = kinds.get(settings.task_type, peft.PeftModel)(
        model, settings, _ADAPTER, low_cpu_mem_usage=True
    )
    _check_rows(adapted)
    states = {
        name: torch.empty(stored.shape, dtype=torch_dtype(stored.dtype), device="meta")
        for name, stored in tensors.items()
    }
    result = set_peft_model_state_dict(
        adapted, states, adapter_name=_ADAPTER, low_cpu_mem_usage=True
    )
    return Loaded(None, tuple(sorted(result.unexpected_keys)))


def _check_rows(model: Any) -> None:
    """Raise the index error of missing embedding rows, which ``meta`` does not check."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for name, module in model.named_modules():
        if isinstance(module, TrainableTokensLayer):
            rows = module.get_base_layer().weight.shape[0]
            last = max(module.token_indices[_ADAPTER], default=0)
            if last >= rows:
                raise IndexError(f"token {last} is out of range for {rows} rows of {name}")


def _sentence(error: Exception) -> str:
    """Return PEFT's error on one line, with the first mismatch only."""
    if (sizes := _MISMATCH.search(str(error))) is not None:
        return printable(f"{sizes[1].replace('.default', '')} is {sizes[2]}, wanted {sizes[3]}")
    return printable(f"{type(error).__name__}: {' '.join(str(error).split())}")
