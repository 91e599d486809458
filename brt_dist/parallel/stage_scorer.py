"""Scores tokens with a model that may be spread over the stages of a pipeline.

Dimension key
  B  lanes    L  tokens in a segment    l  this tensor rank's share of them    C  blocks in a segment    D  model width
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from brt_dist.model.carry import Carry
from brt_dist.parallel.process_groups import Processes
from brt_dist.parallel.stage import Stage


class StageScorer:
    """A language model as evaluation asks for one (`inference.documents.LanguageModel`): all stages call it alike.

    Every stage keeps the carry of its own layers, as a value, so that the carry of training cannot notice. Nothing goes
    back, so a stage is free for the next segment as soon as it has sent one on.
    """

    training: bool

    def __init__(
        self,
        stage: Stage,
        processes: Processes,
        dtype: torch.dtype,
        sequence: bool,
        initial_states: Mapping[int, Tensor],
    ):
        """dtype: that of activations. sequence: tensor ranks hold a share of the tokens each between layers.

        initial_states: of the stage's recurrent layers by their numbers; at ZeRO-3 they are not in the stage itself.
        """
        self.config, self._stage, self._processes, self._dtype = stage.config, stage, processes, dtype
        self._shares = processes.tensor.size if sequence else 1
        self.training, self._initial_states = stage.training, initial_states

    def train(self, mode: bool = True) -> None:
        """Switches dropout on or off."""
        self.training = mode
        self._stage.train(mode)

    def forget_state(self, carry: Carry) -> Carry:
        """`carry` with its states as at the start of a document, its caches as they are."""
        layers = dict(zip(self._stage.numbers, carry.layers, strict=True))
        for number, initial_SD in self._initial_states.items():
            state_BSD = layers[number].states()
            layers[number] = replace(layers[number], state_BSD=initial_SD.to(state_BSD.dtype).expand_as(state_BSD))
        return Carry(tuple(layers.values())).detach()

    @torch.no_grad()
    def token_losses(
        self, tokens: Tensor, targets: Tensor, carry: Carry | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, Carry]:
        """nats_BL on the last stage, zeros on others; and the carry of this stage's layers."""
        lanes, length = tokens.shape
        if starts is None:
            starts = torch.zeros(lanes, length // self.config.window, dtype=torch.bool, device=tokens.device)
        if carry is None:
            carry = self._stage.fresh_carry(lanes, tokens.device, self._dtype)
            starts = starts.clone()
            starts[:, 0] = True
        out, carry = self._stage(self._inputs(tokens), carry, starts, targets)
        if self._processes.is_last_stage:
            return out[1], carry.detach()
        pipeline = self._processes.pipeline
        dist.send(out.contiguous(), pipeline.ranks[pipeline.position + 1])
        return torch.zeros(lanes, length, device=tokens.device), carry.detach()

    def _inputs(self, tokens_BL: Tensor) -> Tensor:
        """Tokens on the first stage; on others what the one before sends, x_BlD."""
        if self._processes.is_first_stage:
            return tokens_BL
        lanes, length = tokens_BL.shape
        x_BlD = torch.empty(lanes, length // self._shares, self.config.dim, dtype=self._dtype, device=tokens_BL.device)
        pipeline = self._processes.pipeline
        dist.recv(x_BlD, pipeline.ranks[pipeline.position - 1])
        return x_BlD
