"""`brt bench`: what a layer and what an optimizer step cost, measured on random input. Nothing is written.

Dimension key
  B  lanes    L  tokens in a segment    C  blocks in a segment    D  model width
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from brt_dist.data.errors import BadInput
from brt_dist.data.loader import Batch
from brt_dist.model.carry import Carry
from brt_dist.model.config import ModelConfig
from brt_dist.model.flops import forward_flops_per_token, layer_flops
from brt_dist.model.initialization import initialize
from brt_dist.model.transformer import make_layer
from brt_dist.model.window_attention import rung_here
from brt_dist.parallel.agreement import keys_and_versions
from brt_dist.parallel.config import ParallelConfig
from brt_dist.parallel.launcher import LaunchError, read_launch
from brt_dist.parallel.parallelize import whole_shapes
from brt_dist.parallel.process_groups import Processes, joined
from brt_dist.train.config import OptimizerConfig, TrainConfig
from brt_dist.train.engine import Engine, check_dtype
from brt_dist.train.metrics import peak_flops
from brt_dist.train.optimizer import check_available, learning_rate
from brt_dist.train.parallel_report import peak_memory

# Rounds and steps in front of those that are timed: kernels are compiled and memory is taken in them.
WARM_UP_ROUNDS, WARM_UP_STEPS = 2, 3
# In so many segments of a lane one document begins on average.
SEGMENTS_PER_DOCUMENT = 4


# --- layers ---


def bench_layers(model: ModelConfig, segment: int, lanes: int, repeat: int) -> dict[str, Any]:
    """Forward and backward of an ordinary and of a recurrent layer of `model`, in turn; the median of `repeat` rounds.

    Each reads one segment of `lanes` lanes, as one process does that shares no layer; nothing is computed again. Times
    are CPU seconds of the process on the CPU, all its threads together, and seconds of the device on CUDA.
    """
    if not model.recurrent_layers:
        raise BadInput("model.recurrent_layers is empty: there is no recurrent layer that could be timed")
    if model.feedback:
        raise BadInput(
            "model.feedback is true: all layers run together, block by block, and none can be timed by itself; set "
            "model.feedback=false"
        )
    if (processes := read_launch().world_size) > 1:
        raise LaunchError(f"{processes} processes were started, but brt bench layers is of one: start it by itself")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_dtype(model.dtype, device)
    # All layers of a kind are alike: one of each will do.
    pair = replace(model, num_layers=2, recurrent_layers=(1,))
    calls = _layer_calls(pair, segment, lanes, device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(WARM_UP_ROUNDS + repeat):
        for name, call in calls.items():
            spent = _seconds(call, device)
            if round_ >= WARM_UP_ROUNDS:
                seconds[name].append(spent)
    medians = {name: median(each) for name, each in seconds.items()}
    ratios = [late / early for early, late in zip(seconds["ordinary"], seconds["recurrent"], strict=True)]
    return {
        "ordinary_seconds": medians["ordinary"],
        "recurrent_seconds": medians["recurrent"],
        "ratio": medians["recurrent"] / medians["ordinary"],
        "ratio_of_rounds": [min(ratios), max(ratios)],
        "flops_ratio": layer_flops(pair, 1) / layer_flops(pair, 0),
        "clock": "device" if device.type == "cuda" else "CPU of the process",
        "rounds": repeat,
        "gate": model.gate,
        "cell": model.cell,
        "lanes": lanes,
        "segment": segment,
        **_measured_on(model, device),
    }


def _layer_calls(pair: ModelConfig, segment: int, lanes: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """By "ordinary" and "recurrent": what goes forward and back through layer 0 and layer 1 of `pair` once.

    Gradients go to the layer's parameters and to its input, as in the middle of a stack.
    """
    dtype: torch.dtype = getattr(torch, pair.dtype)
    layers = nn.ModuleDict({name: make_layer(pair, index) for index, name in enumerate(("ordinary", "recurrent"))})
    initialize(layers, seed=0)
    layers.to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    x_BLD, gradient_BLD = (
        torch.randn(lanes, segment, pair.dim, generator=generator).to(device, dtype) for _ in range(2)
    )
    x_BLD.requires_grad_()
    starts_BC = torch.zeros(lanes, segment // pair.window, dtype=torch.bool, device=device)
    starts_BC[:, 0] = True
    carry = Carry.fresh(pair, lanes, device, dtype)

    def call_of(layer: nn.Module, index: int) -> Callable[[], None]:
        def forward_and_backward() -> None:
            x_BLD.grad = None
            layer.zero_grad()
            out_BLD, _ = layer(x_BLD, carry.layers[index], starts_BC)
            out_BLD.backward(gradient_BLD)

        return forward_and_backward

    return {name: call_of(layer, index) for index, (name, layer) in enumerate(layers.items())}


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    """What `call` takes of the device, or on the CPU of this process's CPU time."""
    if device.type != "cuda":
        began = time.process_time()
        call()
        return time.process_time() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / 1e3


# --- steps ---


