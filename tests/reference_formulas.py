"""The formulas of the reference written out: block by block, token by token, in float64.

Nothing of ours is used. Parameters have the reference's names and lie [in, out]. One lane at a time. Rotary positions
(Su et al. 2021), none at all, and logits divided by the root of the vocabulary's size are what we have beyond it.

Dimension key
  N  tokens in a segment    W  window     S  states        d  width    H  heads    D  head width    m  MLP width
  M  keys that are seen     L  layers     C  blocks in a segment       V  vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]
StateViews = tuple[Tensor, Tensor, Tensor, Tensor]
EPSILON_OF_FLOAT32 = 2.0**-23


@dataclass
class LaneMemory:
    """What one lane carries of one layer."""

    keys: Tensor
    values: Tensor
    state: Tensor | None

    def detach(self) -> LaneMemory:
        return LaneMemory(self.keys.detach(), self.values.detach(), None if self.state is None else self.state.detach())


@dataclass
class SegmentOutcome:
    """What one lane's segment gives; `memory` is what it carries on, as constants."""

    logits_NV: Tensor
    layer_outs_LNd: Tensor
    states_CSd: dict[int, Tensor]
    memory: list[LaneMemory]


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * gain


def unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def bucket(distance: int) -> int:
    if distance < 16:
        return distance
    return min(31, 16 + int(16 * math.log(distance / 16 + EPSILON_OF_FLOAT32) / math.log(8)))


def rotate(x_HD: Tensor, position: int) -> Tensor:
    """Coordinates k and k + D/2 are a point in a plane, which turns by position / 10000^(2k/D)."""
    half = x_HD.shape[-1] // 2
    turned = x_HD.clone()
    for k in range(half):
        angle = position / 10000 ** (k / half)
        turned[:, k] = x_HD[:, k] * math.cos(angle) - x_HD[:, k + half] * math.sin(angle)
        turned[:, k + half] = x_HD[:, k] * math.sin(angle) + x_HD[:, k + half] * math.cos(angle)
    return turned


def attend(query_HD: Tensor, keys_MHD: Tensor, values_MHD: Tensor, scale_H: Tensor, bias_HM: Tensor | float) -> Tensor:
    """One query, its heads' results one after the other; the extra slot of logit -1000 included."""
    scores_HM = (torch.einsum("hd,mhd->hm", query_HD, keys_MHD) + bias_HM) * scale_H.abs()[:, None]
    exponents_HM = torch.exp(scores_HM)
    weights_HM = exponents_HM / (math.exp(-1000.0) + exponents_HM.sum(-1, keepdim=True))
    return torch.einsum("hm,mhd->hd", weights_HM, values_MHD).flatten()


