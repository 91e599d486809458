"""How the work is laid over processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from brt_dist.model.config import ModelConfig


@dataclass(frozen=True)
class ParallelConfig:
    """The layout of a run; the data-parallel size is what remains of the world size.

    tensor             processes that share every layer: heads, channels of the MLP, rows of the vocabulary
    sequence           between those, norms, dropout and residual are shared too, by tokens (with `tensor` > 1)
    pipeline           processes that share the stack of layers: its stages
    zero_stage         what DeepSpeed shards over data ranks: 0 nothing, 1 the optimizer state, 2 its gradients too,
                       3 the parameters too
    offload            what ZeRO keeps in the memory of the host: "none", "optimizer" (its state and step), or with
                       ZeRO-3 "all" (the parameters too)
    micro_batches      forward passes of one data rank per optimizer step
    micro_batch_axis   "lanes": each micro-batch has lanes of its own; "segments": each is the next segment of the same
                       lanes, so that a step reads `micro_batches` segments of every lane
    recompute          activations that the backward pass computes again: "none", "selective" (the tokens' attentions
                       and MLP) or "full" (whole layers)
    recompute_layers   the numbers of the layers that do so; null: all
    report             tells for a few steps what every process computed, sent and waited for, and its memory
    """

    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    zero_stage: int = 1
    offload: Literal["none", "optimizer", "all"] = "none"
    micro_batches: int = 1
    micro_batch_axis: Literal["lanes", "segments"] = "lanes"
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_layers: tuple[int, ...] | None = None
    report: bool = False

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.zero_stage <= 3:
            raise ValueError(f"parallel.zero_stage is {self.zero_stage}; it must be 0, 1, 2 or 3")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"parallel.{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")

    def check_combination(self) -> None:
        """ValueError where two of the keys exclude each other; says why, and what is nearest to it."""
        if self.zero_stage == 0 and self.pipeline > 1:
            raise ValueError(
                f"parallel.zero_stage is 0 with parallel.pipeline {self.pipeline}: the stages of a pipeline are not "
                "clipped by a common gradient norm there; set parallel.zero_stage=1 or parallel.pipeline=1"
            )
        if self.zero_stage > 1 and self.pipeline > 1:
            raise ValueError(
                f"parallel.zero_stage is {self.zero_stage} with parallel.pipeline {self.pipeline}: DeepSpeed shards "
                "gradients as soon as they are there, but a pipeline adds those of all its micro-batches first; set "
                "parallel.zero_stage=1 or parallel.pipeline=1"
            )
        if self.zero_stage == 3 and self.tensor > 1:
            raise ValueError(
                f"parallel.zero_stage is 3 with parallel.tensor {self.tensor}: DeepSpeed would gather the parameters "
                "of layers that megatron-core runs; set parallel.zero_stage=2 or parallel.tensor=1"
            )
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError(
                f"parallel.offload is {self.offload} with parallel.zero_stage 0, which shards nothing that could be "
                "moved; set parallel.zero_stage=1 or parallel.offload=none"
            )
        if self.offload != "none" and self.pipeline > 1:
            raise ValueError(
                f"parallel.offload is {self.offload} with parallel.pipeline {self.pipeline}: DeepSpeed does not add "
                "the gradients of its micro-batches on the host; set parallel.offload=none or parallel.pipeline=1"
            )
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(
                f"parallel.offload is all with parallel.zero_stage {self.zero_stage}; only ZeRO-3 shards parameters: "
                "set parallel.zero_stage=3 or parallel.offload=optimizer"
            )
        if self.recompute == "none" and self.recompute_layers:
            raise ValueError(
                f"parallel.recompute_layers is {list(self.recompute_layers)}, but parallel.recompute is none; "
                "set it to selective or full"
            )

    def check_model(self, model: ModelConfig) -> None:
        """ValueError where the model cannot be divided like this; names both numbers."""
        for name in ("num_heads", "mlp_dim", "vocab_size"):
            if getattr(model, name) % self.tensor:
                raise ValueError(
                    f"model.{name} is {getattr(model, name)}, which parallel.tensor {self.tensor} does not divide"
                )
        if self.pipeline > model.num_layers:
            raise ValueError(
                f"parallel.pipeline is {self.pipeline}, but there are only {model.num_layers} layers (model.num_layers)"
            )
        if model.feedback and self.pipeline > 1:
            raise ValueError(
                f"model.feedback is true with parallel.pipeline {self.pipeline}: the state would go back through the "
                "stages at every block; set parallel.pipeline=1 or model.feedback=false"
            )
        if model.feedback and self.sequence:
            raise ValueError(
                "model.feedback is true with parallel.sequence: the stack runs block by block, and tokens are shared "
                "by segments; set parallel.sequence=false or model.feedback=false"
            )
        if model.feedback and self.recompute != "none" and self.zero_stage == 3:
            raise ValueError(
                f"parallel.recompute is {self.recompute} with parallel.zero_stage 3 and model.feedback: weights that "
                "come and go cannot be computed with again block by block; set parallel.recompute=none or "
                "parallel.zero_stage=2"
            )
        if self.recompute_layers is not None:
            self._check_recompute_layers(model, self.recompute_layers)

    def _check_recompute_layers(self, model: ModelConfig, chosen: tuple[int, ...]) -> None:
        for index in chosen:
            if not 0 <= index < model.num_layers:
                raise ValueError(
                    f"parallel.recompute_layers holds {index}, but there are {model.num_layers} layers, counted from 0 "
                    f"to {model.num_layers - 1}"
                )
        if model.feedback and self.recompute == "full":
            raise ValueError(
                "parallel.recompute_layers chooses layers that are computed again in full, but with model.feedback "
                "they read each other block by block; leave it out, or set parallel.recompute=selective"
            )

    def check_segment(self, segment: int) -> None:
        """ValueError where the tokens of a segment cannot be shared."""
        if self.sequence and segment % self.tensor:
            raise ValueError(
                f"data.segment is {segment}, which parallel.tensor {self.tensor} does not divide (parallel.sequence)"
            )

    @property
    def segments_per_step(self) -> int:
        """How many segments of every lane an optimizer step reads."""
        return self.micro_batches if self.micro_batch_axis == "segments" else 1

    @property
    def lane_groups(self) -> int:
        """Into how many micro-batches the lanes of a data rank are divided."""
        return self.micro_batches // self.segments_per_step

    def data_ranks(self, world_size: int) -> int:
        """Data-parallel size of `world_size` processes; ValueError where the layout does not divide them."""
        model_ranks = self.tensor * self.pipeline
        if world_size % model_ranks:
            raise ValueError(
                f"{world_size} processes were started, which tensor {self.tensor} x pipeline {self.pipeline} "
                f"= {model_ranks} does not divide"
            )
        return world_size // model_ranks


_CHOICES = {
    "offload": ("none", "optimizer", "all"),
    "micro_batch_axis": ("lanes", "segments"),
    "recompute": ("none", "selective", "full"),
}
