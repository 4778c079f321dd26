"""The picture of what quantization cost: its numbers, its lines, and what it refuses."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from loraformat.cli.info import command
from loraformat.demo import ADAPTERS, SMALL_MODEL
from loraformat.errors import InputError, UsageError
from loraformat.model.description import ModelInfo, TensorSummary
from loraformat.ops.convert.convert import convert
from loraformat.ops.info.error_plot import errors_by_layer, normal_error, plot_errors
from loraformat.ops.info.model import info
from loraformat.ops.plots import as_label, colors


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("plot") / "my_$bundle$"
    convert(SMALL_MODEL, target)
    return target


@pytest.fixture
def summary(bundle: Path) -> ModelInfo:
    found = info(bundle)
    assert isinstance(found, ModelInfo)
    return found


def tensor(name: str, shape: tuple[int, ...], error: float | None) -> TensorSummary:
    return TensorSummary(name, "nf4", "BF16", shape, 0, error)


def test_several_weights_of_one_kind_are_weighted_by_their_size() -> None:
    errors = errors_by_layer(
        [
            tensor("model.layers.1.mlp.experts.0.w1.weight", (3, 10), 0.1),
            tensor("model.layers.1.mlp.experts.1.w1.weight", (10,), 0.3),
            tensor("model.layers.0.self_attn.q_proj.weight", (4, 4), 0.2),
            tensor("lm_head.weight", (4, 4), 0.05),
            tensor("model.norm.weight", (4,), None),
        ]
    )
    expected = (0.75 * 0.1**2 + 0.25 * 0.3**2) ** 0.5
    assert errors["w1"] == {1: pytest.approx(expected)}
    assert (errors["q_proj"], errors["lm_head"]) == ({0: 0.2}, {None: 0.05})
    assert "norm" not in errors


def test_normal_weights_cost_more_in_larger_blocks() -> None:
    """9.1 to 9.3 %: what the small model's own weights, nearly normal, cost."""
    assert 0.091 < normal_error(64, True) < 0.093
    assert normal_error(32, False) < normal_error(64, False) < normal_error(256, False)


def test_the_small_models_errors_are_all_drawn(summary: ModelInfo, tmp_path: Path) -> None:
    errors = errors_by_layer(summary.tensors)
    assert len(errors) == 7
    assert all(sorted(row) == [0, 1, 2] for row in errors.values())
    plot_errors(summary, tmp_path / "errors.svg")
    drawn = (tmp_path / "errors.svg").read_text(encoding="utf-8")
    said = [*errors, "layer", "relative RMS error (%)", "block size 64", "my_$bundle$"]
    assert not [text for text in said if f"{text}" not in drawn]


def test_the_command(bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "errors.png"
    result = CliRunner().invoke(command, [str(bundle), "--plot", str(picture)])
    assert (result.exit_code, "architecture:" in result.output) == (0, True), result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("path", "picture", "error", "says"),
    [
        (ADAPTERS["manual"], "errors.png", UsageError, "this is an adapter"),
        (SMALL_MODEL, "errors.png", InputError, "records no quantization errors"),
        (SMALL_MODEL, "errors.jpeg", UsageError, "the plot must be one of"),
    ],
)
def test_what_has_no_picture(
    path: Path, picture: str, error: type[Exception], says: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(command, [str(path), "--plot", str(tmp_path / picture)])
    assert isinstance(result.exception, error)
    assert says in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_colours_differ_however_many() -> None:
    for count in (1, 9, 10, 40):
        assert len({str(color) for color in colors(count)}) == count


def test_a_strangers_name_is_no_formula_and_stays_in_the_legend() -> None:
    assert as_label("$\\frac$") == "\\$\\frac\\$"
    assert as_label("_x").startswith(" ")
    assert "\x1b" not in as_label("a\x1b[31m")
