"""One process's part of training: its stage, the carry of its lanes, an optimizer step, and everything by name.

Dimension key
  B  lanes of a micro-batch    L  tokens in a segment    C  blocks in a segment
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from brt_dist.data.errors import BadInput
from brt_dist.data.loader import Batch
from brt_dist.model.carry import Carry
from brt_dist.model.config import ModelConfig
from brt_dist.parallel.carry_slots import CarrySlots
from brt_dist.parallel.config import ParallelConfig
from brt_dist.parallel.parallelize import build_stage, whole_shapes
from brt_dist.parallel.process_groups import Processes
from brt_dist.parallel.stage_scorer import StageScorer
from brt_dist.parallel.tensor_parallel import cut_of, cuts, merge, share
from brt_dist.train.config import OptimizerConfig, TrainConfig
from brt_dist.train.deepspeed_config import ModelParallelUnit, deepspeed_config, initialize
from brt_dist.train.loss_scale import LossScale, OutOfScale
from brt_dist.train.micro_batches import MicroBatch, micro_batch, predicted_tokens
from brt_dist.train.optimizer import MOMENTS, build_adamw
from brt_dist.train.pipeline import PipelineTrainer, build_pipeline
from brt_dist.train.sharded import ShardedOptimizer
from brt_dist.train.unsharded import UnshardedOptimizer


@dataclass(frozen=True)
class StepResult:
    """The loss of one optimizer step, in nats per predicted token over all lanes, and the norm before clipping.

    skipped      float16 only: the norm is not finite and the weights were left as they are, as happens now and then
    loss_scale   float16 only: what the loss was multiplied with
    """

    loss: float
    grad_norm: float
    skipped: bool = False
    loss_scale: float | None = None


class Engine:
    """Trains this process's stage of a model on the lanes of its data rank, in whatever layout.

    stage   its layers, with their weights
    slots   the carry of its lanes
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        train: TrainConfig,
        processes: Processes,
        lanes: int,
    ):
        """lanes: of all data ranks. BadInput where this device cannot compute in the model's dtype."""
        self.config, self.processes, self._parallel = model, processes, parallel
        self._dtype: torch.dtype = getattr(torch, model.dtype)
        self._table = cuts(model)
        self.stage = build_stage(model, parallel, processes, train.seed)
        self._lanes = lanes // (processes.data.size * parallel.lane_groups)
        fresh = self.stage.fresh_carry(self._lanes, processes.device, self._dtype)
        self.slots = CarrySlots(fresh, parallel.lane_groups)
        named = dict(self.stage.named_parameters())
        settings = deepspeed_config(parallel, train.clip_norm, self._dtype, self._lanes, train.loss_scale)
        self.optimizer: UnshardedOptimizer | ShardedOptimizer
        self._trainer: PipelineTrainer | _PlainTrainer
        if parallel.zero_stage == 0:
            loss_scale = LossScale(train.loss_scale) if self._dtype == torch.float16 else None
            self.optimizer = UnshardedOptimizer(self.stage, optimizer, train.clip_norm, processes, loss_scale)
            module = _Loss(self.stage) if self._dtype == torch.float32 else _CastLoss(self.stage, self._dtype)
            engine = initialize(module, self.optimizer, settings, processes, ModelParallelUnit(processes))
            self._trainer = _PlainTrainer(engine, self.slots)
        else:
            exact = {name: parameter.detach() for name, parameter in named.items()}
            adamw = build_adamw(named, optimizer)
            if parallel.pipeline > 1:
                pipeline = build_pipeline(self.stage, self.slots, processes)
                engine = initialize(pipeline, adamw, settings, processes)
                self._trainer = PipelineTrainer(engine)
            else:
                engine = initialize(_Loss(self.stage), adamw, settings, processes, ModelParallelUnit(processes))
                self._trainer = _PlainTrainer(engine, self.slots)
            self.optimizer = ShardedOptimizer(engine, named)
            if self._dtype != torch.float32:
                # DeepSpeed rounds the weights first and takes its float32 ones from those.
                self.optimizer.set_parameters(exact.__getitem__)
        self.deepspeed = engine

    def step(self, batches: Sequence[Batch], lr: float, seed: int) -> StepResult:
        """One optimizer step over this data rank's micro-batches, in order.

        The gradient is that of the sum of all losses of the step over the number of its predicted tokens, in every
        layout. seed: of this step's dropout masks, which are the same for every micro-batch and rank.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        predicted = predicted_tokens(batches)
        # DeepSpeed takes the mean over micro-batches and data ranks; the loss is a sum over all of them.
        scale = self.processes.data.size * len(batches) / max(1, predicted)
        self.stage.seed = seed
        loss_scale = self.optimizer.loss_scale
        if self._parallel.zero_stage == 0:
            # Elsewhere DeepSpeed multiplies by itself.
            scale *= loss_scale
        slots = range(self._parallel.lane_groups) if self._parallel.segments_per_step == 1 else [0] * len(batches)
        inputs = [
            micro_batch(batch, slot, scale, self.processes.device) for batch, slot in zip(batches, slots, strict=True)
        ]
        nats = self.processes.sum(self._train(inputs))[0]
        told_scale = loss_scale if self._dtype == torch.float16 else None
        return StepResult(nats / max(1, predicted), self.optimizer.grad_norm, self.optimizer.skipped, told_scale)

    def _train(self, inputs: Sequence[MicroBatch]) -> float:
        try:
            return self._trainer.train(inputs)
        except Exception as error:
            # DeepSpeed knows no other way to say so.
            if "loss scale already at minimum" in str(error):
                raise OutOfScale from error
            raise

    @contextmanager
    def scoring(self) -> Iterator[StageScorer]:
        """What scores tokens with the weights as they are, in the dtype that training computes in. A collective call.

        At ZeRO-0 in another precision than float32 the weights are rounded inside, and exact again behind.
        """
        exact = {parameter: parameter.data for parameter in self.stage.parameters() if self._rounds(parameter)}
        for parameter, weight in exact.items():
            parameter.data = weight.to(self._dtype)
        try:
            yield StageScorer(self.stage, self.processes, self._dtype, self._parallel.sequence, self._initial_states())
        finally:
            for parameter, weight in exact.items():
                parameter.data = weight

    def _initial_states(self) -> dict[int, Tensor]:
        names = {number: f"layers.{number}.initial_state_SD" for number in self.config.recurrent_layers}
        own = (number for number in self.stage.numbers if number in names)
        return {number: self.optimizer.value(names[number]).to(self._dtype) for number in own}

    def _rounds(self, parameter: nn.Parameter) -> bool:
        return self._parallel.zero_stage == 0 and parameter.dtype != self._dtype

    def parameters(self) -> dict[str, Tensor]:
        """The parameters of this stage by name, whole and in float32, on the CPU, in the process that writes them.

        Each is told by one stage alone. A collective call.
        """
        return self._whole(self.optimizer.parameters())

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's moments by `<parameter>/<moment>`, as `parameters` gives those.

        Adafactor and Muon have moments of their own for each matrix that is stacked in a parameter, whose name is then
        `<parameter>[<index>]`.
        """
        return self._whole(self.optimizer.moments())

    def carry(self) -> dict[str, Tensor]:
        """The carry of this stage's layers for the lanes of this data rank, whole, where tensor rank 0 asks."""
        return self._whole(iter(self.slots.all_lanes().tensors(self.stage.numbers.start).items()), by_data=True)

    def _whole(self, held: Iterator[tuple[str, Tensor]], by_data: bool = False) -> dict[str, Tensor]:
        """Merged over tensor ranks, one tensor after the other; `by_data`: every data rank has tensors of its own."""
        keeps = self.processes.tensor.position == 0 and (by_data or self.processes.data.position == 0)
        merged = {}
        for name, tensor in held:
            cut = cut_of(name, self._table)
            shares = [tensor] if cut is None else self.processes.gather_shares(tensor.detach())
            if keeps and not self._is_told_elsewhere(name):
                merged[name] = merge(shares, cut).detach().cpu()
        return merged

    def _is_told_elsewhere(self, name: str) -> bool:
        """A tied embedding stands on the first and on the last stage."""
        return name.startswith("embedding.") and not self.stage.is_first

    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of all parameters and moments of the whole model, by name."""
        shapes = whole_shapes(self.config)
        if isinstance(self.optimizer, UnshardedOptimizer):
            moments = self.optimizer.moment_shapes()
            # Of those that were cut, the whole shapes; optimizers of whole matrices are never cut.
            return shapes | {name: shapes.get(name.partition("/")[0], shape) for name, shape in moments.items()}
        return shapes | {f"{name}/{moment}": shape for name, shape in shapes.items() for moment in MOMENTS["AdamW"]}

    def restore(
        self, value: Callable[[str], Tensor], carry: Mapping[str, Tensor], steps: int, progress: Mapping[str, float]
    ) -> None:
        """Take up what the functions above gave after `steps` steps of the optimizer, in whatever layout.

        value: the whole parameter or moment of a name. carry: of this data rank's lanes and this stage's layers.
        progress: of the optimizer.
        """
        tensor = self.processes.tensor

        def mine(name: str, whole: Tensor) -> Tensor:
            return share(whole, cut_of(name, self._table), tensor.position, tensor.size)

        self.optimizer.restore(lambda name: mine(name, value(name)), steps, progress)
        shares = {name: mine(name, whole).to(self.processes.device) for name, whole in carry.items()}
        self.slots.restore(Carry.from_tensors(shares, self.stage.numbers.start))


def check_dtype(dtype: str, device: torch.device) -> None:
    """BadInput where `device` cannot compute in it."""
    if dtype == "float16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise BadInput(
            "model.dtype is float16, which this processor cannot compute in; use bfloat16 or float32, or a GPU"
        )


class _PlainTrainer:
    """Trains the whole model on each data rank: DeepSpeed's plain engine."""

    def __init__(self, engine: Any, slots: CarrySlots):
        self._engine, self._slots = engine, slots

    def train(self, inputs: Sequence[MicroBatch]) -> float:
        """One optimizer step; the sum of nats of this rank's lanes."""
        total = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        self._engine.train()
        for each in inputs:
            loss, nats, carry = self._engine(each, self._slots.read(each.slot))
            # In front of the backward pass, which then holds neither a second carry nor the graph of its states.
            self._slots.write(each.slot, carry)
            del carry
            self._engine.backward(loss)
            self._engine.step()
            total += nats
        return float(total)


class _Loss(nn.Module):
    """The loss inside the engine's forward pass."""

    def __init__(self, stage: nn.Module):
        super().__init__()
        self.stage = stage

    def forward(self, each: MicroBatch, carry: Carry) -> tuple[Tensor, Tensor, Carry]:
        """The loss to go back from, the plain sum of nats, and the carry."""
        (nats, _), carry = self.stage(each.tokens_BL, carry, each.starts_BC, each.targets_BL)
        return nats * each.scale, nats.detach(), carry


class _CastLoss(nn.Module):
    """The loss of the stage with its weights rounded to `dtype`; the weights and their gradients stay float32."""

    def __init__(self, stage: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.loss, self.dtype = _Loss(stage), dtype

    def forward(self, each: MicroBatch, carry: Carry) -> tuple[Tensor, Tensor, Carry]:
        """As `_Loss` gives it."""
        weights = {name: weight.to(self.dtype) for name, weight in self.loss.named_parameters()}
        return torch.func.functional_call(self.loss, weights, (each, carry))
