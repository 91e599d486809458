"""Adafactor: the reference's steps, and what its rule means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from brt_dist.train.adafactor import Adafactor

REFERENCE = Path(__file__).resolve().parent.parent / "reference" / "adafactor.npz"
NAMES = ("big", "small", "vec", "zero_vec")
STEPS = range(1, 5)


def reference_errors() -> dict[str, list[float]]:
    """By tensor and step, our largest error over the tensor's largest entry."""
    recorded = np.load(REFERENCE, allow_pickle=False)
    tensors = {name: torch.tensor(recorded[f"step0/{name}"]) for name in NAMES}
    optimizer = Adafactor(list(tensors.values()), lr=1.0)
    errors: dict[str, list[float]] = {name: [] for name in NAMES}
    for step in STEPS:
        optimizer.param_groups[0]["lr"] = float(recorded[f"step{step}/lr"])
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(recorded[f"step{step}/grad/{name}"])
        optimizer.step()
        for name, tensor in tensors.items():
            expected = torch.tensor(recorded[f"step{step}/param/{name}"])
            errors[name].append(float((tensor - expected).abs().max() / expected.abs().max()))
    return errors


@pytest.mark.parametrize("name", NAMES)
def test_four_steps_are_those_of_the_reference(name: str):
    """Measured: 2.3e-7 for the tensor that begins at zero, 4e-8 for the others."""
    assert max(reference_errors()[name]) < 1e-6


def some_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def stepped(tensor: Tensor, *gradients: Tensor, lr: float = 0.1, **settings: float) -> Tensor:
    """A copy of `tensor` behind a step for each of the gradients."""
    copy = tensor.clone()
    optimizer = Adafactor([copy], lr=lr, **settings)
    for gradient in gradients:
        copy.grad = gradient.clone()
        optimizer.step()
    return copy


def rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


@pytest.mark.parametrize(("shape", "squares"), [((128, 130), 128 + 130), ((127, 300), 127 * 300), ((500,), 500)])
def test_only_matrices_with_two_long_sides_keep_rows_and_columns_alone(shape: tuple[int, ...], squares: int):
    tensor = torch.zeros(shape)
    state = Adafactor([tensor], lr=1.0).state[tensor]
    assert state["momentum"].shape == shape
    assert sum(value.numel() for name, value in state.items() if name not in ("momentum", "step")) == squares


@pytest.mark.parametrize("shape", [(130, 140), (20, 30)])
def test_the_size_of_gradients_does_not_matter(shape: tuple[int, int]):
    tensor, gradients = some_matrix(*shape), [some_matrix(*shape, seed=seed) for seed in (1, 2, 3)]
    larger = stepped(tensor, *(1000 * gradient for gradient in gradients))
    assert torch.allclose(stepped(tensor, *gradients), larger, atol=1e-6)


@pytest.mark.parametrize("size", [1e-5, 1e-3, 2.0])
def test_no_step_is_longer_than_the_rate_times_the_size_of_the_tensor(size: float):
    tensor = size * some_matrix(140, 130)
    before = tensor
    for seed in range(1, 6):
        # Gradients that grow: the mean of their squares lags behind, and the update must be clipped.
        after = stepped(before, some_matrix(140, 130), 10.0**seed * some_matrix(140, 130, seed), momentum=0.0)
        once = stepped(before, some_matrix(140, 130), momentum=0.0)
        assert rms(after - once) <= 0.1 * max(rms(once), 1e-3) * (1 + 1e-4)
        before = after


def test_a_row_of_equal_squares_makes_the_factored_step_exact():
    """Where squared gradients are an outer product, rows and columns know all of them."""
    rows, columns = torch.rand(130) + 0.5, torch.rand(150) + 0.5
    signs = some_matrix(130, 150, seed=4).sign()
    tensor = some_matrix(130, 150)
    moved = stepped(tensor, signs * torch.outer(rows, columns), momentum=0.0) - tensor
    assert torch.allclose(moved, -0.1 * rms(tensor) * signs, rtol=1e-4)


def test_a_tensor_at_zero_moves_and_one_without_gradients_stays():
    assert rms(stepped(torch.zeros(300), torch.ones(300), momentum=0.0)) == pytest.approx(0.1 * 1e-3)
    tensor = some_matrix(130, 140)
    assert torch.equal(stepped(tensor, torch.zeros_like(tensor)), tensor)


def test_without_momentum_none_is_kept_and_the_first_step_is_ten_times_as_long():
    tensor, gradient = some_matrix(40, 50), some_matrix(40, 50, seed=1)
    with_momentum, without = stepped(tensor, gradient), stepped(tensor, gradient, momentum=0.0)
    assert torch.allclose(10 * (with_momentum - tensor), without - tensor, atol=1e-6)
    assert set(Adafactor([tensor], lr=1.0, momentum=0.0).state[tensor]) == {"step", "squares"}


def test_the_state_of_a_bfloat16_tensor_is_float32():
    tensor = some_matrix(20, 30).bfloat16()
    optimizer = Adafactor([tensor], lr=0.1)
    tensor.grad = some_matrix(20, 30, seed=1).bfloat16()
    optimizer.step()
    assert tensor.dtype == torch.bfloat16
    assert {value.dtype for value in optimizer.state[tensor].values()} == {torch.float32}
