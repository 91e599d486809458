"""The processes of a run: how they find each other, what each shares with which others, and its lanes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from brt_dist.parallel.agreement import REFUSED, check_agreement
from brt_dist.parallel.config import ParallelConfig
from brt_dist.parallel.launcher import SECONDS_FOR_THE_LEADER_TO_SPEAK, Launch, LaunchError

T = TypeVar("T")

# How long processes wait for one another: for the leading one while it hashes a large corpus, say.
PATIENCE = timedelta(hours=2)
# How long until all have met: machines of one job begin minutes apart at most.
MEETING = timedelta(minutes=10)
# The same for one that comes only to say that it was told something wrong.
REFUSING = timedelta(seconds=30)

# Where processes on several machines meet if MASTER_PORT is not set; torchrun's choice too.
DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Axis:
    """The processes that differ from this one along one axis of the layout alone.

    position   this process's among them, from 0
    ranks      their numbers in the whole run, in order
    group      through which they talk; None where there is only this one
    """

    position: int = 0
    ranks: tuple[int, ...] = (0,)
    group: Any = None

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self.ranks)


@dataclass(frozen=True)
class Processes:
    """This process among all of a run.

    tensor     those that share its layers with it
    data       those that hold the same parameters and read other lanes
    pipeline   those that hold the other layers: its position there is its stage
    """

    rank: int
    local_rank: int
    device: torch.device
    tensor: Axis = Axis()
    data: Axis = Axis()
    pipeline: Axis = Axis()

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether tokens come in here."""
        return self.pipeline.position == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether losses come out here."""
        return self.pipeline.position == self.pipeline.size - 1

    @property
    def counts(self) -> bool:
        """Whether the losses that come out here are counted: those of tensor ranks are the same."""
        return self.is_last_stage and self.tensor.position == 0

    @property
    def writes(self) -> bool:
        """Whether this process writes the parameters of its stage, which others hold too."""
        return self.data.position == 0 and self.tensor.position == 0

    def micro_batch_lanes(self, lanes: int, groups: int) -> list[range]:
        """Global numbers of this data rank's lanes, in so many consecutive groups of equal size."""
        size = lanes // (self.data.size * groups)
        first = self.data.position * groups
        return [range((first + g) * size, (first + g + 1) * size) for g in range(groups)]

    def sum(self, *values: float) -> list[float]:
        """Sums over all data ranks of what the last stage knows, in float64."""
        return self._total([value if self.counts else 0.0 for value in values])

    def sum_named(self, named: Mapping[str, float]) -> dict[str, float]:
        """Sums by name over all processes, in float64. Stages may know different names."""
        every: list[Any] = [list(named)]
        if self.pipeline.group is not None:
            every = [None] * self.pipeline.size
            dist.all_gather_object(every, list(named), group=self.pipeline.group)
        names = list(dict.fromkeys(name for stage in every for name in stage))
        return dict(zip(names, self._total([named.get(name, 0.0) for name in names]), strict=True))

    def _total(self, values: Sequence[float]) -> list[float]:
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        return [float(total) for total in totals]

    def gather_shares(self, share: Tensor) -> list[Tensor]:
        """What each tensor rank holds, in order; only tensor rank 0 gets more than its own."""
        if self.tensor.group is None:
            return [share]
        share = share.to(self.device).contiguous()
        leads = self.tensor.position == 0
        every = [torch.empty_like(share) for _ in self.tensor.ranks] if leads else None
        dist.gather(share, every, dst=self.tensor.ranks[0], group=self.tensor.group)
        return every or [share]

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
            failures = self._total([failed])[0]
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
def joined(launch: Launch, parallel: ParallelConfig, told: Mapping[str, Any] | None = None) -> Iterator[Processes]:
    """Join the processes that were launched together; leave them at the end.

    told: what must be the same in all of them, by name. NCCL where there is a GPU, gloo otherwise. LaunchError where
    several machines were started without MASTER_ADDR, or where processes were told different things.
    """
    if parallel.tensor > 1:
        # Read when CUDA starts: megatron-core relies on kernels starting in the order in which they were called.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with connected(launch) as device:
        yield lay_out(launch, parallel, device, told)


def refuse_together(launch: Launch, why: str) -> bool:
    """Tell the others that this process's configuration is refused, `why` in one line.

    True if all were refused for the same reason. LaunchError where others were told something else; they leave, too.
    False if they could not be met.
    """
    with ExitStack() as stack:
        try:
            device = stack.enter_context(connected(launch, REFUSING))
        except LaunchError:
            return False
        check_agreement({REFUSED: why}, launch.rank, launch.world_size, device)
    return True


@contextmanager
def connected(launch: Launch, meeting: timedelta = MEETING) -> Iterator[torch.device]:
    """Connect the processes, whatever they will do; the device that this one computes on.

    LaunchError where they have not all met within `meeting`.
    """
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
        _meet(backend, f"tcp://{address}:{port}", launch, meeting)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def lay_out(
    launch: Launch, parallel: ParallelConfig, device: torch.device, told: Mapping[str, Any] | None = None
) -> Processes:
    """This process's place in the layout, and the groups it belongs to. All connected processes call this alike."""
    # First of all: processes that were told different layouts would wait for each other in different groups.
    check_agreement(told or {}, launch.rank, launch.world_size, device)
    # On CUDA the device's number: a launcher may show each process only the GPU that is its own.
    local_rank = launch.local_rank if device.index is None else device.index
    places = grid(launch.world_size, parallel)
    axes = {name: _axis(launch.rank, rows) for name, rows in places.items()}
    return Processes(launch.rank, local_rank, device, **axes)


def grid(world_size: int, parallel: ParallelConfig) -> dict[str, list[list[int]]]:
    """The rows of ranks along each axis, by its name.

    Neighbours share a layer, where most is sent; stages, which send least, are farthest apart. Megatron-core and
    DeepSpeed's pipeline count in the same order.
    """
    data_ranks = parallel.data_ranks(world_size)
    ranks_PDT = torch.arange(world_size).view(parallel.pipeline, data_ranks, parallel.tensor)
    return {
        "tensor": ranks_PDT.flatten(0, 1).tolist(),
        "data": ranks_PDT.transpose(1, 2).flatten(0, 1).tolist(),
        "pipeline": ranks_PDT.permute(1, 2, 0).flatten(0, 1).tolist(),
    }


def _axis(rank: int, rows: list[list[int]]) -> Axis:
    # Every process makes the groups of all rows, in the same order: torch asks for that.
    groups = [dist.new_group(row) if len(row) > 1 else None for row in rows]
    row, group = next((row, group) for row, group in zip(rows, groups, strict=True) if rank in row)
    return Axis(row.index(rank), tuple(row), group)


def _meet(backend: str, place: str, launch: Launch, meeting: timedelta) -> None:
    try:
        store, rank, size = next(rendezvous(place, launch.rank, launch.world_size, timeout=meeting))
        # All are here when all have said so; then they may wait longer for each other.
        store.set(f"rank {rank} is here", "")
        store.wait([f"rank {each} is here" for each in range(size)], meeting)
    except dist.DistError as error:
        raise LaunchError(
            f"rank {launch.rank}: {launch.world_size} processes should meet at {place}, but not all of them came "
            f"within {meeting.total_seconds():.0f} s"
        ) from error
    store.set_timeout(PATIENCE)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)


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
