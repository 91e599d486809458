"""What one process computed, sent and waited for in a step, read off torch's profiler.

Every collective, whoever calls it (megatron-core, DeepSpeed or we), is an operator of torch.distributed. The profiler
records it with its tensors; nothing is wrapped and nothing estimated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import profile, record_function

from brt_dist.parallel.process_groups import Processes
from brt_dist.train.profiler import quiet_profiler
from brt_dist.train.time_shares import Span, TimeShares, shares_of_kernels, shares_of_operators

# What the profiler calls the step among its events.
STEP = "optimizer step"
OPERATORS = "c10d::"
MESSAGES = ("send", "recv")
BACKENDS = ("gloo:", "nccl:")

# By operator of torch.distributed: what it is called here, and which argument holds the tensors handed in; None: none.
CALLS: dict[str, tuple[str, int | None]] = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all_gather", 1),
    "_allgather_base_": ("all_gather", 1),
    "allgather_coalesced_": ("all_gather", 1),
    "allgather_into_tensor_coalesced_": ("all_gather", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "gather_": ("gather", 1),
    "scatter_": ("scatter", 0),
    "alltoall_base_": ("all_to_all", 1),
    "alltoall_": ("all_to_all", 1),
    "send": ("send", 0),
    "recv_": ("recv", 0),
    "recv_any_source_": ("recv", 0),
    "barrier": ("barrier", None),
}


@dataclass(frozen=True)
class Event:
    """Something that the profiler saw.

    activity   its kind in the profiler's words: "cpu_op", "user_annotation", "kernel", "gpu_memcpy", ...
    thread     on the CPU
    """

    name: str
    activity: str
    thread: int
    span: Span


@dataclass(frozen=True)
class Call:
    """A call of torch.distributed: its operator's name, and the sizes of each argument's tensors in bytes."""

    operator: str
    arguments: Sequence[int]


@dataclass(frozen=True)
class Traffic:
    """How often something was called, and the bytes of all its calls."""

    calls: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class StepTraffic:
    """One step of one process.

    times        where its time went
    by_kernels   whether that was read off the GPU's kernels; otherwise off the CPU's operators
    traffic      by collective
    """

    times: TimeShares
    by_kernels: bool
    traffic: dict[str, Traffic]


@contextmanager
def observed(processes: Processes) -> Iterator[list[StepTraffic]]:
    """Observe the step that is made inside; it stands in the list when it is over.

    A collective call: all processes begin the step together.
    """
    quiet_profiler()
    seen: list[StepTraffic] = []
    profiler = profile(record_shapes=True)
    profiler.start()
    try:
        # What one process waits for another that reads its observation should not count.
        processes.on_all(lambda: None)
        with record_function(STEP):
            yield seen
    finally:
        profiler.stop()
    events = read_events(profiler)
    times, by_kernels = shares(events)
    step = step_of(events).span
    seen.append(StepTraffic(times, by_kernels, count(read_calls(profiler, step))))


def step_of(events: Iterable[Event]) -> Event:
    """The step, on the CPU."""
    return next(event for event in events if event.name == STEP and event.activity == "user_annotation")


def shares(events: Sequence[Event]) -> tuple[TimeShares, bool]:
    """Where the step's time went, and whether kernels told it: they do where there are any."""
    step = step_of(events)
    kernels = [event for event in events if event.activity in ("kernel", "gpu_memcpy", "gpu_memset")]
    if kernels:
        own = [event.span for event in kernels if not event.name.startswith("nccl")]
        collectives = [e.span for e in kernels if e.name.startswith("nccl") and "SendRecv" not in e.name]
        return shares_of_kernels(step.span, own, collectives), True
    operators = [e.span for e in events if e.thread == step.thread and e.name.startswith("aten::")]
    collectives, messages = (
        _under_way([event for event in events if _is_message(event) == are_messages]) for are_messages in (False, True)
    )
    return shares_of_operators(step.span, operators, collectives, messages), False


def _under_way(events: Sequence[Event]) -> list[Span]:
    """When calls were under way: from the begin of a call to the end of what the backend's own thread did for it.

    In between that thread wakes up. Which belongs to which is not known where several run at a time, but then the
    moments in which any is under way are the same. Where the backend did a call in several parts, calls and parts.
    """
    called = [event.span for event in events if event.name.startswith(OPERATORS)]
    done = [event.span for event in events if event.name.startswith(BACKENDS)]
    if len(called) != len(done):
        return called + done
    return list(zip(sorted(begin for begin, _ in called), sorted(end for _, end in done), strict=True))


def _is_message(event: Event) -> bool:
    return event.name.rpartition(":")[2].startswith(MESSAGES)


def count(calls: Iterable[Call]) -> dict[str, Traffic]:
    """Calls and bytes by collective, in order of the names.

    A call's bytes are those of the tensors that the process hands in: of an all_gather the share that it adds, of a
    reduce_scatter the whole of which it gets a share; of recv what it gets. An operator that is not in `CALLS` stands
    under its own name, with its first argument.
    """
    counted: dict[str, Traffic] = {}
    for call in calls:
        name, argument = CALLS.get(call.operator, (call.operator, 0))
        before, size = counted.get(name, Traffic()), 0 if argument is None else call.arguments[argument]
        counted[name] = Traffic(before.calls + 1, before.bytes + size)
    return dict(sorted(counted.items()))


def read_events(profiler: profile) -> list[Event]:
    """All that a stopped profiler saw."""
    events = _results(profiler).events()
    return [
        Event(e.name(), e.activity_type(), e.start_thread_id(), (e.start_ns(), e.start_ns() + e.duration_ns()))
        for e in events
    ]


def read_calls(profiler: profile, during: Span) -> list[Call]:
    """The calls of torch.distributed that began in a span, in all threads.

    Only the profiler's tree tells the types of tensors that stand in lists, as most do here.
    """
    calls, nodes = [], list(_results(profiler).experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.name.startswith(OPERATORS) and during[0] <= node.start_time_ns < during[1]:
            calls.append(Call(node.name.removeprefix(OPERATORS), [_size(each) for each in node.extra_fields.inputs]))
    return calls


def _results(profiler: profile) -> Any:
    assert profiler.profiler is not None
    return profiler.profiler.kineto_results


def _size(argument: Any) -> int:
    """Bytes of a recorded argument: a tensor, a list of them, or something else."""
    if isinstance(argument, list):
        return sum(_size(each) for each in argument)
    if isinstance(argument, torch._C._profiler._TensorMetadata):
        dtype: torch.dtype = argument.dtype
        return torch.Size(argument.sizes).numel() * dtype.itemsize
    return 0
