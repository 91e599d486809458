"""What a run reports: metrics.jsonl, evaluations.jsonl, TensorBoard, and progress for the person who watches."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from brt_dist.train.run_folder import EVALUATIONS, METRICS, drop_lines_after

SECONDS_BETWEEN_LINES = 10.0

# Dense bfloat16 peaks in FLOP/s from the makers' data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """What the device can do at best in `dtype`; None where it is not known."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


class Reporter:
    """Writes a run's lines and shows its progress; in processes that don't lead it does neither."""

    def __init__(self, folder: Path, steps: int, done: int, active: bool):
        """`done`: finished steps; lines of later ones are dropped, because those steps will be made again."""
        self.active = active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        for name in (METRICS, EVALUATIONS):
            drop_lines_after(folder / name, done)
        self._metrics = (folder / METRICS).open("a", encoding="utf-8")
        self._evaluations = (folder / EVALUATIONS).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        self._steps, self._shown = steps, 0.0
        console = Console(file=sys.stderr)
        self._bar = self._make_bar(console, done) if console.is_terminal else None

    def _make_bar(self, console: Console, done: int) -> Progress:
        bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = bar.add_task("train", total=self._steps, completed=done, loss=float("nan"), speed=0.0)
        bar.start()
        return bar

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            if self._bar is not None:
                self._bar.stop()
            for file in (self._metrics, self._evaluations, self._board):
                file.close()

    def step(self, figures: dict[str, Any]) -> None:
        """Log one optimizer step."""
        if not self.active:
            return
        self._write(self._metrics, "train", figures)
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=figures["step"],
                loss=figures["loss"],
                speed=figures["tokens_per_second"],
            )
        elif time.monotonic() - self._shown > SECONDS_BETWEEN_LINES or figures["step"] == self._steps:
            self._shown = time.monotonic()
            left = (self._steps - figures["step"]) * figures["step_seconds"]
            self.say(
                f"step {figures['step']}/{self._steps}  loss {figures['loss']:.4f}  "
                f"{figures['tokens_per_second']:,.0f} tokens/s  {left:.0f} s left"
            )

    def evaluation(self, figures: dict[str, Any]) -> None:
        """Log one evaluation on validation documents."""
        if self.active:
            self._write(self._evaluations, "validation", figures)
            states = f", {figures['state_cleared']:.4f} with the states put back" if "state_cleared" in figures else ""
            self.say(
                f"step {figures['step']}: validation {figures['carried']:.4f} nats per token, "
                f"{figures['cleared']:.4f} with the carry cleared at every segment{states}"
            )

    def say(self, line: str) -> None:
        """Show a line to the person who watches."""
        if self.active:
            if self._bar is not None:
                self._bar.console.print(line, highlight=False)
            else:
                print(line, file=sys.stderr, flush=True)

    def _write(self, file: Any, group: str, figures: dict[str, Any]) -> None:
        file.write(json.dumps(figures) + "\n")
        file.flush()
        for name, value in figures.items():
            if name != "step" and value is not None:
                self._board.add_scalar(f"{group}/{name}", value, figures["step"])
