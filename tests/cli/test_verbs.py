"""What info, verify, formats and convert say, for each format."""

import json
import shutil

import pytest

from loraformat.ops.convert.convert import convert


@pytest.fixture(params=["loraformat", "safetensors", "bitsandbytes"])
def any_model(request, bundle, model, tmp_path):
    if request.param == "loraformat":
        return request.param, bundle
    if request.param == "safetensors":
        return request.param, model
    convert(bundle, tmp_path / "bnb", to_format="bitsandbytes")
    return request.param, tmp_path / "bnb"


def test_info_of_each_format(run, any_model):
    name, path = any_model
    said = json.loads(run("info", path, "--json", "--tensors").out)
    assert said["format"] == name
    assert said["architecture"] == "LlamaForCausalLM"
    assert said["layers"] == 6
    assert said["parameters"] == 128 * 64 + 64 + 6 * (64 + 2 * 64 * 64)
    assert len(said["tensors"]) == 20
    text = run("info", path, "--tensors").out
    assert f"format:       {name}" in text
    assert "model.layers.5.mlp.up_proj.weight" in text
    quantized = name != "safetensors"
    assert ("NF4, block size 64, double quantization" in text) is quantized
    assert (said["quantized_parameters"] == 6 * 2 * 64 * 64) is quantized


def test_info_without_tensors_lists_none(run, bundle):
    assert "model.layers" not in run("info", bundle).out
    assert "tensors" not in json.loads(run("info", bundle, "--json").out)


def test_info_of_an_adapter_in_a_bundle(run, with_adapter):
    said = json.loads(run("info", with_adapter, "--json").out)
    (adapter,) = said["adapters"]
    assert adapter["name"] == "polite"
    assert adapter["ranks"] == [4]
    assert adapter["targets"] == ["q_proj"]
    assert adapter["parameters"] == 2 * 4 * 64
    assert adapter["base"] == "org/base\x1b[31m"
    text = run("info", with_adapter).out
    assert "polite, rank 4, 512 parameters" in text
    assert "base org/base\\x1b[31m" in text


def test_verify_of_a_bundle_with_an_adapter(run, with_adapter):
    assert run("verify", with_adapter).code == 0
    path = with_adapter / "adapters" / "polite" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    result = run("verify", with_adapter)
    assert result.code == 4
    assert f"V03: {path}: " in result.out


def test_verify_of_each_format(run, any_model):
    name, path = any_model
    result = run("verify", path)
    assert (result.code, result.err) == (0, "")
    hashed = "every hash matches" if name == "loraformat" else "this format has no hashes"
    assert result.out.startswith(f"valid: {name}, 20 tensors; ")
    assert hashed in result.out


def test_verify_lists_every_wrong_hash(run, bundle):
    shards = sorted(bundle.glob("model-*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        data = bytearray(shard.read_bytes())
        data[4096] ^= 1  # the first byte of the first tensor
        shard.write_bytes(data)
    tokenizer = bundle / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes().replace(b"1.0", b"1.1"))
    result = run("verify", bundle)
    assert result.code == 4
    lines = result.out.splitlines()
    assert sum(line.startswith("V01: ") for line in lines) == len(shards)
    assert f"V03: {tokenizer}: its SHA-256 is not the manifest's" in lines
    assert len(lines) == len(shards) + 1
    found = json.loads(run("verify", bundle, "--json").out)["findings"]
    assert [f["rule"] for f in found].count("V01") == len(shards)
    assert run("verify", bundle, "--quiet").code == 4


def test_verify_names_the_rule_of_a_broken_structure(run, bundle):
    (bundle / "model.safetensors.index.json").unlink()
    result = run("verify", bundle)
    assert result.code == 4
    assert result.out.startswith("B03: ")


def test_verify_of_a_damaged_model_without_hashes(run, model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    result = run("verify", model)
    assert result.code == 4
    assert result.out.startswith(f"H09: {path}: ")


def test_formats(run):
    text = run("formats").out
    said = json.loads(run("formats", "--json").out)["formats"]
    names = [row["name"] for row in said]
    assert {"bitsandbytes", "loraformat", "safetensors"} <= set(names)
    assert names == sorted(names)
    assert all(row["reads"] or row["writes"] for row in said)
    assert all(f"{name} (" in text for name in names)
    assert "cannot hold: the manifest with its hashes and fingerprint" in text


def test_convert_says_what_it_did_and_what_is_lost(run, bundle, tmp_path):
    result = run("convert", bundle, tmp_path / "dense", "--to", "safetensors", "--dtype", "bf16")
    assert result.code == 0
    assert "loraformat " in result.out
    assert "wrote safetensors" in result.out
    assert "not carried over: the manifest with its hashes" in result.out


def test_convert_prints_the_error_of_the_quantization(run, model, tmp_path):
    result = run("convert", model, tmp_path / "out")
    assert "relative RMS error" in result.out
    assert "q_proj" in result.out


def test_a_dry_run_writes_nothing(run, model, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    result = run("convert", model, tmp_path / "out", "--dry-run", "--max-shard-size", "20kB")
    assert result.code == 0
    assert "would write loraformat" in result.out
    assert "shard 1 of" in result.out
    assert sorted(tmp_path.rglob("*")) == before


def test_strict_refuses_what_would_be_lost(run, bundle, tmp_path):
    result = run("convert", bundle, tmp_path / "dense", "--to", "safetensors", "--strict")
    assert result.code == 3
    assert "omit --strict" in result.err
    assert not (tmp_path / "dense").exists()


def test_there_and_back_and_verify(run, model, tmp_path, snapshot):
    assert run("convert", model, tmp_path / "a", "-q").code == 0
    assert run("convert", tmp_path / "a", tmp_path / "b", "-q", "--to", "bitsandbytes").code == 0
    assert run("convert", tmp_path / "b", tmp_path / "c", "-q").code == 0
    first, again = (json.loads((tmp_path / d / "loraformat.json").read_text()) for d in "ac")
    assert first["fingerprint"] == again["fingerprint"]


@pytest.mark.parametrize("size", ["2GB", "1GiB", "20000", "0.5 MB", "20k"])
def test_sizes(run, model, tmp_path, size):
    assert run("convert", model, tmp_path / "x", "--dry-run", "--max-shard-size", size).code == 0


def test_a_local_path_that_looks_like_a_hub_id_wins(run, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    shutil.copytree(model, tmp_path / "org" / "name")
    assert run("info", "org/name").code == 0
