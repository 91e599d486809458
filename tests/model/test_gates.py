"""The gates: a learned moving average, and an LSTM's input and forget gates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from brt_dist.model.config import ModelConfig
from brt_dist.model.gates import FixedGate, LSTMGate, make_gate

LN3 = math.log(3.0)  # sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4, tanh(ln(3) / 2) = 1/2


def fixed_gate(*biases: float, squash: bool = False) -> FixedGate:
    """Float64; hidden vectors are the candidates."""
    gate = FixedGate(len(biases), len(biases), squash).double()
    with torch.no_grad():
        gate.candidate.weight.copy_(torch.eye(len(biases)))
        gate.bias_D.copy_(torch.tensor(biases))
    return gate


def lstm_gate(squash: bool = False, input_bias: float = 0.0, forget_bias: float = 0.0) -> LSTMGate:
    """Float64, one channel; hidden vectors are (candidate, what the input gate adds, what the forget gate adds)."""
    gate = LSTMGate(3, 1, squash).double()
    with torch.no_grad():
        gate.candidate_and_gates.weight.copy_(torch.eye(3))
        gate.input_bias_D.fill_(input_bias)
        gate.forget_bias_D.fill_(forget_bias)
    return gate


def any_gate(kind: str, inputs: int, dim: int, squash: bool) -> FixedGate | LSTMGate:
    """Float64, all parameters drawn."""
    torch.manual_seed(0)
    config = ModelConfig(gate=kind, dim=dim)  # type: ignore[arg-type]
    gate = make_gate(config, inputs, squash).double()
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_()
    return gate


SQUASH = pytest.mark.parametrize("squash", [False, True], ids=["plain", "squashed"])
EITHER = pytest.mark.parametrize("kind", ["fixed", "lstm"])


# --- fixed ---


def test_the_next_state_lies_between_state_and_candidate_by_the_sigmoid_of_the_bias() -> None:
    state, hidden = torch.tensor([[[2.0, 2.0, 2.0]]]).double(), torch.tensor([[[10.0, 10.0, 10.0]]]).double()
    after = fixed_gate(0.0, LN3, 100.0)(state, hidden)
    torch.testing.assert_close(after, torch.tensor([[[6.0, 4.0, 2.0]]]).double(), rtol=0, atol=1e-6)


def test_a_gate_of_zero_bias_halves_the_distance_at_each_step() -> None:
    gate, state, hidden = fixed_gate(0.0), torch.zeros(1, 1, 1).double(), torch.ones(1, 1, 1).double()
    for step in range(1, 11):
        state = gate(state, hidden)
        assert state.item() == 1 - 2.0**-step


# --- LSTM ---


@pytest.mark.parametrize(
    ("state", "candidate", "input_gate", "forget_gate", "expected"),
    [
        # keeps 3/4 of 8, admits 1/4 of 4
        (8.0, 4.0, -LN3, LN3, 7.0),
        # keeps 1/4 of 8, admits 3/4 of 4: shares need not add up to one ...
        (8.0, 4.0, LN3, LN3, 9.0),
        # ... nor must the state shrink where nothing comes in
        (8.0, 4.0, -1000.0, 1000.0, 8.0),
        (8.0, 4.0, 1000.0, -1000.0, 4.0),
        (-8.0, 2.0, 0.0, 0.0, -3.0),
    ],
)
def test_an_lstm_gate_keeps_and_admits_each_by_a_sigmoid_of_its_own(
    state: float, candidate: float, input_gate: float, forget_gate: float, expected: float
) -> None:
    # The constants -1 and +1 are made up for in the hidden vector once, and in the biases once.
    state_BSD = torch.tensor([[[state]]], dtype=torch.float64)
    by_hidden = torch.tensor([[[candidate, input_gate + 1, forget_gate - 1]]], dtype=torch.float64)
    by_bias = torch.tensor([[[candidate, 0.0, 0.0]]], dtype=torch.float64)
    assert lstm_gate()(state_BSD, by_hidden).item() == pytest.approx(expected, abs=1e-12)
    biased = lstm_gate(input_bias=input_gate + 1, forget_bias=forget_gate - 1)
    assert biased(state_BSD, by_bias).item() == pytest.approx(expected, abs=1e-6)


def test_an_untouched_lstm_gate_remembers() -> None:
    state_BSD = torch.tensor([[[10.0]]], dtype=torch.float64)
    # sigmoid(1) = 0.7311 of the state stays, sigmoid(-1) = 0.2689 of the candidate comes in.
    after = lstm_gate()(state_BSD, torch.tensor([[[100.0, 0.0, 0.0]]], dtype=torch.float64))
    assert after.item() == pytest.approx(7.310585786300049 + 26.894142136999512, abs=1e-12)


# --- both ---


@EITHER
@SQUASH
def test_the_gates_never_see_the_state_and_channels_never_mix(kind: str, squash: bool) -> None:
    gate, hidden_BSI = any_gate(kind, 5, 3, squash), torch.randn(1, 2, 5, dtype=torch.float64)
    slopes = []
    for state_BSD in torch.randn(2, 1, 2, 3, dtype=torch.float64):
        slope = torch.autograd.functional.jacobian(lambda state: gate(state, hidden_BSI), state_BSD)
        slopes.append(slope.reshape(6, 6))
    assert torch.equal(slopes[0], slopes[1])
    shares = slopes[0].diagonal()
    assert torch.equal(slopes[0], shares.diag())
    assert ((shares > 0) & (shares < 1)).all()


@EITHER
def test_a_squashed_candidate_is_the_tanh_of_the_plain_one(kind: str) -> None:
    # The candidate alone: with the state zero, the next state is the admitted share of it.
    half_ln3 = torch.full((1, 1, 1), LN3 / 2, dtype=torch.float64)
    zero = torch.zeros_like(half_ln3)
    if kind == "fixed":
        plain, squashed = (fixed_gate(LN3, squash=squash)(zero, half_ln3) for squash in (False, True))
    else:
        hidden = torch.cat([half_ln3, zero - LN3 + 1, zero], dim=-1)
        plain, squashed = (lstm_gate(squash)(zero, hidden) for squash in (False, True))
    assert plain.item() == pytest.approx(LN3 / 2 / 4, abs=1e-6)
    assert squashed.item() == pytest.approx(0.5 / 4, abs=1e-6)


@EITHER
@SQUASH
def test_a_gate_passes_gradients_to_state_hidden_vectors_and_all_its_parameters(kind: str, squash: bool) -> None:
    gate = any_gate(kind, 4, 2, squash)
    names, parameters = zip(*gate.named_parameters(), strict=True)

    def run(state: Tensor, hidden: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(gate, dict(zip(names, values, strict=True)), (state, hidden))

    state, hidden = (torch.randn(2, 3, size, dtype=torch.float64, requires_grad=True) for size in (2, 4))
    assert torch.autograd.gradcheck(run, (state, hidden, *parameters))


@EITHER
def test_small_updates_in_bfloat16_are_not_lost_in_a_float32_state(kind: str) -> None:
    # A bias of 7 keeps 0.9991 of the state: a step of 0.0009 vanishes beside 1 in bfloat16.
    gate = fixed_gate(7.0) if kind == "fixed" else lstm_gate(forget_bias=6.0)
    state, hidden = torch.ones(1, 1, 1), torch.zeros(1, 1, 1 if kind == "fixed" else 3, dtype=torch.bfloat16)
    gate = gate.bfloat16()
    for _ in range(1000):
        state = gate(state, hidden)
    assert state.dtype == torch.float32
    expected = torch.sigmoid(torch.tensor(7.0).double()) ** 1000
    assert abs(state.item() - expected.item()) < 1e-3


@EITHER
@SQUASH
def test_a_bfloat16_gate_rounds_its_products_and_nothing_behind_them(kind: str, squash: bool) -> None:
    gate = any_gate(kind, 16, 8, squash).bfloat16()
    state_BSD, hidden_BSI = torch.randn(2, 3, 8), torch.randn(2, 3, 16).bfloat16()
    exact = any_gate(kind, 16, 8, squash).float()
    exact.load_state_dict(gate.state_dict())
    projection = exact.candidate if isinstance(exact, FixedGate) else exact.candidate_and_gates

    def rounded(module: object, inputs: object, outputs: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        if isinstance(outputs, Tensor):
            return outputs.bfloat16().float()
        return tuple(part.bfloat16().float() for part in outputs)

    projection.register_forward_hook(rounded)
    torch.testing.assert_close(gate(state_BSD, hidden_BSI), exact(state_BSD, hidden_BSI.float()), rtol=1e-6, atol=1e-6)


@EITHER
def test_openness_is_the_mean_share_of_the_candidate_that_comes_in(kind: str) -> None:
    gate = any_gate(kind, 5, 3, squash=False)
    hidden_BSI = torch.randn(2, 4, 5, dtype=torch.float64)
    hidden_BSI[..., 0] = 1.0
    candidate = gate.candidate.weight if isinstance(gate, FixedGate) else gate.candidate_and_gates.weight[:3]
    with torch.no_grad():
        candidate.copy_(torch.eye(1, 5).expand(3, 5))  # every candidate is 1
    admitted_BSD = gate(torch.zeros(2, 4, 3, dtype=torch.float64), hidden_BSI)
    assert gate.openness(hidden_BSI).item() == pytest.approx(admitted_BSD.mean().item(), abs=1e-6)


def test_the_configuration_names_the_gate() -> None:
    assert isinstance(make_gate(ModelConfig(gate="fixed"), 8), FixedGate)
    assert isinstance(make_gate(ModelConfig(gate="lstm"), 8), LSTMGate)
