"""DeepSpeed's settings, derived from ours, and its engine, made quietly."""

from __future__ import annotations

import io
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from brt_dist.parallel.config import ParallelConfig
from brt_dist.parallel.process_groups import Processes


def deepspeed_config(
    parallel: ParallelConfig, clip_norm: float, dtype: torch.dtype, micro_batch_lanes: int, loss_scale: float = 65536.0
) -> dict[str, Any]:
    """DeepSpeed's JSON, derived from our sections. Gradients of ranks are summed in float32 in every precision.

    At ZeRO-0 the weights that DeepSpeed sees are float32 and `UnshardedOptimizer` clips: DeepSpeed would sum gradients
    in bfloat16 there, and tells no gradient norm.
    """
    sharded = parallel.zero_stage > 0
    return {
        "train_micro_batch_size_per_gpu": micro_batch_lanes,
        "gradient_accumulation_steps": parallel.micro_batches,
        "gradient_clipping": clip_norm if sharded else 0.0,
        "zero_optimization": _zero(parallel),
        # torch's AdamW: DeepSpeed's own are compiled at the first use, for more than a minute.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": sharded and dtype == torch.bfloat16, "immediate_grad_update": True},
        "fp16": {
            "enabled": sharded and dtype == torch.float16,
            "initial_scale_power": int(math.log2(loss_scale)),
            # A step that does not fit float16 halves the scale at once.
            "hysteresis": 1,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        # Otherwise ranks would add up gradients in bfloat16, and even one rank alone would round its own.
        "communication_data_type": "fp32",
        # Activations are whole on every tensor rank, or shared by tokens; neither is DeepSpeed's to cut.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "steps_per_print": 2**31,
    }


def _zero(parallel: ParallelConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {"stage": parallel.zero_stage}
    if parallel.offload != "none":
        settings["offload_optimizer"] = {"device": "cpu"}
    if parallel.offload == "all":
        settings["offload_param"] = {"device": "cpu"}
    return settings


class ModelParallelUnit:
    """What DeepSpeed's plain engine asks of the layout, under its names."""

    def __init__(self, processes: Processes):
        self._processes = processes
        # DeepSpeed wants a group even where it is of one.
        self._alone = dist.new_group([processes.rank], use_local_synchronization=True)

    def get_model_parallel_rank(self) -> int:
        """Among tensor ranks."""
        return self._processes.tensor.position

    def get_model_parallel_world_size(self) -> int:
        """How many tensor ranks."""
        return self._processes.tensor.size

    def get_model_parallel_group(self) -> Any:
        """The tensor ranks."""
        return self._processes.tensor.group or self._alone

    def get_data_parallel_rank(self) -> int:
        """Among data ranks."""
        return self._processes.data.position

    def get_data_parallel_world_size(self) -> int:
        """How many data ranks."""
        return self._processes.data.size

    def get_data_parallel_group(self) -> Any:
        """The data ranks."""
        return self._processes.data.group or self._alone


def initialize(
    module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], processes: Processes, mpu: Any = None
) -> Any:
    """DeepSpeed's engine for `module`, which may be a pipeline."""
    deepspeed = quiet_deepspeed(processes)
    # The bf16 optimizer prints the use of memory at every step of its construction, past the logger.
    with redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, mpu=mpu, dist_init_required=False
        )
    return engine


def quiet_deepspeed(processes: Processes) -> Any:
    """DeepSpeed, without its banner lines and without its build of a shared-memory operator."""
    # DeepSpeed takes the device from these, insists on the first, and that the second agree where OpenMPI set it.
    os.environ["LOCAL_RANK"] = str(processes.local_rank)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(processes.local_rank)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Broadcasts of the optimizer, in a hook behind the backward pass.
    warnings.filterwarnings("ignore", message="c10d::.* an autograd kernel was not registered")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # On CPU, init_distributed would compile this C++ extension first; gloo does without it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    return deepspeed


# By the names under which DeepSpeed logs them. Of others its logger does not know what to make, and ends the process.
_LOGGED = {
    **{
        name: name
        for name in ("all_reduce", "all_gather", "reduce_scatter", "reduce", "broadcast", "gather", "scatter")
    },
    **{"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"},
    **{"all_to_all": "all_to_all", "all_to_all_single": "all_to_all", "barrier": "barrier"},
    **{"send": "send", "recv": "recv", "isend": "send", "irecv": "recv"},
}


@contextmanager
def deepspeed_calls() -> Iterator[dict[str, tuple[int, int]]]:
    """What DeepSpeed itself sends inside, by its communication logger; filled at the end.

    By collective: calls, and the bytes of the tensors that this process hands in. On a GPU each of them then waits for
    its end, so that times inside say nothing.
    """
    import deepspeed.comm as comm

    counted: dict[str, tuple[int, int]] = {}
    comm.comms_logger.reset_data()
    comm.configure(enabled=True, prof_all=False, prof_ops=list(_LOGGED), verbose=False, debug=False)
    try:
        yield counted
    finally:
        comm.configure(enabled=False)
        for logged, by_size in comm.comms_logger.comms_dict.items():
            calls, size = counted.get(_LOGGED[logged], (0, 0))
            calls += sum(count for count, *_ in by_size.values())
            size += sum(message * count for message, (count, *_) in by_size.items())
            counted[_LOGGED[logged]] = calls, size
        comm.comms_logger.reset_data()
