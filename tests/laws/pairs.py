"""A tiny base of a class of transformers, its fine-tune, and the adapter between them."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file

from loraformat.families.table import family_of
from loraformat.families.tensor_names import layer_of
from loraformat.ops.extract.extract import extract
from tests.adapters import moe_models
from tests.train import causal_models

#: Of what the fine-tune adds to each matrix, and of the adapter that is extracted.
RANK, FULL_RANK = 2, 8
#: How often a rounding may exceed the one that is measured: another order of sums, other elements.
_ROUNDINGS = 16


@dataclass(frozen=True)
class Pair:
    """Directories, and the logits of base and fine-tune.

    Attributes
    ----------
    folder : Path
        With ``base``, ``tuned`` and ``adapter``.
    before, wanted : torch.Tensor
        Logits of the base and of the fine-tune, in float32.
    bound : float
        How far apart logits may be of weights that are equal but for one rounding in float32.
    """

    folder: Path
    before: torch.Tensor
    wanted: torch.Tensor
    bound: float

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def in_peft(self, adapter: Path) -> torch.Tensor:
        """Return the logits of the base with an adapter beside it, all of whose tensors load."""
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return logits(peft.PeftModel.from_pretrained(opened(self.base), adapter))


def make_pair(model_type: str, folder: Path, **sizes: Any) -> Pair:
    """Write a base, a fine-tune whose matrices all differ by `RANK`, and the adapter."""
    if model_type in moe_models.model_types():
        model = moe_models.make(model_type, **sizes)
    else:
        model = causal_models.make(model_type)
    before = logits(model)
    model.save_pretrained(folder / "base")
    wanted = logits(tune(model))
    model.save_pretrained(folder / "tuned")
    extract(folder / "base", folder / "tuned", folder / "adapter", rank=FULL_RANK)
    return Pair(folder, before, wanted, rounding(model, wanted))


def tune(model: Any) -> Any:
    """Add a delta of low rank to every matrix of the layers, experts and routers included."""
    random = torch.Generator().manual_seed(2)
    family = family_of(model.config.to_dict())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if layer_of(name) is None or weight.ndim not in (2, 3) or "conv" in name:
                continue
            if family.is_shared(name) or (weight.ndim == 2 and not name.endswith(".weight")):
                continue
            b = torch.randn(*weight.shape[:-1], RANK, generator=random)
            a = torch.randn(*weight.shape[:-2], RANK, weight.shape[-1], generator=random)
            weight += 0.02 * b @ a
    return model


def rounding(model: Any, wanted: torch.Tensor) -> float:
    """Return a bound for what rounding to float32 does to a model's logits.

    Both are measured: what rounding the weights does, each moved by a unit in its last place, up
    or down by chance; and what rounding of activations does, against the model in float64 (but
    for what its class always computes in float32).
    """
    random = torch.Generator().manual_seed(3)
    unit = torch.finfo(torch.float32).eps
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            sign = torch.randint(0, 2, parameter.shape, generator=random) * 2 - 1
            parameter.mul_(1 + unit * sign)
    of_weights = (logits(moved) - wanted).abs().max()
    try:
        of_activations = (logits(copy.deepcopy(model).double()) - wanted).abs().max()
    except RuntimeError as error:  # a class that casts to float32 before it multiplies
        assert "dtype" in str(error)
        of_activations = of_weights
    return _ROUNDINGS * max(float(of_weights), float(of_activations))


def assert_close(found: torch.Tensor, pair: Pair) -> None:
    """Assert that logits are the fine-tune's but for rounding, far less than it differs."""
    assert pair.bound < 0.01 * (pair.wanted - pair.before).abs().max()
    torch.testing.assert_close(found, pair.wanted, atol=pair.bound, rtol=0)


def opened(folder: Path) -> Any:
    """Return the model of a directory as transformers opens it, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def logits(model: Any) -> torch.Tensor:
    """Return the logits of a few tokens."""
    return moe_models.logits(model)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a directory."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
