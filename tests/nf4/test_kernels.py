"""Choosing a kernel, threads, and the kernels of other processors under emulation."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import numpy
import pytest
import torch

from loraformat.errors import UsageError
from loraformat.nf4 import kernels
from loraformat.nf4.kernels import native, threads
from loraformat.nf4.kernels.tables import tables
from loraformat.tensors.torch_arrays import tensor_of
from tests import torch_codec as codec

HERE = Path(__file__).parent
SOURCES = Path(kernels.__file__).parent
PROGRAM = "from loraformat.nf4 import kernels; print(kernels.active().name)"


def run(choice, program=PROGRAM):
    environment = os.environ | {kernels.VARIABLE: choice, "PYTHONPATH": str(SOURCES.parents[1])}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_this_checkout_has_its_library():
    """Run ``python hatch_build.py`` if it has not; where there is no compiler, this must fail."""
    assert native.supported()[:1] == ("scalar",)


@pytest.mark.parametrize("choice", kernels.available())
def test_forced_by_the_environment(choice):
    done = run(choice)
    assert (done.returncode, done.stdout.strip()) == (0, choice), done.stderr


def test_a_kernel_keeps_its_tables():
    """Threads that ask for the first kernel at once make the tables twice."""
    kernel, other = native.NativeKernel("scalar"), numpy.arange(64, dtype=numpy.float32)
    tables.cache_clear()
    gc.collect()
    rubbish = [bytearray(40_000) for _ in range(100)]  # where the tables may have been
    packed, absmax = numpy.empty(32, numpy.uint8), numpy.empty(1, numpy.float32)
    assert kernel.quantize(other, 64, packed, absmax)
    assert rubbish and packed.tolist() == codec.quantize(tensor_of(other)).packed.tolist()


@pytest.mark.parametrize("choice", ["auto", "c", ""])
def test_default_is_the_fastest(monkeypatch, choice):
    monkeypatch.setenv(kernels.VARIABLE, choice)
    assert kernels.active().name == kernels.available()[-1]


@pytest.mark.parametrize("choice", sorted({"neon", "avx512"} - set(kernels.available())))
def test_what_the_cpu_lacks_is_refused(choice):
    with pytest.raises(UsageError, match=f"asks for the '{choice}' kernel"):
        kernels.get(choice)


def test_unknown_name_is_refused():
    with pytest.raises(UsageError, match="LORAFORMAT_KERNEL is 'sse', wanted one of auto, c,"):
        kernels.get("sse")


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_without_a_usable_library(monkeypatch, tmp_path, content):
    for cached in (native.library, kernels.get):
        cached.cache_clear()
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    if content:
        (tmp_path / "_nf4.so").write_bytes(content)
    warned = pytest.warns(RuntimeWarning, match="_nf4.so cannot be used")
    try:
        with warned if content else nullcontext():
            assert kernels.available() == ("numpy",)
        assert kernels.get("auto").name == "numpy"
        for choice in ("c", "scalar"):
            with pytest.raises(UsageError, match="has numpy; unset it"):
                kernels.get(choice)
    finally:
        for cached in (native.library, kernels.get):
            cached.cache_clear()


def test_a_library_of_another_version_is_told(monkeypatch):
    monkeypatch.setattr(native, "_INTERFACE", 0)
    with pytest.warns(RuntimeWarning, match="belongs to another version.*reinstall loraformat"):
        assert native.library.__wrapped__() is None


def test_pieces_cover_the_range_once():
    seen = torch.zeros(1000, dtype=torch.int32)

    def task(start, stop):
        seen[start:stop] += 1

    for count in (1, 3, 16):
        threads.run(task, 1000, 7, count)
    assert seen.tolist() == [3] * 1000
    threads.run(task, 0, 7, 4)


@pytest.mark.parametrize("bad", [0, 13])
def test_the_error_of_a_piece_comes_out(bad):
    def task(start, stop):
        if start == bad:
            raise ValueError(start)

    for count in (1, 4):
        with pytest.raises(ValueError, match=str(bad)):
            threads.run(task, 100, 1, count)


def test_threads_are_as_many_as_work_at_once(monkeypatch):
    monkeypatch.setattr(threads, "default_threads", lambda: 5)
    before = set(threading.enumerate())
    for count in (2, 3, 4, 5, 6, 2):
        threads.run(lambda start, stop: time.sleep(0.01), 12, 1, count)
    assert 0 < len(set(threading.enumerate()) - before) <= 5


def test_a_piece_may_have_pieces():
    program = (
        "from loraformat.nf4.kernels.threads import run\nfound = []\n"
        "inner = lambda start, stop: found.append(start)\n"
        "run(lambda start, stop: run(inner, 9, 1, 3), 60, 1, 3)\n"
        "print(len(found), sum(found))"
    )
    done = run("auto", program)
    assert done.stdout.split() == ["540", "2160"], done.stderr


@pytest.mark.parametrize("in_torch", [False, True])
def test_no_piece_is_at_work_after_an_error(in_torch, torch_threads):
    """Helpers finish the piece that they are at, and begin no other."""
    torch_threads(2)
    begun, ended, at_work = [], [], threading.Barrier(2, timeout=30)

    def task(start, stop):
        begun.append(start)
        if start < 2:
            at_work.wait()
        if start == 0:
            raise ValueError(start)
        time.sleep(0.05)
        ended.append(start)

    with pytest.raises(ValueError, match="0"):
        threads.run(task, 100, 1, 2, in_torch=in_torch)
    seen = len(begun)
    assert seen < 100 and len(ended) == seen - 1
    time.sleep(0.1)
    assert len(begun) == seen


@pytest.mark.skipif(os.name != "posix", reason="a signal comes between two instructions")
def test_no_other_piece_is_at_work_after_an_interruption(torch_threads):
    """The calling thread leaves its own where it is; the others finish theirs."""
    torch_threads(2)
    begun, ended, at_work = set(), set(), threading.Barrier(2, timeout=30)

    def task(start, stop):
        begun.add((threading.get_ident(), start))
        if start < 2:
            at_work.wait()
        if start == 0:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        ended.add((threading.get_ident(), start))

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            threads.run(task, 50, 1, 2, in_torch=True)
    finally:
        signal.signal(signal.SIGINT, before)
    seen = len(begun)
    assert seen < 50
    assert {thread for thread, _ in begun - ended} <= {threading.get_ident()}
    time.sleep(0.2)
    assert len(begun) == seen and torch.get_num_threads() == 2


def test_torch_has_its_threads_again(torch_threads):
    torch_threads(2)
    used = set()
    threads.run(lambda start, stop: used.add(torch.get_num_threads()), 50, 1, 2, in_torch=True)
    assert used == {1} and torch.get_num_threads() == 2


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_forked_child_has_its_own_threads():
    program = (
        "import os, numpy\nfrom loraformat.nf4 import codec\n"
        "x = numpy.random.default_rng(0).standard_normal(1 << 20, numpy.float32)\n"
        "a = codec.quantize(x, threads=4)\npid = os.fork()\n"
        "same = (codec.quantize(x, threads=4).packed == a.packed).all()\n"
        "if not pid: os._exit(0 if same else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), same)"
    )
    done = run("auto", program)
    assert done.stdout.split() == ["0", "True"], done.stderr


def machines():
    """C compilers with a way to run what they make: this machine, others where emulated."""
    found = {}
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler:
        found["native"] = ([compiler], [])
    cross, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if cross and emulator:
        found["aarch64"] = ([cross, "-static"], [emulator])
    return found


@pytest.mark.parametrize("machine", machines())
def test_instruction_sets_agree_with_scalar_code(machine, tmp_path):
    """Also without Python: compare_kernels.c, with the sanitizers of this machine's compiler."""
    compile_command, run_command = machines()[machine]
    table, program = tmp_path / "tables", tmp_path / "compare"
    table.write_bytes(tables().tobytes())
    flags = ["-std=c99", "-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    if machine == "native":
        flags += ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    sources = [HERE / "compare_kernels.c", *sorted(SOURCES.glob("*.c"))]
    subprocess.run([*compile_command, *flags, f"-I{SOURCES}", "-o", program, *sources], check=True)
    done = subprocess.run([*run_command, program, table], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    compared = done.stdout.split()
    assert compared[0] == "compared" and int(compared[1]) > 1000
    if machine == "aarch64":
        assert "neon" in compared


def test_a_worker_thread_may_call(normal):
    from concurrent.futures import ThreadPoolExecutor

    x = normal(600_000)
    expected = codec.quantize(x).packed
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: codec.quantize(x, threads=3).packed, range(8)):
            assert torch.equal(got, expected)


def test_the_fallback_leaves_torch_threads_as_they_are(monkeypatch):
    monkeypatch.setenv("LORAFORMAT_KERNEL", "numpy")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        codec.quantize(torch.randn(1 << 20), threads=3)
        seen = []
        fresh = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        fresh.start()
        fresh.join()
        assert (torch.get_num_threads(), seen) == (2, [2])
    finally:
        torch.set_num_threads(before)
