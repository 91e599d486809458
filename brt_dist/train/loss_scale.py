"""Dynamic loss scaling at ZeRO-0: float16 gradients are computed of a multiple of the loss, so that few become zero."""

from __future__ import annotations

from dataclasses import dataclass

from brt_dist.data.errors import BadInput

# DeepSpeed's choices for the other ZeRO stages.
LEAST, STEPS_TO_GROW = 1.0, 1000


class OutOfScale(BadInput):
    """Gradients that float16 cannot hold, whatever the loss is multiplied with."""

    def __init__(self) -> None:
        super().__init__(
            f"the run diverged: gradients of the loss itself, at a loss scale of {LEAST:.0f}, leave float16; earlier "
            "checkpoints stand, and model.dtype=bfloat16 has a wider range"
        )


@dataclass
class LossScale:
    """What the loss is multiplied with: halved where gradients leave float16, doubled after 1000 steps without that.

    good_steps   since the last change
    """

    scale: float
    good_steps: int = 0

    def update(self, overflow: bool) -> None:
        """Take note of a step. OutOfScale where nothing is left to halve."""
        if overflow and self.scale == LEAST:
            raise OutOfScale
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.scale /= 2
        elif self.good_steps == STEPS_TO_GROW:
            self.scale, self.good_steps = self.scale * 2, 0
