"""What the launcher told this process: torchrun, deepspeed, mpiexec (MPICH, Intel MPI, OpenMPI), srun, or nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

# Per launcher: rank, world size, rank on this machine. The first whose rank is set counts.
NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
LOCAL_SIZE_NAMES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


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
            local_size = next((int(given[name]) for name in LOCAL_SIZE_NAMES if given.get(name, "").isdigit()), size)
            port = given.get("MASTER_PORT", "")
            return Launch(
                int(given[rank_name]),
                size,
                int(given.get(local_name, "0")),
                local_size,
                given.get("MASTER_ADDR") or None,
                int(port) if port.isdigit() else None,
            )
    return Launch()
