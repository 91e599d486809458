"""The formulas of the reference, fixed gate and skip, written out: block by block, token by token, in float64.

Nothing of ours is used. Parameters have the reference's names and lie [in, out]. One lane at a time.

Dimension key
  N  tokens in a segment    W  window    S  states    d  width    H  heads    D  head width    M  keys that are seen
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]
EPSILON_OF_FLOAT32 = 2.0**-23


@dataclass
class LaneMemory:
    """What one lane carries of one layer."""

    keys: Tensor
    values: Tensor
    state: Tensor | None


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * gain


def unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def bucket(distance: int) -> int:
    if distance < 16:
        return distance
    return min(31, 16 + int(16 * math.log(distance / 16 + EPSILON_OF_FLOAT32) / math.log(8)))


def attend(query_HD: Tensor, keys_MHD: Tensor, values_MHD: Tensor, scale_H: Tensor, bias_HM: Tensor | float) -> Tensor:
    """One query; the extra slot of logit -1000 included."""
    scores_HM = (torch.einsum("hd,mhd->hm", query_HD, keys_MHD) + bias_HM) * scale_H.abs()[:, None]
    exponents_HM = torch.exp(scores_HM)
    weights_HM = exponents_HM / (math.exp(-1000.0) + exponents_HM.sum(-1, keepdim=True))
    return torch.einsum("hm,mhd->hd", weights_HM, values_MHD)


class LiteralModel:
    """`config` holds the reference's keys."""

    def __init__(self, config: Mapping[str, Any], parameters: Parameters):
        self.config, self.parameters = config, parameters
        self.heads = (config["num_heads"], config["head_size"])
        self.window = config["window_length"]

    def fresh(self) -> list[LaneMemory]:
        """Zeros; a start puts the initial state there."""
        empty = torch.zeros(self.window, *self.heads, dtype=torch.float64)
        state = torch.zeros(self.config["recurrent_num_states"], self.config["embedding_size"], dtype=torch.float64)
        recurrent = self.config["recurrent_layer_indices"]
        return [LaneMemory(empty, empty, state if i in recurrent else None) for i in range(self.config["num_layers"])]

    def segment(
        self, tokens: Sequence[int], memory: list[LaneMemory], starts: Sequence[bool]
    ) -> tuple[Tensor, list[LaneMemory]]:
        """logits_NV and what the lane carries on, as constants."""
        embedding = self.parameters["embed/embedding"]
        xs = [embedding[token] for token in tokens]
        left = []
        for index in range(self.config["num_layers"]):
            xs, layer_memory = self.layer(index, xs, memory[index], starts)
            left.append(layer_memory)
        gain = self.parameters["final_layernorm/scale"]
        logits = [rms(x, gain) @ embedding.T / math.sqrt(len(x)) for x in xs]
        return torch.stack(logits), left

    def layer(
        self, index: int, xs: list[Tensor], memory: LaneMemory, starts: Sequence[bool]
    ) -> tuple[list[Tensor], LaneMemory]:
        name = f"transformer{index}/"
        window = self.window
        normed = [rms(x, self.parameters[f"{name}tbase/_kvq/pre_attn_layernorm/scale"]) for x in xs]
        keys = [unit(self.project(h, f"{name}tbase/_kvq/keys_layer")) for h in normed]
        values = [self.project(h, f"{name}tbase/_kvq/values_layer") for h in normed]
        previous_keys, previous_values = list(memory.keys), list(memory.values)
        state = memory.state
        outs: list[Tensor] = []
        for block, start in enumerate(starts):
            if start:
                previous_keys = [torch.zeros(self.heads, dtype=torch.float64)] * window
                previous_values = previous_keys
                if state is not None:
                    state = self.parameters[f"{name}recurrent_initial_state"]
            here = range(block * window, (block + 1) * window)
            seen_keys = previous_keys + [keys[i] for i in here]
            seen_values = previous_values + [values[i] for i in here]
            for row, i in enumerate(here):
                outs.append(self.token(name, xs[i], normed[i], row, seen_keys, seen_values, state))
            if state is not None:
                state = self.next_state(name, state, torch.stack(seen_keys), torch.stack(seen_values))
            previous_keys, previous_values = seen_keys[window:], seen_values[window:]
        left = LaneMemory(torch.stack(previous_keys).detach(), torch.stack(previous_values).detach(), None)
        left.state = None if state is None else state.detach()
        return outs, left

    def token(
        self,
        name: str,
        x: Tensor,
        h: Tensor,
        row: int,
        seen_keys: list[Tensor],
        seen_values: list[Tensor],
        state: Tensor | None,
    ) -> Tensor:
        """The layer's output for token `row` of a block, whose keys are the second W of `seen_keys`."""
        own = self.window + row
        table = self.parameters[f"{name}relative_positions/rel_embedding"]
        seen = [j for j in range(2 * self.window) if 1 <= own - j <= self.window]
        heads = attend(
            unit(self.project(h, f"{name}tbase/_kvq/queries_layer")),
            torch.stack([seen_keys[j] for j in seen]),
            torch.stack([seen_values[j] for j in seen]),
            self.parameters[f"{name}tbase/_kvq/attention_scale"],
            torch.stack([table[:, bucket(own - j)] for j in seen], dim=1),
        ).flatten()
        if state is not None:
            state_keys, state_values, _, _ = self.state_views(name, state)
            query = unit(self.project(h, f"{name}tbase/_kvq/queries2_layer"))
            scale = self.parameters[f"{name}tbase/attention_scale2"]
            heads = torch.cat([heads, attend(query, state_keys, state_values, scale, 0.0).flatten()])
        x1 = x + heads @ self.parameters[f"{name}tbase/post_attn_mlp/output_layer/kernel"]
        hidden = rms(x1, self.parameters[f"{name}tbase/pre_ffn_layernorm/scale"])
        hidden = torch.relu(hidden @ self.parameters[f"{name}tbase/ffn/hidden0/kernel"])
        return x1 + hidden @ self.parameters[f"{name}tbase/ffn/output_layer/kernel"]

    def state_views(self, name: str, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, values, queries to states, queries to tokens; each [S, H, D]."""
        u = rms(state, self.parameters[f"{name}recurrent_tbase/_kvq/pre_attn_layernorm/scale"])
        u = u + self.parameters[f"{name}recurrent_tbase/_kvq/position_embeddings"]
        keys, values, to_states, to_tokens = (
            self.project(u, f"{name}recurrent_tbase/_kvq/{kind}_layer")
            for kind in ("keys", "values", "queries", "queries2")
        )
        return unit(keys), values, unit(to_states), unit(to_tokens)

    def next_state(self, name: str, state: Tensor, token_keys: Tensor, token_values: Tensor) -> Tensor:
        keys, values, to_states, to_tokens = self.state_views(name, state)
        scale = self.parameters[f"{name}recurrent_tbase/_kvq/attention_scale"]
        token_scale = self.parameters[f"{name}recurrent_tbase/attention_scale2"]
        keep = torch.sigmoid(self.parameters[f"{name}recurrent_tbase/post_attn_mlp/gate_bias"])
        rows = []
        for s in range(len(state)):
            r = torch.cat(
                [
                    attend(to_states[s], keys, values, scale, 0.0).flatten(),
                    attend(to_tokens[s], token_keys, token_values, token_scale, 0.0).flatten(),
                ]
            )
            z = r @ self.parameters[f"{name}recurrent_tbase/post_attn_mlp/output_layer/kernel"]
            rows.append(state[s] * keep + z * (1 - keep))
        return torch.stack(rows)

    def project(self, x: Tensor, name: str) -> Tensor:
        return (x @ self.parameters[f"{name}/kernel"]).unflatten(-1, self.heads)
