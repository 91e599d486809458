"""Starts processes as a user does, and runs several `brt` commands in the same ones, which spares their start."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import psutil

BIN = Path(sys.executable).parent
BRT = ["-m", "brt_dist"]


def command(launcher: str, ranks: int, program: Sequence[str]) -> list[str]:
    """The command line that starts `program` (what follows `python`) in `ranks` processes."""
    port = free_port()
    return {
        "python": [sys.executable, *program],
        "torchrun": [str(BIN / "torchrun"), "--master_port", port, "--nproc_per_node", str(ranks), *program],
        "deepspeed": [
            *(str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", port),
            *(("--module", *program[1:]) if program[0] == "-m" else program),
        ],
        "mpiexec": [str(BIN / "mpiexec"), "-n", str(ranks), sys.executable, *program],
    }[launcher]


def start(
    launcher: str, ranks: int, program: Sequence[str], told: Mapping[str, object] | None = None
) -> subprocess.Popen[str]:
    """Starts `program`, one thread a process, and gives its pipes; `told` is added to its environment."""
    taken = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in taken}
    environment |= {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    environment |= {name: str(value) for name, value in (told or {}).items()}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    return subprocess.Popen(
        command(launcher, ranks, program),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Waits for the end; after `timeout` seconds the process and all that it started are killed."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        launcher = psutil.Process(process.pid)
        for started in [launcher, *launcher.children(recursive=True)]:
            started.kill()
        out, err = process.communicate()
        raise AssertionError(f"{process.args} was not done after {timeout} s:\n{out}\n{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(launcher: str, ranks: int, program: Sequence[str], timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    """`start` and `finish`."""
    return finish(start(launcher, ranks, program), timeout)


def run_in_turn(launcher: str, ranks: int, commands: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
    """Runs `brt` commands one after the other in `ranks` processes; exit status and output of each in rank 0."""
    done = run(launcher, ranks, [__file__, json.dumps(commands)], timeout=60 + 60 * ranks * len(commands))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return [(status, output) for status, output in map(json.loads, done.stdout.splitlines())]


def free_port() -> str:
    """A port of this machine that nobody uses."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


def _main(commands: list[list[str]]) -> None:
    from brt_dist.cli import main
    from brt_dist.parallel.launcher import Launch, read_launch
    from brt_dist.parallel.process_groups import connected, lay_out
    from brt_dist.train import trainer

    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    with connected(read_launch()) as device:

        def lay_out_only(launch: Launch, parallel: Any, told: Any = None) -> Any:
            return nullcontext(lay_out(launch, parallel, device, told))

        trainer.joined = lay_out_only  # type: ignore[assignment]
        for arguments in commands:
            output = StringIO()
            with redirect_stdout(output), redirect_stderr(output):
                status = main(arguments)
            if read_launch().rank == 0:
                print(json.dumps([status, output.getvalue()]), flush=True)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
