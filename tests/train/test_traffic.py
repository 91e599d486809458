"""What is read off the profiler: calls with their bytes, and where the time went on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import profile

from brt_dist.parallel.process_groups import Processes
from brt_dist.train.time_shares import TimeShares
from brt_dist.train.traffic import STEP, Call, Event, Traffic, count, observed, read_calls, shares

SHARE = torch.ones(6, 4, dtype=torch.bfloat16)
BYTES = 6 * 4 * 2


@pytest.fixture
def processes() -> Iterator[Processes]:
    """This process alone, connected to itself."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Processes(0, 0, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("all_reduce", lambda: dist.all_reduce(SHARE)),
        ("all_gather", lambda: dist.all_gather([torch.empty_like(SHARE)], SHARE)),
        ("all_gather", lambda: dist.all_gather_into_tensor(torch.empty_like(SHARE), SHARE)),
        ("reduce_scatter", lambda: dist.reduce_scatter_tensor(torch.empty(6, 2), torch.ones(6, 2))),
        ("broadcast", lambda: dist.broadcast(SHARE, 0)),
        ("reduce", lambda: dist.reduce(SHARE, 0)),
        ("gather", lambda: dist.gather(SHARE, [torch.empty_like(SHARE)], 0)),
        ("scatter", lambda: dist.scatter(SHARE, [SHARE.clone()], 0)),
        ("all_to_all", lambda: dist.all_to_all_single(torch.empty_like(SHARE), SHARE)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_a_call_is_counted_with_the_bytes_that_are_handed_in(processes: Processes, name: str, call: Callable[[], Any]):
    with observed(processes) as seen:
        call()
        call()
    (step,) = seen
    assert step.traffic == {name: Traffic(2, 2 * BYTES)}
    assert not step.by_kernels


def test_only_the_calls_of_the_step_are_counted(processes: Processes):
    with profile(record_shapes=True) as profiler:
        dist.all_reduce(SHARE)
    assert [call.operator for call in read_calls(profiler, (0, 2**63))] == ["allreduce_"]
    assert read_calls(profiler, (0, 1)) == []


def test_a_step_that_fails_leaves_the_profiler_ready_for_the_next(processes: Processes):
    with pytest.raises(ZeroDivisionError), observed(processes):
        1 / 0  # noqa: B018
    with observed(processes) as seen:
        dist.barrier()
    assert seen[0].traffic == {"barrier": Traffic(1, 0)}


def test_a_call_that_no_line_of_the_table_names_stands_under_its_own_name():
    assert count([Call("new_call", [12, 5]), Call("send", [7, 0])]) == {
        "new_call": Traffic(1, 12),
        "send": Traffic(1, 7),
    }


def test_the_gpus_time_is_read_off_its_kernels():
    step = Event(STEP, "user_annotation", 1, (1000, 2000))
    on_the_gpu = [
        Event("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "kernel", 0, (900, 1100)),
        Event("void gemm_kernel<float>", "kernel", 0, (1050, 1300)),
        Event("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "kernel", 0, (1200, 1500)),
        Event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 0, (1500, 1520)),
        Event("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "kernel", 0, (1700, 1800)),
    ]
    others = [
        Event(STEP, "gpu_user_annotation", 0, (1050, 1800)),
        Event("nccl:all_reduce", "gpu_user_annotation", 0, (900, 1100)),
        Event("aten::mm", "cpu_op", 1, (1000, 1990)),
        Event("c10d::allreduce_", "cpu_op", 1, (1000, 1010)),
        Event("cudaLaunchKernel", "cuda_runtime", 1, (1000, 1010)),
    ]
    # The step's first 50 ns and the all-gather; kernel and copy; all else, also the message behind the kernel.
    expected = TimeShares(compute=250 + 20, communication=50 + 100, bubble=1000 - 420)
    assert shares([*others[:1], step, *on_the_gpu, *others[1:]]) == (expected, True)


def test_the_cpus_time_is_read_off_the_operators_of_the_thread_that_makes_the_step():
    events = [
        Event(STEP, "user_annotation", 1, (1000, 2000)),
        Event("aten::mm", "cpu_op", 1, (1000, 1100)),
        Event("aten::copy_", "cpu_op", 2, (1100, 1400)),
        # Until its thread wakes up, and as long as nothing else is computed.
        Event("c10d::allreduce_", "cpu_op", 1, (1100, 1110)),
        Event("gloo:all_reduce", "user_annotation", 2, (1150, 1400)),
        Event("aten::mm", "cpu_op", 1, (1200, 1300)),
        Event("c10d::recv_", "cpu_op", 1, (1500, 1510)),
        Event("gloo:recv", "user_annotation", 1, (1505, 1800)),
    ]
    assert shares(events) == (TimeShares(compute=1000 - 500, communication=200, bubble=300), False)
