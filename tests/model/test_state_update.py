"""The three cells: what a state becomes of what it has read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_models import CELLS, hold_gates, small_config, variant_name
from torch import Tensor

from brt_dist.model.gates import FixedGate, LSTMGate
from brt_dist.model.state_update import Dual, Single, Skip, StateNorm, make_update

DIM, READ, MLP = 6, 16, 10  # of the small models: read is 2 x 2 heads x 4
KEEP = 1000.0  # a gate's logit: all of the state stays
EVERY_CELL = pytest.mark.parametrize("variant", CELLS, ids=variant_name)
BOTH_GATES = pytest.mark.parametrize("gate", ["fixed", "lstm"])

Update = Skip | Dual | Single


def an_update(**changes: Any) -> Update:
    """Float64, all parameters drawn."""
    torch.manual_seed(0)
    update = make_update(small_config(**changes)).double()
    with torch.no_grad():
        for parameter in update.parameters():
            parameter.normal_(0, 0.5)
    return update


def state_and_read() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    state, read = (torch.randn(2, 3, size, generator=generator, dtype=torch.float64) for size in (DIM, READ))
    return state, read


def hidden_of(gate: FixedGate | LSTMGate, update: Update, state: Tensor, read: Tensor) -> Tensor:
    """The hidden vectors that reach a gate."""
    seen: list[Tensor] = []
    handle = gate.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    update(state, read)
    handle.remove()
    return seen[0]


def literal_gate(gate: FixedGate | LSTMGate, state: Tensor, hidden: Tensor, squash: bool = False) -> Tensor:
    """The gate's formula with its own numbers."""
    if isinstance(gate, FixedGate):
        keep = 1 / (1 + torch.exp(-gate.bias_D))
        admit, candidate = 1 - keep, hidden @ gate.candidate.weight.T
    else:
        of_candidate, of_input, of_forget = gate.candidate_and_gates.weight.view(3, DIM, -1)
        keep = 1 / (1 + torch.exp(-(hidden @ of_forget.T + gate.forget_bias_D + 1)))
        admit = 1 / (1 + torch.exp(-(hidden @ of_input.T + gate.input_bias_D - 1)))
        candidate = hidden @ of_candidate.T
    return state * keep + admit * (torch.tanh(candidate) if squash else candidate)


@EVERY_CELL
def test_a_cell_computes_its_formula(variant: dict[str, Any]) -> None:
    update = an_update(**variant)
    state, read = state_and_read()
    if isinstance(update, Skip):
        expected = literal_gate(update.gate, state, read)
    elif isinstance(update, Dual):
        between = literal_gate(update.gate, state, read)
        normed = between / (between.square().mean(-1, keepdim=True) + 1e-6).sqrt() * update.mlp_norm.weight
        hidden = (normed @ update.mlp_input.weight.T).clamp(min=0)
        expected = literal_gate(update.mlp_gate, between, hidden)
    else:
        hidden = (read @ update.mlp_input.weight.T).clamp(min=0)
        expected = literal_gate(update.gate, state, hidden, squash=True)
    torch.testing.assert_close(update(state, read), expected, rtol=0, atol=1e-12)


@EVERY_CELL
def test_a_cell_has_the_matrices_of_its_kind_and_no_others(variant: dict[str, Any]) -> None:
    def of_gate(name: str, inputs: int) -> dict[str, tuple[int, ...]]:
        if variant["gate"] == "fixed":
            return {f"{name}.candidate.weight": (DIM, inputs), f"{name}.bias_D": (DIM,)}
        biases = {f"{name}.{kind}_bias_D": (DIM,) for kind in ("input", "forget")}
        return {f"{name}.candidate_and_gates.weight": (3 * DIM, inputs), **biases}

    expected = {
        "skip": of_gate("gate", READ),
        "dual": {
            **of_gate("gate", READ),
            "mlp_norm.weight": (DIM,),
            "mlp_input.weight": (MLP, DIM),
            **of_gate("mlp_gate", MLP),
        },
        "single": {"mlp_input.weight": (MLP, READ), **of_gate("gate", MLP)},
    }[variant["cell"]]
    found = {name: tuple(parameter.shape) for name, parameter in an_update(**variant).named_parameters()}
    assert found == expected


