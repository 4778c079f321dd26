"""P7 at random: fifty times kill -9; and two ranks that are stopped."""

import shutil
import tempfile
from pathlib import Path

import pytest

FORKS = Path(__file__).with_name("forks.py")


@pytest.fixture
def work(tmp_path):
    """In memory where there is such a place: a kill does not ask for the disk."""
    memory = Path("/dev/shm")
    # New whatever a test that was itself killed has left there: its runs would be gone on with.
    directory = Path(
        tempfile.mkdtemp(prefix="loraformat-", dir=memory if memory.is_dir() else tmp_path)
    )
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def run(start, *arguments, said=""):
    process = start(
        FORKS, *arguments, cwd=FORKS.parents[3], env={"OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    )
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert said in err
    return out


def test_fifty_kills(start, place, work):
    out = run(start, "kills", place, work, "50")
    assert out.startswith("50 kills, ")
    assert int(out.split()[2]) >= 3


def test_two_ranks_stop_together_and_go_on(start, place, work):
    assert run(start, "ranks", place, work) == "two ranks stopped and went on\n"


def test_a_rank_that_is_lost_is_not_waited_for(start, place, work):
    run(start, "lost", place, work, said="LoraFormatError: another process of this run has ended")
