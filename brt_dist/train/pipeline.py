"""A pipeline of stages, driven by DeepSpeed's pipeline engine.

Between stages go activations, and with them the starts of their lanes and the number of their slot. The carry stays:
every stage keeps that of its own layers.

Dimension key
  B  lanes of a micro-batch    L  tokens in a segment    C  blocks in a segment    D  model width
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from brt_dist.parallel.carry_slots import CarrySlots
from brt_dist.parallel.process_groups import Processes
from brt_dist.parallel.stage import Stage
from brt_dist.train.deepspeed_config import quiet_deepspeed
from brt_dist.train.micro_batches import MicroBatch

# x_BLD (tokens_BL in front of the first stage), starts_BC as int64, slot.
Activations = tuple[Tensor, Tensor, Tensor]


class SlottedStage(nn.Module):
    """A stage that finds the carry of its layers by the slot's number, and puts the next one there."""

    def __init__(self, stage: Stage, slots: CarrySlots):
        super().__init__()
        self.stage = stage
        self._slots = slots

    def forward(self, activations: Activations) -> Activations:
        x, starts_BC, slot = activations
        out_BLD, carry = self.stage(x, self._slots.read(slot), starts_BC.bool())
        self._slots.write(slot, carry)
        # Tensor ranks that share tokens leave them in another order of dimensions; what is sent lies in a row.
        return out_BLD.contiguous(), starts_BC, slot


class StageLoss:
    """The loss behind the last stage; counts the nats of a step."""

    def __init__(self, stage: Stage, device: torch.device):
        self._stage = stage
        self.nats = torch.zeros((), dtype=torch.float64, device=device)

    def __call__(self, activations: Activations, labels: tuple[Tensor, Tensor]) -> Tensor:
        targets_BL, scale = labels
        nats, _ = self._stage.loss(activations[0], targets_BL)
        self.nats += nats.detach()
        return nats * scale


class PipelineTrainer:
    """Trains the stages of each data rank together."""

    def __init__(self, engine: Any):
        self._engine = engine

    def train(self, inputs: Sequence[MicroBatch]) -> float:
        """One optimizer step; the sum of nats of this rank's lanes on the last stage, 0 on others."""
        loss: StageLoss = self._engine.module.loss_fn
        loss.nats.zero_()
        pairs = [((each.tokens_BL, each.starts_BC.long(), each.slot), (each.targets_BL, each.scale)) for each in inputs]
        self._engine.train_batch(iter(pairs))
        return float(loss.nats)


def build_pipeline(stage: Stage, slots: CarrySlots, processes: Processes) -> nn.Module:
    """DeepSpeed's module of this process's stage; which layers a stage holds is decided already."""
    quiet_deepspeed(processes)
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    class ThisStage(LayerSpec):
        """The stage as it was built; DeepSpeed would build it now."""

        def build(self, log: bool = False) -> nn.Module:
            return SlottedStage(stage, slots)

    class Tie(TiedLayerSpec):
        """Stands for the embedding at both ends of the pipeline; what goes through stays as it is."""

        def build(self, log: bool = False) -> nn.Module:
            assert stage.embedding is not None
            return stage.embedding

    class Pipeline(PipelineModule):
        """A stage is one layer here, with the tied embedding beside it on the first and on the last."""

        def _partition_layers(self, method: str = "uniform") -> None:
            tied = len(self._layer_specs) > self.num_stages
            inner = range(1 + tied, self.num_stages + tied)
            self.parts = [0, *inner, len(self._layer_specs)]
            self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

        def get_tied_weights_and_groups(self) -> list[tuple[Any, Any]]:
            # In float16 gradients are added up in `grad_accum`, in float32; DeepSpeed would reduce `grad`, of one
            # micro-batch, and the two copies of the embedding would part.
            return [(_Accumulated.of(weight), group) for weight, group in super().get_tied_weights_and_groups()]

    size = processes.pipeline.size
    specs: list[Any] = [ThisStage(SlottedStage) for _ in range(size)]
    if stage.config.tie_embeddings:
        tie = Tie("embedding", nn.Embedding, forward_fn=_pass_through)
        specs = [tie, *specs, tie]
    topology = PipeModelDataParallelTopology(num_pp=size, num_mp=processes.tensor.size, num_dp=processes.data.size)
    # It prints its settings, past the logger.
    with redirect_stdout(io.StringIO()):
        pipeline: nn.Module = Pipeline(specs, topology=topology, loss_fn=StageLoss(stage, processes.device))
    _check_places(pipeline, processes)
    return pipeline


@dataclass
class _Accumulated:
    """A weight as DeepSpeed reduces its gradient."""

    grad: Tensor

    @classmethod
    def of(cls, weight: Any) -> Any:
        """The weight itself, unless its gradient is added up elsewhere."""
        accumulated = getattr(weight, "grad_accum", None)
        return weight if accumulated is None else cls(accumulated)


def _pass_through(embedding: nn.Module, activations: Activations) -> Activations:
    return activations


def _check_places(pipeline: Any, processes: Processes) -> None:
    """DeepSpeed counts its ranks by itself; both must mean the same processes."""
    grid: Any = pipeline._grid
    ours = (processes.pipeline.position, processes.data.position, processes.tensor.position)
    theirs = (grid.get_stage_id(), grid.get_data_parallel_rank(), grid.get_slice_parallel_rank())
    assert ours == theirs, f"stage, data and tensor rank are {ours} here and {theirs} in DeepSpeed"
