"""Kills a training run at random, again and again, until it is done; in a process of its own.

Everything is imported once; each run is a fork of this process, which has one thread.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path


def forked(work):
    """Start work in a child; the number of the process is returned."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def seconds_of(work):
    begun = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1]) == 0
    return time.monotonic() - begun


def kill_at_random(work, kills, longest, *, seed, ended):
    """Kill so many children after random times; whenever one ends before that, look and begin anew.

    ``ended`` is called with each run's number of kills.
    """
    chance = random.Random(seed)
    done = survived = 0
    while done < kills:
        child = forked(work)
        time.sleep(chance.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), status
        if status:
            done, survived = done + 1, survived + 1
        else:
            ended(survived)
            survived = 0
    seconds_of(work)
    ended(survived)


def fake_run(directory):
    """A run of the fake model, from its newest checkpoint."""
    from loraformat.train import saved_state
    from tests.train.loop.fakes import FakeModel
    from tests.train.loop.test_loop import make

    directory.mkdir(parents=True, exist_ok=True)
    found, problems = saved_state.newest(directory / "checkpoints")
    assert problems == []
    model = FakeModel()
    loop = make(directory, model=model, checkpoint=found, loop={"steps": 40, "save_every": 3})
    loop.run()
    model.save_adapter(directory / "adapter", force=True)


def check(where, name, kept):
    """Hold the killed run's files against the whole run's, and clear the place."""
    for file in kept:
        one, other = (where / run / file for run in ("whole", name))
        assert one.read_bytes() == other.read_bytes(), file
    shutil.rmtree(where / name)


def main():
    where, kills = Path(sys.argv[1]), int(sys.argv[2])
    import torch

    import tests.train.loop.test_loop  # noqa: F401

    torch.set_num_threads(1)
    fake_run(where / "warm")  # here, so that children need not load what it loads
    longest = seconds_of(lambda: fake_run(where / "whole"))
    survived = []

    def ended(count):
        check(where, "killed", ["adapter/a.safetensors"])
        survived.append(count)

    kill_at_random(lambda: fake_run(where / "killed"), kills, longest, seed=0, ended=ended)
    print(f"{sum(survived)} kills, {len(survived)} runs, at most {max(survived)} in one")


if __name__ == "__main__":
    main()
