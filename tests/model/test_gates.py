"""The fixed gate: a learned moving average."""

from __future__ import annotations

import torch

from brt_dist.model.gates import FixedGate


def gate_with_bias(*biases: float) -> FixedGate:
    gate = FixedGate(len(biases)).double()
    with torch.no_grad():
        gate.bias_D.copy_(torch.tensor(biases))
    return gate


def test_the_next_state_lies_between_state_and_update_by_the_sigmoid_of_the_bias() -> None:
    state, update = torch.tensor([[[2.0, 2.0, 2.0]]]).double(), torch.tensor([[[10.0, 10.0, 10.0]]]).double()
    # sigmoid(0) = 1/2 and sigmoid(ln 3) = 3/4 of the old state are kept.
    after = gate_with_bias(0.0, float(torch.tensor(3.0).log()), 100.0)(state, update)
    torch.testing.assert_close(after, torch.tensor([[[6.0, 4.0, 2.0]]]).double(), rtol=0, atol=1e-6)


def test_a_gate_of_zero_bias_halves_the_distance_at_each_step() -> None:
    gate, state, update = gate_with_bias(0.0), torch.zeros(1, 1, 1).double(), torch.ones(1, 1, 1).double()
    for step in range(1, 11):
        state = gate(state, update)
        assert state.item() == 1 - 2.0**-step


def test_small_updates_in_bfloat16_are_not_lost_in_a_float32_state() -> None:
    gate = gate_with_bias(7.0).bfloat16()  # keeps 0.9991 of the state: a step of 0.0009 vanishes beside 1 in bfloat16
    state, update = torch.ones(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.bfloat16)
    for _ in range(1000):
        state = gate(state, update)
    assert state.dtype == torch.float32
    expected = torch.sigmoid(torch.tensor(7.0).double()) ** 1000
    assert abs(state.item() - expected.item()) < 1e-3


def test_the_gate_passes_gradients_to_state_update_and_bias() -> None:
    gate = gate_with_bias(0.3, -0.7)
    state, update = (torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda state, update, bias: gate(state, update), (state, update, gate.bias_D))
