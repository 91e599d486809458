"""The reference's parameters: names and shapes as its description lists them, and random values.

Dimension key
  V  vocabulary    d  width    HD  heads x head width    m  MLP width    S  states
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Shape = tuple[int, ...]


def parameter_shapes(config: Mapping[str, Any], position: str = "t5") -> dict[str, Shape]:
    """`config` holds the reference's keys; a table of relative positions is there for `t5` only."""
    shapes: dict[str, Shape] = {
        "embed/embedding": (config["vocab_size"], config["embedding_size"]),
        "final_layernorm/scale": (config["embedding_size"],),
    }
    for index in range(config["num_layers"]):
        recurrent = index in config["recurrent_layer_indices"]
        reads_states = recurrent or (config["feedback_recurrence"] and config["dstack_window_length"] > 0)
        shapes |= {f"transformer{index}/{name}": shape for name, shape in token_shapes(config, reads_states).items()}
        if recurrent:
            shapes |= {f"transformer{index}/{name}": shape for name, shape in state_shapes(config).items()}
    return {name: shape for name, shape in shapes.items() if position == "t5" or "relative_positions" not in name}


def token_shapes(config: Mapping[str, Any], reads_states: bool) -> dict[str, Shape]:
    d, m, H = config["embedding_size"], config["mlp_dim"], config["num_heads"]
    HD = H * config["head_size"]
    shapes: dict[str, Shape] = {
        "tbase/_kvq/pre_attn_layernorm/scale": (d,),
        "tbase/_kvq/keys_layer/kernel": (d, HD),
        "tbase/_kvq/values_layer/kernel": (d, HD),
        "tbase/_kvq/queries_layer/kernel": (d, HD),
        "tbase/_kvq/attention_scale": (H,),
        "relative_positions/rel_embedding": (H, 32),
        "tbase/post_attn_mlp/output_layer/kernel": (2 * HD if reads_states else HD, d),
        "tbase/pre_ffn_layernorm/scale": (d,),
        "tbase/ffn/hidden0/kernel": (d, m),
        "tbase/ffn/output_layer/kernel": (m, d),
    }
    if reads_states:
        shapes |= {"tbase/_kvq/queries2_layer/kernel": (d, HD), "tbase/attention_scale2": (H,)}
    return shapes


def state_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    d, m, H, S = (config[name] for name in ("embedding_size", "mlp_dim", "num_heads", "recurrent_num_states"))
    HD = H * config["head_size"]
    single, skip = config["recurrent_single_gate"], config["recurrent_skip_ffn"]
    cell: dict[str, Shape] = {
        f"_kvq/{kind}_layer/kernel": (d, HD) for kind in ("keys", "values", "queries", "queries2")
    }
    cell |= {
        "_kvq/position_embeddings": (S, d),
        "_kvq/pre_attn_layernorm/scale": (d,),
        "_kvq/attention_scale": (H,),
        "attention_scale2": (H,),
    }
    if not single:
        cell["post_attn_mlp/output_layer/kernel"] = (2 * HD, d)
        cell |= gate_shapes(config, "post_attn_mlp", 2 * HD)
    if not skip:
        cell["ffn/hidden0/kernel"] = (2 * HD if single else d, m)
        cell["ffn/output_layer/kernel"] = (m, d)
        cell |= gate_shapes(config, "ffn", m)
    if not single and not skip:
        cell["pre_ffn_layernorm/scale"] = (d,)
    return {"recurrent_initial_state": (S, d)} | {f"recurrent_tbase/{name}": shape for name, shape in cell.items()}


def gate_shapes(config: Mapping[str, Any], name: str, width: int) -> dict[str, Shape]:
    """A gate that sees `width` numbers."""
    d = config["embedding_size"]
    if config["recurrent_gate_type"] == "bias":
        return {f"{name}/gate_bias": (d,)}
    kernels: dict[str, Shape] = {f"{name}/{kind}_gate/kernel": (width, d) for kind in ("input", "forget")}
    return kernels | {f"{name}/{kind}_gate/bias": (d,) for kind in ("input", "forget")}


def draw_parameters(config: Mapping[str, Any], position: str = "t5") -> dict[str, np.ndarray]:
    """A random float32 value for every parameter, each of a size at which it matters."""
    generator = np.random.default_rng(0)
    parameters = {}
    for name, shape in parameter_shapes(config, position).items():
        values = generator.standard_normal(shape)
        if name.endswith("kernel"):
            values /= np.sqrt(shape[0])
        elif name.endswith("layernorm/scale"):
            values = 1 + values / 4
        elif name.endswith(("attention_scale", "attention_scale2")):
            values *= 2  # of both signs: the reference takes the absolute value
        parameters[name] = values.astype(np.float32)
    return parameters
