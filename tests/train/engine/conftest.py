"""What the engine's tests share: bundles made once, models opened and closed."""

from __future__ import annotations

import pytest

from loraformat.train.opening import load
from tests.train.engine.reference import Branch, places
from tests.train.tiny_bundles import make, stored_model


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory):
    """Returns the bundle of a tiny architecture."""
    made = {}

    def get(architecture):
        if architecture not in made:
            made[architecture] = make(tmp_path_factory.mktemp(architecture), architecture)
        return made[architecture]

    return get


@pytest.fixture
def opened(bundle_of):
    """Returns a model in evaluation mode and the dense one that it must equal."""
    models = []

    def get(architecture, **options):
        bundle = bundle_of(architecture)
        model = load(bundle, **options).eval()
        models.append(model)
        return model, stored_model(bundle, model.config._attn_implementation)

    yield get
    for model in models:
        model.close()


@pytest.fixture
def attach():
    """Gives every linear and every stack of experts of the decoder layers a branch."""

    def give(model):
        for seed, module in enumerate(places(model).values()):
            module.branch = Branch(module, seed)
        return model

    return give
