"""`parallel.report`: what moves in a run. Some steps of every process are observed, and told once they are over."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from brt_dist.data.atomic_file import write_json
from brt_dist.parallel.process_groups import Processes
from brt_dist.train.deepspeed_config import deepspeed_calls
from brt_dist.train.traffic import StepTraffic, Traffic, observed

REPORT = "report.json"

# Of the first steps of a process: one is observed but not told, for in it much is made that stays; then those that
# are; in the last one DeepSpeed's communication logger counts. It slows a GPU down, so that step is not timed.
UNTOLD, TOLD = 1, 3
STEPS = UNTOLD + TOLD + 1


@dataclass
class ProcessReport:
    """What one process tells. The words are those of the JSON file, sizes in bytes, times in nanoseconds.

    by_deepspeed   of `traffic`, what DeepSpeed called itself in one step; None where the run ended before
    """

    rank: int
    stage: int
    data: int
    tensor: int
    peak_memory: int = 0
    steps: list[StepTraffic] = field(default_factory=list)
    by_deepspeed: dict[str, Traffic] | None = None

    def mean(self, share: str) -> float:
        """A share of the steps' time ("step": all of it) in seconds."""
        return sum(getattr(step.times, share) for step in self.steps) / len(self.steps) / 1e9

    def traffic(self) -> dict[str, tuple[float, float]]:
        """Calls and bytes by collective, means over the steps; they differ where a step does something more."""
        names = sorted({name for step in self.steps for name in step.traffic})
        each = {name: [step.traffic.get(name, Traffic()) for step in self.steps] for name in names}
        return {
            name: (sum(t.calls for t in all_) / len(all_), sum(t.bytes for t in all_) / len(all_))
            for name, all_ in each.items()
        }


class ParallelReport:
    """Observes the first steps of this process and tells in the leading one what all of them saw."""

    def __init__(self, folder: Path, done: int, steps: int, processes: Processes, say: Callable[[str], None]):
        """done: steps of the run before this process's first; steps: of the whole run."""
        self.folder, self._done, self._processes, self._say = folder, done, processes, say
        self._left = islice(range(STEPS), steps - done)
        self._last = min(STEPS, steps - done) - 1
        places = (processes.pipeline.position, processes.data.position, processes.tensor.position)
        self._own = ProcessReport(processes.rank, *places)

    @contextmanager
    def step(self) -> Iterator[None]:
        """The next step is made inside. A collective call."""
        number = next(self._left, None)
        if number is None:
            yield
            return
        if number < STEPS - 1:
            with observed(self._processes) as seen:
                yield
            if number >= UNTOLD:
                self._own.steps += seen
        else:
            with deepspeed_calls() as counted:
                yield
            self._own.by_deepspeed = {name: Traffic(*each) for name, each in sorted(counted.items())}
        if number == self._last:
            self._tell()

    def _tell(self) -> None:
        if not self._own.steps:
            self._say("parallel.report is true, but this run has no step behind its first one")
            return
        self._own.peak_memory = peak_memory(self._processes.device)
        every: list[Any] | None = [None] * dist.get_world_size() if self._processes.leads else None
        dist.gather_object(self._own, every)
        first = self._done + UNTOLD + 1

        def tell() -> None:
            assert every is not None
            for line in told(every, first, self._processes.device.type):
                self._say(line)
            write_json(self.folder / REPORT, as_json(every, first))

        self._processes.on_leader(tell)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process ever held: tensors on a GPU, or on the CPU all of its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def told(reports: Sequence[ProcessReport], first: int, device: str) -> list[str]:
    """The lines that a person reads, of all processes in order of rank; first: the number of the first step told."""
    last = first + len(reports[0].steps) - 1
    by = "kernels of the GPU" if reports[0].steps[0].by_kernels else "operators on the CPU"
    memory = "tensors on the GPU" if device == "cuda" else "resident memory of the process"
    return [
        f"parallel.report: means of steps {first} to {last}, times from {by}, peak of {memory}",
        "  compute: own work runs; communication: only a collective runs; bubble: waits for a neighbouring stage"
        + (", or idle" if reports[0].steps[0].by_kernels else ""),
        "  rank  stage  data  tensor    step ms  compute ms  communication ms  bubble ms  peak GiB",
        *(
            f"{each.rank:6}{each.stage:7}{each.data:6}{each.tensor:8}{each.mean('step') * 1e3:11.2f}"
            f"{each.mean('compute') * 1e3:12.2f}{each.mean('communication') * 1e3:18.2f}"
            f"{each.mean('bubble') * 1e3:11.2f}{each.peak_memory / 2**30:10.3f}"
            for each in reports
        ),
        "  calls and bytes of a step; in brackets those by DeepSpeed",
        *_told_traffic(reports),
    ]


def _told_traffic(reports: Sequence[ProcessReport]) -> Iterator[str]:
    """Ranks that move the same share their lines."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for each in reports:
        alike.setdefault(tuple(_traffic_lines(each)), []).append(each.rank)
    for lines, ranks in alike.items():
        yield f"  rank{'s' if len(ranks) > 1 else ''} {ranges(ranks)}"
        yield from lines


def _traffic_lines(report: ProcessReport) -> Iterator[str]:
    for name, (calls, size) in report.traffic().items():
        line = f"    {name:15}{_number(calls):>8} calls{_number(size):>18} bytes"
        if report.by_deepspeed is not None:
            own = report.by_deepspeed.get(name, Traffic())
            line += f"  ({own.calls:,} calls, {own.bytes:,} bytes)"
        yield line


def _number(mean: float) -> str:
    return f"{int(mean):,}" if mean == int(mean) else f"{mean:,.1f}"


def ranges(ranks: Sequence[int]) -> str:
    """Ascending numbers in few words: "0-3, 8"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    return ", ".join("-".join(map(str, run)) for run in runs)


def as_json(reports: Sequence[ProcessReport], first: int) -> dict[str, Any]:
    """The same exactly, step by step."""
    return {"ranks": [_plain(each, first) for each in reports]}


def _plain(report: ProcessReport, first: int) -> dict[str, Any]:
    steps = [
        {
            "step": first + index,
            "nanoseconds": {name: getattr(step.times, name) for name in ("step", "compute", "communication", "bubble")},
            "times_from": "kernels" if step.by_kernels else "operators",
            "traffic": _plain_traffic(step.traffic),
        }
        for index, step in enumerate(report.steps)
    ]
    place = {"rank": report.rank, "stage": report.stage, "data": report.data, "tensor": report.tensor}
    logged = None if report.by_deepspeed is None else _plain_traffic(report.by_deepspeed)
    return {**place, "peak_memory_bytes": report.peak_memory, "steps": steps, "by_deepspeed": logged}


def _plain_traffic(traffic: dict[str, Traffic]) -> dict[str, dict[str, int]]:
    return {name: {"calls": each.calls, "bytes": each.bytes} for name, each in traffic.items()}
