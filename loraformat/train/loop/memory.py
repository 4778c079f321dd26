"""What the process holds in memory."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

__all__ = ["available", "held", "peak", "resident"]


def resident() -> int:
    """Return the bytes of memory that this process has now, mapped pages included."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:  # no Linux
        return peak()
    return int(pages) * os.sysconf("SC_PAGESIZE")


def peak() -> int:
    """Return the most bytes of memory that this process ever had.

    Linux's ``ru_maxrss`` would begin at the size of the process that started this one.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def held(device: str) -> int:
    """Return the bytes that are in use where the model computes."""
    if device.startswith("cuda"):
        return int(torch.cuda.memory_allocated(torch.device(device)))
    return resident()


def available(device: str) -> int | None:
    """Return the bytes that a device has left, or None if it does not say."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
