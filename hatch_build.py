"""Build hook: compile the NF4 kernels into the package, where there is a C compiler.

Without one, or if it fails, the package installs all the same and computes the same numbers in
numpy, more slowly. ``python hatch_build.py`` compiles in place, for work in a checkout.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # ``python hatch_build.py`` needs no hatchling
    BuildHookInterface = object  # type: ignore[assignment, misc]

KERNELS = Path("loraformat", "nf4", "kernels")
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
LIBRARY = KERNELS / f"_nf4{SUFFIX}"
# No contraction into fused operations and no -ffast-math: every kernel computes the same bits.
FLAGS = ["-std=c99", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-shared"]


def compiler() -> list[str] | None:
    """Find the C compiler: ``$CC``, else cc, gcc or clang.

    Returns
    -------
    list of str or None
        The command and its own options.
    """
    chosen = os.environ.get("CC")
    if chosen:
        return shlex.split(chosen)
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    return None if found is None else [found]


def compile_kernels(root: Path) -> str | None:
    """Compile ``loraformat/nf4/kernels/*.c`` into one shared library beside them.

    Parameters
    ----------
    root : Path
        The directory of this file.

    Returns
    -------
    str or None
        Why there is no library, or None for success. A library from before is removed first.
    """
    (root / LIBRARY).unlink(missing_ok=True)
    command = compiler()
    if command is None:
        return "no C compiler found (cc, gcc, clang, or $CC)"
    flags = FLAGS if sys.platform == "win32" else [*FLAGS, "-fPIC"]
    sources = sorted(str(path) for path in (root / KERNELS).glob("*.c"))
    with tempfile.TemporaryDirectory(dir=root / KERNELS) as scratch:
        made = Path(scratch, LIBRARY.name)
        flags = [*flags, *shlex.split(os.environ.get("CFLAGS", "")), "-o", str(made)]
        try:
            done = subprocess.run([*command, *flags, *sources], capture_output=True, text=True)
        except OSError as error:
            return f"the C compiler could not be started: {error}"
        if done.returncode or not made.is_file():
            return f"the C compiler failed ({done.returncode}): {done.stderr.strip()[-2000:]}"
        made.replace(root / LIBRARY)
    return None


class KernelBuildHook(BuildHookInterface):  # type: ignore[type-arg, unused-ignore]
    """Adds the shared library to wheels and editable installs."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and tag the wheel for this platform if there is something to run on it.

        Parameters
        ----------
        version : str
            ``"standard"`` or ``"editable"``.
        build_data : dict
            hatchling's; changed in place.
        """
        if self.target_name != "wheel":
            return
        problem = compile_kernels(Path(self.root))
        if problem:
            self.app.display_warning(
                f"loraformat: NF4 kernels not compiled, the numpy fallback will be used: {problem}"
            )
            return
        if version == "editable":  # reads the library in the checkout
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag()}"
        build_data["force_include"][str(Path(self.root, LIBRARY))] = LIBRARY.as_posix()


def platform_tag() -> str:
    """Name the platform as wheel file names do.

    Returns
    -------
    str
        For example ``"linux_x86_64"``.
    """
    name = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return name.replace("universal2", platform.machine())  # the compiler makes one architecture


def get_build_hook() -> type[KernelBuildHook]:
    """Hand the hook to hatchling, which finds a second class in this module otherwise.

    Returns
    -------
    type
        `KernelBuildHook`.
    """
    return KernelBuildHook


if __name__ == "__main__":
    failure = compile_kernels(Path(__file__).resolve().parent)
    if failure:
        sys.exit(f"hatch_build.py: {failure}")
