"""DeepSpeed behind a small interface: one optimizer step, and the parameters and optimizer state by name.

Dimension key
  B  lanes of a micro-batch    L  tokens in a segment
"""

from __future__ import annotations

import copy
import io
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from brt_dist.checkpoint.files import CheckpointError, mismatch
from brt_dist.data.loader import Batch
from brt_dist.model.carry import Carry
from brt_dist.model.transformer import BlockRecurrentTransformer
from brt_dist.parallel.config import ParallelConfig
from brt_dist.parallel.process_groups import Processes
from brt_dist.train.config import OptimizerConfig
from brt_dist.train.optimizer import MOMENTS, build_adamw, make_state
from brt_dist.train.unsharded import UnshardedOptimizer


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
        self._dtype: torch.dtype = getattr(torch, model.config.dtype)
        self._model = model.to(processes.device)
        micro_batch_lanes = lanes // (processes.data_ranks * parallel.micro_batches)
        config = deepspeed_config(parallel, clip_norm, self._dtype, micro_batch_lanes)
        self._tensors: UnshardedOptimizer | _ShardedTensors
        if parallel.zero_stage == 0:
            self._tensors = UnshardedOptimizer(model, optimizer, clip_norm)
            module = _Loss(model) if self._dtype == torch.float32 else _CastLoss(model, self._dtype)
            self._engine = _initialize(module, self._tensors, config, processes.local_rank)
        else:
            named = dict(model.named_parameters())
            exact = {name: parameter.detach() for name, parameter in named.items()}
            self._engine = _initialize(_Loss(model), build_adamw(named, optimizer), config, processes.local_rank)
            self._tensors = _ShardedTensors(self._engine, named)
            # DeepSpeed rounds the weights first and takes its float32 ones from those.
            self._tensors.set_parameters(exact)

    @property
    def model(self) -> BlockRecurrentTransformer:
        """The model with its current weights in the dtype it computes in, as every rank holds them.

        A copy at ZeRO-0 in another precision than float32, where the weights themselves are float32.
        """
        copies = {
            id(parameter): nn.Parameter(parameter.detach().to(self._dtype), requires_grad=False)
            for parameter in self._model.parameters()
            if parameter.dtype != self._dtype
        }
        return copy.deepcopy(self._model, copies) if copies else self._model

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
        return StepResult(loss_sum / max(1, predicted), self._tensors.grad_norm), new_carries

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter by name, whole and in float32, on the CPU. A collective call."""
        return self._tensors.parameters()

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's moments by `<parameter>/<moment>`, whole and in float32, on the CPU. A collective call.

        Adafactor and Muon have moments of their own for each matrix that is stacked in a parameter, whose name is then
        `<parameter>[<index>]`.
        """
        return self._tensors.optimizer_state()

    def restore(
        self, parameters: dict[str, Tensor], optimizer_state: dict[str, Tensor], steps: int, source: object
    ) -> None:
        """Take up what `parameters` and `optimizer_state` gave after `steps` optimizer steps, in whatever layout.

        CheckpointError, which names `source`, where they are not those of this model and optimizer.
        """
        held = {**parameters, **optimizer_state}
        shapes = {name: parameter.shape for name, parameter in self._model.named_parameters()}
        wanted = {**shapes, **self._tensors.state_shapes()}
        self.processes.on_leader(lambda: _check_tensors(held, wanted, source))
        self._tensors.restore(parameters, optimizer_state, steps)


