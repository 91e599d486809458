"""The processes of a run: how they find each other and which lanes each of them owns."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from brt_dist.parallel.config import ParallelConfig
from brt_dist.parallel.launcher import SECONDS_FOR_THE_LEADER_TO_SPEAK, Launch, LaunchError

T = TypeVar("T")

# How long processes wait for one another: for the leading one while it hashes a large corpus, say.
PATIENCE = timedelta(hours=2)

# Where processes on several machines meet if MASTER_PORT is not set; torchrun's choice too.
DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Processes:
    """This process among all: its data-parallel rank, the number of those, its rank on this machine, its device."""

    data_rank: int
    data_ranks: int
    local_rank: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.data_rank == 0

    def micro_batch_lanes(self, lanes: int, micro_batches: int) -> list[range]:
        """Global numbers of the lanes of each of this rank's micro-batches: consecutive groups of equal size."""
        group = lanes // (self.data_ranks * micro_batches)
        first = self.data_rank * micro_batches
        return [range((first + m) * group, (first + m + 1) * group) for m in range(micro_batches)]

    def sum(self, *values: float) -> list[float]:
        """Sums over all data ranks, in float64."""
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        return [float(total) for total in totals]

    def on_all(self, work: Callable[[], None]) -> None:
        """Do `work` in every process and wait for all of them.

        Where it fails, its exception is raised as it is; processes in which it didn't fail then leave quietly with
        exit status 2, instead of waiting for those that did.
        """
        failed = 1.0
        try:
            work()
            failed = 0.0
        finally:
            failures = self.sum(failed)[0]
        if failures:
            time.sleep(SECONDS_FOR_THE_LEADER_TO_SPEAK)
            raise SystemExit(2)

    def on_leader(self, work: Callable[[], T]) -> T:
        """What `work` returns in the leading process, for all of them; it must be small enough to be pickled.

        An exception is raised there as it is; the other processes leave quietly with exit status 2.
        """
        answer: list[tuple[bool, T | None]] = [(False, None)]
        if self.leads:
            try:
                answer = [(True, work())]
            finally:
                dist.broadcast_object_list(answer, src=0, device=self.device)
        else:
            dist.broadcast_object_list(answer, src=0, device=self.device)
        done, value = answer[0]
        if not done:
            time.sleep(SECONDS_FOR_THE_LEADER_TO_SPEAK)
            raise SystemExit(2)
        return cast(T, value)


@contextmanager
def joined(launch: Launch, parallel: ParallelConfig) -> Iterator[Processes]:
    """Join the processes that were launched together; leave them at the end.

    NCCL where there is a GPU, gloo otherwise. LaunchError where several machines were started without MASTER_ADDR.
    """
    data_ranks = parallel.data_ranks(launch.world_size)
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", launch.local_rank % torch.cuda.device_count()), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        # Several processes with a thread per core each would fight for the cores.
        torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // launch.local_size)))
    if launch.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=PATIENCE)
    else:
        address, port = _meeting_point(launch)
        dist.init_process_group(
            backend,
            init_method=f"tcp://{address}:{port}",
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=PATIENCE,
        )
    try:
        # On CUDA the device's number: a launcher may show each process only the GPU that is its own.
        local_rank = launch.local_rank if device.index is None else device.index
        yield Processes(launch.rank, data_ranks, local_rank, device)
    finally:
        dist.destroy_process_group()


def _meeting_point(launch: Launch) -> tuple[str, int]:
    on_several_machines = launch.local_size < launch.world_size
    if launch.address is None and on_several_machines:
        raise LaunchError(
            f"{launch.world_size} processes on several machines were started ({launch.local_size} on this one): "
            "set MASTER_ADDR to the name of the machine of rank 0"
        )
    # The processes that one mpiexec starts on a machine share their parent, and no two jobs on it have the same one.
    free_port = DEFAULT_PORT if on_several_machines else 20000 + os.getppid() % 12000
    return launch.address or "127.0.0.1", launch.port or free_port