class LiteralModel:
    """`config` holds the reference's keys; the reference itself is `t5` and `sqrt_dim`."""

    def __init__(
        self,
        config: Mapping[str, Any],
        parameters: Parameters,
        position: Literal["t5", "rotary", "none"] = "t5",
        logit_scale: Literal["sqrt_dim", "sqrt_vocab"] = "sqrt_dim",
    ):
        self.config, self.parameters, self.position = config, parameters, position
        self.logit_divisor = math.sqrt(config["embedding_size" if logit_scale == "sqrt_dim" else "vocab_size"])
        self.heads = (config["num_heads"], config["head_size"])
        self.window = config["window_length"]
        self.recurrent = sorted(config["recurrent_layer_indices"])
        self.feedback = config["feedback_recurrence"] and config["dstack_window_length"] > 0

    def zeros(self) -> list[LaneMemory]:
        """The carry into the first segment, which a start turns into that of a new document."""
        empty = torch.zeros(self.window, *self.heads, dtype=torch.float64)
        state = torch.zeros(self.config["recurrent_num_states"], self.config["embedding_size"], dtype=torch.float64)
        layers = range(self.config["num_layers"])
        return [LaneMemory(empty, empty, state if index in self.recurrent else None) for index in layers]

    def new_document(self) -> list[LaneMemory]:
        memory = self.zeros()
        for index in self.recurrent:
            memory[index].state = self.parameters[f"transformer{index}/recurrent_initial_state"]
        return memory

    def segment(self, tokens: Sequence[int], memory: list[LaneMemory], starts: Sequence[bool]) -> SegmentOutcome:
        """The whole stack, one block after the other; starts[c]: a document begins with block c."""
        embedding, gain = self.parameters["embed/embedding"], self.parameters["final_layernorm/scale"]
        outs: list[list[Tensor]] = [[] for _ in range(self.config["num_layers"])]
        states: dict[int, list[Tensor]] = {index: [] for index in self.recurrent}
        for block, start in enumerate(starts):
            memory = self.new_document() if start else list(memory)
            views = {index: self.state_views(index, memory[index].state) for index in self.recurrent}
            seen = dict(views)
            if self.feedback:
                for index in set(range(self.config["num_layers"])) - set(self.recurrent):
                    seen[index] = views[self.recurrent[-1]]
            xs = [embedding[token] for token in tokens[block * self.window : (block + 1) * self.window]]
            for index in range(self.config["num_layers"]):
                xs, memory[index] = self.layer(index, xs, memory[index], seen.get(index))
                outs[index].extend(xs)
            for index in self.recurrent:
                states[index].append(memory[index].state)
        return SegmentOutcome(
            torch.stack([rms(x, gain) @ embedding.T / self.logit_divisor for x in outs[-1]]),
            torch.stack([torch.stack(xs) for xs in outs]),
            {index: torch.stack(blocks) for index, blocks in states.items()},
            [layer.detach() for layer in memory],
        )

    def layer(
        self, index: int, xs: list[Tensor], memory: LaneMemory, seen_states: StateViews | None
    ) -> tuple[list[Tensor], LaneMemory]:
        """One block through one layer: its outputs, and the layer's memory after the block."""
        kvq = f"transformer{index}/tbase/_kvq"
        normed = [rms(x, self.parameters[f"{kvq}/pre_attn_layernorm/scale"]) for x in xs]
        keys = torch.stack([unit(self.project(h, f"{kvq}/keys_layer")) for h in normed])
        values = torch.stack([self.project(h, f"{kvq}/values_layer") for h in normed])
        all_keys, all_values = torch.cat([memory.keys, keys]), torch.cat([memory.values, values])
        rows = range(self.window)
        outs = [self.token(index, xs[row], normed[row], row, all_keys, all_values, seen_states) for row in rows]
        state = memory.state
        if state is not None:
            assert seen_states is not None
            state = self.next_state(index, state, seen_states, all_keys, all_values)
        return outs, LaneMemory(keys, values, state)

    def token(
        self,
        index: int,
        x: Tensor,
        h: Tensor,
        row: int,
        keys: Tensor,
        values: Tensor,
        seen_states: StateViews | None,
    ) -> Tensor:
        """The layer's output for token `row` of a block, whose keys are the second W of `keys`."""
        name = f"transformer{index}/"
        own = self.window + row
        seen = [key for key in range(2 * self.window) if 1 <= own - key <= self.window]
        query, seen_keys = unit(self.project(h, f"{name}tbase/_kvq/queries_layer")), keys[seen]
        bias: Tensor | float = 0.0
        if self.position == "rotary":
            query, seen_keys = rotate(query, own), torch.stack([rotate(keys[key], key) for key in seen])
        if self.position == "t5":
            table = self.parameters[f"{name}relative_positions/rel_embedding"]
            bias = table[:, [bucket(own - key) for key in seen]]
        heads = attend(query, seen_keys, values[seen], self.parameters[f"{name}tbase/_kvq/attention_scale"], bias)
        if seen_states is not None:
            state_keys, state_values, _, _ = seen_states
            query = unit(self.project(h, f"{name}tbase/_kvq/queries2_layer"))
            scale = self.parameters[f"{name}tbase/attention_scale2"]
            heads = torch.cat([heads, attend(query, state_keys, state_values, scale, 0.0)])
        x1 = x + heads @ self.parameters[f"{name}tbase/post_attn_mlp/output_layer/kernel"]
        hidden = rms(x1, self.parameters[f"{name}tbase/pre_ffn_layernorm/scale"])
        hidden = torch.relu(hidden @ self.parameters[f"{name}tbase/ffn/hidden0/kernel"])
        return x1 + hidden @ self.parameters[f"{name}tbase/ffn/output_layer/kernel"]

    def state_views(self, index: int, state: Tensor | None) -> StateViews:
        """Keys, values, queries to states, queries to tokens; each [S, H, D]."""
        assert state is not None
        kvq = f"transformer{index}/recurrent_tbase/_kvq"
        u = rms(state, self.parameters[f"{kvq}/pre_attn_layernorm/scale"])
        u = u + self.parameters[f"{kvq}/position_embeddings"]
        keys, values, to_states, to_tokens = (
            self.project(u, f"{kvq}/{kind}_layer") for kind in ("keys", "values", "queries", "queries2")
        )
        return unit(keys), values, unit(to_states), unit(to_tokens)

    def next_state(
        self, index: int, state: Tensor, views: StateViews, token_keys: Tensor, token_values: Tensor
    ) -> Tensor:
        name = f"transformer{index}/recurrent_tbase"
        keys, values, to_states, to_tokens = views
        scale = self.parameters[f"{name}/_kvq/attention_scale"]
        token_scale = self.parameters[f"{name}/attention_scale2"]
        rows = []
        for s, vector in enumerate(state):
            of_states = attend(to_states[s], keys, values, scale, 0.0)
            of_tokens = attend(to_tokens[s], token_keys, token_values, token_scale, 0.0)
            rows.append(self.next_vector(name, vector, torch.cat([of_states, of_tokens])))
        return torch.stack(rows)

    def next_vector(self, name: str, s: Tensor, r: Tensor) -> Tensor:
        """One state vector after it has read r: the cells single, skip and dual."""
        if self.config["recurrent_single_gate"]:
            n = torch.relu(r @ self.parameters[f"{name}/ffn/hidden0/kernel"])
            return self.gate(f"{name}/ffn", s, n, torch.tanh(n @ self.parameters[f"{name}/ffn/output_layer/kernel"]))
        z = r @ self.parameters[f"{name}/post_attn_mlp/output_layer/kernel"]
        c = self.gate(f"{name}/post_attn_mlp", s, r, z)
        if self.config["recurrent_skip_ffn"]:
            return c
        n = rms(c, self.parameters[f"{name}/pre_ffn_layernorm/scale"])
        n = torch.relu(n @ self.parameters[f"{name}/ffn/hidden0/kernel"])
        return self.gate(f"{name}/ffn", c, n, n @ self.parameters[f"{name}/ffn/output_layer/kernel"])

    def gate(self, name: str, c: Tensor, h: Tensor, z: Tensor) -> Tensor:
        if self.config["recurrent_gate_type"] == "bias":
            g = torch.sigmoid(self.parameters[f"{name}/gate_bias"])
            return c * g + z * (1 - g)
        forget, let_in = (
            h @ self.parameters[f"{name}/{kind}_gate/kernel"] + self.parameters[f"{name}/{kind}_gate/bias"]
            for kind in ("forget", "input")
        )
        return c * torch.sigmoid(forget + 1) + z * torch.sigmoid(let_in - 1)

    def project(self, x: Tensor, name: str) -> Tensor:
        return (x @ self.parameters[f"{name}/kernel"]).unflatten(-1, self.heads)
