"""DeepSpeed behind a small interface: one optimizer step, and the parameters and optimizer state by name.

Dimension key
  B  lanes of a micro-batch    L  tokens in a segment
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from brt_dist.data.loader import Batch
from brt_dist.model.carry import Carry
from brt_dist.model.transformer import BlockRecurrentTransformer
from brt_dist.parallel.config import ParallelConfig
from brt_dist.parallel.process_groups import Processes
from brt_dist.train.config import OptimizerConfig
from brt_dist.train.optimizer import build_optimizer

# What AdamW remembers of a parameter, by torch's names.
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepResult:
    """The loss of one optimizer step, in nats per predicted token over all lanes, and the norm before clipping."""

    loss: float
    grad_norm: float


class Engine:
    """Trains a model on the data ranks. The model's parameters must hold their initial or restored float32 values."""

    def __init__(
        self,
        model: BlockRecurrentTransformer,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        clip_norm: float,
        processes: Processes,
        lanes: int,
    ):
        self.processes = processes
        self.micro_batches = parallel.micro_batches
        dtype: torch.dtype = getattr(torch, model.config.dtype)
        micro_batch_lanes = lanes // (processes.data_ranks * parallel.micro_batches)
        config = deepspeed_config(parallel, clip_norm, dtype, micro_batch_lanes)
        self._names = dict(model.named_parameters())
        self._engine = _initialize(model.to(processes.device), optimizer, config, processes.local_rank)
        self._make_moments()

    @property
    def model(self) -> BlockRecurrentTransformer:
        """The model with its current weights, as every rank holds them."""
        return self._engine.module.model

    def step(
        self, batches: Sequence[Batch], carries: Sequence[Carry | None], lr: float, seed: int
    ) -> tuple[StepResult, list[Carry]]:
        """One optimizer step over this rank's micro-batches, each with the carry of its own lanes.

        The gradient is that of the sum of all lanes' losses over the number of tokens they predict, in every layout.
        seed: of this step's dropout masks, which are the same for every micro-batch and rank.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        predicted = batches[0].predicted
        # DeepSpeed takes the mean over micro-batches and data ranks; the loss is a sum over all of them.
        scale = self.processes.data_ranks * self.micro_batches / max(1, predicted)
        total = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        new_carries = []
        for batch, carry in zip(batches, carries, strict=True):
            torch.manual_seed(seed)
            loss, nats, carry = self._engine(batch, carry, scale)
            self._engine.backward(loss)
            self._engine.step()
            total += nats
            new_carries.append(carry)
        loss_sum = self.processes.sum(float(total))[0]
        return StepResult(loss_sum / max(1, predicted), float(self._engine.get_global_grad_norm())), new_carries

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter by name, whole and in float32, on the CPU. A collective call."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).cpu() for name, p in self._names.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """AdamW's moments by `<parameter>/<moment>`, whole and in float32, on the CPU. A collective call."""
        from deepspeed.utils import safe_get_full_optimizer_state

        return {
            f"{name}/{moment}": safe_get_full_optimizer_state(p, moment).cpu()
            for name, p in self._names.items()
            for moment in MOMENTS
        }

    def restore(self, parameters: dict[str, Tensor], optimizer_state: dict[str, Tensor], steps: int) -> None:
        """Take up what `parameters` and `optimizer_state` gave after `steps` optimizer steps, in whatever layout."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        adamw = self._engine.optimizer.optimizer
        for state in adamw.state.values():
            state["step"].fill_(steps)
        for name, parameter in self._names.items():
            with torch.no_grad():
                parameter.copy_(parameters[name])
            safe_set_full_fp32_param(parameter, parameters[name].to(self.processes.device))
            for moment in MOMENTS:
                value = optimizer_state[f"{name}/{moment}"].to(self.processes.device)
                safe_set_full_optimizer_state(parameter, value, moment)

    def _make_moments(self) -> None:
        """Give AdamW the state that it would otherwise make in its first step, and link it to the parameters.

        DeepSpeed links during the step of the first parameter group, when those of the others are still missing.
        """
        adamw = self._engine.optimizer.optimizer
        for group in adamw.param_groups:
            for flat in group["params"]:
                moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
                adamw.state[flat] = {"step": torch.tensor(0.0), **moments}
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()


def deepspeed_config(
    parallel: ParallelConfig, clip_norm: float, dtype: torch.dtype, micro_batch_lanes: int
) -> dict[str, Any]:
    """DeepSpeed's JSON, derived from our sections. Gradients are summed in float32 in every precision."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch_lanes,
        "gradient_accumulation_steps": parallel.micro_batches,
        "gradient_clipping": clip_norm,
        "zero_optimization": {"stage": parallel.zero_stage},
        # torch's AdamW: DeepSpeed's own are compiled at the first use, for more than a minute.
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**31,
    }


class _LossModule(nn.Module):
    """The loss inside the engine's forward pass."""

    def __init__(self, model: BlockRecurrentTransformer):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, carry: Carry | None, scale: float) -> tuple[Tensor, Tensor, Carry]:
        """The loss to go back from, the plain sum of nats, and the carry."""
        device = self.model.embedding.weight.device
        tokens_BL, targets_BL, starts_BC = (
            tensor.to(device, non_blocking=True) for tensor in (batch.tokens_BL, batch.targets_BL, batch.starts_BC)
        )
        nats, _, carry = self.model.loss(tokens_BL, targets_BL, carry, starts_BC)
        return nats * scale, nats.detach(), carry


def _initialize(
    model: BlockRecurrentTransformer, optimizer: OptimizerConfig, config: dict[str, Any], local_rank: int
) -> Any:
    # DeepSpeed takes the device from these, insists on the first, and that the second agree where OpenMPI set it.
    os.environ["LOCAL_RANK"] = str(local_rank)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(local_rank)
    deepspeed = _quiet_deepspeed()
    module = _LossModule(model)
    # The bf16 optimizer prints the use of memory at every step of its construction, past the logger.
    with redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=build_optimizer(model, optimizer), config=config, dist_init_required=False
        )
    return engine


def _quiet_deepspeed() -> Any:
    """DeepSpeed, without its banner lines and without its build of a shared-memory operator."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning)
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # On CPU, init_distributed would compile this C++ extension first; gloo does without it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    return deepspeed
