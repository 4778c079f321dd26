"""Timing a child process: wall, CPU, and its peak of anonymous memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

__all__ = ["Cost", "machine", "median_cost", "run_program", "run_python"]

_SAMPLE_SECONDS = 0.01


@dataclass(frozen=True)
class Cost:
    """What a process took.

    Attributes
    ----------
    wall, cpu : float
        Seconds; CPU is user and system time of all threads.
    anonymous : int
        Peak resident anonymous memory in bytes, sampled every 10 ms.
    resident : int
        Peak resident memory in bytes, mapped file pages included: the kernel's high-water mark
        as last seen. (``ru_maxrss`` would begin at the size of the process that starts it.)
    """

    wall: float
    cpu: float
    anonymous: int
    resident: int

    def to_json(self) -> dict[str, float]:
        """Return the members."""
        return asdict(self)


def run_python(arguments: Sequence[str]) -> Cost:
    """Run ``python ARGUMENTS`` and measure it; see `run_program`."""
    return run_program([sys.executable, *arguments])


def run_program(command: Sequence[str]) -> Cost:
    """Run a program and measure it.

    Raises
    ------
    RuntimeError
        If it fails; with what it printed.
    """
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    anonymous, resident = [0], [0]
    sampler = threading.Thread(target=_sample, args=(child, anonymous, resident), daemon=True)
    sampler.start()
    assert child.stdout is not None
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(output.decode(errors="replace")[-2000:])
    return Cost(wall, usage.ru_utime + usage.ru_stime, anonymous[0], resident[0])


def _sample(child: subprocess.Popen[bytes], anonymous: list[int], resident: list[int]) -> None:
    status = Path(f"/proc/{child.pid}/status")
    while child.returncode is None:
        try:
            for line in status.read_text().splitlines():
                for field, peak in (("RssAnon:", anonymous), ("VmHWM:", resident)):
                    if line.startswith(field):
                        peak[0] = max(peak[0], int(line.split()[1]) * 1024)
        except OSError:
            return
        time.sleep(_SAMPLE_SECONDS)


def median_cost(costs: Sequence[Cost]) -> Cost:
    """Return the median of times and the maximum of memory."""
    return Cost(
        median(cost.wall for cost in costs),
        median(cost.cpu for cost in costs),
        max(cost.anonymous for cost in costs),
        max(cost.resident for cost in costs),
    )


def machine() -> dict[str, str | int]:
    """Return what a reader of the figures must know about this machine."""
    import platform

    import torch

    model = "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
