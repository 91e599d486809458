"""Every size of the paper has the paper's number of parameters, counted without allocating memory."""

from __future__ import annotations

import pytest
from no_memory import count_parameters, parameter_sizes
from paper_sizes import CELLS, FAMILY, FEEDBACK, TALL, WIDTHS

from brt_dist.model.config import ModelConfig

# Millions, as the paper and its published configurations name their sizes: with 12 layers and with 13.
ROUNDED = {
    "40m": (37.8, 40.9),
    "80m": (75.5, 81.8),
    "160m": (151.0, 163.6),
    "320m": (302.0, 327.2),
    "650m": (604.0, 654.4),
    "1300m": (1208.0, 1308.7),
}


def config(size: str, num_layers: int, *recurrent_layers: int) -> ModelConfig:
    dim, num_heads, head_dim, mlp_dim = WIDTHS[size]
    return ModelConfig(
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        recurrent_layers=recurrent_layers,
    )


@pytest.mark.parametrize("size", FAMILY)
def test_every_size_has_the_papers_number_of_parameters(size: str) -> None:
    twelve, thirteen, recurrent = FAMILY[size]
    assert count_parameters(config(size, 12)) == twelve
    assert count_parameters(config(size, 13)) == thirteen
    assert count_parameters(config(size, 12, 9)) == recurrent
    assert (round(twelve / 1e6, 1), round(thirteen / 1e6, 1)) == ROUNDED[size]


@pytest.mark.parametrize("size", TALL)
def test_the_tall_models_have_two_recurrent_layers_and_about_as_many_parameters_as_their_baselines(size: str) -> None:
    recurrent, baseline = TALL[size]
    assert count_parameters(config(size, 24, 9, 19)) == recurrent
    assert count_parameters(config(size, 26)) == baseline
    assert recurrent == pytest.approx(baseline, rel=0.025)


def test_the_widest_model_has_heads_that_do_not_add_up_to_its_width() -> None:
    dim, num_heads, head_dim, _ = WIDTHS["1300m"]
    assert (dim, num_heads * head_dim) == (2048, 4096)


@pytest.mark.parametrize(("gate", "cell"), CELLS, ids=":".join)
def test_every_gate_and_cell_has_the_papers_number_of_parameters(gate: str, cell: str) -> None:
    assert count_parameters(ModelConfig(gate=gate, cell=cell)) == CELLS[gate, cell]  # type: ignore[arg-type]


@pytest.mark.parametrize(("gate", "cell"), CELLS, ids=":".join)
def test_feedback_adds_the_same_to_each(gate: str, cell: str) -> None:
    model = ModelConfig(gate=gate, cell=cell, feedback=True)  # type: ignore[arg-type]
    assert count_parameters(model) == CELLS[gate, cell] + FEEDBACK
    assert 11 * (2 * model.dim * model.num_heads * model.head_dim + model.num_heads) == FEEDBACK


@pytest.mark.parametrize(("vocab_size", "entries"), [(32_128, 32_899_072), (260, 266_240)])
def test_the_embedding_is_one_matrix_for_both_ends_and_the_rest_does_not_depend_on_it(
    vocab_size: int, entries: int
) -> None:
    sizes = parameter_sizes(ModelConfig(vocab_size=vocab_size))
    assert sizes.pop("embedding.weight") == entries
    assert sum(sizes.values()) == CELLS["fixed", "skip"]