def bench_step(
    model: ModelConfig,
    segment: int,
    lanes: int,
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    train: TrainConfig,
    steps: int,
    resolved: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any] | None:
    """`steps` optimizer steps on random tokens, behind a few more that warm up; None in processes that don't lead.

    `resolved` is the whole configuration; every process of the launch calls this. A step's seconds are those between
    two moments at which no process has work left. Tokens are there before it begins. BadInput where something doesn't
    fit.
    """
    with joined(read_launch(), parallel, {**keys_and_versions(resolved), "--steps": steps}) as processes:
        processes.on_leader(lambda: check_available(optimizer))
        processes.on_leader(lambda: check_dtype(model.dtype, processes.device))
        engine = Engine(model, parallel, optimizer, train, processes, lanes)
        groups = processes.micro_batch_lanes(lanes, parallel.lane_groups)
        total = max(train.steps, WARM_UP_STEPS + steps)
        timed = []
        for step in range(1, WARM_UP_STEPS + steps + 1):
            first = (step - 1) * parallel.segments_per_step
            batches = [
                random_batch(model, segment, lanes, position, group, train.seed)
                for position in range(first, first + parallel.segments_per_step)
                for group in groups
            ]
            lr = learning_rate(step, total, optimizer)
            timed.append(_timed_step(engine, batches, lr, train.seed * 1_000_003 + step, processes))
        peaks: list[Any] | None = [None] * dist.get_world_size() if processes.leads else None
        dist.gather_object(peak_memory(processes.device), peaks)
        if not processes.leads:
            return None
        return {
            **_speed(model, lanes * segment * parallel.segments_per_step, timed, processes),
            "peak_memory_bytes": peaks,
            "peak_memory_of": "tensors on the GPU" if processes.device.type == "cuda" else "resident memory",
            "parameters": sum(shape.numel() for shape in whole_shapes(model).values()),
            "lanes": lanes,
            "segment": segment,
            "optimizer": optimizer.name,
            "layout": {"processes": dist.get_world_size(), "data": processes.data.size, **_without_report(parallel)},
            **_measured_on(model, processes.device),
            "deepspeed": version("deepspeed"),
        }


def _timed_step(
    engine: Engine, batches: Sequence[Batch], lr: float, seed: int, processes: Processes
) -> tuple[float, float]:
    """Seconds and loss of one step."""
    _wait_for_all(processes)
    began = time.perf_counter()
    loss = engine.step(batches, lr, seed).loss
    _wait_for_all(processes)
    return time.perf_counter() - began, loss


def _wait_for_all(processes: Processes) -> None:
    """Until every process has come here and no device has work left."""
    if processes.device.type == "cuda":
        torch.cuda.synchronize(processes.device)
    processes.sum(0.0)


def _speed(
    model: ModelConfig, tokens: int, timed: Sequence[tuple[float, float]], processes: Processes
) -> dict[str, Any]:
    """Figures of all steps' seconds and losses, each step of so many `tokens`; None where one is not known."""
    seconds = [spent for spent, _ in timed[WARM_UP_STEPS:]]
    devices = dist.get_world_size()
    rate = tokens / median(seconds)
    peak = peak_flops(processes.device, getattr(torch, model.dtype))
    # JSON has no infinity.
    first, *_, last = (loss if math.isfinite(loss) else None for _, loss in timed)
    return {
        "step_seconds": median(seconds),
        "step_seconds_range": [min(seconds), max(seconds)],
        "tokens_per_second": rate,
        "tokens_per_second_per_device": rate / devices,
        "mfu": None if peak is None else rate * 3 * forward_flops_per_token(model) / (peak * devices),
        "first_loss": first,
        "last_loss": last,
        "steps": len(seconds),
        "warm_up_steps": WARM_UP_STEPS,
    }


def random_batch(model: ModelConfig, segment: int, lanes: int, position: int, group: range, seed: int) -> Batch:
    """The segment at `position` of the lanes `group` (global numbers, of `lanes`): random tokens, all predicted.

    A lane's tokens are the same in every layout. Now and then a document begins in it, in front of any block.
    """
    blocks = segment // model.window
    rows, starts_BC = [], torch.zeros(len(group), blocks, dtype=torch.bool)
    for row, lane in enumerate(group):
        generator = np.random.default_rng((seed, position, lane))
        rows.append(generator.integers(model.vocab_size, size=segment + 1))
        block = int(generator.integers(blocks * SEGMENTS_PER_DOCUMENT))
        if block < blocks:
            starts_BC[row, block] = True
    tokens = torch.from_numpy(np.stack(rows))
    inputs_BL, targets_BL = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return Batch(inputs_BL, targets_BL, starts_BC, lanes * segment, position)


def _without_report(parallel: ParallelConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(parallel).items() if name != "report"}


# --- both ---


def _measured_on(model: ModelConfig, device: torch.device) -> dict[str, Any]:
    """What figures mean nothing without."""
    rung = rung_here(device, getattr(torch, model.dtype), model.head_dim, model.position == "t5")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device.type,
        "device_name": name,
        "dtype": model.dtype,
        "attention": rung,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
