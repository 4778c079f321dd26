"""Make the modules beside this file and those of tests/gguf importable."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "gguf")]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny llama with the small model's tokenizer."""
    from bases import make_base

    return make_base("llama", tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="session")
def biased(base, tmp_path_factory):
    """The same with biases, without which PEFT has none to train."""
    import shutil

    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("base") / "biased"
    shutil.copytree(base, folder)
    config = AutoConfig.from_pretrained(base, attention_bias=True, mlp_bias=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tied(tmp_path_factory):
    from bases import make_base

    return make_base("llama-tied", tmp_path_factory.mktemp("base") / "tied")


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    """Returns a function: the directory of the adapter with a feature; it must not be changed."""
    import features

    root, made = tmp_path_factory.mktemp("adapters"), {}

    def get(feature):
        if feature not in made:
            made[feature] = features.write(feature, root / feature.replace(" ", "-"))
        return made[feature]

    return get
