"""Where a branch begins.

Every way leaves the base as it is stored, and is written as a plain adapter on it:

- ``kaiming`` (PEFT's default): A uniform in ±1/√in (He 2015 with a = √5), B zero;
- ``gaussian``: A normal with standard deviation 1/r, B zero;
- ``orthogonal``: A and B both begin with something, in row spaces that do not meet: B A = 0;
- ``pissa`` and ``loftq``: `loraformat.train.lora.initialise_svd`.

Under the first four the model computes at step 0 what the base does; under ``loftq`` it is nearer
to the model that was quantized. An embedding always begins as PEFT's: A zero, B normal.

Random numbers depend on the seed and the module's name, so that a module begins alike whatever
else is trained, and in whatever order.
"""

from __future__ import annotations

import hashlib
import math

import torch

from loraformat.errors import UsageError, printable
from loraformat.model.checkpoint import Checkpoint
from loraformat.train.lora.branch import Factors
from loraformat.train.lora.initialise_svd import loftq, pissa
from loraformat.train.lora.options import LoraOptions
from loraformat.train.lora.target_module import TargetModule

__all__ = ["initial", "seed_of"]


def seed_of(seed: int, name: str) -> int:
    """Return the seed of one module's factors.

    Examples
    --------
    >>> seed_of(0, "model.layers.0.mlp.up_proj") == seed_of(0, "model.layers.1.mlp.up_proj")
    False
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def initial(
    site: TargetModule, rank: int, options: LoraOptions, original: Checkpoint | None = None
) -> Factors:
    """Return the factors that a branch begins with.

    Parameters
    ----------
    site : TargetModule
    rank : int
    options : LoraOptions
        Its ``init``, ``seed`` and scaling.
    original : Checkpoint, optional
        The dense model that the base was quantized from, for ``loftq``.

    Returns
    -------
    Factors
        float32 on the CPU.

    Raises
    ------
    UsageError
        If the rank does not suit the way, or ``loftq`` lacks the original.
    """
    random = torch.Generator().manual_seed(seed_of(options.seed, site.name))
    if site.kind == "embedding":
        return Factors(
            torch.zeros(rank, site.in_features),
            torch.randn(site.out_features, rank, generator=random),
        )
    if options.init == "pissa":
        return pissa(site, rank, options.scaling(rank), random.initial_seed())
    if options.init == "loftq" and site.quantized:
        found = loftq(site, rank, options.scaling(rank), random.initial_seed(), original)
        if found is not None:
            return found
    return _random(site, rank, options.init, random)


def _random(site: TargetModule, rank: int, way: str, random: torch.Generator) -> Factors:
    leading = (site.experts,) if site.experts else ()
    a_shape = (*leading, rank, site.in_features)
    b_shape = (*leading, site.out_features, rank)
    if way == "orthogonal":
        return _orthogonal(site, a_shape, b_shape, random)
    if way == "gaussian":
        a = torch.randn(a_shape, generator=random) / rank
    else:
        a = (torch.rand(a_shape, generator=random) * 2 - 1) / math.sqrt(site.in_features)
    return Factors(a, torch.zeros(b_shape))


def _orthogonal(
    site: TargetModule, a_shape: tuple[int, ...], b_shape: tuple[int, ...], random: torch.Generator
) -> Factors:
    """Return factors through two halves of one orthonormal basis of the inner space.

    The constants are PEFT's.
    """
    *leading, rank, _ = a_shape
    if rank % 2:
        raise UsageError(
            f"init orthogonal halves the rank, and that of {printable(site.name)} is {rank}",
            hint="give an even rank",
        )
    basis = torch.linalg.qr(torch.randn(*leading, rank, rank, generator=random)).Q
    right = torch.randn(*leading, rank // 2, a_shape[-1], generator=random)
    left = torch.randn(*leading, b_shape[-2], rank // 2, generator=random)
    a = basis[..., 0::2, :].mT @ right / 10
    b = left @ basis[..., 1::2, :] / 10
    return Factors(a.contiguous(), b.contiguous())