@BOTH_GATES
def test_the_second_gate_of_dual_reads_what_the_first_has_left(gate: str) -> None:
    update = an_update(cell="dual", gate=gate)
    skip = an_update(cell="skip", gate=gate)
    assert isinstance(update, Dual)
    assert isinstance(skip, Skip)
    skip.gate.load_state_dict(update.gate.state_dict())
    state, read = state_and_read()
    hold_gates(update.mlp_gate, KEEP)
    torch.testing.assert_close(update(state, read), skip(state, read), rtol=0, atol=0)
    # The MLP sees the state behind the first gate: where that admits nothing, what was read is lost.
    hold_gates(update.gate, KEEP)
    before = hidden_of(update.mlp_gate, update, state, read)
    assert torch.equal(before, hidden_of(update.mlp_gate, update, state, read.flip(0)))
    assert not torch.equal(before, hidden_of(update.mlp_gate, update, state.flip(0), read))


@BOTH_GATES
def test_there_is_a_norm_before_the_mlp_of_dual_and_none_before_that_of_single(gate: str) -> None:
    state, read = state_and_read()
    dual, single = an_update(cell="dual", gate=gate), an_update(cell="single", gate=gate)
    assert isinstance(dual, Dual)
    assert isinstance(single, Single)
    hold_gates(dual.gate, KEEP)
    once, twice = (hidden_of(dual.mlp_gate, dual, factor * state, read) for factor in (1, 2))
    torch.testing.assert_close(twice, once, rtol=1e-4, atol=1e-4)
    once, twice = (hidden_of(single.gate, single, state, factor * read) for factor in (1, 2))
    torch.testing.assert_close(twice, 2 * once, rtol=0, atol=1e-12)
    assert torch.equal(once, hidden_of(single.gate, single, state.flip(0), read))


@EVERY_CELL
def test_only_the_candidate_of_single_stays_between_minus_one_and_one(variant: dict[str, Any]) -> None:
    state, read = state_and_read()
    # From a state of zero, the next one is a share of the candidate alone.
    after = an_update(**variant)(torch.zeros_like(state), 100 * read).abs().max()
    assert (after <= 1) == (variant["cell"] == "single")


@EVERY_CELL
def test_the_next_state_is_computed_in_the_dtype_of_the_state(variant: dict[str, Any]) -> None:
    state, read = state_and_read()
    update = an_update(**variant).bfloat16()
    assert update(state.float(), read.bfloat16()).dtype == torch.float32
    assert update(state.bfloat16(), read.bfloat16()).dtype == torch.bfloat16


@EVERY_CELL
def test_a_cell_treats_every_lane_and_state_vector_alike_and_apart(variant: dict[str, Any]) -> None:
    update = an_update(**variant)
    state, read = state_and_read()
    order = torch.tensor([2, 0, 1])
    after = update(state, read)
    torch.testing.assert_close(update(state[:, order], read[:, order]), after[:, order], rtol=0, atol=1e-14)
    changed = read.clone()
    changed[1, 2] += 1
    differs_BS = (update(state, changed) != after).any(-1)
    assert differs_BS.tolist() == [[False, False, False], [False, False, True]]


@EVERY_CELL
def test_gradients_of_a_cell_are_those_of_its_differences(variant: dict[str, Any]) -> None:
    update = an_update(**variant)
    state, read = (value[:1].requires_grad_() for value in state_and_read())
    assert torch.autograd.gradcheck(update, (state, read))


def test_the_norm_of_a_state_is_computed_in_the_states_dtype_and_rounded_once() -> None:
    torch.manual_seed(0)
    norm = StateNorm(DIM).bfloat16()
    with torch.no_grad():
        norm.weight.normal_()
    state_BSD = torch.randn(2, 30, DIM)
    mean_square = state_BSD.double().square().mean(-1, keepdim=True)
    exact = state_BSD.double() / (mean_square + 1e-6).sqrt() * norm.weight.double()
    normed = norm(state_BSD)
    assert normed.dtype == torch.bfloat16
    # Half a step of a bfloat16 of 8 bits; rounding the state or its norm as well would come to more.
    assert ((normed.double() - exact).abs() <= exact.abs() * (2.0**-8 + 1e-5)).all()


def test_the_norm_has_the_root_of_the_mean_square_with_its_epsilon_inside() -> None:
    norm = StateNorm(4).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tiny = torch.full((1, 1, 4), 1e-3, dtype=torch.float64)
    # mean square 1e-6, and 1e-6 on top: 1e-3 / sqrt(2e-6)
    expected = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], dtype=torch.float64) / math.sqrt(2)
    torch.testing.assert_close(norm(tiny), expected, rtol=0, atol=1e-12)
