"""Runs that are killed, and runs of two ranks, as forks of one process that has loaded everything.

::

    python forks.py kills PLACE WORK COUNT     kill -9 so many runs at random
    python forks.py ranks PLACE WORK           stop two ranks with Ctrl-C, and go on
    python forks.py lost PLACE WORK            kill one of two ranks

A process of its own, since a fork must have one thread.
"""

import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # which torch's optimizers load at their first step

from loraformat.train.run.train import train
from tests.train.loop import tiny_runs

#: So that runs end, too, on a machine that others make slower meanwhile.
MOST_KILLS_OF_A_RUN = 12

FILES = ("adapter_model.safetensors", "activation_statistics.safetensors", "adapter_config.json",
         "training_record.json")  # fmt: skip


def forked(work, **environment):
    """Start work in a child; its process number is returned."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update({name: str(value) for name, value in environment.items()})
        work()
        code = 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def ended(*children):
    """Wait for children, and return their exit codes; minus the signal for one that was killed."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def run(place, directory, observe=lambda event: None, **changes):
    """A tiny run from its newest checkpoint, in a directory of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    os.chdir(directory)
    torch.set_num_threads(1)
    options = tiny_runs.options(
        place / "bundle", place / "data.jsonl", Path("adapter"), **{"save_every": 2, **changes}
    )
    train(options, resume=True, observe=observe)


def hold(one, other):
    """Hold a run's files against another's."""
    for name in FILES:
        assert (one / "adapter" / name).read_bytes() == (other / "adapter" / name).read_bytes(), (
            name
        )
    assert losses(one) == losses(other)


def losses(directory):
    from loraformat.train.loop.metrics import read_metrics

    return [line["loss"] for line in read_metrics(directory / "adapter.run" / "metrics.jsonl")]


def kills(place, work, count):
    """Kill runs at random times until so many were hit; each that ends is held to a whole one."""
    begun = time.monotonic()
    assert ended(forked(lambda: run(place, work / "whole", epochs=1))) == [0]
    longest = time.monotonic() - begun
    chance = random.Random(0)
    done, survived = 0, [0]
    while done < count or survived[-1]:
        child = forked(lambda: run(place, work / "killed", epochs=1))
        if done < count and survived[-1] < MOST_KILLS_OF_A_RUN:
            time.sleep(chance.uniform(0.1 * longest, longest))
            os.kill(child, signal.SIGKILL)
        (code,) = ended(child)
        assert code in (0, -signal.SIGKILL), code
        if code:
            done, survived[-1] = done + 1, survived[-1] + 1
        else:
            hold(work / "killed", work / "whole")
            shutil.rmtree(work / "killed")
            survived.append(0)
    print(f"{sum(survived)} kills, {len(survived) - 1} whole runs")


def pair(place, directory, observe=lambda event: None):
    """Two ranks, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        forked(
            lambda: run(place, directory, observe, epochs=3, grad_accum=1, save_every=None),
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE=2,
            MASTER_ADDR="localhost",
            MASTER_PORT=port,
        )
        for rank in range(2)
    ]


def ranks(place, work):
    """Stop one of two ranks: both save the same step; gone on, they come to the same bytes."""

    def stop(event):
        if event["event"] == "step" and event["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    assert ended(*pair(place, work / "whole")) == [0, 0]
    assert ended(*pair(place, work / "stopped", stop)) == [130, 130]
    saved = [path.name for path in (work / "stopped" / "adapter.run" / "checkpoints").iterdir()]
    assert saved == ["step-00000005"], saved
    assert ended(*pair(place, work / "stopped")) == [0, 0]
    hold(work / "stopped", work / "whole")
    print("two ranks stopped and went on")


def lost(place, work):
    """Kill the second of two ranks: the first says that it waits for nobody."""

    def die(event):
        if event["event"] == "step" and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    first, second = pair(place, work, die)
    assert ended(first, second) == [1, -signal.SIGKILL]


if __name__ == "__main__":
    wanted, where, there, *rest = sys.argv[1:]
    if wanted == "kills":
        kills(Path(where), Path(there), int(rest[0]))
    else:
        {"ranks": ranks, "lost": lost}[wanted](Path(where), Path(there))
