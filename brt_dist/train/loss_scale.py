"""Dynamic loss scaling at ZeRO-0: float16 gradients are computed of a multiple of the loss, so that few become zero."""

from __future__ import annotations

from dataclasses import dataclass

# DeepSpeed's choices for the other ZeRO stages.
LEAST, STEPS_TO_GROW = 1.0, 1000


@dataclass
class LossScale:
    """What the loss is multiplied with: halved where gradients leave float16, doubled after 1000 steps without that.

    good_steps   since the last change
    """

    scale: float
    good_steps: int = 0

    def update(self, overflow: bool) -> None:
        """Take note of a step."""
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.scale = max(LEAST, self.scale / 2)
        elif self.good_steps == STEPS_TO_GROW:
            self.scale, self.good_steps = self.scale * 2, 0
