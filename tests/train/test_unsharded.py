"""Adafactor and Muon step every matrix by itself, also where the model stacks several in one parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import small_model
from torch import Tensor, nn

from brt_dist.data.errors import BadInput
from brt_dist.model.stacked_linear import StackedLinear
from brt_dist.train.adafactor import Adafactor
from brt_dist.train.config import OptimizerConfig
from brt_dist.train.optimizer import check_available
from brt_dist.train.unsharded import UnshardedOptimizer

INPUTS, OUTPUTS, PARTS, LR = 130, 140, 3, 0.01
NAMES = ["adafactor", "muon"]


class Stack(nn.Module):
    """A stack of three matrices, long enough to be factored, one that stands alone, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.stacked = StackedLinear(INPUTS, OUTPUTS, PARTS)
        self.single = nn.Linear(INPUTS, OUTPUTS, bias=False)
        self.scale = nn.Parameter(torch.ones(4))
        with torch.no_grad():
            # Matrices of different sizes: a step relative to the size of all together is another one.
            for factor, part in enumerate(self.stacked.weight.chunk(PARTS), start=1):
                part.mul_(factor)


def fill_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        if name == "stacked.weight":
            for factor, part in enumerate(parameter.grad.chunk(PARTS), start=1):
                part.mul_(10.0**factor)


def config(name: str, **settings: Any) -> OptimizerConfig:
    return OptimizerConfig(**({"name": name, "lr": LR, "weight_decay": 0.1} | settings))


