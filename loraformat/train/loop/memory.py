"""Memory of this process and of the machine."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

__all__ = ["available", "held", "peak", "resident", "resident_of", "spare"]


def resident() -> int:
    """Return the bytes of memory that this process has now, mapped pages included."""
    found = resident_of(os.getpid())
    return peak() if found is None else found


def resident_of(process: int) -> int | None:
    """Return the bytes of memory that a process has now, by its number; None if unknown."""
    try:
        pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    except OSError:  # no Linux, or no such process
        return None
    return int(pages) * os.sysconf("SC_PAGESIZE")


def peak() -> int:
    """Return the most bytes of memory that this process ever had.

    Linux's ``ru_maxrss`` would begin at the size of the process that started this one.
    """
    found = _kilobytes(Path("/proc/self/status"), "VmHWM:")
    if found is not None:
        return found
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def held(device: str) -> int:
    """Return the bytes that are in use where the model computes."""
    if device.startswith("cuda"):
        return int(torch.cuda.memory_allocated(torch.device(device)))
    return resident()


def available(device: str) -> int | None:
    """Return the bytes that a device has left, or None if it does not say.

    Of the CPU's memory: what the machine has left, or this process's control group, or its limit
    on data (RLIMIT_DATA), whichever is least.
    """
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    left = [found for found in (_of_machine(), _of_group(), _of_process()) if found is not None]
    return max(0, min(left)) if left else None


def spare(base_bytes: int, device: str) -> int:
    """Return the bytes that a process may take for speed alone.

    On a CPU half of what would be left if all of the mapped base were in the page cache, shared
    with the other processes of a run on this machine; on a GPU half of what is free there.
    """
    left = available(device)
    if left is None:
        return 0
    if device.startswith("cuda"):
        return left // 2
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, left - base_bytes) // 2 // max(1, processes)


def _of_machine() -> int | None:
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable:")


def _of_process() -> int | None:
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    used = _kilobytes(Path("/proc/self/status"), "VmData:")
    return None if limit == resource.RLIM_INFINITY or used is None else limit - used


def _of_group(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return what the innermost control groups (version 2) that have a limit leave."""
    path = _own_group()
    if path is None:
        return None
    left = None
    group = root / path
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root):
            break
        try:
            limit = int((folder / "memory.max").read_text())
            cached = _field(folder / "memory.stat", "inactive_file")
            here = limit - int((folder / "memory.current").read_text()) + cached
        except (OSError, ValueError):  # no limit ("max"), or no such file
            continue
        left = here if left is None else min(left, here)
    return left


def _own_group() -> str | None:
    """Return the path of this process's control group below the root of all."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    return next((line[3:].strip("/") for line in lines if line.startswith("0::")), None)


def _field(path: Path, name: str) -> int:
    """Return a number of a file of names and numbers, 0 if it is not there."""
    for line in path.read_text().splitlines():
        words = line.split()
        if words[0] == name:
            return int(words[1])
    return 0


def _kilobytes(path: Path, name: str) -> int | None:
    """Return a size in bytes from a file of proc, which says kB."""
    try:
        return _field(path, name) * 1024 or None
    except OSError:
        return None
