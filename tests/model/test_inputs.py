"""What a model refuses to be called with: one line that names the thing and the numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from small_models import WINDOW, small_config, small_model, some_carry, some_tokens, starts_at
from torch import Tensor

from brt_dist.model.carry import Carry, LayerCarry

LANES, LENGTH = 2, 3 * WINDOW


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError, match=r"\S") as found:
        call()
    message = str(found.value)
    assert "\n" not in message
    return message


def with_id(value: int, lane: int, position: int) -> Tensor:
    tokens_BL = some_tokens(LANES, LENGTH)
    tokens_BL[lane, position] = value
    return tokens_BL


@pytest.mark.parametrize("value", [-1, 11, 40])
def test_a_token_outside_the_vocabulary_is_named_with_its_place(value: int) -> None:
    model, tokens_BL = small_model(), with_id(value, 1, 5)
    expected = f"tokens hold {value} in lane 1 at position 5; the vocabulary has the ids 0 to 10"
    assert refusal(lambda: model(tokens_BL)) == expected
    assert refusal(lambda: model.loss(tokens_BL, some_tokens(LANES, LENGTH))) == expected
    assert refusal(lambda: model.token_losses(tokens_BL, some_tokens(LANES, LENGTH))) == expected


@pytest.mark.parametrize("value", [-101, -1, 11])
def test_a_target_outside_the_vocabulary_is_named_with_its_place(value: int) -> None:
    model = small_model()
    message = refusal(lambda: model.loss(some_tokens(LANES, LENGTH), with_id(value, 0, 7)))
    assert message == f"targets hold {value} in lane 0 at position 7; the vocabulary has the ids 0 to 10"


def test_the_ends_of_the_vocabulary_and_what_is_not_predicted_pass() -> None:
    nats, _, _ = small_model().loss(with_id(0, 0, 0), with_id(-100, 1, 3))
    assert nats.isfinite()
    small_model()(with_id(10, 1, LENGTH - 1))


@pytest.mark.parametrize(
    "tokens",
    [torch.zeros(LANES, LENGTH), torch.zeros(LENGTH, dtype=torch.int64), torch.zeros(LANES, LENGTH, dtype=torch.bool)],
    ids=["floats", "one dimension", "truth values"],
)
def test_tokens_of_another_kind_or_shape_are_refused(tokens: Tensor) -> None:
    message = refusal(lambda: small_model()(tokens))
    assert message.startswith(
        f"tokens have shape {tuple(tokens.shape)} and dtype {tokens.dtype}; expected int64 or int32"
    )


def test_targets_of_another_shape_than_the_tokens_are_refused_with_both() -> None:
    message = refusal(lambda: small_model().loss(some_tokens(2, 8), some_tokens(2, 12)))
    assert message == "targets have shape (2, 12), tokens (2, 8)"


@pytest.mark.parametrize("length", [0, 9])
def test_a_segment_that_is_not_whole_blocks_is_refused_with_both_numbers(length: int) -> None:
    message = refusal(lambda: small_model()(some_tokens(1, length)))
    assert message == f"a segment of {length} tokens is not a positive multiple of the window, 4"


@pytest.mark.parametrize(
    "starts",
    [starts_at(LANES, 2), starts_at(3, 3), starts_at(LANES, 3)[0], starts_at(LANES, 3).long()],
    ids=["too few blocks", "too many lanes", "one dimension", "integers"],
)
def test_starts_of_another_shape_or_dtype_are_refused(starts: Tensor) -> None:
    message = refusal(lambda: small_model()(some_tokens(LANES, LENGTH), None, starts))
    assert message == (
        f"starts have shape {tuple(starts.shape)} and dtype {starts.dtype}; "
        "expected (2, 3) and torch.bool, for 2 lanes of 3 blocks"
    )


def carry_with(**changes: Tensor | None) -> Carry:
    """A carry whose layer 1 is changed."""
    layers = list(some_carry(small_config(), LANES).layers)
    layers[1] = replace(layers[1], **changes)
    return Carry(tuple(layers))


def cache(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("carry", "message"),
    [
        (
            some_carry(small_config(), 3),
            "carry layers.0.keys has shape (3, 4, 2, 4); expected (2, 4, 2, 4) for 2 lanes",
        ),
        (
            carry_with(values_BWHK=cache(2, 8, 2, 4)),
            "carry layers.1.values has shape (2, 8, 2, 4); expected (2, 4, 2, 4) for 2 lanes",
        ),
        (
            carry_with(state_BSD=cache(2, 5, 6)),
            "carry layers.1.state has shape (2, 5, 6); expected (2, 3, 6) for 2 lanes",
        ),
        (
            carry_with(keys_BWHK=cache(2, 4, 2, 4, dtype=torch.float32)),
            "carry layers.1.keys has dtype torch.float32; expected torch.float64",
        ),
        (
            carry_with(state_BSD=cache(2, 3, 6, dtype=torch.bfloat16)),
            "carry layers.1.state has dtype torch.bfloat16; expected torch.float64",
        ),
        (
            carry_with(state_BSD=torch.zeros(2, 3, 6, dtype=torch.float64, device="meta")),
            "carry layers.1.state is on meta, the model on cpu",
        ),
        (
            carry_with(state_BSD=None),
            "the carry has 3 layers with states in []; the model has 3 with states in [1]",
        ),
        (
            some_carry(small_config(num_layers=4, recurrent_layers=(1, 3)), 2),
            "the carry has 4 layers with states in [1, 3]; the model has 3 with states in [1]",
        ),
        (Carry(()), "the carry has 0 layers with states in []; the model has 3 with states in [1]"),
    ],
    ids=["lanes", "window", "states", "dtype", "state's dtype", "device", "no state", "other layers", "empty"],
)
def test_a_carry_that_is_not_this_models_is_refused_by_name_and_numbers(carry: Carry, message: str) -> None:
    assert refusal(lambda: small_model()(some_tokens(LANES, LENGTH), carry)) == message


def test_a_carry_of_an_ordinary_layer_has_no_state() -> None:
    layers = list(some_carry(small_config(), LANES).layers)
    layers[0] = LayerCarry(layers[0].keys_BWHK, layers[0].values_BWHK, cache(2, 3, 6))
    message = refusal(lambda: small_model()(some_tokens(LANES, LENGTH), Carry(tuple(layers))))
    assert message == "the carry has 3 layers with states in [0, 1]; the model has 3 with states in [1]"


@pytest.mark.parametrize("changes", [{}, {"gate": "lstm", "cell": "dual", "feedback": True}, {"position": "rotary"}])
def test_a_carry_made_under_autocast_goes_back_in_under_autocast(changes: dict[str, object]) -> None:
    model, tokens_BL = small_model(**changes).float(), some_tokens(LANES, LENGTH)
    exact, _ = model(tokens_BL, model(tokens_BL)[1])
    with torch.autocast("cpu", torch.bfloat16):
        _, carry = model(tokens_BL)
        logits, carry = model(tokens_BL, carry)
    for name, tensor in carry.tensors().items():
        assert tensor.dtype == (torch.float32 if name.endswith("state") else torch.bfloat16), name
    assert logits.dtype == torch.bfloat16
    assert (logits - exact).norm() < 0.06 * exact.norm()


# --- what is accepted ---


def test_everything_can_be_named_in_a_call() -> None:
    model, starts = small_model(), starts_at(LANES, 3, (1, 1))
    tokens, targets, carry = some_tokens(LANES, LENGTH), some_tokens(LANES, LENGTH, seed=5), some_carry(model.config, 2)
    logits, _ = model(tokens=tokens, carry=carry, starts=starts)
    assert torch.equal(logits, model(tokens, carry, starts)[0])
    nats, _, _ = model.loss(tokens=tokens, targets=targets, carry=carry, starts=starts)
    scored, _ = model.token_losses(tokens=tokens, targets=targets, carry=carry, starts=starts)
    torch.testing.assert_close(scored.sum(), nats.detach())


def test_ids_of_32_bits_give_what_those_of_64_give() -> None:
    model, tokens, targets = small_model(), some_tokens(LANES, LENGTH), some_tokens(LANES, LENGTH, seed=5)
    assert torch.equal(model(tokens.int())[0], model(tokens)[0])
    assert torch.equal(model.loss(tokens.int(), targets.int())[0], model.loss(tokens, targets)[0])


def test_what_is_no_tensor_and_no_carry_is_refused_by_name() -> None:
    model, tokens = small_model(), some_tokens(LANES, LENGTH)
    assert refusal(lambda: model(tokens.tolist())).startswith("tokens are a list; expected a tensor")  # type: ignore[arg-type]
    assert refusal(lambda: model(tokens, None, [True])).startswith("starts are a list; expected a tensor")  # type: ignore[arg-type]
    named = some_carry(model.config, 2).tensors()
    assert refusal(lambda: model(tokens, named)) == (  # type: ignore[arg-type]
        "the carry is a dict; expected the Carry that an earlier call returned"
    )


def test_tensors_on_another_device_than_the_model_are_refused_by_name() -> None:
    model, tokens = small_model(), some_tokens(LANES, LENGTH)
    assert refusal(lambda: model(tokens.to("meta"))) == "tokens are on meta, the model on cpu"
    assert refusal(lambda: model.loss(tokens, tokens.to("meta"))) == "targets are on meta, the model on cpu"
    starts = starts_at(LANES, 3).to("meta")
    assert refusal(lambda: model(tokens, None, starts)) == "starts are on meta, the model on cpu"


def test_a_float64_model_takes_its_own_carry_under_autocast() -> None:
    model, tokens = small_model(), some_tokens(LANES, LENGTH)
    with torch.autocast("cpu", torch.bfloat16):
        _, carry = model(tokens)
        model(tokens, carry)
