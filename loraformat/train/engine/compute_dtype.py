"""The compute dtype of a model: which one is asked for, and which one this CPU is fastest in.

The factors of products with the base have the compute dtype. With float32 a step is that of a
dense float32 model to rounding. With bfloat16 activations are bfloat16, too, as in a model that
transformers opens in it: each product is off by about 2⁻⁹ of its size, memory for activations is
halved, and where a CPU multiplies bfloat16 in hardware it is two to three times as fast; where it
does not, many times slower. float16 holds too little for activations: they stay float32.

Trained parameters, their gradients and their optimizer states are float32 whatever is chosen, and
so are sums over tiles, softmax and loss.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from loraformat.errors import UsageError

__all__ = ["DTYPES", "activation_dtype", "choose_dtype", "cpu_features", "multiplies_bfloat16"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose_dtype(wanted: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """Return the compute dtype: None is float32 on a CPU, bfloat16 on a GPU.

    ``"fastest"`` is bfloat16 on a CPU, too, where that is faster; it is known by the processor, not
    measured, so that a run that is resumed does not change its mind.

    Raises
    ------
    UsageError
        If it is another type.

    Examples
    --------
    >>> choose_dtype(None, torch.device("cpu"))
    torch.float32
    """
    if wanted is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if wanted == "fastest":
        fast = device.type != "cpu" or multiplies_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    if wanted not in DTYPES or isinstance(wanted, str):
        raise UsageError(f"compute dtype {wanted}: wanted float32, bfloat16 or float16")
    return wanted


def activation_dtype(compute: torch.dtype) -> torch.dtype:
    """Return the type of hidden states, norms and biases for a type of factors.

    Examples
    --------
    >>> activation_dtype(torch.bfloat16), activation_dtype(torch.float16)
    (torch.bfloat16, torch.float32)
    """
    return torch.bfloat16 if compute == torch.bfloat16 else torch.float32


def multiplies_bfloat16() -> bool:
    """Tell whether bfloat16 products are faster than float32 ones on this CPU.

    They are with Intel's AMX, and with AVX512-BF16 on AMD (2.3 times, measured on Zen); on
    Intel's cores without AMX the same instructions run at half the rate, and lose.
    """
    words = cpu_features()
    return "amx_bf16" in words or {"avx512_bf16", "AuthenticAMD"} <= words


@cache
def cpu_features() -> frozenset[str]:
    """Return the words that Linux says of the first processor: its maker, its flags, and more.

    Empty elsewhere.

    Examples
    --------
    >>> "no such flag" in cpu_features()
    False
    """
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return frozenset()
    return frozenset(cpuinfo.read_text().split("\n\n")[0].split())