class _ShardedTensors:
    """Parameters and AdamW's moments at ZeRO-1 and 2, where DeepSpeed holds them flat and cut over the data ranks."""

    def __init__(self, engine: Any, named: Mapping[str, nn.Parameter]):
        self._engine, self._named = engine, named
        self._adamw = engine.optimizer.optimizer
        # DeepSpeed links moments to parameters during the step of the first parameter group, when those of the others
        # would still be missing.
        make_state(self._adamw)
        engine.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def grad_norm(self) -> float:
        """Of all gradients in the last step, before clipping."""
        return float(self._engine.get_global_grad_norm())

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter by name, on the CPU. A collective call."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).cpu() for name, p in self._named.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """Moments by `<parameter>/<moment>`, on the CPU. A collective call."""
        from deepspeed.utils import safe_get_full_optimizer_state

        return {
            f"{name}/{moment}": safe_get_full_optimizer_state(p, moment).cpu()
            for name, p in self._named.items()
            for moment in MOMENTS["AdamW"]
        }

    def state_shapes(self) -> dict[str, torch.Size]:
        """The shape of every tensor that `optimizer_state` gives."""
        return {f"{name}/{moment}": p.shape for name, p in self._named.items() for moment in MOMENTS["AdamW"]}

    def set_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Give every parameter its float32 value, and round the one that computes. A collective call."""
        from deepspeed.utils import safe_set_full_fp32_param

        for name, parameter in self._named.items():
            value = parameters[name].to(parameter.device)
            with torch.no_grad():
                parameter.copy_(value)
            safe_set_full_fp32_param(parameter, value)

    def restore(self, parameters: dict[str, Tensor], optimizer_state: dict[str, Tensor], steps: int) -> None:
        """Take up what `parameters` and `optimizer_state` gave after `steps` steps. A collective call."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self.set_parameters(parameters)
        for state in self._adamw.state.values():
            state["step"].fill_(steps)
        for name, parameter in self._named.items():
            for moment in MOMENTS["AdamW"]:
                safe_set_full_optimizer_state(
                    parameter, optimizer_state[f"{name}/{moment}"].to(parameter.device), moment
                )


def deepspeed_config(
    parallel: ParallelConfig, clip_norm: float, dtype: torch.dtype, micro_batch_lanes: int
) -> dict[str, Any]:
    """DeepSpeed's JSON, derived from our sections. Gradients of ranks are summed in float32 in every precision.

    Those of micro-batches too, but for bfloat16 at ZeRO-1, where DeepSpeed 0.19.8 sums them in bfloat16 all the same.
    At ZeRO-0 the weights that DeepSpeed sees are float32 and `UnshardedOptimizer` clips: DeepSpeed would sum gradients
    in bfloat16 there, and tells no gradient norm.
    """
    sharded = parallel.zero_stage > 0
    return {
        "train_micro_batch_size_per_gpu": micro_batch_lanes,
        "gradient_accumulation_steps": parallel.micro_batches,
        "gradient_clipping": clip_norm if sharded else 0.0,
        "zero_optimization": {"stage": parallel.zero_stage},
        # torch's AdamW: DeepSpeed's own are compiled at the first use, for more than a minute.
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": sharded and dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**31,
    }


class _Loss(nn.Module):
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


class _CastLoss(nn.Module):
    """The loss of the model with its weights rounded to `dtype`; the weights and their gradients stay float32."""

    def __init__(self, model: BlockRecurrentTransformer, dtype: torch.dtype):
        super().__init__()
        self.loss, self.dtype = _Loss(model), dtype

    def forward(self, batch: Batch, carry: Carry | None, scale: float) -> tuple[Tensor, Tensor, Carry]:
        """As `_Loss` gives it."""
        weights = {name: weight.to(self.dtype) for name, weight in self.loss.named_parameters()}
        return torch.func.functional_call(self.loss, weights, (batch, carry, scale))


def _check_tensors(held: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], source: object) -> None:
    if found := mismatch(held, wanted):
        raise CheckpointError(f"{source} is not of this model and optimizer: it {found}")


def _initialize(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], local_rank: int) -> Any:
    # DeepSpeed takes the device from these, insists on the first, and that the second agree where OpenMPI set it.
    os.environ["LOCAL_RANK"] = str(local_rank)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(local_rank)
    deepspeed = _quiet_deepspeed()
    # The bf16 optimizer prints the use of memory at every step of its construction, past the logger.
    with redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
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
