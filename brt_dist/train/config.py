"""What a training run does, how it steps, and where it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """Length and rhythm of a run.

    steps                optimizer steps of the whole run; the learning rate's cosine ends here
    seed                 of the initial weights and of dropout
    save_every           steps between two checkpoints; 0: only one at the end
    evaluate_every       steps between two evaluations on validation documents; 0: none
    evaluate_documents   how many validation documents an evaluation reads, the first of the split
    evaluate_tokens      how many tokens of each, from its first on
    clip_norm            largest gradient norm of a step; 0: no clipping
    profile_steps        steps that a torch profiler trace is written of; 0: none
    """

    steps: int = 1000
    seed: int = 0
    save_every: int = 0
    evaluate_every: int = 0
    evaluate_documents: int = 8
    evaluate_tokens: int = 16384
    clip_norm: float = 1.0
    profile_steps: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"train.seed is {self.seed}; it must be at least 0 and below 2^32")
        for name, least in (
            ("steps", 1),
            ("save_every", 0),
            ("evaluate_every", 0),
            ("evaluate_documents", 1),
            ("evaluate_tokens", 1),
            ("clip_norm", 0),
            ("profile_steps", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine down to `final_lr_ratio` of the peak.

    Weight decay acts on matrices only (see `train/optimizer.py`). The embedding's learning rate is `embedding_lr_ratio`
    times that of the rest: with entries of size 1, where a matrix has 1/sqrt(dim), it needs more to move as fast, which
    is what the paper's Adafactor gave it by scaling steps with a parameter's size.
    """

    name: Literal["adamw"] = "adamw"
    lr: float = 1e-3
    warmup_steps: int = 100
    final_lr_ratio: float = 0.1
    embedding_lr_ratio: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.lr <= 1000:
            raise ValueError(f"optimizer.lr is {self.lr}; it must be greater than 0 and at most 1000")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps is {self.warmup_steps}; it must be at least 0")
        if not self.embedding_lr_ratio > 0:
            raise ValueError(f"optimizer.embedding_lr_ratio is {self.embedding_lr_ratio}; it must be greater than 0")
        if not 0 <= self.final_lr_ratio <= 1:
            raise ValueError(f"optimizer.final_lr_ratio is {self.final_lr_ratio}; it must lie between 0 and 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas are {list(self.betas)}; each must be at least 0 and less than 1")
        if not self.eps > 0:
            raise ValueError(f"optimizer.eps is {self.eps}; it must be greater than 0")
        if self.weight_decay < 0:
            raise ValueError(f"optimizer.weight_decay is {self.weight_decay}; it must be at least 0")


@dataclass(frozen=True)
class RunFolderConfig:
    """Where a run writes its configuration, metrics and checkpoints."""

    dir: str = ""
