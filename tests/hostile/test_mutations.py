"""The property: a damaged bundle is refused by an error of our own, or says the same as before."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from bundles import VALID, content, fingerprint, minireader_accepts, put, read, refusal, write
from mutations import mutate

CASES = int(os.environ.get("LORAFORMAT_FUZZ_CASES", "20000"))
SEED = int(os.environ.get("LORAFORMAT_FUZZ_SEED", "1"))
#: Share of the cases that each bundle gets.
BASES = {
    "adapter": 0.35,
    "nf4-odd-count": 0.2,
    "nf4-transposed": 0.15,
    "several-shards": 0.15,
    "newer-minor": 0.05,
    "ignorable-extension": 0.05,
    "nf4-plain": 0.05,
}


@pytest.mark.parametrize("base", BASES)
def test_damage_is_refused_or_without_meaning(base: str, tmp_path: Path) -> None:
    original, rng = read(VALID / base), Random(f"{SEED}/{base}")
    path = write(tmp_path / "bundle", original)
    meaning, name = content(path), fingerprint(path)
    outcomes: Counter[str] = Counter()
    for number in range(round(CASES * BASES[base])):
        what, files, repaired = mutate(original, rng)
        case = f"base {base}, seed {SEED}, case {number}: {what}"
        _replace(path, original, files)
        try:
            reason = refusal(path)
        except Exception as error:
            raise AssertionError(f"{case}: {error!r}") from error
        outcomes[reason[:3] if reason else "accepted"] += 1
        assert minireader_accepts(path) == (reason is None), (
            f"{case}: the minireader differs: {reason}"
        )
        if reason is None and content(path) != meaning:
            assert repaired, f"{case}: other content is accepted"
            config_only = {k: v for k, v in content(path).items() if k != "config.json"}
            same_base = config_only == {k: v for k, v in meaning.items() if k != "config.json"}
            assert same_base or fingerprint(path) != name, (
                f"{case}: other content, same fingerprint"
            )
        _replace(path, files, original)
    assert outcomes["accepted"] > 0.005 * outcomes.total(), outcomes
    assert outcomes["accepted"] < 0.5 * outcomes.total(), outcomes
    assert len(outcomes) > 12, outcomes


def _replace(path: Path, old: dict[str, bytes], new: dict[str, bytes]) -> None:
    for name in new:
        if new[name] != old.get(name):
            put(path / name, new[name])


def test_cases_are_repeatable() -> None:
    original = read(VALID / "adapter")
    one, other = Random("x"), Random("x")
    assert [mutate(original, one) for _ in range(50)] == [
        mutate(original, other) for _ in range(50)
    ]


@pytest.mark.parametrize("base", ["nf4-odd-count"])
def test_every_single_bit(base: str, tmp_path: Path) -> None:
    """Each flipped bit is found, or the bundle means what it meant."""
    path = tmp_path / "bundle"
    shutil.copytree(VALID / base, path)
    meaning, name = content(path), fingerprint(path)
    accepted: Counter[str] = Counter()
    for file, data in read(path).items():
        spoiled = bytearray(data)
        for bit in range(8 * len(data)):
            spoiled[bit // 8] ^= 1 << bit % 8
            put(path / file, spoiled)
            if refusal(path) is None:
                accepted[file] += 1
                assert content(path) == meaning and fingerprint(path) == name, (file, bit)
            spoiled[bit // 8] ^= 1 << bit % 8
        put(path / file, data)
    # White space, created_by, source, shard_limit and relative_rms_error in the manifest, the
    # version's minor digit; white space in the index. Nothing in shards and carried files.
    assert accepted.keys() <= {"loraformat.json", "model.safetensors.index.json"}, accepted
    assert accepted["loraformat.json"] < 0.1 * 8 * len(read(path)["loraformat.json"])
