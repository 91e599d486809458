"""torch's profiler: traces of a few steps, for people to look at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from brt_dist.parallel.process_groups import Processes


@contextmanager
def traced(folder: Path, steps: int, behind: int, processes: Processes) -> Iterator[Any]:
    """A profiler that is told of every step, and writes a trace of `steps` of them into the run folder; None for 0.

    behind: so many steps of this process, and one more, are left out first. torch runs one profiler at a time, so
    whoever else uses it must be done then.
    """
    if not steps:
        yield None
        return
    quiet_profiler()
    trace = folder / "profile" / f"rank-{processes.rank:05d}.json"
    trace.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=behind, warmup=1, active=steps, repeat=1),
        on_trace_ready=lambda profile: profile.export_chrome_trace(str(trace)),
    ) as profiler:
        yield profiler


def quiet_profiler() -> None:
    """Keep the profiler from telling every start and stop of it in every process; call this before the first."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
