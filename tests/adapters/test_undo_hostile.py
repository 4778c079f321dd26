"""Damaged and lying undo records: a clean error with its rule, quickly, and nothing written."""

import json
import random

import pytest

from loraformat.cli import main
from loraformat.errors import LoraFormatError
from loraformat.ops.merge.merge import merge
from loraformat.ops.unmerge.unmerge import unmerge
from tests.adapters.merging import Q, adapter, delta, small
from tests.peak_memory import PeakGrowth


@pytest.fixture
def merged(tmp_path):
    import torch

    base, _ = small(tmp_path, torch.bfloat16)
    given = [adapter(delta(Q, 32, 32))]
    merge(base, given, tmp_path / "out", undo=tmp_path / "undo.lfu")
    return tmp_path, given


def parts_of(raw):
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_record(raw, change):
    header, data = parts_of(raw)
    record = json.loads(header["__metadata__"]["loraformat.undo"])
    change(record)
    header["__metadata__"]["loraformat.undo"] = json.dumps(record)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def refused(merged, raw):
    path, given = merged
    bad = path / "bad.lfu"
    bad.write_bytes(raw)
    with pytest.raises(LoraFormatError) as caught:
        unmerge(path / "out", path / "no", undo=bad, adapter=given)
    assert not (path / "no").exists()
    return caught.value


@pytest.mark.parametrize("left", [0, 7, 8, 100, 0.5, -1])
def test_truncated(merged, left):
    raw = (merged[0] / "undo.lfu").read_bytes()
    end = int(len(raw) * left) if left == 0.5 else left
    assert refused(merged, raw[:end]).exit_code == 3


LIES = {
    "shape": lambda r: r["tensors"][Q].update(shape=[2**47, 2**20]),
    "mode raw": lambda r: r["tensors"][Q].update(mode="raw", terms=[], shape=[2**40, 32]),
    "mode rows": lambda r: r["tensors"][Q].update(mode="rows", terms=[], rows=[0, 31]),
    "tiles": lambda r: r.update(tile_elements=1),
    "a million terms": lambda r: r["tensors"][Q].update(terms=r["tensors"][Q]["terms"] * 10**5),
    "expert": lambda r: r["tensors"][Q]["terms"][0].update(expert=2**31 - 1),
    "rows": lambda r: r["tensors"][Q]["terms"][0].update(rows=[31, 3]),
    "weight": lambda r: r["tensors"][Q]["terms"][0].update(weight=1e308),
    "deep": lambda r: r.update(config=json.loads("[" * 30 + "]" * 30)),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_cost_no_memory(merged, lie):
    raw = with_record((merged[0] / "undo.lfu").read_bytes(), LIES[lie])
    growth = PeakGrowth()
    error = refused(merged, raw)
    assert error.exit_code == 3
    assert growth.nbytes < 300_000 * 1024


def test_paths_are_not_followed(merged):
    path, given = merged
    secret = path / "secret"
    secret.write_text("x")
    raw = with_record(
        (path / "undo.lfu").read_bytes(), lambda r: r["adapters"][0].update(path=str(secret))
    )
    (path / "moved.lfu").write_bytes(raw)
    report = unmerge(path / "out", path / "back", undo=path / "moved.lfu", adapter=given)
    assert report.exact
    with pytest.raises(LoraFormatError):
        unmerge(path / "out", path / "no", undo=path / "moved.lfu")


def test_random_damage(merged):
    raw = (merged[0] / "undo.lfu").read_bytes()
    chance = random.Random(0)
    path, given = merged
    refusals = 0
    for _ in range(150):
        bad = bytearray(raw)
        for _ in range(chance.choice([1, 1, 3])):
            bad[chance.randrange(len(bad))] = chance.randrange(256)
        (path / "bad.lfu").write_bytes(bad)
        try:
            report = unmerge(path / "out", path / "back", undo=path / "bad.lfu", adapter=given,
                             force=True)  # fmt: skip
            assert report.exact  # a digit of created_by, say
        except LoraFormatError as error:
            assert error.exit_code in (2, 3)
            refusals += 1
    assert refusals > 100


def test_on_the_command_line(merged, capsys):
    path, _ = merged
    (path / "bad.lfu").write_bytes((path / "undo.lfu").read_bytes()[:-1])
    arguments = ["unmerge", path / "out", "--undo", path / "bad.lfu", "-o", path / "no"]
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 3
    printed = capsys.readouterr().err
    assert "bad.lfu" in printed and "Traceback" not in printed
