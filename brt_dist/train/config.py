"""What a training run does, how it steps, and where it writes."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """Length and rhythm of a run.

    steps                optimizer steps of the whole run; where the learning rate is a cosine, it ends here
    seed                 of the initial weights and of dropout
    save_every           steps between two checkpoints; 0: only one at the end
    evaluate_every       steps between two evaluations on validation documents; 0: none
    evaluate_documents   how many validation documents an evaluation reads, the first of the split
    evaluate_tokens      how many tokens of each, from its first on
    health_every         steps between two looks at the health of the state (see `state_health.py`); 0: none
    clip_norm            largest gradient norm of a step; 0: no clipping
    loss_scale           float16 only: what the loss is multiplied with at first; it then follows the gradients
    profile_steps        steps that a torch profiler trace is written of; 0: none
    """

    steps: int = 1000
    seed: int = 0
    save_every: int = 0
    evaluate_every: int = 0
    evaluate_documents: int = 8
    evaluate_tokens: int = 16384
    health_every: int = 10
    clip_norm: float = 1.0
    loss_scale: float = 65536.0
    profile_steps: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"train.seed is {self.seed}; it must be at least 0 and below 2^32")
        if self.loss_scale < 1 or not math.log2(self.loss_scale).is_integer():
            raise ValueError(f"train.loss_scale is {self.loss_scale}; it must be a power of 2, and at least 1")
        for name, least in (
            ("steps", 1),
            ("save_every", 0),
            ("evaluate_every", 0),
            ("evaluate_documents", 1),
            ("evaluate_tokens", 1),
            ("health_every", 0),
            ("clip_norm", 0),
            ("profile_steps", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer, and its learning rate at every step.

    name                "adamw"; "adafactor": the paper's; "muon": Muon for matrices, AdamW for everything else.
                        The last two look at whole matrices and need parallel.zero_stage 0
    lr                  AdamW, Muon: the peak, of size 0.001. Adafactor: steps relative to a tensor's own size, 0.01 at
                        the peak in the reference's later recipe. With schedule "rsqrt" a factor instead: the paper
                        trained with Adafactor, 1.0 and 1000 steps of warm-up
    schedule            "cosine": behind the warm-up half a cosine, down to `final_lr_ratio` of the peak at the last
                        step;
                        "rsqrt": lr / sqrt(step), whatever the number of steps, with a peak of lr / sqrt(warmup_steps)
    warmup_steps        steps in which the rate rises in a line
    final_lr_ratio      what is left at the end of the cosine
    embedding_lr_ratio  AdamW, also beside Muon: the learning rate of the embedding, and of a head that is not tied to
                        it, over that of the rest. With entries of
                        size 1, where a matrix has 1/sqrt(dim), it needs more to move as fast; Adafactor does so itself
    betas, eps          AdamW, also beside Muon
    weight_decay        AdamW and Muon, on matrices only (see `train/optimizer.py`)
    momentum            Adafactor, Muon; null: 0.9 and 0.95. Adafactor without momentum (0) keeps none in memory
    """

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    lr: float = 1e-3
    schedule: Literal["cosine", "rsqrt"] = "cosine"
    warmup_steps: int = 100
    final_lr_ratio: float = 0.1
    embedding_lr_ratio: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float | None = None

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
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.momentum is {self.momentum}; it must be at least 0 and less than 1")

    @property
    def whole_matrices(self) -> bool:
        """Whether the optimizer looks at more of a matrix than one entry at a time, so that none may be cut."""
        return self.name != "adamw"

    def ignored(self) -> list[str]:
        """The keys that were given a value, but that this optimizer or this schedule does not look at."""
        unused = {
            "adamw": ["momentum"],
            "adafactor": ["embedding_lr_ratio", "betas", "eps", "weight_decay"],
            "muon": [],
        }[self.name]
        if self.schedule == "rsqrt":
            unused = ["final_lr_ratio", *unused]
        defaults = {key.name: key.default for key in fields(self)}
        return [name for name in unused if getattr(self, name) != defaults[name]]


@dataclass(frozen=True)
class RunFolderConfig:
    """Where a run writes its configuration, metrics and checkpoints."""

    dir: str = ""
