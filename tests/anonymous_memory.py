"""How much anonymous memory a verb takes at its peak, in a process of its own (Linux)."""

import json
import os
import subprocess
import sys

#: Runs verbs, and prints how much anonymous memory each takes beyond what there was before it;
#: the first has made every import by then, and is not counted.
CHILD = """
import json, sys, threading, time
from pathlib import Path
import torch
from loraformat.cli import commands
torch.set_num_threads(1)

def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def grown(call):
    before = peak = anonymous()
    done = False

    def watch():
        nonlocal peak
        while not done:
            peak = max(peak, anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    commands.main(call, standalone_mode=False)
    done = True
    watcher.join()
    return peak - before

print(json.dumps([grown(call) for call in json.loads(sys.argv[1])][1:]))
"""


def grown(first, *calls):
    """Return the bytes that each call takes at its peak beyond what the one before it left."""
    words = [[*map(str, call), "--quiet"] for call in (first, *calls)]
    # What is freed goes back at once, so that what is held is measured and no allocator's mood.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", CHILD, json.dumps(words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)
