"""Optimizers by name: which tensor is stepped by which rule, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from brt_dist.data.errors import BadInput
from brt_dist.train.adafactor import Adafactor
from brt_dist.train.config import OptimizerConfig

Optimizer = torch.optim.Optimizer

# What torch's optimizers remember of a tensor beside the number of its step, by their names for it.
MOMENTS = {"AdamW": ("exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}


def build_adamw(named: Mapping[str, Tensor], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all tensors, in groups: the rows of the vocabulary, the matrices, which decay, and the rest.

    Each group's `lr_ratio` says by what its learning rate differs from the schedule's.
    """
    rows = [tensor for name, tensor in named.items() if is_vocabulary(name)]
    matrices = [tensor for name, tensor in named.items() if is_matrix(name, tensor)]
    rest = [tensor for name, tensor in named.items() if not is_vocabulary(name) and not is_matrix(name, tensor)]
    first: dict[str, Any] = {"params": rows, "weight_decay": 0.0, "lr_ratio": config.embedding_lr_ratio}
    if not rows and len(rest) > 1:
        # DeepSpeed adds up a pipeline's gradient norm group by group: a stage with fewer groups would be waited for.
        first, rest = {"params": rest[:1], "weight_decay": 0.0, "lr_ratio": 1.0}, rest[1:]
    groups: list[dict[str, Any]] = [
        first,
        {"params": matrices, "weight_decay": config.weight_decay, "lr_ratio": 1.0},
        {"params": rest, "weight_decay": 0.0, "lr_ratio": 1.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps
    )


def build_adafactor(named: Mapping[str, Tensor], config: OptimizerConfig) -> Adafactor:
    """Adafactor over all tensors, alike: its steps are relative to a tensor's size, so that no kind needs its own."""
    momentum = 0.9 if config.momentum is None else config.momentum
    return Adafactor([{"params": list(named.values()), "lr_ratio": 1.0}], lr=config.lr, momentum=momentum)


def build_muon(named: Mapping[str, Tensor], config: OptimizerConfig) -> list[Optimizer]:
    """Muon over the matrices, and AdamW over everything else: embedding, gains, scales, biases, ids, initial states.

    A matrix's step is scaled to the size that AdamW's would have (0.2 sqrt(longer side); Liu et al. 2025, "Muon is
    scalable for LLM training"), so that one learning rate and one weight decay serve both, and those found for AdamW
    are a good beginning.
    """
    check_available(config)
    matrices = {name: tensor for name, tensor in named.items() if is_matrix(name, tensor)}
    others = {name: tensor for name, tensor in named.items() if name not in matrices}
    muon = torch.optim.Muon(
        [{"params": list(matrices.values()), "lr_ratio": 1.0}],
        lr=config.lr,
        momentum=0.95 if config.momentum is None else config.momentum,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, build_adamw(others, config)]


def build_optimizers(named: Mapping[str, Tensor], config: OptimizerConfig) -> list[Optimizer]:
    """The optimizers that share the work on the tensors. Those of Adafactor and Muon must be whole and unfused."""
    if config.name == "adafactor":
        return [build_adafactor(named, config)]
    if config.name == "muon":
        return build_muon(named, config)
    return [build_adamw(named, config)]


def check_available(config: OptimizerConfig) -> None:
    """BadInput where this torch lacks the optimizer."""
    if config.name == "muon" and not hasattr(torch.optim, "Muon"):
        raise BadInput(f"optimizer.name is muon, which torch {torch.__version__} lacks; torch 2.9 brought it")


def is_matrix(name: str, tensor: Tensor) -> bool:
    """Weight decay and Muon are for matrices: not for gains, scales, biases, embeddings, state ids, initial states.

    name: of the parameter, or of a matrix stacked in it (`layers.0.projection.weight[2]`).
    """
    return name.partition("[")[0].endswith(".weight") and tensor.ndim == 2 and not is_vocabulary(name)


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has a row for each entry of the vocabulary: the embedding, and a head of its own."""
    return name in ("embedding.weight", "head.weight")


def make_state(optimizer: Optimizer) -> None:
    """Give every tensor now the zeros that torch's AdamW and Muon would give it in their first step."""
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            make_state_of(tensor, optimizer)


def make_state_of(tensor: Tensor, optimizer: Optimizer) -> None:
    """As `make_state`, of one tensor."""
    if not optimizer.state[tensor]:
        zeros = {name: torch.zeros_like(tensor) for name in MOMENTS[type(optimizer).__name__]}
        optimizer.state[tensor] = {"step": torch.tensor(0.0), **zeros}


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 1, of `steps`.

    cosine: linear from lr / warmup_steps up to lr, then a half cosine down to lr * final_lr_ratio at the last step.
    The reference's cosine begins at step 0, under the warm-up: with 500,000 steps it is lower by 0.3 % at most.
    rsqrt: lr / sqrt(step), behind the same line up to lr / sqrt(warmup_steps).
    """
    if config.schedule == "rsqrt":
        reached = min(step, config.warmup_steps) / config.warmup_steps if config.warmup_steps else 1.0
        return config.lr * reached / math.sqrt(max(step, config.warmup_steps))
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)
