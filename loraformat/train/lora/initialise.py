"""Initial factors of a branch.

Every way leaves the base as it is stored, and is written as a plain adapter on it:

- ``kaiming`` (PEFT's default): A uniform in ±1/√in (He 2015 with a = √5), B zero;
- ``gaussian``: A normal with standard deviation 1/r, B zero;
- ``orthogonal``: A and B both nonzero, in row spaces that do not meet: B A = 0;
- ``pissa`` (Meng 2024): B₀ A₀ = the best approximation of W of the rank, over the scaling. Training
  moves B A from there while W − s · B₀ A₀ stays; what is written is B A − B₀ A₀ on W itself;
- ``loftq`` (Li 2023), one step of it: s · B A = the best approximation of the rank of the
  quantization error, W_original − W. More steps would quantize again, and so change the base.

Under the first four the model computes at step 0 what the base does; under ``loftq`` it is nearer
to the model that was quantized. An embedding always begins as PEFT's: A zero, B normal.

``pissa`` and ``loftq`` need the leading singular parts of a matrix that is seen tile by tile:
`loraformat.algebra.subspace.block_krylov`, a few passes, no dense weight kept above 256 MiB.

Random numbers depend on the seed and the module's name, so that a module begins alike whatever
else is trained, and in whatever order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy
import torch

from loraformat.algebra.subspace import block_krylov, held, working_bytes
from loraformat.errors import InputError, UnsupportedError, UsageError, printable
from loraformat.model.checkpoint import Checkpoint, DenseTensor
from loraformat.tensors.arrays import Array
from loraformat.tensors.torch_arrays import array_of, tensor_of
from loraformat.train.lora.branch import Factors
from loraformat.train.lora.options import LoraOptions
from loraformat.train.lora.target_modules import TargetModule

__all__ = ["initial", "loftq", "pissa", "svd_bytes"]

_Tiles = Callable[[], Iterator[tuple[int, torch.Tensor]]]

#: Share of a weight's norm that no quantizing to NF4 loses; it is about 0.09.
_LOST_AT_MOST = 0.5
#: Most of a tile that a target gives (bytes), and how many there are at once: LoftQ's difference
#: has tiles of its own, and its norms are added up in float64.
_TILE = 16 << 20
_TILES = {"pissa": 1, "loftq": 6}
#: LAPACK's, and what the allocator keeps (bytes).
_WORKSPACE = 16 << 20


def initial(
    target: TargetModule, rank: int, options: LoraOptions, original: Checkpoint | None = None
) -> Factors:
    """Return the factors that a branch begins with: float32, on the CPU.

    `original` is the dense model that the base was quantized from, for ``loftq``.

    Raises
    ------
    UsageError
        If the rank does not suit the way, or ``loftq`` lacks the original.
    """
    digest = hashlib.sha256(f"{options.seed}:{target.name}".encode()).digest()
    random = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if target.kind == "embedding":
        return Factors(
            torch.zeros(rank, target.in_features),
            torch.randn(target.out_features, rank, generator=random),
        )
    if options.init == "pissa":
        return pissa(target, rank, options.scaling(rank), random.initial_seed())
    if options.init == "loftq" and target.quantized:
        found = loftq(target, rank, options.scaling(rank), random.initial_seed(), original)
        if found is not None:
            return found
    return _random(target, rank, options.init, random)


def _random(target: TargetModule, rank: int, way: str, random: torch.Generator) -> Factors:
    leading = (target.experts,) if target.experts else ()
    a_shape = (*leading, rank, target.in_features)
    b_shape = (*leading, target.out_features, rank)
    if way == "orthogonal":
        return _orthogonal(target, a_shape, b_shape, random)
    if way == "gaussian":
        a = torch.randn(a_shape, generator=random) / rank
    else:
        a = (torch.rand(a_shape, generator=random) * 2 - 1) / math.sqrt(target.in_features)
    return Factors(a, torch.zeros(b_shape))


def _orthogonal(
    target: TargetModule,
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    random: torch.Generator,
) -> Factors:
    """Return factors through two halves of one orthonormal basis of the inner space.

    The constants are PEFT's.
    """
    *leading, rank, _ = a_shape
    if rank % 2:
        raise UsageError(
            f"init orthogonal halves the rank, and that of {printable(target.name)} is {rank}",
            hint="give an even rank",
        )
    basis = torch.linalg.qr(torch.randn(*leading, rank, rank, generator=random)).Q
    right = torch.randn(*leading, rank // 2, a_shape[-1], generator=random)
    left = torch.randn(*leading, b_shape[-2], rank // 2, generator=random)
    a = basis[..., 0::2, :].mT @ right / 10
    b = left @ basis[..., 1::2, :] / 10
    return Factors(a.contiguous(), b.contiguous())


def svd_bytes(target: TargetModule, rank: int, init: str) -> int:
    """Return what finding the factors of one module takes at its peak, besides them (bytes).

    0 for others than ``pissa`` and ``loftq``, and where these begin at random.
    """
    at_random = target.kind == "embedding" or (init == "loftq" and not target.quantized)
    if init not in _TILES or at_random:
        return 0
    rows, columns = target.out_features, target.in_features
    matrix = 4 * rows * columns
    taken = working_bytes((rows, columns), rank) + _TILES[init] * min(_TILE, matrix) + _WORKSPACE
    if init == "loftq":
        return taken + matrix  # the original's, mapped, which has 4 bytes a number at most
    return taken + 4 * target.experts * rank * (rows + columns)  # before they are one tensor


def pissa(target: TargetModule, rank: int, scaling: float, seed: int) -> Factors:
    """Return the principal parts of a weight as trained factors, and as fixed ones to take off.

    The product of the factors is the weight's part over `scaling`; `seed` is that of the random
    start.

    Raises
    ------
    UsageError
        If the rank is higher than the weight's can be.
    """
    _check_rank(target, rank)
    pairs = []
    for expert in range(target.experts or 1):
        pair = _leading(partial(_plain, target, expert), target, rank, scaling, seed)
        if pair is None:
            raise InputError(
                f"{printable(target.weight_name)} is zero: it has no principal directions"
            )
        pairs.append(pair)
    a, b = map(torch.stack, zip(*pairs, strict=True)) if target.experts else pairs[0]
    return Factors(a, b, (a.clone(), b.clone()))


def loftq(
    target: TargetModule, rank: int, scaling: float, seed: int, original: Checkpoint | None
) -> Factors | None:
    """Return the leading parts of what quantizing to NF4 lost; None if it lost nothing.

    Parameters as in `initial`; `original` is the model that was quantized.

    Raises
    ------
    UsageError
        If it is not given, or the rank is too high.
    InputError
        If it has no such weight, one of another shape, or one that this is not made of.
    """
    if original is None:
        raise UsageError(
            "init loftq corrects what quantizing lost, and needs the model that was quantized",
            hint="give the dense model (--original), or choose another init",
        )
    _check_rank(target, rank)
    if target.experts:
        raise UnsupportedError(
            f"init loftq cannot be used for the experts {printable(target.name)}",
            hint="target the other linears, or choose another init",
        )
    tensor = _original(target, original)
    try:
        weight = tensor_of(tensor.array())
        weight = weight.T if target.transposed else weight
        _check_same(target, weight, original)
        pair = _leading(partial(_lost, target, weight), target, rank, scaling, seed)
    finally:
        tensor.release()
    return None if pair is None else Factors(*pair)


def _check_rank(target: TargetModule, rank: int) -> None:
    most = min(target.in_features, target.out_features)
    if rank > most:
        raise UsageError(
            f"{printable(target.name)} is {target.out_features} x {target.in_features}: it has "
            f"{most} principal directions, not {rank}",
            hint="give a lower rank, or another init",
        )


def _plain(target: TargetModule, expert: int) -> Iterator[tuple[int, torch.Tensor]]:
    for first, _, tile in target.tiles(expert):
        yield first, tile


def _original(target: TargetModule, original: Checkpoint) -> DenseTensor:
    tensor = original.tensors.get(target.weight_name)
    shape = (target.out_features, target.in_features)
    wanted = shape[::-1] if target.transposed else shape
    if tensor is None:
        problem = "is not there"
    elif not isinstance(tensor, DenseTensor):
        problem = "is quantized"
    elif tensor.shape != wanted:
        problem = f"is {list(tensor.shape)}, wanted {list(wanted)}"
    else:
        return tensor
    raise InputError(
        f"{printable(target.weight_name)} {problem}",
        path=original.path,
        hint="init loftq needs the dense model that the base was quantized from",
    )


def _check_same(target: TargetModule, weight: torch.Tensor, original: Checkpoint) -> None:
    """Refuse another model of the same shapes: its difference is no error of quantizing."""
    lost = sum(float(tile.double().square().sum()) for _, tile in _lost(target, weight))
    stored = sum(float(tile.double().square().sum()) for _, _, tile in target.tiles(0))
    if lost > _LOST_AT_MOST**2 * stored:
        share = (lost / stored) ** 0.5 if stored else torch.inf
        raise InputError(
            f"{printable(target.weight_name)} is not the weight that was quantized: it differs by "
            f"{share:.0%} of its norm",
            path=original.path,
            hint="give the model that the bundle was converted from",
        )


def _lost(target: TargetModule, weight: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield tiles of the original weight minus what is stored."""
    for first, last, tile in target.tiles(0):
        yield first, weight[first:last].to(tile) - tile


def _leading(
    tiles: _Tiles, target: TargetModule, rank: int, scaling: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return A and B with s · B A the leading part; None if there is nothing."""
    shape = (target.out_features, target.in_features)

    def arrays() -> Iterator[tuple[int, Array]]:
        return ((first, array_of(tile.cpu())) for first, tile in tiles())

    try:
        found = block_krylov(held(arrays, shape), shape, rank, seed=seed)
    except numpy.linalg.LinAlgError:
        raise InputError(
            f"{printable(target.weight_name)} has no singular values: it holds NaN or infinity"
        ) from None
    if not found.squared_norm:
        return None
    b, a = map(tensor_of, found.factors(rank))
    return a / scaling**0.5, b / scaling**0.5