def step_alone(name: str, matrices: list[Tensor], gradients: list[list[Tensor]]) -> list[Tensor]:
    """The matrices behind a step for each list of gradients, by an optimizer that is given nothing else."""
    matrices = [matrix.clone() for matrix in matrices]
    optimizer: torch.optim.Optimizer = (
        Adafactor(matrices, lr=LR)
        if name == "adafactor"
        else torch.optim.Muon(matrices, lr=LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    )
    for each in gradients:
        for matrix, gradient in zip(matrices, each, strict=True):
            matrix.grad = gradient.clone()
        optimizer.step()
    return matrices


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_is_stepped_as_its_matrices_are_alone(name: str):
    model = Stack()
    start = [part.detach().clone() for part in model.stacked.weight.chunk(PARTS)]
    fused_start = model.stacked.weight.detach().clone()
    optimizer = UnshardedOptimizer(model, config(name), clip_norm=0)
    gradients = []
    for seed in (1, 2, 3):
        fill_gradients(model, seed)
        assert model.stacked.weight.grad is not None
        gradients.append(list(model.stacked.weight.grad.clone().chunk(PARTS)))
        optimizer.step()
    alone = torch.cat(step_alone(name, start, gradients))
    assert torch.equal(model.stacked.weight, alone)
    fused = step_alone(name, [fused_start], [[torch.cat(each)] for each in gradients])[0]
    assert (fused - alone).abs().max() > 0.01 * (fused_start - alone).abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_whose_memory_moved_is_still_the_one_that_is_stepped(name: str):
    stayed, moved = Stack(), Stack()
    for model in (stayed, moved):
        optimizer = UnshardedOptimizer(model, config(name), clip_norm=0)
        if model is moved:
            model.stacked.weight.data = model.stacked.weight.data.clone()
        fill_gradients(model, 1)
        optimizer.step()
    assert torch.equal(stayed.stacked.weight, moved.stacked.weight)
    assert not torch.equal(moved.stacked.weight, Stack().stacked.weight)


@pytest.mark.parametrize("name", ["adamw", *NAMES])
def test_what_is_restored_goes_on_bit_for_bit(name: str):
    models = [small_model(gate="lstm", cell="dual").float() for _ in range(2)]
    unbroken, resumed = (UnshardedOptimizer(model, config(name), clip_norm=1.0) for model in models)
    for seed in (1, 2):
        fill_gradients(models[0], seed)
        unbroken.step()
    state = {name: tensor.clone() for name, tensor in unbroken.moments()}
    assert {name: tensor.shape for name, tensor in state.items()} == resumed.moment_shapes()
    held = state | {name: tensor.detach().clone() for name, tensor in unbroken.parameters()}
    resumed.restore(held.__getitem__, steps=2, progress={})
    for optimizer, model in zip((unbroken, resumed), models, strict=True):
        fill_gradients(model, 3)
        optimizer.step()
    ours, theirs = ({**dict(each.parameters()), **dict(each.moments())} for each in (unbroken, resumed))
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("name", ["adamw", *NAMES])
def test_every_entry_of_every_parameter_has_moments_of_its_own(name: str):
    model = small_model(gate="lstm", cell="single", feedback=True).float()
    shapes = UnshardedOptimizer(model, config(name), clip_norm=0).moment_shapes()
    first = {"adamw": ("exp_avg",), "adafactor": ("momentum",), "muon": ("momentum_buffer", "exp_avg")}[name]
    entries = sum(shape.numel() for key, shape in shapes.items() if key.endswith(first))
    assert entries == sum(parameter.numel() for parameter in model.parameters())
    assert any("[2]/" in key for key in shapes) == (name != "adamw")


def test_muon_takes_the_matrices_and_adamw_all_else():
    model = small_model(gate="lstm", cell="dual").float()
    optimizer = UnshardedOptimizer(model, config("muon", embedding_lr_ratio=3.0, momentum=0.8), clip_norm=0)
    by_muon = {key.split("/")[0] for key in optimizer.moment_shapes() if key.endswith("momentum_buffer")}
    assert "layers.0.projection.weight[1]" in by_muon
    assert "layers.1.cell.update.gate.candidate_and_gates.weight[2]" in by_muon
    assert "layers.0.mlp.output.weight" in by_muon
    by_adamw = {key.split("/")[0] for key in optimizer.moment_shapes() if key.endswith("exp_avg")}
    endings = ("norm.weight", "scale_H", "bias_D", "bias.table", "ids_SD", "initial_state_SD", "embedding.weight")
    assert {ending for ending in endings if any(name.endswith(ending) for name in by_adamw)} == set(endings)
    assert all(name.endswith(endings) for name in by_adamw)
    muon, *adamw = optimizer.param_groups
    assert (muon["momentum"], muon["weight_decay"], muon["lr_ratio"]) == (0.8, 0.1, 1.0)
    assert [(group["lr_ratio"], group["weight_decay"]) for group in adamw] == [(3.0, 0.0), (1.0, 0.0)]


@pytest.mark.parametrize("name", ["adamw", *NAMES])
def test_a_rate_set_in_the_groups_is_the_rate_of_the_step(name: str):
    def moved(lr: float) -> float:
        model = Stack()
        optimizer = UnshardedOptimizer(model, config(name, weight_decay=0.0), clip_norm=0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        fill_gradients(model, 1)
        optimizer.step()
        return float((model.stacked.weight - Stack().stacked.weight).detach().norm())

    assert moved(0.004) == pytest.approx(2 * moved(0.002), rel=1e-3)
    assert moved(0.0) == 0


@pytest.mark.parametrize("clip_norm", [0.5, 1e6, 0.0])
def test_gradients_are_clipped_by_the_norm_of_all_of_them(clip_norm: float):
    ours, theirs = Stack(), Stack()
    optimizer = UnshardedOptimizer(ours, config("adamw", eps=1.0), clip_norm)
    plain = torch.optim.AdamW(theirs.parameters(), lr=LR, betas=(0.9, 0.95), eps=1.0, weight_decay=0.1)
    for seed in (1, 2):
        fill_gradients(ours, seed)
        fill_gradients(theirs, seed)
        optimizer.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm or torch.inf)
        plain.step()
        assert optimizer.grad_norm == float(norm) > 1000
    assert torch.equal(ours.stacked.weight, theirs.stacked.weight)


def test_a_torch_without_muon_is_named(monkeypatch: pytest.MonkeyPatch):
    def build() -> None:
        UnshardedOptimizer(Stack(), config("muon"), clip_norm=0)

    build()
    monkeypatch.delattr(torch.optim, "Muon")
    for call in (build, lambda: check_available(config("muon"))):
        with pytest.raises(BadInput, match=rf"optimizer\.name is muon, which torch {torch.__version__[:3]}"):
            call()
    check_available(config("adafactor"))
