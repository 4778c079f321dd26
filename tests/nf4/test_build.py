"""The build hook: with a compiler, without one, and as an editable install. No network."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "loraformat"
version = "0"
requires-python = ">=3.10"
[tool.hatch.build.targets.wheel]
packages = ["loraformat"]
[tool.hatch.build.hooks.custom]
path = "hatch_build.py"
"""
PROGRAM = """\
import numpy
from loraformat.nf4 import kernels, codec
q = codec.quantize(numpy.linspace(-1, 1, 1000, dtype="f4"))
print(kernels.active().name, sum(q.packed.tolist()), kernels.__file__)
"""


@pytest.fixture
def tree(tmp_path):
    """The package in a project of its own, never compiled before."""
    root = tmp_path / "tree"
    leave = shutil.ignore_patterns("_nf4.*", "__pycache__", "demo")
    shutil.copytree(ROOT / "loraformat", root / "loraformat", ignore=leave)
    shutil.copy(ROOT / "hatch_build.py", root)
    (root / "pyproject.toml").write_text(PACKAGE)
    (root / ".gitignore").write_text("*.so\n*.dylib\n*.dll\n")
    return root


def hatch(tree, target, compiler):
    environment = os.environ | ({"CC": compiler} if compiler else {})
    if not compiler:
        environment.pop("CC", None)
    build = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", "dist"]
    done = subprocess.run(build, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    made = list((tree / "dist").iterdir())
    assert len(made) == 1
    return made[0], done.stdout + done.stderr


def imported(path):
    """Import from `path`, which is also the working directory and so comes first."""
    command = [sys.executable, "-c", PROGRAM]
    environment = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run(
        command, cwd=path, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_wheel_with_a_compiler(tree, tmp_path):
    wheel, said = hatch(tree, "wheel", None)
    assert "py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    assert "not compiled" not in said
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    kernel, total, where = imported(tmp_path / "site")
    assert kernel != "numpy" and where.startswith(str(tmp_path / "site"))
    assert "Root-Is-Purelib: false" in next((tmp_path / "site").glob("*/WHEEL")).read_text()
    assert int(total) > 0


@pytest.mark.parametrize("compiler", ["/bin/false", "/nowhere/cc"])
def test_wheel_without_a_compiler(tree, tmp_path, compiler):
    wheel, said = hatch(tree, "wheel", compiler)
    assert wheel.name == "loraformat-0-py3-none-any.whl"
    assert said.count("not compiled, the numpy fallback will be used") == 1
    names = zipfile.ZipFile(wheel).namelist()
    assert "loraformat/nf4/kernels/nf4.c" in names
    assert not [name for name in names if name.endswith((".so", ".dylib", ".dll"))]
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert imported(tmp_path / "site")[0] == "numpy"


def test_both_wheels_compute_the_same(tree, tmp_path):
    totals = set()
    for compiler in (None, "/bin/false"):
        wheel, _ = hatch(tree, "wheel", compiler)
        zipfile.ZipFile(wheel).extractall(tmp_path / str(compiler is None))
        totals.add(imported(tmp_path / str(compiler is None))[1])
        wheel.unlink()
    assert len(totals) == 1


def test_source_distribution_carries_the_c_files_only(tree):
    archive, said = hatch(tree, "sdist", "/bin/false")
    with tarfile.open(archive) as opened:
        names = [name.split("/", 1)[1] for name in opened.getnames()]
    assert "not compiled" not in said, "nothing is compiled for an sdist"
    kernels = {"loraformat/nf4/kernels/nf4.c", "loraformat/nf4/kernels/nf4.h"}
    assert {"hatch_build.py", *kernels} <= set(names)
    assert not [name for name in names if name.endswith(".so")]


def test_editable_install_finds_the_library_in_the_checkout(tree, tmp_path):
    program = "import hatchling.build; print(hatchling.build.build_editable('dist'))"
    (tree / "dist").mkdir()
    subprocess.run([sys.executable, "-c", program], cwd=tree, check=True, capture_output=True)
    (wheel,) = (tree / "dist").iterdir()
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (pth,) = (tmp_path / "site").glob("*.pth")
    assert pth.read_text().strip() == str(tree)
    kernel, _, where = imported(tree)
    assert kernel != "numpy" and where.startswith(str(tree))


def test_in_place(tree):
    command = [sys.executable, "hatch_build.py"]
    subprocess.run(command, cwd=tree, check=True)
    assert list((tree / "loraformat" / "nf4" / "kernels").glob("_nf4.*"))
    failing = os.environ | {"CC": "/bin/false"}
    done = subprocess.run(command, cwd=tree, env=failing, capture_output=True, text=True)
    assert done.returncode == 1 and "the C compiler failed (1)" in done.stderr
    assert not list((tree / "loraformat" / "nf4" / "kernels").glob("_nf4.*")), (
        "a stale library is removed"
    )
