"""What a process may still take: of the machine, of its control group, of its own limit."""

import resource

import pytest

from loraformat.train.loop import memory


@pytest.fixture
def left(monkeypatch):
    """Sets what each of the three leaves."""

    def set_to(machine=None, group=None, process=None):
        monkeypatch.setattr(memory, "_of_machine", lambda: machine)
        monkeypatch.setattr(memory, "_of_group", lambda: group)
        monkeypatch.setattr(memory, "_of_process", lambda: process)

    return set_to


def test_the_least_counts(left):
    left(machine=30, group=20, process=None)
    assert memory.available("cpu") == 20
    left(machine=30, process=-5)
    assert memory.available("cpu") == 0
    left()
    assert memory.available("cpu") is None and memory.spare(1, "cpu") == 0


def test_half_of_what_the_cached_base_leaves_is_shared_by_the_ranks(left, monkeypatch):
    left(machine=1000)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert memory.spare(400, "cpu") == 300
    assert memory.spare(2000, "cpu") == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert memory.spare(400, "cpu") == 100


def test_control_groups_from_the_inside_out(tmp_path, monkeypatch):
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.setattr(memory, "_own_group", lambda: "outer/inner")
    assert memory._of_group(tmp_path) is None

    def write(folder, limit, used, cached):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")

    write(inner, "max", 900, 0)
    assert memory._of_group(tmp_path) is None
    write(inner.parent, 1000, 900, 50)
    assert memory._of_group(tmp_path) == 150
    write(inner, 200, 190, 0)
    assert memory._of_group(tmp_path) == 10


def test_the_process_s_own_limit():
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    assert memory._of_process() is None or limits[0] != resource.RLIM_INFINITY
    used = memory._kilobytes(memory.Path("/proc/self/status"), "VmData:")
    resource.setrlimit(resource.RLIMIT_DATA, (used + (1 << 30), limits[1]))
    try:
        assert 0.9 * (1 << 30) < memory._of_process() <= 1 << 30
        assert memory.available("cpu") <= 1 << 30
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def test_of_this_machine():
    assert memory._of_machine() > 1 << 20
