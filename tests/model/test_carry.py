"""What lanes remember: documents cut anywhere, packed together, started afresh."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import WINDOW, small_config, small_model, some_carry, some_tokens, starts_at
from torch import Tensor

from brt_dist.model.carry import Carry
from brt_dist.model.transformer import BlockRecurrentTransformer

POSITIONS = ["t5", "rotary", "none"]
KINDS = ["keys", "values", "state"]


def read_in_segments(model: BlockRecurrentTransformer, tokens_BL: Tensor, blocks: list[int]) -> tuple[Tensor, Carry]:
    """logits_BLV of documents read in segments of so many blocks, and the last carry."""
    carry, read = None, []
    for segment in tokens_BL.split([WINDOW * count for count in blocks], dim=1):
        logits, carry = model(segment, carry)
        read.append(logits)
    assert carry is not None
    return torch.cat(read, dim=1), carry


def assert_same_carry(ours: Carry, other: Carry, tolerance: float = 1e-12) -> None:
    assert ours.tensors().keys() == other.tensors().keys()
    for name, tensor in ours.tensors().items():
        torch.testing.assert_close(tensor, other.tensors()[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("recurrent_layers", [(), (1,), (0, 2)])
@pytest.mark.parametrize("blocks", [[1, 1, 1, 1, 1, 1], [2, 4], [5, 1], [1, 2, 3], [3, 3]])
def test_any_cut_into_whole_blocks_gives_the_logits_and_the_carry_of_one_pass(
    blocks: list[int], recurrent_layers: tuple[int, ...], position: str
) -> None:
    model = small_model(recurrent_layers=recurrent_layers, position=position)
    tokens_BL = some_tokens(2, 6 * WINDOW)
    whole, last = read_in_segments(model, tokens_BL, [6])
    pieces, last_of_pieces = read_in_segments(model, tokens_BL, blocks)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-12)
    assert_same_carry(last_of_pieces, last)


@pytest.mark.parametrize("position", POSITIONS)
def test_documents_packed_into_lanes_get_what_each_has_alone(position: str) -> None:
    model = small_model(position=position)
    long, short = some_tokens(1, 5 * WINDOW, seed=3), some_tokens(1, 3 * WINDOW, seed=4)
    tokens_BL = torch.stack([torch.cat([long, short], 1)[0], torch.cat([short, long], 1)[0]])
    starts_BC = starts_at(2, 8, (0, 5), (1, 3))
    packed, carry = model(tokens_BL, None, starts_BC)
    alone = {name: model(document) for name, document in (("long", long), ("short", short))}
    torch.testing.assert_close(packed[0], torch.cat([alone["long"][0], alone["short"][0]], 1)[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(packed[1], torch.cat([alone["short"][0], alone["long"][0]], 1)[0], rtol=0, atol=1e-12)
    assert_same_carry(carry, Carry.concatenate([alone["short"][1], alone["long"][1]]))


@pytest.mark.parametrize("position", POSITIONS)
def test_a_change_in_one_document_changes_the_others_by_exactly_zero(position: str) -> None:
    model = small_model(position=position)
    tokens_BL = some_tokens(2, 6 * WINDOW)
    starts_BC = starts_at(2, 6, (0, 2), (1, 4))
    border = 2 * WINDOW
    other_BL = tokens_BL.clone()
    other_BL[0, :border] = (other_BL[0, :border] + 1) % model.config.vocab_size
    carry = some_carry(model.config, 2)
    logits, next_carry = model(tokens_BL, carry, starts_BC)
    changed, changed_carry = model(other_BL, carry, starts_BC)
    assert not torch.isclose(logits[0, :border], changed[0, :border]).all(-1).any()
    assert torch.equal(logits[0, border:], changed[0, border:])  # the next document of the same lane
    assert torch.equal(logits[1], changed[1])  # another lane
    for name, tensor in next_carry.tensors().items():
        assert torch.equal(tensor, changed_carry.tensors()[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_erases_state_and_cache_of_its_lane_and_of_no_other(kind: str) -> None:
    model = small_model()
    carry = some_carry(model.config, 2)
    other = Carry(tuple(replace_tensor(layer, kind) for layer in carry.layers))
    tokens_BL, starts_BC = some_tokens(2, 2 * WINDOW), starts_at(2, 2, (1, 0))
    logits, _ = model(tokens_BL, carry, starts_BC)
    changed, _ = model(tokens_BL, other, starts_BC)
    assert torch.equal(logits[1], changed[1])
    assert not torch.isclose(logits[0, :WINDOW], changed[0, :WINDOW]).all()


def replace_tensor(layer: object, kind: str) -> object:
    field = {"keys": "keys_BWHK", "values": "values_BWHK", "state": "state_BSD"}[kind]
    tensor = getattr(layer, field)
    return layer if tensor is None else replace(layer, **{field: tensor.flip(1) + 1})  # type: ignore[type-var]


def test_a_start_in_one_lane_changes_no_bit_of_another() -> None:
    model = small_model()
    carry, tokens_BL = some_carry(model.config, 3), some_tokens(3, 3 * WINDOW)
    logits, left = model(tokens_BL, carry, starts_at(3, 3))
    started, left_started = model(tokens_BL, carry, starts_at(3, 3, (1, 1)))
    assert torch.equal(logits[[0, 2]], started[[0, 2]])
    assert torch.equal(logits[1, :WINDOW], started[1, :WINDOW])
    assert not torch.isclose(logits[1, WINDOW:], started[1, WINDOW:]).all()
    for name, tensor in left.tensors().items():
        assert torch.equal(tensor[[0, 2]], left_started.tensors()[name][[0, 2]]), name


@pytest.mark.parametrize("starts", [None, starts_at(2, 2, (1, 1))], ids=["no other start", "another start"])
def test_no_carry_equals_a_start_of_every_lane_in_front_of_block_0(starts: Tensor | None) -> None:
    model = small_model()
    tokens_BL = some_tokens(2, 2 * WINDOW)
    explicit = starts_at(2, 2, (0, 0), (1, 0)) | (starts_at(2, 2) if starts is None else starts)
    logits, left = model(tokens_BL, None, starts)
    expected, expected_left = model(tokens_BL, some_carry(model.config, 2), explicit)
    assert torch.equal(logits, expected)
    assert_same_carry(left, expected_left, tolerance=0)


def test_the_given_starts_are_not_written_to() -> None:
    starts_BC = starts_at(2, 2)
    small_model()(some_tokens(2, 2 * WINDOW), None, starts_BC)
    assert not starts_BC.any()


def test_a_start_puts_the_learned_initial_state_in_place() -> None:
    model = small_model()
    seen: list[Tensor] = []
    layer = model.layers[1]
    layer.cell.register_forward_hook(lambda cell, inputs, outputs: seen.append(inputs[0]))
    model(some_tokens(2, 3 * WINDOW), some_carry(model.config, 2), starts_at(2, 3, (0, 1)))
    assert torch.equal(seen[1][0], layer.initial_state_SD)
    for block, lane in ((0, 0), (0, 1), (1, 1), (2, 0), (2, 1)):
        assert not torch.equal(seen[block][lane], layer.initial_state_SD)


def test_the_carry_holds_the_last_window_of_keys_and_values_and_the_state() -> None:
    config = small_config(num_states=5, recurrent_layers=(0, 2))
    carry = small_model(num_states=5, recurrent_layers=(0, 2))(some_tokens(2, 3 * WINDOW))[1]
    cache = (2, config.window, config.num_heads, config.head_dim)
    for index, layer in enumerate(carry.layers):
        assert layer.keys_BWHK.shape == layer.values_BWHK.shape == cache
        assert (layer.state_BSD is None) == (index not in config.recurrent_layers)
        if layer.state_BSD is not None:
            assert layer.state_BSD.shape == (2, 5, config.dim)


def test_the_returned_carry_is_detached_and_keeps_no_memory_of_the_segment() -> None:
    model = small_model().train()
    logits, carry = model(some_tokens(2, 8 * WINDOW))
    assert logits.requires_grad
    for name, tensor in carry.tensors().items():
        assert not tensor.requires_grad, name
        assert tensor.grad_fn is None, name
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name


def test_reading_a_segment_leaves_the_carry_that_came_in_as_it_was() -> None:
    model = small_model()
    carry = some_carry(model.config, 2)
    before = carry.detach()
    model(some_tokens(2, 2 * WINDOW), carry, starts_at(2, 2, (0, 0), (1, 1)))
    assert_same_carry(carry, before, tolerance=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_state_is_float32_whatever_the_model_and_the_cache_is_the_models(dtype: torch.dtype) -> None:
    model = small_model().to(dtype)
    for carry in (
        Carry.fresh(model.config, 2, torch.device("cpu"), dtype),
        model(some_tokens(2, 2 * WINDOW))[1],
    ):
        for name, tensor in carry.tensors().items():
            assert tensor.dtype == (torch.float32 if name.endswith("state") else dtype), name


def test_a_carry_becomes_named_tensors_and_lanes_and_comes_back() -> None:
    config = small_config()
    carry = some_carry(config, 3)
    assert set(carry.tensors()) == {
        *(f"layers.{index}.{kind}" for index in range(3) for kind in ("keys", "values")),
        "layers.1.state",
    }
    assert_same_carry(Carry.from_tensors(carry.tensors()), carry, tolerance=0)
    first, others = carry.map(lambda tensor: tensor[:1]), carry.map(lambda tensor: tensor[1:])
    assert_same_carry(Carry.concatenate([first, others]), carry, tolerance=0)


def test_a_missing_tensor_of_a_carry_is_named() -> None:
    named = some_carry(small_config(), 1).tensors()
    del named["layers.2.values"]
    with pytest.raises(KeyError, match=r"layers\.2\.values"):
        Carry.from_tensors(named)
