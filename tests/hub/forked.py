"""The command line in a process of its own that need not import torch again.

A server of forks imports the heavy packages once; each command runs in a fresh child of it,
in which huggingface_hub is imported anew and reads its environment.
"""

import multiprocessing
import os
import sys
from types import SimpleNamespace

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.hub.preloaded"])
_SECONDS = 100


def child(arguments, directory, environment, prefix):
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{prefix}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    from loraformat.cli import main

    main(list(arguments))


def start(arguments, directory, environment, prefix):
    process = CONTEXT.Process(
        target=child, args=([*map(str, arguments)], str(directory), environment, str(prefix))
    )
    process.start()
    return process


def finish(process, prefix):
    process.join(_SECONDS)
    if process.is_alive():
        process.kill()
        raise AssertionError("the command did not end")
    texts = {}
    for name in ("out", "err"):
        with open(f"{prefix}.{name}", encoding="utf-8") as file:  # noqa: PTH123
            texts[name] = file.read()
    return SimpleNamespace(returncode=process.exitcode, stdout=texts["out"], stderr=texts["err"])
