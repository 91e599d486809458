"""Every launcher's environment gives the same description of a process's place."""

from __future__ import annotations

from pathlib import Path

import pytest

from brt_dist.cli import main
from brt_dist.parallel.launcher import Launch, LaunchError, read_launch

TORCHRUN = {
    **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "node0", "MASTER_PORT": "29511"},
}
DEEPSPEED = {
    **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"},
    **{"MASTER_ADDR": "node0", "MASTER_PORT": "29511"},
}
OPENMPI = {
    **{"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"},
    **{"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {
    **{"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"},
    **{"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1"},
}


@pytest.mark.parametrize("environment", [TORCHRUN, DEEPSPEED])
def test_torchrun_and_deepspeed_tell_where_to_meet(environment: dict[str, str]):
    assert read_launch(environment) == Launch(3, 4, 1, 2, "node0", 29511)


@pytest.mark.parametrize("environment", [OPENMPI, MPICH, SLURM])
def test_mpiexec_and_srun_tell_only_the_place_and_the_user_where_to_meet(environment: dict[str, str]):
    assert read_launch(environment) == Launch(3, 4, 1, 2, None, None)
    meeting = {"MASTER_ADDR": "node0", "MASTER_PORT": "29511"}
    assert read_launch({**environment, **meeting}) == Launch(3, 4, 1, 2, "node0", 29511)


@pytest.mark.parametrize(("machine", "size"), [("0", 4), ("1", 4), ("2", 3), ("3", 1)])
def test_slurms_list_of_tasks_gives_those_of_this_machine(machine: str, size: int):
    environment = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4(x2),3,1", "SLURM_NODEID": machine}
    assert read_launch(environment).local_size == size


def test_under_srun_a_rank_of_another_protocol_takes_its_place_on_the_machine_from_slurm():
    environment = {**SLURM, "PMI_RANK": "3", "PMI_SIZE": "4"}
    assert read_launch(environment) == Launch(3, 4, 1, 2, None, None)


def test_a_launcher_inside_an_allocation_counts_more_than_the_allocation():
    inside = {**SLURM, **TORCHRUN, "RANK": "0"}
    assert read_launch(inside) == Launch(0, 4, 1, 2, "node0", 29511)


@pytest.mark.parametrize(
    "environment", [{}, {"HOME": "/root"}, {"RANK": "1"}, {"RANK": "", "WORLD_SIZE": ""}, {"SLURM_PROCID": "0"}]
)
def test_without_a_launcher_there_is_one_process(environment: dict[str, str]):
    assert read_launch(environment) == Launch(0, 1, 0, 1, None, None)


def test_several_machines_without_an_address_are_refused_in_one_line(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data: {{shards: {shards}, segment: 16, lanes: 4}}\nmodel: {{vocab_size: 384, window: 8, num_layers: 10}}\n"
    )
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**MPICH, "PMI_RANK": "0", "MPI_LOCALRANKID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", str(config), f"run.dir={tmp_path / 'run'}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("brt: 4 processes on several machines were started (2 on this one): set MASTER_ADDR")
    assert told.count("\n") == 1
    assert issubclass(LaunchError, ValueError)
