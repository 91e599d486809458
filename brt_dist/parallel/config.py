"""How the work is laid over processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParallelConfig:
    """The layout of a run; the data-parallel size is what remains of the world size.

    tensor, pipeline   processes that share one layer, and one stack of layers (only 1 so far)
    zero_stage         what DeepSpeed shards over data ranks: 0 nothing, 1 the optimizer state, 2 its gradients too
    micro_batches      forward passes of one rank per optimizer step, each with lanes and a carry slot of its own
    micro_batch_axis   "lanes": micro-batches are groups of lanes
    """

    tensor: int = 1
    pipeline: int = 1
    zero_stage: int = 1
    micro_batches: int = 1
    micro_batch_axis: Literal["lanes", "segments"] = "lanes"

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.zero_stage <= 3:
            raise ValueError(f"parallel.zero_stage is {self.zero_stage}; it must be 0, 1, 2 or 3")

    def check_supported(self) -> None:
        """ValueError where this layout cannot be run, or not yet."""
        if self.zero_stage == 0 and self.pipeline > 1:
            raise ValueError(
                f"parallel.zero_stage is 0 with parallel.pipeline {self.pipeline}: the stages of a pipeline are not "
                "clipped by a common gradient norm there; set parallel.zero_stage=1 or parallel.pipeline=1"
            )
        for name in ("tensor", "pipeline"):
            if getattr(self, name) != 1:
                raise ValueError(f"parallel.{name} is {getattr(self, name)}; this version runs 1 only")
        if self.zero_stage == 3:
            raise ValueError("parallel.zero_stage is 3; this version runs 0, 1 and 2")
        if self.micro_batch_axis != "lanes":
            raise ValueError("parallel.micro_batch_axis is 'segments'; this version runs 'lanes' only")

    def data_ranks(self, world_size: int) -> int:
        """Data-parallel size of `world_size` processes; ValueError where the layout does not divide them."""
        model_ranks = self.tensor * self.pipeline
        if world_size % model_ranks:
            raise ValueError(
                f"{world_size} processes were started, which tensor {self.tensor} x pipeline {self.pipeline} "
                f"= {model_ranks} does not divide"
            )
        return world_size // model_ranks
