"""Sizes that cannot work are refused with their numbers; those that can are taken as they are."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from small_models import FAMILY, variant_name

from brt_dist.model.config import ModelConfig

SIZES = ["vocab_size", "dim", "num_layers", "num_heads", "head_dim", "mlp_dim", "window", "num_states"]
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({size: value}, rf"model\.{size} is {value};") for size in SIZES for value in (0, -3)),
    ({"gate": "gru"}, r"model\.gate is 'gru'; it must be one of fixed, lstm"),
    ({"cell": "triple"}, r"model\.cell is 'triple'; .* skip, dual, single"),
    ({"position": "absolute"}, r"model\.position is 'absolute'; .* t5, rotary, none"),
    ({"logit_scale": "none"}, r"model\.logit_scale is 'none'; .* sqrt_dim, sqrt_vocab"),
    ({"dtype": "int8"}, r"model\.dtype is 'int8'; .* float32, bfloat16, float16"),
    ({"dropout": 1.0}, r"model\.dropout is 1\.0"),
    ({"dropout": -0.1}, r"model\.dropout is -0\.1"),
    ({"position": "rotary", "head_dim": 33}, r"model\.head_dim is 33; .* even"),
    ({"recurrent_layers": (12,)}, r"holds 12, but there are 12 layers, counted from 0 to 11"),
    ({"recurrent_layers": (-1,)}, r"holds -1, but there are 12 layers"),
    ({"recurrent_layers": (3, 5, 3)}, r"\[3, 5, 3\] names a layer twice"),
    ({"feedback": True, "recurrent_layers": ()}, r"model\.feedback is true, but model\.recurrent_layers is empty"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value))
def test_what_cannot_work_is_refused_by_name_and_number(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        ModelConfig(**changes)
    assert "\n" not in str(refusal.value)


def test_the_default_is_the_papers_model() -> None:
    config = ModelConfig()
    assert (config.dim, config.num_heads, config.head_dim, config.mlp_dim) == (1024, 8, 128, 4096)
    assert (config.num_layers, config.recurrent_layers, config.window, config.num_states) == (12, (9,), 512, 512)
    assert (config.gate, config.cell, config.position, config.feedback) == ("fixed", "skip", "t5", False)


def test_without_recurrent_layers_the_cell_is_of_no_matter() -> None:
    config = ModelConfig(recurrent_layers=(), gate="lstm", cell="dual")
    assert config.recurrent_layers == ()


@pytest.mark.parametrize("variant", FAMILY, ids=variant_name)
def test_every_member_of_the_family_is_taken_and_learns_from_two_blocks_on(variant: dict[str, Any]) -> None:
    config = ModelConfig(window=8, **variant)
    assert {name: getattr(config, name) for name in variant} == variant
    config.check_segment(16)
    with pytest.raises(ValueError, match="fewer than two blocks of 8"):
        config.check_segment(8)


def test_a_list_of_layers_becomes_a_value_that_cannot_change() -> None:
    layers: Any = [1, 3]
    config = ModelConfig(recurrent_layers=layers)
    assert config.recurrent_layers == (1, 3)
    assert hash(config) == hash(ModelConfig(recurrent_layers=(1, 3)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("recurrent_layers", "segment", "message"),
    [
        ((), 8, None),
        ((), 16, None),
        ((1,), 16, None),
        ((1,), 24, None),
        ((1,), 8, "segment of 8 tokens has fewer than two blocks of 8; .* from 16 on"),
        ((1,), 20, "segment of 20 tokens is not a positive multiple of the window, 8"),
        ((), 20, "segment of 20 tokens is not a positive multiple of the window, 8"),
        ((), 0, "segment of 0 tokens"),
        ((), -8, "segment of -8 tokens"),
    ],
)
def test_a_segment_is_whole_blocks_and_two_at_least_where_layers_recur(
    recurrent_layers: tuple[int, ...], segment: int, message: str | None
) -> None:
    config = ModelConfig(window=8, recurrent_layers=recurrent_layers)
    if message is None:
        config.check_segment(segment)
    else:
        with pytest.raises(ValueError, match=message):
            config.check_segment(segment)


@pytest.mark.parametrize(("logit_scale", "divisor"), [("sqrt_dim", 32.0), ("sqrt_vocab", 32128**0.5)])
def test_logits_are_divided_by_a_root(logit_scale: Any, divisor: float) -> None:
    assert ModelConfig(logit_scale=logit_scale).logit_divisor == divisor


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("recurrent_layers", 9),
        ("recurrent_layers", (1.0,)),
        ("recurrent_layers", ("9",)),
        ("window", 8.5),
        ("dim", 16.0),
        ("num_heads", True),
        ("vocab_size", "50"),
    ],
)
def test_a_size_of_another_type_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"model\.{key} is "):
        ModelConfig(**{key: value})
