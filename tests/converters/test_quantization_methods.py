"""Quantization methods: any rows of a weight, a third party's method, and which one reads what."""

import json
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraformat import plugins
from loraformat.errors import InputError, UnsupportedError, UsageError
from loraformat.ops.convert.convert import convert
from loraformat.ops.opening.model import open_model
from loraformat.shards.quantized import method_of
from loraformat.testing import dense

README = Path(__file__).parents[2] / "converters/README.md"
W = "model.layers.0.mlp.up_proj.weight"
STACK = "model.layers.0.mlp.experts.gate_up_proj"


def write(path, tensors, **config):
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "gpt_oss", **config}))
    return path


def codes(*shape):
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)


def float8(*shape):
    return codes(*shape).where(codes(*shape) & 127 != 127, 0).view(torch.float8_e4m3fn)


#: A weight's stored tensors, by what they are.
STORED = {
    "float8 without scales": {W: float8(70, 40)},
    "float8 in blocks": {W: float8(200, 300), f"{W}_scale_inv": torch.rand(2, 3)},
    "float8 by row": {W: float8(70, 40), f"{W}_scale": torch.rand(70)},
    "float8 vector": {W: float8(300), f"{W}_scale": torch.rand(3)},
    "float8 number": {W: float8(), f"{W}_scale": torch.rand(1)},
    "float8 experts": {W: float8(3, 200, 300), f"{W}_scale_inv": torch.rand(3, 2, 3)},
    "packed integers": {
        W.replace("weight", "weight_packed"): codes(40, 32).view(torch.int32),
        W.replace("weight", "weight_scale"): torch.rand(40, 2),
        W.replace("weight", "weight_shape"): torch.tensor([40, 64]),
    },
    "NVFP4": {
        W: codes(40, 32), f"{W}_scale": float8(40, 4), f"{W}_scale_2": torch.rand(()),
    },
    "GPTQ": {
        W.replace("weight", "qweight"): codes(8, 128).view(torch.int32),
        W.replace("weight", "qzeros"): codes(2, 16).view(torch.int32),
        W.replace("weight", "scales"): torch.rand(2, 32),
    },
    "AWQ": {
        W.replace("weight", "qweight"): codes(64, 16).view(torch.int32),
        W.replace("weight", "qzeros"): codes(2, 16).view(torch.int32),
        W.replace("weight", "scales"): torch.rand(2, 32),
    },
    "torchao int4": {
        W.replace("weight", "_weight_qdata"): codes(70, 32).view(torch.int8),
        W.replace("weight", "_weight_scale"): torch.rand(2, 70),
        W.replace("weight", "_weight_zero_point"): torch.rand(2, 70),
    },
    "bitsandbytes int8": {
        W: codes(70, 40).view(torch.int8), W.replace("weight", "SCB"): torch.rand(70)
    },
    "MXFP4 experts": {
        f"{STACK}_blocks": codes(3, 40, 5, 16), f"{STACK}_scales": codes(3, 40, 5) // 3 + 80
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("stored", STORED)
def test_some_rows_are_those_of_the_whole(tmp_path, stored, dtype):
    path = write(tmp_path / "m", STORED[stored])
    with open_model(path, dtype=dtype) as model:
        (tensor,) = model.tensors.values()
        rows, columns = tensor.matrix_shape
        whole = tensor.array().reshape(rows, columns)
        for start, stop in [
            (0, rows),
            (0, 1),
            (rows - 1, rows),
            (rows // 3, rows // 2 + 1),
            (0, 0),
        ]:
            found = tensor.rows(start, stop)
            assert found.dtype == whole.dtype and found.shape == (stop - start, columns)
            assert found.tobytes() == whole[start:stop].tobytes()


def test_rows_of_stored_numbers_are_not_copied():
    tensor = dense("experts", torch.arange(24.0).reshape(2, 3, 4))
    assert tensor.matrix_shape == (6, 4)
    assert tensor.rows(2, 5).tolist() == [[8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]]
    assert not tensor.rows(2, 5).flags.owndata
    assert dense("bias", torch.ones(3)).rows(0, 1).shape == (1, 3)
    assert dense("scalar", torch.ones(())).rows(0, 1).shape == (1, 1)


@pytest.fixture
def int8(monkeypatch):
    """The method that the README shows, as if a package had brought it."""
    section = README.read_text(encoding="utf-8").partition("## Quantized weights")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    module = type(json)("loraformat_int8")
    exec(compile(code, "README.md", "exec"), module.__dict__)
    monkeypatch.setitem(__import__("sys").modules, "loraformat_int8", module)
    real = list(plugins.entry_points(group=plugins.GROUP))
    entry = EntryPoint("int8", "loraformat_int8:CONVERTER", plugins.GROUP)

    def clear():
        plugins._entry_points.cache_clear()
        plugins._load.cache_clear()

    monkeypatch.setattr(plugins, "entry_points", lambda group: [*real, entry])
    clear()
    yield module
    monkeypatch.undo()
    clear()


def int8_tensors(*shape):
    values = codes(*shape).view(torch.int8)
    return {W: values, f"{W}_scale": torch.rand(*shape[:-1], 1)}


@pytest.mark.parametrize("shape", [(6, 64), (3, 6, 64)])
def test_the_method_of_the_readme(int8, tmp_path, shape):
    tensors = int8_tensors(*shape)
    path = write(tmp_path / "m", tensors, quantization_config={"quant_method": "w8"})
    report = convert(path, tmp_path / "out", to_format="safetensors", dtype="f32")
    assert report.source_format == "int8"
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == {W}
    assert torch.equal(found[W], tensors[W].float() * tensors[f"{W}_scale"])
    assert "quantization_config" not in (tmp_path / "out/config.json").read_text()
    with open_model(path) as model:
        assert (model.tensors[W].dtype, model.tensors[W].quantization) == ("BF16", "int8")


def test_a_method_of_a_third_party_is_named_where_it_helps(int8, tmp_path):
    path = write(tmp_path / "m", int8_tensors(6, 64))
    with pytest.raises(UnsupportedError) as refused:
        convert(path, tmp_path / "out", from_format="safetensors")
    assert refused.value.hint == "use --from int8"
    bad = write(tmp_path / "bad", int8_tensors(6, 64) | {f"{W}_scale": torch.rand(5, 1)})
    with pytest.raises(InputError, match="scales no rows"):
        convert(bad, tmp_path / "out")


def test_without_it_the_same_checkpoint_is_refused(tmp_path):
    path = write(tmp_path / "m", int8_tensors(6, 64))
    assert plugins.sniff(path).name == "safetensors"
    with pytest.raises(UnsupportedError, match="an unknown method"):
        convert(path, tmp_path / "out")


@pytest.mark.parametrize("stored", STORED)
def test_another_format_after_from_is_refused_with_the_right_one(tmp_path, stored):
    path = write(tmp_path / "m", STORED[stored])
    with pytest.raises(UnsupportedError, match="is quantized with") as refused:
        convert(path, tmp_path / "out", from_format="safetensors")
    name = refused.value.hint.removeprefix("use --from ")
    assert convert(path, tmp_path / "out", from_format=name).source_format == name


def test_a_config_is_only_for_formats_without_one(tmp_path):
    path = write(tmp_path / "m", STORED["float8 by row"])
    for name in ("float8", "mxfp4", "pytorch", "safetensors"):
        with pytest.raises(UsageError, match="--config is for GGUF files"):
            convert(path, tmp_path / "out", from_format=name, config=path / "config.json")


def test_the_method_of_a_directory(tmp_path):
    assert method_of(write(tmp_path / "a", {W: torch.ones(2, 2)})) is None
    named = {"quantization_config": {"quant_method": "spqr"}}
    assert method_of(write(tmp_path / "b", {W: torch.ones(2, 2)}, **named)) == "spqr"
    assert method_of(write(tmp_path / "c", STORED["MXFP4 experts"], **named)) == "MXFP4"
    assert method_of(tmp_path / "nothing") is None
