"""The layouts of the parity matrix: every way to lay a run over processes, and a selection that covers every pair."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import combinations, product
from typing import Any

MODEL = ("model.num_layers=4", "model.recurrent_layers=[1, 2]", "train.steps=20", "train.save_every=0")
MICRO_BATCHES = 2
# A ReLU within rounding of zero opens in one order of a sum and not in another; then one hidden unit has another
# gradient at one token, and the runs differ by more than rounding. Where the whole matrix met one, the seed is another.
SEEDS = {("segments", "lstm:single"): 7, ("lanes", "lstm:dual"): 5}
AXES: dict[str, tuple[Any, ...]] = {
    "tensor": (1, 2),
    "pipeline": (1, 2),
    "data": (1, 2),
    "axis": ("lanes", "segments"),
    "zero_stage": (0, 1, 2, 3),
    "recompute": ("none", "full"),
    "sequence": (False, True),
    "cell": ("fixed:skip", "lstm:dual", "lstm:single"),
}


@dataclass(frozen=True)
class Layout:
    """One place of the matrix."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    axis: str = "lanes"
    zero_stage: int = 1
    recompute: str = "none"
    sequence: bool = False
    cell: str = "fixed:skip"

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def allowed(self) -> bool:
        """Whether such a run is not refused, and not the same as another one."""
        if self.pipeline > 1 and self.zero_stage != 1:
            return False
        if self.tensor > 1 and self.zero_stage == 3:
            return False
        return self.tensor > 1 or not self.sequence

    @property
    def name(self) -> str:
        sequence = " sequence" if self.sequence else ""
        sizes = f"tensor {self.tensor}{sequence} pipeline {self.pipeline} data {self.data}"
        return f"{sizes} {self.axis} zero {self.zero_stage} recompute {self.recompute} {self.cell}"

    @property
    def reference(self) -> str:
        """The name of the run of one process that this one must equal."""
        return f"one process {self.axis} {self.cell}"

    @property
    def overrides(self) -> tuple[str, ...]:
        keys = ("tensor", "pipeline", "zero_stage", "recompute", "sequence")
        layout = (f"parallel.{key}={str(getattr(self, key)).lower()}" for key in keys)
        return (*self.sequential, *layout)

    @property
    def sequential(self) -> tuple[str, ...]:
        """What stays where one process does all the work: the model, and how much of its lanes a step reads."""
        gate, cell = self.cell.split(":")
        reading = (f"parallel.micro_batches={MICRO_BATCHES}", f"parallel.micro_batch_axis={self.axis}")
        seed = () if (self.axis, self.cell) not in SEEDS else (f"train.seed={SEEDS[self.axis, self.cell]}",)
        return (*MODEL, f"model.gate={gate}", f"model.cell={cell}", *reading, *seed)


def every_layout() -> list[Layout]:
    """The full product, without what is refused."""
    layouts = (Layout(**dict(zip(AXES, values, strict=True))) for values in product(*AXES.values()))
    return [layout for layout in layouts if layout.allowed]


def pairs(layout: Layout) -> set[tuple[Any, ...]]:
    """All pairs of values of two axes that a layout has."""
    return set(combinations(sorted(asdict(layout).items()), 2))


def covering(layouts: Iterable[Layout]) -> list[Layout]:
    """Some of the layouts that have every pair that any of them has; those with few processes are taken first."""
    left = list(layouts)
    missing = set().union(*(pairs(layout) for layout in left))
    chosen = []
    while missing:
        best = max(left, key=lambda layout: len(pairs(layout) & missing) / (1 + layout.world))
        chosen.append(best)
        missing -= pairs(best)
    return chosen
