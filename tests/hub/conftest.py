"""A Hub on the loopback interface, with models on it, and the command line that asks it."""

import itertools
import json
import shutil

import pytest

from loraformat.demo import ADAPTERS, SMALL_MODEL
from loraformat.ops.convert.convert import convert
from tests.conftest import environment
from tests.hub import forked
from tests.hub.fake_hub import COMMIT, TOKEN, Repository, files_of, serve

__all__ = ["BASE_COMMIT", "COMMIT", "PEFT", "TOKEN", "Repository", "files_of", "published"]

BASE_COMMIT = "d" * 40
PEFT = ["adapter_config.json", "adapter_model.safetensors"]


def published(server, repo="me/new"):
    """What a push made, without the file that the Hub itself puts there."""
    return {p: d for p, d in server.repositories[repo].files.items() if p != ".gitattributes"}


@pytest.fixture
def server():
    """An empty Hub."""
    server, thread = serve()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def hub(server, model):
    """A Hub with ``org/dense``, and in it files that nobody wants."""
    files = files_of(model)
    for unwanted in ("pytorch_model.bin", "model.gguf", "onnx/model.onnx", "original/params.json"):
        files[unwanted] = b"unwanted"
    files["README.md"] = b"# A model\n"
    server.repositories["org/dense"] = Repository(files)
    return server


@pytest.fixture
def hub_bundle(hub, model, tmp_path):
    """The bundle ``org/bundle`` on that Hub."""
    convert(model, tmp_path / "bundle", max_shard_size=6_000)
    hub.repositories["org/bundle"] = Repository(files_of(tmp_path / "bundle"), "b" * 40)
    return tmp_path / "bundle"


@pytest.fixture
def begin(server, tmp_path):
    """Starts a command line against that Hub; ``finish(begin(...))`` waits for it."""
    numbers = itertools.count()

    def run(*arguments, **more):
        prefix = tmp_path / f".said-{next(numbers)}"
        variables = {**environment(tmp_path), "HF_ENDPOINT": server.endpoint, **more}
        return forked.start(arguments, tmp_path, variables, prefix), prefix

    return run


@pytest.fixture
def ask(begin):
    """Runs the command line against that Hub."""

    def run(*arguments, **more):
        return forked.finish(*begin(*arguments, **more))

    return run


@pytest.fixture
def shelf(server, tmp_path):
    """A Hub with ``org/base``; here an adapter of it, and one that knows a local path only."""
    config = (SMALL_MODEL / "config.json").read_bytes()
    card = {"license": "apache-2.0", "language": "en"}
    server.repositories["org/base"] = Repository({"config.json": config}, BASE_COMMIT, card=card)
    shutil.copytree(ADAPTERS["manual"], tmp_path / "local")
    shutil.copytree(ADAPTERS["manual"], tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}, indent=2))
    return server


@pytest.fixture
def push(ask):
    """Runs ``loraformat push`` as somebody who is logged in."""

    def run(*arguments, **more):
        return ask("push", *arguments, **{"HF_TOKEN": TOKEN, **more})

    return run
