"""Sizes and choices of a model: the one place that knows which of them fit together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """A Block-Recurrent Transformer (Hutchins et al. 2022); without recurrent layers, the sliding-window baseline.

    The defaults are the paper's Rec:fixed:skip at 151M + 9M parameters. H x K (num_heads x head_dim) need not equal
    dim, nor num_states the window.

    window             tokens of a block; a token attends to exactly this many earlier ones
    num_states         state vectors of a recurrent layer
    recurrent_layers   their indices, counted from 0
    gate, cell         of the recurrent layers, as in the paper's Rec:gate:cell (see `gates.py`, `state_update.py`)
    feedback           all other layers read the (last) recurrent layer's state, too; the stack runs block by block
    position           of the token self-attention: T5 relative bias, rotary, or none
    logit_scale        what logits are divided by: sqrt(dim) or sqrt(vocab_size)
    tie_embeddings     the head's rows are the embedding's (paper); false gives the head a matrix of its own
    dtype              of weights and activations in training (`brt train`), as torch names it; the state and its gates
                       are float32 in any case, and so is a model as it is constructed
    """

    vocab_size: int = 32128
    dim: int = 1024
    num_layers: int = 12
    num_heads: int = 8
    head_dim: int = 128
    mlp_dim: int = 4096
    window: int = 512
    num_states: int = 512
    recurrent_layers: tuple[int, ...] = (9,)
    gate: Literal["fixed", "lstm"] = "fixed"
    cell: Literal["skip", "dual", "single"] = "skip"
    position: Literal["t5", "rotary", "none"] = "t5"
    feedback: bool = False
    dropout: float = 0.0
    logit_scale: Literal["sqrt_dim", "sqrt_vocab"] = "sqrt_dim"
    tie_embeddings: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        if not isinstance(self.recurrent_layers, list | tuple) or any(
            type(i) is not int for i in self.recurrent_layers
        ):
            raise ValueError(f"model.recurrent_layers is {self.recurrent_layers!r}; it must be a list of layer indices")
        object.__setattr__(self, "recurrent_layers", tuple(self.recurrent_layers))
        for name in ("vocab_size", "dim", "num_layers", "num_heads", "head_dim", "mlp_dim", "window", "num_states"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1 and whole")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"model.{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout is {self.dropout}; it must be at least 0 and less than 1")
        if self.position == "rotary" and self.head_dim % 2:
            raise ValueError(f"model.head_dim is {self.head_dim}; rotary positions need an even number")
        self._check_recurrence()

    def _check_recurrence(self) -> None:
        for index in self.recurrent_layers:
            if not 0 <= index < self.num_layers:
                raise ValueError(
                    f"model.recurrent_layers holds {index}, but there are {self.num_layers} layers, "
                    f"counted from 0 to {self.num_layers - 1}"
                )
        if len(set(self.recurrent_layers)) < len(self.recurrent_layers):
            raise ValueError(f"model.recurrent_layers {list(self.recurrent_layers)} names a layer twice")
        if self.feedback and not self.recurrent_layers:
            raise ValueError(
                "model.feedback is true, but model.recurrent_layers is empty: no layer has a state to read"
            )

    @property
    def logit_divisor(self) -> float:
        """What the product of final hidden vector and embedding is divided by."""
        return (self.dim if self.logit_scale == "sqrt_dim" else self.vocab_size) ** 0.5

    def check_segment(self, segment: int) -> None:
        """ValueError unless segments of `segment` tokens are whole blocks, two at least where layers recur.

        With one block per segment the state update would get no gradient: truncated backpropagation ends at the
        segment's end, and a token reads the state as it was before its own block.
        """
        if segment < 1 or segment % self.window:
            raise ValueError(f"a segment of {segment} tokens is not a positive multiple of the window, {self.window}")
        if self.recurrent_layers and segment < 2 * self.window:
            raise ValueError(
                f"a segment of {segment} tokens has fewer than two blocks of {self.window}; "
                f"a recurrent layer learns only from {2 * self.window} on"
            )


_CHOICES = {
    "gate": ("fixed", "lstm"),
    "cell": ("skip", "dual", "single"),
    "position": ("t5", "rotary", "none"),
    "logit_scale": ("sqrt_dim", "sqrt_vocab"),
    "dtype": ("float32", "bfloat16", "float16"),
}
