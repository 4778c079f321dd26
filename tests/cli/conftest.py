"""The command line inside this process, and bundles to look at."""

import json
from types import SimpleNamespace

import pytest

from loraformat.cli import main
from loraformat.ops.convert.convert import convert


@pytest.fixture
def run(capsys):
    """Runs a command line and returns its exit code, stdout and stderr."""

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=left.value.code, out=out, err=err)

    return call


@pytest.fixture
def bundle(model, tmp_path):
    convert(model, tmp_path / "bundle", max_shard_size=6_000)
    return tmp_path / "bundle"


@pytest.fixture
def with_adapter(bundle):
    """The bundle with one adapter beside its base, named in the manifest."""
    import hashlib

    import numpy
    from safetensors.numpy import save_file

    directory = bundle / "adapters" / "polite"
    directory.mkdir(parents=True)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {
            f"{prefix}.lora_A.weight": numpy.zeros((4, 64), numpy.float32),
            f"{prefix}.lora_B.weight": numpy.zeros((64, 4), numpy.float32),
        },
        directory / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "org/base\x1b[31m"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    manifest = json.loads((bundle / "loraformat.json").read_text())
    manifest["adapters"] = {
        "polite": {
            "files": {
                path.name: {
                    "bytes": path.stat().st_size,
                    "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                }
                for path in sorted(directory.iterdir())
            }
        }
    }
    (bundle / "loraformat.json").write_text(json.dumps(manifest))
    return bundle
