"""``loraformat.train`` and ``loraformat.demo`` are packages, and are called as their verbs."""

import inspect
import subprocess
import sys

import pytest

import loraformat
from loraformat.demo.pipeline import demo
from loraformat.train.run.verbs import train

FUNCTIONS = {"train": train, "demo": demo}
IMPORTS = {
    "train": "from loraformat.train import load",
    "demo": "from loraformat.demo import ADAPTERS",
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_package_has_the_signature_of_its_verb(name):
    assert inspect.signature(getattr(loraformat, name)) == inspect.signature(FUNCTIONS[name])


@pytest.mark.parametrize("first", ["", "import"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_is_called_before_and_after_its_package_is_imported(name, first):
    program = (
        f"import loraformat\n{first and IMPORTS[name]}\n"
        f"try:\n    loraformat.{name}(no_such_option=1)\n"
        f"except TypeError as error:\n    print(error)\n{IMPORTS[name]}\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{name}() ")


def test_former_names_of_formats_are_taken(tmp_path):
    report = loraformat.convert(
        loraformat.demo.SMALL_MODEL, tmp_path / "out", to_format="safetensors", dry_run=True
    )
    assert report.target_format == "safetensors"
