"""What `loraformat.train` offers, and what importing it does to the process."""

import os
import subprocess
import sys

import pytest

import loraformat.train


@pytest.mark.parametrize("name", loraformat.train.__all__)
def test_every_name_is_there_under_its_own_name(name):
    assert getattr(loraformat.train, name).__name__ == name


@pytest.mark.parametrize(
    ("before", "given", "policy"),
    [
        ("", {}, "PASSIVE"),
        ("", {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
        # torch has read the variable by then; what it says would be said too late.
        ("sys.modules['torch'] = None", {}, None),
    ],
)
def test_threads_that_wait_sleep_where_it_can_still_be_said(before, given, policy):
    code = f"import os, sys; {before}\nimport loraformat.train\n"
    code += "print(os.environ.get('OMP_WAIT_POLICY'), sys.modules.get('torch'))"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment | given, capture_output=True, text=True
    )
    assert found.stdout == f"{policy} None\n", found.stderr
