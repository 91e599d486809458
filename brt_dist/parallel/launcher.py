"""What the launcher told this process: torchrun, deepspeed, mpiexec (MPICH, Intel MPI, OpenMPI), srun, or nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Per launcher: rank, world size, rank on this machine. The first whose rank is set counts.
NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
# For launchers that tell a process its rank, but not its place on the machine.
SLURM_LOCAL_RANK = "SLURM_LOCALID"
LOCAL_SIZE_NAMES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


# How long the other processes wait behind a refusal of the whole run, which the leading process alone puts into words:
# a launcher kills all that remain when the first one ends.
SECONDS_FOR_THE_LEADER_TO_SPEAK = 3.0


class LaunchError(ValueError):
    """Processes that were started in a way in which they cannot find each other; the message is one line."""


@dataclass(frozen=True)
class Launch:
    """This process's place among those that were started together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str | None = None
    port: int | None = None


def read_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """The launch that `environment` (default: this process's) describes; a launch of one where it names none."""
    given = os.environ if environment is None else environment
    for rank_name, size_name, local_name in NAMES:
        if given.get(rank_name, "").isdigit() and given.get(size_name, "").isdigit():
            size = int(given[size_name])
            local_rank = _first_number(given, (local_name, SLURM_LOCAL_RANK))
            local_size = _first_number(given, LOCAL_SIZE_NAMES) or _slurm_local_size(given) or size
            port = given.get("MASTER_PORT", "")
            return Launch(
                int(given[rank_name]),
                size,
                local_rank or 0,
                local_size,
                given.get("MASTER_ADDR") or None,
                int(port) if port.isdigit() else None,
            )
    return Launch()


def _first_number(given: Mapping[str, str], names: Sequence[str]) -> int | None:
    return next((int(given[name]) for name in names if given.get(name, "").isdigit()), None)


def _slurm_local_size(given: Mapping[str, str]) -> int | None:
    """Tasks on this machine, of a list such as "4(x2),3": four on each of the first two, three on the third."""
    counts = [
        int(tasks)
        for tasks, machines in re.findall(r"(\d+)(?:\(x(\d+)\))?", given.get("SLURM_STEP_TASKS_PER_NODE", ""))
        for _ in range(int(machines or 1))
    ]
    machine = given.get("SLURM_NODEID", "")
    return counts[int(machine)] if machine.isdigit() and int(machine) < len(counts) else None
