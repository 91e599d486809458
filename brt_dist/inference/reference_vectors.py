"""Parameters by the reference implementation's names, and how they lie in ours.

The reference keeps every projection in a matrix of its own, stored [in, out]; ours stand [out, in], those with the same
input in one, row under row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from brt_dist.data.errors import BadInput
from brt_dist.model.config import ModelConfig
from brt_dist.model.transformer import BlockRecurrentTransformer

HEAD = {"embedding.weight": ["embed/embedding"], "final_norm.weight": ["final_layernorm/scale"]}
TOKENS = {
    "attention_norm.weight": ["tbase/_kvq/pre_attn_layernorm/scale"],
    "projection.weight": [
        "tbase/_kvq/queries_layer/kernel",
        "tbase/_kvq/keys_layer/kernel",
        "tbase/_kvq/values_layer/kernel",
    ],
    "scale_H": ["tbase/_kvq/attention_scale"],
    "bias.table": ["relative_positions/rel_embedding"],
    "attention_output.weight": ["tbase/post_attn_mlp/output_layer/kernel"],
    "mlp_norm.weight": ["tbase/pre_ffn_layernorm/scale"],
    "mlp.input.weight": ["tbase/ffn/hidden0/kernel"],
    "mlp.output.weight": ["tbase/ffn/output_layer/kernel"],
}
READING_TOKENS = {
    **TOKENS,
    "projection.weight": [*TOKENS["projection.weight"], "tbase/_kvq/queries2_layer/kernel"],
    "state_scale_H": ["tbase/attention_scale2"],
}
# Our sizes that are also those of parameters, and the reference's names of them.
SIZES = {
    "vocab_size": "vocab_size",
    "dim": "embedding_size",
    "num_heads": "num_heads",
    "head_dim": "head_size",
    "mlp_dim": "mlp_dim",
    "num_states": "recurrent_num_states",
}
CELL = {
    "norm.weight": ["_kvq/pre_attn_layernorm/scale"],
    "ids_SD": ["_kvq/position_embeddings"],
    "projection.weight": [f"_kvq/{part}_layer/kernel" for part in ("queries", "queries2", "keys", "values")],
    "scale_H": ["_kvq/attention_scale"],
    "token_scale_H": ["attention_scale2"],
}


def gate_names(config: ModelConfig, ours: str, theirs: str) -> dict[str, list[str]]:
    """A gate's parameters; the reference keeps them, with the candidate's projection, in the block named `theirs`."""
    candidate = f"{theirs}/output_layer/kernel"
    if config.gate == "fixed":
        return {f"{ours}.candidate.weight": [candidate], f"{ours}.bias_D": [f"{theirs}/gate_bias"]}
    gates = [f"{theirs}/{gate}_gate/kernel" for gate in ("input", "forget")]
    return {
        f"{ours}.candidate_and_gates.weight": [candidate, *gates],
        f"{ours}.input_bias_D": [f"{theirs}/input_gate/bias"],
        f"{ours}.forget_bias_D": [f"{theirs}/forget_gate/bias"],
    }


def update_names(config: ModelConfig) -> dict[str, list[str]]:
    """The parameters of a cell's update: skip has the attention's block alone, single the MLP's alone, dual both."""
    if config.cell == "skip":
        return gate_names(config, "gate", "post_attn_mlp")
    mlp_input = {"mlp_input.weight": ["ffn/hidden0/kernel"]}
    if config.cell == "single":
        return {**mlp_input, **gate_names(config, "gate", "ffn")}
    return {
        **gate_names(config, "gate", "post_attn_mlp"),
        "mlp_norm.weight": ["pre_ffn_layernorm/scale"],
        **mlp_input,
        **gate_names(config, "mlp_gate", "ffn"),
    }


