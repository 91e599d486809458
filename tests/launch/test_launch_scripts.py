"""Each script of launch/ starts the same training in several processes, and ends as the training did.

Here a second machine is this one again, or words written down by a stand-in for the launcher; nothing calls ssh.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from processes import BIN, finish
from training_runs import Runs

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {"torchrun": "torchrun.sh", "deepspeed": "deepspeed.sh", "mpiexec": "mpiexec.sh", "srun": "slurm.sbatch"}

# What the scripts, the launchers and brt read, by the beginning of its name.
READ = (
    *("NODES", "NODE_RANK", "PROCESSES_PER_NODE", "HOSTFILE", "MASTER_", "CUDA_VISIBLE_DEVICES", "SLURM_", "SRUN_"),
    *("RANK", "WORLD_SIZE", "LOCAL_", "OMPI_", "PMI_", "MPI_", "TORCHELASTIC_"),
)

# A job of two machines, as sbatch describes it to the script.
JOB = {"SLURM_JOB_ID": "4321007", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}

# Notes its arguments, and where the processes would meet, in the file that its own name gives.
RECORDER = """
import json, os, sys
if sys.argv[1:] != ["--version"]:
    told = {name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")}
    with open(sys.argv[0] + ".json", "w") as file:
        json.dump({"arguments": sys.argv[1:], **told}, file)
"""

# Starts the tasks of all machines here; when one fails, it ends the others and tells its exit status.
SRUN = """
import os, subprocess, sys, time
options = []
while sys.argv[1].startswith("--"):
    options.append(sys.argv.pop(1))
given = dict(option.removeprefix("--").split("=") for option in options)
assert given["kill-on-bad-exit"] == "1"
machines, each = int(os.environ["SLURM_JOB_NUM_NODES"]), int(given["ntasks-per-node"])
assert int(given["ntasks"]) == machines * each
step = {"SLURM_STEP_NUM_TASKS": given["ntasks"], "SLURM_STEP_TASKS_PER_NODE": f"{each}(x{machines})"}
tasks = [
    subprocess.Popen(sys.argv[1:], env={
        **os.environ, **step,
        "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task % each), "SLURM_NODEID": str(task // each),
    })
    for task in range(machines * each)
]
while None in (ended := [task.poll() for task in tasks]) and not any(ended):
    time.sleep(0.05)
for task in tasks:
    task.terminate()
sys.exit(max(map(abs, filter(None, ended)), default=0))
"""


class Launches:
    """Starts the scripts; programs put into its folder count more than those of the machine."""

    def __init__(self, folder: Path):
        self.programs = folder / "programs"
        self.programs.mkdir()

    def put(self, name: str, source: str) -> None:
        """A Python program `name`."""
        program = self.programs / name
        program.write_text(f"#!{sys.executable}\n{source}")
        program.chmod(0o755)

    def start(self, launcher: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Starts the script of `launcher`, one thread a process, and gives its pipes."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(READ)}
        path = os.pathsep.join([str(self.programs), str(BIN), os.environ["PATH"]])
        environment |= {"OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(
            ["bash", str(ROOT / "launch" / SCRIPTS[launcher]), *arguments],
            env=environment | variables,
            cwd=self.programs.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, launcher: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Starts the script of `launcher` and waits for its end."""
        return finish(self.start(launcher, *arguments, **variables))

    def recorded(self, launcher: str, *arguments: str, **variables: str) -> dict[str, object]:
        """What the script hands to `launcher` where it would start processes."""
        self.put(launcher, RECORDER)
        done = self.run(launcher, *arguments, **variables)
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads((self.programs / f"{launcher}.json").read_text())


@pytest.fixture
def launches(tmp_path: Path) -> Launches:
    return Launches(tmp_path)


@pytest.fixture
def runs(tmp_path: Path, shards: Path) -> Runs:
    """Runs in a folder whose name has spaces."""
    return Runs(tmp_path / "two short runs", shards)


def free_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


def slurm_of_two_machines(launches: Launches) -> None:
    launches.put("srun", SRUN)
    launches.put("scontrol", 'import sys\nassert sys.argv[1:3] == ["show", "hostnames"]\nprint("127.0.0.1\\nnode2")')


# --- real runs ---


def torchrun_on_two_machines(launches: Launches, arguments: list[str], folder: Path) -> list[subprocess.Popen[str]]:
    both = {"NODES": "2", "PROCESSES_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [launches.start("torchrun", *arguments, **both, NODE_RANK=rank) for rank in ("1", "0")]


def deepspeed_on_one_host(launches: Launches, arguments: list[str], folder: Path) -> list[subprocess.Popen[str]]:
    launches.put("ssh", "raise SystemExit('ssh was called')")
    hostfile = folder / "host file"
    hostfile.write_text("# this machine\n\nlocalhost slots=2\n")
    return [launches.start("deepspeed", *arguments, HOSTFILE=str(hostfile), MASTER_PORT=free_port())]


def mpiexec_on_one_machine(launches: Launches, arguments: list[str], folder: Path) -> list[subprocess.Popen[str]]:
    return [launches.start("mpiexec", *arguments, PROCESSES_PER_NODE="2")]


def slurm_on_two_machines(launches: Launches, arguments: list[str], folder: Path) -> list[subprocess.Popen[str]]:
    slurm_of_two_machines(launches)
    return [launches.start("srun", *arguments, **JOB, MASTER_PORT=free_port())]


@pytest.mark.parametrize(
    "start", [torchrun_on_two_machines, deepspeed_on_one_host, mpiexec_on_one_machine, slurm_on_two_machines]
)
def test_a_script_trains_in_two_processes_with_every_argument_as_it_was_written(
    start: Callable[[Launches, list[str], Path], list[subprocess.Popen[str]]],
    launches: Launches,
    runs: Runs,
    tmp_path: Path,
):
    command = runs.command("run", "train.steps=2", "train.save_every=0", "model.recurrent_layers=[0, 2]")
    done = [finish(process) for process in start(launches, command[1:], tmp_path)]
    assert [end.returncode for end in done] == [0] * len(done), [end.stderr for end in done]
    assert [line["step"] for line in runs.metrics("run")] == [1, 2]
    assert sum(end.stdout.count("data ranks: 2,") + end.stderr.count("data ranks: 2,") for end in done) == 1
    resolved = yaml.safe_load((runs.folder / "run" / "config.yaml").read_text())
    assert resolved["model"]["recurrent_layers"] == [0, 2]


@pytest.mark.parametrize("launcher", SCRIPTS)
def test_a_refusal_comes_through_as_one_line_and_an_exit_status(launcher: str, launches: Launches, runs: Runs):
    port = {} if launcher == "torchrun" else {"MASTER_PORT": free_port()}
    job = JOB if launcher == "srun" else {"PROCESSES_PER_NODE": "2"}
    slurm_of_two_machines(launches)
    done = launches.run(launcher, *runs.command("run", "data.lanes=9")[1:], **job, **port)
    # torchrun ends with 1 whenever a process fails.
    assert done.returncode == (1 if launcher == "torchrun" else 2)
    told = [line for line in done.stderr.splitlines() if line.startswith("brt:")]
    assert len(told) == 1
    assert told[0].startswith("brt: data.lanes is 9, which 2 data ranks x parallel.micro_batches 1 = 2")
    assert not (runs.folder / "run").exists()


# --- what a launcher is told ---

TRAIN = ["brt_dist", "train", "my run.yaml", "model.recurrent_layers=[3, 7]", "run.dir=$HOME/*"]
ARGUMENTS = TRAIN[2:]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_torchrun_starts_eight_processes_on_each_of_two_numbered_machines(rank: str, launches: Launches):
    told = launches.recorded(
        "torchrun", *ARGUMENTS, NODES="2", PROCESSES_PER_NODE="8", NODE_RANK=rank, MASTER_ADDR="node1"
    )
    meeting = ["--nnodes", "2", "--node-rank", rank, "--master-addr", "node1", "--master-port", "29500"]
    assert told["arguments"] == [*meeting, "--nproc-per-node", "8", "-m", *TRAIN]
    assert told["OMP_NUM_THREADS"] == "1"


def test_deepspeed_reads_two_machines_and_their_processes_in_its_hostfile(launches: Launches, tmp_path: Path):
    (tmp_path / "hosts").write_text("node1 slots=8\nnode2 slots=8\n")
    told = launches.recorded("deepspeed", *ARGUMENTS, HOSTFILE="hosts")
    assert told["arguments"] == ["--hostfile", "hosts", "--module", *TRAIN]
    told = launches.recorded("deepspeed", *ARGUMENTS, HOSTFILE="hosts", MASTER_ADDR="10.0.0.1", MASTER_PORT="29511")
    meeting = ["--master_addr", "10.0.0.1", "--master_port", "29511"]
    assert told["arguments"] == ["--hostfile", "hosts", *meeting, "--module", *TRAIN]
    told = launches.recorded("deepspeed", *ARGUMENTS, HOSTFILE="hosts", NODES="1", PROCESSES_PER_NODE="4")
    assert told["arguments"] == ["--hostfile", "hosts", "--num_nodes", "1", "--num_gpus", "4", "--module", *TRAIN]


def test_mpiexec_starts_eight_processes_on_each_machine_of_its_hostfile(launches: Launches, tmp_path: Path):
    (tmp_path / "hosts").write_text("# the cluster\nnode1:8\nnode2:8\n")
    told = launches.recorded("mpiexec", *ARGUMENTS, HOSTFILE="hosts", PROCESSES_PER_NODE="8")
    program = [str(BIN / "python"), "-m", *TRAIN]
    assert told["arguments"] == ["-n", "16", "-f", "hosts", "-ppn", "8", *program]
    assert told["MASTER_ADDR"] == "node1"


def test_open_mpi_is_told_the_same_in_its_own_words(launches: Launches, tmp_path: Path):
    (tmp_path / "hosts").write_text("node1 slots=8\nnode2 slots=8\n")
    launches.put(
        "mpiexec", f'import sys\nif sys.argv[1] == "--version":\n    print("mpiexec (Open MPI) 5")\n{RECORDER}'
    )
    done = launches.run("mpiexec", *ARGUMENTS, HOSTFILE="hosts", PROCESSES_PER_NODE="8", NCCL_SOCKET_IFNAME="eth0")
    assert (done.returncode, done.stderr) == (0, "")
    arguments = json.loads((launches.programs / "mpiexec.json").read_text())["arguments"]
    passed_on = {arguments[place + 1] for place, word in enumerate(arguments) if word == "-x"}
    assert {"MASTER_ADDR", "PYTHONPATH", "OMP_NUM_THREADS", "NCCL_SOCKET_IFNAME"} <= passed_on
    assert "MASTER_PORT" not in passed_on
    assert arguments[:4] == ["-n", "16", "--bind-to", "none"]
    machines = ["--hostfile", "hosts", "--map-by", "ppr:8:node"]
    assert arguments[-len(machines) - 2 - len(TRAIN) :] == [*machines, str(BIN / "python"), "-m", *TRAIN]


def test_srun_starts_one_task_for_each_gpu_unless_the_job_says_otherwise(launches: Launches):
    slurm_of_two_machines(launches)
    program = ["python", "-m", *TRAIN]
    told = launches.recorded("srun", *ARGUMENTS, **JOB, SLURM_GPUS_ON_NODE="8", SLURM_CPUS_PER_TASK="6")
    tasks = ["--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=6"]
    assert told["arguments"] == ["--kill-on-bad-exit=1", "--export=ALL", *tasks, *program]
    assert (told["MASTER_ADDR"], told["MASTER_PORT"]) == ("127.0.0.1", "21007")

    given = {"SLURM_NTASKS": "8", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29511"}
    told = launches.recorded("srun", *ARGUMENTS, **JOB, SLURM_GPUS_ON_NODE="8", **given)
    assert told["arguments"] == ["--kill-on-bad-exit=1", "--export=ALL", *program]
    assert (told["MASTER_ADDR"], told["MASTER_PORT"]) == ("10.0.0.1", "29511")


def test_a_machine_without_a_gpu_gets_one_process(launches: Launches):
    assert launches.recorded("torchrun", *ARGUMENTS)["arguments"][:3] == ["--standalone", "--nproc-per-node", "1"]
    assert launches.recorded("deepspeed", *ARGUMENTS)["arguments"][:2] == ["--num_gpus", "1"]
    assert launches.recorded("mpiexec", *ARGUMENTS)["arguments"][:2] == ["-n", "1"]


# --- what a script refuses ---


@pytest.mark.parametrize("launcher", SCRIPTS)
def test_without_arguments_a_script_says_what_it_takes(launcher: str, launches: Launches):
    done = launches.run(launcher)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ")
    assert done.stderr.endswith(f"launch/{SCRIPTS[launcher]} CONFIG [key=value ...]\n")
    asked = launches.run(launcher, "--help")
    assert (asked.returncode, asked.stderr) == (0, "")
    assert f"launch/{SCRIPTS[launcher]} CONFIG [key=value ...]" in asked.stdout
    assert "MASTER_PORT" in asked.stdout


@pytest.mark.parametrize(
    ("launcher", "variables", "words"),
    [
        ("torchrun", {"NODES": "2", "PROCESSES_PER_NODE": "1", "MASTER_ADDR": "node1"}, "set NODE_RANK"),
        ("torchrun", {"NODES": "2", "PROCESSES_PER_NODE": "1", "NODE_RANK": "0"}, "set MASTER_ADDR"),
        ("deepspeed", {"HOSTFILE": "no hosts"}, "HOSTFILE is no hosts, which cannot be read"),
        ("mpiexec", {"HOSTFILE": "no hosts", "PROCESSES_PER_NODE": "1"}, "HOSTFILE is no hosts, which cannot be read"),
    ],
)
def test_what_would_start_elsewhere_or_never_is_refused(
    launcher: str, variables: dict[str, str], words: str, launches: Launches
):
    done = launches.run(launcher, "run.yaml", **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{SCRIPTS[launcher]}: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
