"""The optimizer at ZeRO-1, 2 and 3, where DeepSpeed holds parameters and moments flat and cut over the data ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from brt_dist.train.loss_scale import STEPS_TO_GROW
from brt_dist.train.optimizer import MOMENTS, make_state, make_state_of


class ShardedOptimizer:
    """Parameters and AdamW's moments of this process's share of the model, by name."""

    def __init__(self, engine: Any, named: Mapping[str, nn.Parameter]):
        self._engine, self._named = engine, named
        self._adamw = engine.optimizer.optimizer
        # DeepSpeed links moments to parameters during the step of the first parameter group, when those of the others
        # would still be missing.
        if self._partitioned:
            # It hands AdamW the tensors of a group only while that steps.
            for flat in engine.optimizer.fp32_partitioned_groups_flat:
                make_state_of(flat, self._adamw)
        else:
            make_state(self._adamw)
            engine.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def grad_norm(self) -> float:
        """Of all gradients in the last step, before clipping; infinite where the step was skipped."""
        return math.inf if self.skipped else float(self._engine.get_global_grad_norm())

    @property
    def skipped(self) -> bool:
        """Whether the last step left float16 and the weights are what they were."""
        return self._engine.fp16_enabled() and bool(self._engine.optimizer.overflow)

    @property
    def loss_scale(self) -> float:
        """What the next loss is multiplied with; 1 in other precisions than float16."""
        return float(self._engine.optimizer.loss_scale) if self._engine.fp16_enabled() else 1.0

    def progress(self) -> dict[str, float]:
        """Small numbers that a checkpoint keeps."""
        if not self._engine.fp16_enabled():
            return {}
        scaler = self._engine.optimizer.loss_scaler
        good_steps = scaler.cur_iter - scaler.last_overflow_iter - 1
        return {"loss_scale": scaler.cur_scale, "good_steps": good_steps % STEPS_TO_GROW}

    @property
    def _partitioned(self) -> bool:
        """Whether parameters are cut too (ZeRO-3)."""
        return bool(self._engine.zero_optimization_partition_weights())

    def value(self, name: str) -> Tensor:
        """One parameter in float32. A collective call of all data ranks."""
        from deepspeed.utils import safe_get_full_fp32_param

        whole: Tensor = safe_get_full_fp32_param(self._named[name])
        return whole

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter in float32, one after the other. A collective call of all data ranks."""
        for name in self._named:
            yield name, self.value(name)

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """Every moment, as `<parameter>/<moment>`, one after the other. A collective call of all data ranks."""
        from deepspeed.utils import safe_get_full_optimizer_state

        for name, parameter in self._named.items():
            for moment in MOMENTS["AdamW"]:
                yield f"{name}/{moment}", safe_get_full_optimizer_state(parameter, moment)

    def set_parameters(self, value: Callable[[str], Tensor]) -> None:
        """Give every parameter its float32 value, and round the one that computes."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        for name, parameter in self._named.items():
            new = value(name).to(self._engine.device)
            if self._partitioned:
                own = _own_part(new, parameter)
                safe_set_local_fp32_param(parameter, own)
                parameter.ds_tensor.data.copy_(own)  # type: ignore[attr-defined]
            else:
                with torch.no_grad():
                    parameter.copy_(new)
                safe_set_full_fp32_param(parameter, new)

    def restore(self, value: Callable[[str], Tensor], steps: int, progress: Mapping[str, float]) -> None:
        """Take up the parameters and moments that `value` gives by name, after `steps` steps."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._engine.fp16_enabled() and progress:
            scaler = self._engine.optimizer.loss_scaler
            scaler.cur_scale, scaler.cur_iter = progress["loss_scale"], int(progress["good_steps"])
            scaler.last_overflow_iter = -1
        self.set_parameters(value)
        for state in self._adamw.state.values():
            state["step"].fill_(steps)
        for name, parameter in self._named.items():
            for moment in MOMENTS["AdamW"]:
                new = value(f"{name}/{moment}").to(self._engine.device)
                if self._partitioned:
                    safe_set_local_optimizer_state(parameter, _own_part(new, parameter), moment)
                else:
                    safe_set_full_optimizer_state(parameter, new, moment)


def _own_part(whole: Tensor, parameter: Any) -> Tensor:
    """This rank's part of a tensor at ZeRO-3: equal parts of its entries, zeros behind the last.

    DeepSpeed's own function for whole tensors reaches over the end where the parts are not equal.
    """
    group, size = parameter.ds_process_group, parameter.ds_tensor.numel()
    flat = nn.functional.pad(whole.flatten(), (0, size * dist.get_world_size(group) - whole.numel()))
    return flat.narrow(0, size * dist.get_rank(group), size)