def read_vectors(path: Path) -> Mapping[str, np.ndarray]:
    """The arrays of a vectors file; BadInput where it is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            vectors = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise BadInput(f"there is no file {path}") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or 'it is damaged'}") from error
    except Exception as error:  # numpy and zipfile raise a dozen kinds for a broken file
        raise BadInput(f"{path} is not a vectors file, an .npz archive of numbers, or it is damaged") from error
    if "config_json" not in vectors:
        raise BadInput(f"{path} is not a vectors file of a model: it has no config_json")
    return vectors


def load_model(vectors: Mapping[str, np.ndarray]) -> BlockRecurrentTransformer:
    """Our model with the file's sizes and parameters. KeyError names what the file lacks, ValueError what is wrong."""
    return model_with_parameters(model_config(read_config(vectors)), vectors)


def model_with_parameters(config: ModelConfig, vectors: Mapping[str, np.ndarray]) -> BlockRecurrentTransformer:
    """A model of `config` with the file's parameters; nothing is allocated before all of them fit. Errors as above."""
    _check_sizes(config, vectors)
    with torch.device("meta"):
        model = BlockRecurrentTransformer(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    parameters = {}
    for ours, theirs in reference_names(config).items():
        expected = (shapes[ours][0] // len(theirs), *shapes[ours][1:])
        parameters[ours] = torch.cat([_read_parameter(vectors, name, expected) for name in theirs])
    model.to_empty(device="cpu").load_state_dict(parameters)
    return model


def _check_sizes(config: ModelConfig, vectors: Mapping[str, np.ndarray]) -> None:
    """ValueError where a size is beyond every parameter in the file: even shapes of such sizes can be too much."""
    shapes = [array.shape for key, array in vectors.items() if key.startswith("param/") and array.size]
    if config.num_layers > len(shapes):
        raise ValueError(f"num_layers in config_json is {config.num_layers}, but the file has {len(shapes)} parameters")
    largest = max((size for shape in shapes for size in shape), default=0)
    sizes = {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    sizes["num_heads x head_size"] = config.num_heads * config.head_dim
    for name, size in sizes.items():
        if size > largest:
            raise ValueError(
                f"{name} in config_json is {size}, but no parameter in the file has more than {largest} rows or columns"
            )


def _read_parameter(vectors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> Tensor:
    """One of the reference's parameters as it stands in ours, where it must have `shape`."""
    parameter = read_numbers(vectors, f"param/{name}")
    turned = _turn(name, torch.empty(shape, device="meta"))
    if parameter.shape != turned.shape:
        raise ValueError(
            f"param/{name} has the shape {tuple(parameter.shape)}, "
            f"but in the model of config_json it has {tuple(turned.shape)}"
        )
    return _turn(name, parameter)


def read_numbers(vectors: Mapping[str, np.ndarray], key: str) -> Tensor:
    """An array of floating-point numbers of any width and byte order, as float64. Errors as above."""
    array = vectors[key]
    if array.dtype.kind != "f":
        raise ValueError(f"{key} holds {array.dtype}; expected floating-point numbers")
    return torch.from_numpy(array.astype(np.float64))


def read_config(vectors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The reference's configuration, as it stands in the file. ValueError where it is none."""
    try:
        config = json.loads(str(vectors["config_json"]))
    except json.JSONDecodeError as error:
        raise ValueError(f"config_json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError("config_json holds no JSON object")
    return config


def model_config(reference: Mapping[str, Any]) -> ModelConfig:
    """Our configuration for the reference's; ValueError where a key is missing or its value isn't one of ours.

    What belongs to recurrence is read only where there is a recurrent layer. Other keys are of no concern.
    """
    indices = _entry(reference, "recurrent_layer_indices", list)
    if not all(type(index) is int for index in indices):
        raise ValueError(f"recurrent_layer_indices in config_json is {indices}; it must hold whole numbers")
    sizes = {ours: theirs for ours, theirs in SIZES.items() if indices or ours != "num_states"}
    return ModelConfig(
        **{"num_states": 1} | {ours: _entry(reference, theirs, int) for ours, theirs in sizes.items()},
        num_layers=_entry(reference, "num_layers", int),
        window=_entry(reference, "window_length", int),
        position="t5",
        recurrent_layers=tuple(indices),
        gate=_gate(reference) if indices else "fixed",
        cell=_cell(reference) if indices else "skip",
        feedback=_has_feedback(reference) if indices else False,
    )


def _gate(reference: Mapping[str, Any]) -> Literal["fixed", "lstm"]:
    kind = _entry(reference, "recurrent_gate_type", str)
    if kind == "bias":
        return "fixed"
    if kind == "lstm":
        return "lstm"
    raise ValueError(f"recurrent_gate_type in config_json is {kind!r}; it must be 'bias' (the fixed gate) or 'lstm'")


def _cell(reference: Mapping[str, Any]) -> Literal["skip", "dual", "single"]:
    single = _entry(reference, "recurrent_single_gate", bool)
    skip = _entry(reference, "recurrent_skip_ffn", bool)
    if single and skip:
        raise ValueError("recurrent_single_gate and recurrent_skip_ffn in config_json are both true; no cell is both")
    if single:
        return "single"
    return "skip" if skip else "dual"


def _has_feedback(reference: Mapping[str, Any]) -> bool:
    """The reference feeds back only where its whole stack runs block by block: `dstack_window_length` above 0."""
    if not _entry(reference, "feedback_recurrence", bool):
        return False
    block, window = _entry(reference, "dstack_window_length", int), _entry(reference, "window_length", int)
    if block not in (0, window):
        raise ValueError(
            f"dstack_window_length in config_json is {block} and window_length {window}; "
            "with feedback_recurrence they must be equal"
        )
    return block > 0


def _entry(reference: Mapping[str, Any], key: str, kind: type) -> Any:
    if key not in reference:
        raise ValueError(f"config_json lacks {key}")
    if type(reference[key]) is not kind:  # isinstance would take true for a whole number
        raise ValueError(f"{key} in config_json is {reference[key]!r}; it must be {_KINDS[kind]}")
    return reference[key]


_KINDS = {int: "a whole number", bool: "true or false", str: "a string", list: "a list"}


def reference_names(config: ModelConfig) -> dict[str, list[str]]:
    """For each of our parameters the reference's whose rows it holds, one under the other."""
    names = dict(HEAD)
    for index in range(config.num_layers):
        recurrent = index in config.recurrent_layers
        tokens = f"layers.{index}.tokens" if recurrent else f"layers.{index}"
        for ours, theirs in (READING_TOKENS if recurrent or config.feedback else TOKENS).items():
            if ours == "bias.table" and config.position != "t5":
                continue
            names[f"{tokens}.{ours}"] = [f"transformer{index}/{name}" for name in theirs]
        if recurrent:
            names[f"layers.{index}.initial_state_SD"] = [f"transformer{index}/recurrent_initial_state"]
            cell = CELL | {f"update.{ours}": theirs for ours, theirs in update_names(config).items()}
            for ours, theirs in cell.items():
                names[f"layers.{index}.cell.{ours}"] = [f"transformer{index}/recurrent_tbase/{name}" for name in theirs]
    return names


def gradients_of(model: BlockRecurrentTransformer) -> dict[str, Tensor]:
    """Every parameter's gradient under the reference's name and in its shape."""
    parameters = dict(model.named_parameters())
    gradients = {}
    for ours, theirs in reference_names(model.config).items():
        gradient = parameters[ours].grad
        gradient = torch.zeros_like(parameters[ours]) if gradient is None else gradient
        for name, part in zip(theirs, gradient.chunk(len(theirs)), strict=True):
            gradients[name] = _turn(name, part)
    return gradients


def _turn(name: str, tensor: Tensor) -> Tensor:
    """Matrices stand [in, out] in the reference and [out, in] in ours; everything else is the same."""
    return tensor.T if name.endswith("/kernel") else tensor
