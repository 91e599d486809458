"""AdamW: which parameters decay, and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from brt_dist.train.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters, in groups: the embedding, the matrices, which decay, and the rest.

    Each group's `lr_ratio` says by what its learning rate differs from the schedule's.
    """
    embedding: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        group = embedding if "embedding" in name else matrices if decays(name, parameter) else rest
        group.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": embedding, "weight_decay": 0.0, "lr_ratio": config.embedding_lr_ratio},
        {"params": matrices, "weight_decay": config.weight_decay, "lr_ratio": 1.0},
        {"params": rest, "weight_decay": 0.0, "lr_ratio": 1.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps
    )


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices only: not for gains, scales, biases, embeddings, state ids and initial states."""
    return name.endswith(".weight") and parameter.ndim == 2 and "embedding" not in name


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 1, of `steps`.

    Linear from lr / warmup_steps up to lr, then a half cosine down to lr * final_lr_ratio at the last step.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)
