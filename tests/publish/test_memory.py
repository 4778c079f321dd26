"""A conversion holds a few tensors in memory, never the model."""

import json
import subprocess
import sys

import numpy
import pytest

MB = 1_000_000

#: Converts and prints how much anonymous memory grew beyond what one small conversion takes.
CHILD = """
import json, sys, threading, time
from pathlib import Path
from loraformat.ops.convert.convert import convert

small, large, to_format = map(str, sys.argv[1:])

def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

convert(small, small + "-out", to_format=to_format)
before = peak = anonymous()
done = False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
convert(large, large + "-out", to_format=to_format, max_shard_size=30_000_000)
done = True
watcher.join()
print(json.dumps({"grown": peak - before}))
"""


def write_layers(directory, layers, width=1024):
    """Layers of one 4 MB matrix each, without holding them in memory."""
    directory.mkdir()
    size = 4 * width * width
    header = {
        f"model.layers.{n}.mlp.up_proj.weight": {
            "dtype": "F32", "shape": [width, width], "data_offsets": [n * size, (n + 1) * size],
        }
        for n in range(layers)
    }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    matrix = numpy.random.default_rng(0).standard_normal(width * width, dtype=numpy.float32)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(layers):
            file.write(matrix)
    (directory / "config.json").write_text('{"model_type": "llama"}\n')
    return directory


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("to_format", ["safetensors", "loraformat"])
def test_memory_does_not_grow_with_the_model(tmp_path, to_format):
    grown = {}
    for layers in (48, 96):
        small = write_layers(tmp_path / f"small-{layers}", 2)
        large = write_layers(tmp_path / f"large-{layers}", layers)
        result = subprocess.run(
            [sys.executable, "-c", CHILD, small, large, to_format],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        grown[layers] = json.loads(result.stdout)["grown"]
    assert grown[48] < 60 * MB  # of 200 MB; three tensors in flight, and what torch needs for one
    assert grown[96] < grown[48] + 10 * MB
