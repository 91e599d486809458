"""What lanes remember: documents cut anywhere, packed together, started afresh."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_models import (
    CELLS,
    MODELS,
    WINDOW,
    all_lanes,
    small_config,
    small_model,
    some_carry,
    some_tokens,
    starts_at,
    variant_name,
)
from torch import Tensor

from brt_dist.model.carry import Carry, LayerCarry
from brt_dist.model.transformer import BlockRecurrentTransformer

BLOCKS = 6
EVERY_MODEL = pytest.mark.parametrize("variant", MODELS, ids=variant_name)
# What the carry itself promises depends on how the stack runs, not on the cell.
BOTH_WAYS = pytest.mark.parametrize("feedback", [False, True], ids=["whole", "block by block"])
# The same examples at every run, and no limit of time for one: the machine may be busy.
FEW = settings(max_examples=2, derandomize=True, deadline=None)


@functools.cache
def model_of(**variant: Any) -> BlockRecurrentTransformer:
    """Tests that share it don't change it."""
    return small_model(**variant)


def documents_in_lanes(lanes: int) -> st.SearchStrategy[Tensor]:
    """starts_BC of 6 blocks; block 0 is a start in all or some lanes."""
    row = st.lists(st.booleans(), min_size=BLOCKS, max_size=BLOCKS)
    return st.lists(row, min_size=lanes, max_size=lanes).map(torch.tensor)


def cuts() -> st.SearchStrategy[list[int]]:
    """Six blocks as segments of so many blocks each."""
    inner = st.sets(st.integers(1, BLOCKS - 1)).map(sorted)
    return inner.map(lambda places: [b - a for a, b in itertools.pairwise([0, *places, BLOCKS])])


def read_in_segments(
    model: BlockRecurrentTransformer, tokens_BL: Tensor, blocks: list[int], carry: Carry, starts_BC: Tensor
) -> tuple[Tensor, Carry]:
    """logits_BLV of lanes read in segments of so many blocks, and the last carry."""
    read = []
    segments = zip(tokens_BL.split([WINDOW * count for count in blocks], 1), starts_BC.split(blocks, 1), strict=True)
    for segment_BL, segment_starts_BC in segments:
        logits, carry = model(segment_BL, carry, segment_starts_BC)
        read.append(logits)
    return torch.cat(read, dim=1), carry


def assert_same_carry(ours: Carry, other: Carry, tolerance: float = 1e-12) -> None:
    assert ours.tensors().keys() == other.tensors().keys()
    for name, tensor in ours.tensors().items():
        torch.testing.assert_close(tensor, other.tensors()[name], rtol=0, atol=tolerance, msg=name)


@EVERY_MODEL
@FEW
@given(cut=cuts(), starts_BC=documents_in_lanes(2))
@example(cut=[1] * BLOCKS, starts_BC=starts_at(2, BLOCKS))
@example(cut=[1, 5], starts_BC=starts_at(2, BLOCKS, (0, 1), (1, 3)))
@torch.no_grad()
def test_any_cut_into_whole_blocks_gives_the_logits_and_the_carry_of_one_pass(
    variant: dict[str, Any], cut: list[int], starts_BC: Tensor
) -> None:
    model = model_of(**variant)
    tokens_BL, carry = some_tokens(2, BLOCKS * WINDOW), some_carry(model.config, 2)
    whole, last = read_in_segments(model, tokens_BL, [BLOCKS], carry, starts_BC)
    pieces, last_of_pieces = read_in_segments(model, tokens_BL, cut, carry, starts_BC)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-12)
    assert_same_carry(last_of_pieces, last)


@EVERY_MODEL
@FEW
@given(starts_BC=documents_in_lanes(2))
@example(starts_BC=starts_at(2, BLOCKS, (0, 2), (0, 3), (1, 5)))
@torch.no_grad()
def test_documents_packed_into_lanes_get_what_each_has_alone(variant: dict[str, Any], starts_BC: Tensor) -> None:
    model = model_of(**variant)
    tokens_BL = some_tokens(2, BLOCKS * WINDOW, seed=3)
    packed, carry = model(tokens_BL, None, starts_BC)
    last = []
    for lane in range(2):
        borders = [0, *(c for c in range(1, BLOCKS) if starts_BC[lane, c]), BLOCKS]
        for first, end in itertools.pairwise(borders):
            document = slice(first * WINDOW, end * WINDOW)
            alone, left = model(tokens_BL[lane : lane + 1, document])
            torch.testing.assert_close(packed[lane, document], alone[0], rtol=0, atol=1e-12)
        last.append(left)
    assert_same_carry(carry, all_lanes(last))


@EVERY_MODEL
def test_a_change_in_one_document_changes_the_others_by_exactly_zero(variant: dict[str, Any]) -> None:
    model = model_of(**variant)
    tokens_BL = some_tokens(2, BLOCKS * WINDOW)
    starts_BC = starts_at(2, BLOCKS, (0, 2), (0, 5), (1, 4))
    first, end = 2 * WINDOW, 5 * WINDOW
    other_BL = tokens_BL.clone()
    other_BL[0, first:end] = (other_BL[0, first:end] + 1) % model.config.vocab_size
    carry = some_carry(model.config, 2)
    logits, next_carry = model(tokens_BL, carry, starts_BC)
    changed, changed_carry = model(other_BL, carry, starts_BC)
    assert not torch.isclose(logits[0, first:end], changed[0, first:end]).all(-1).any()
    assert torch.equal(logits[0, :first], changed[0, :first])  # the document before it
    assert torch.equal(logits[0, end:], changed[0, end:])  # the next document of the same lane
    assert torch.equal(logits[1], changed[1])  # another lane
    for name, tensor in next_carry.tensors().items():
        assert torch.equal(tensor, changed_carry.tensors()[name]), name


@EVERY_MODEL
def test_the_gradient_of_one_documents_loss_is_exactly_zero_at_every_other(variant: dict[str, Any]) -> None:
    """At its tokens' embeddings, and at the carry, which belongs to what was read before the first start."""
    model = model_of(**variant)
    tokens_BL, targets_BL = some_tokens(2, BLOCKS * WINDOW), some_tokens(2, BLOCKS * WINDOW, seed=5)
    starts_BC = starts_at(2, BLOCKS, (0, 2), (0, 5), (1, 0), (1, 4))
    documents_BL = (starts_BC.cumsum(1) + torch.tensor([[0], [10]])).repeat_interleave(WINDOW, dim=1)
    embedded = model.embedding(tokens_BL).detach().requires_grad_()
    carry = some_carry(model.config, 2).map(Tensor.requires_grad_)
    handle = model.embedding.register_forward_hook(lambda module, inputs, output: embedded)
    logits, _ = model(tokens_BL, carry, starts_BC)
    handle.remove()
    nats_BL = F.cross_entropy(logits.flatten(0, 1), targets_BL.flatten(), reduction="none").view(2, -1)
    carried = list(carry.tensors().values())
    for document in documents_BL.unique().tolist():
        own_BL = documents_BL == document
        at_tokens, *at_carry = torch.autograd.grad(nats_BL[own_BL].sum(), [embedded, *carried], retain_graph=True)
        assert not at_tokens[~own_BL].any()
        assert (at_tokens[own_BL] != 0).any(-1).all()
        for gradient_B in at_carry:
            # Document 0 alone goes on from before: lane 0's first blocks.
            assert [bool(lane.any()) for lane in gradient_B] == [document == 0, False]


@EVERY_MODEL
def test_a_start_erases_state_and_cache_of_its_lane_and_of_no_other(variant: dict[str, Any]) -> None:
    model = model_of(**variant)
    carry = some_carry(model.config, 2)
    tokens_BL, starts_BC = some_tokens(2, 2 * WINDOW), starts_at(2, 2, (1, 0))
    logits, _ = model(tokens_BL, carry, starts_BC)
    for kind in ("keys", "values", "state") if model.config.recurrent_layers else ("keys", "values"):
        other = Carry(tuple(with_another(layer, kind) for layer in carry.layers))
        changed, _ = model(tokens_BL, other, starts_BC)
        assert torch.equal(logits[1], changed[1]), kind
        assert not torch.isclose(logits[0, :WINDOW], changed[0, :WINDOW]).all(), kind


def with_another(layer: LayerCarry, kind: str) -> LayerCarry:
    field = {"keys": "keys_BWHK", "values": "values_BWHK", "state": "state_BSD"}[kind]
    tensor = getattr(layer, field)
    return layer if tensor is None else replace(layer, **{field: tensor.flip(1) + 1})


@BOTH_WAYS
def test_a_start_in_one_lane_changes_no_bit_of_another(feedback: bool) -> None:
    model = model_of(feedback=feedback)
    carry, tokens_BL = some_carry(model.config, 3), some_tokens(3, 3 * WINDOW)
    logits, left = model(tokens_BL, carry, starts_at(3, 3))
    started, left_started = model(tokens_BL, carry, starts_at(3, 3, (1, 1)))
    assert torch.equal(logits[[0, 2]], started[[0, 2]])
    assert torch.equal(logits[1, :WINDOW], started[1, :WINDOW])
    assert not torch.isclose(logits[1, WINDOW:], started[1, WINDOW:]).all()
    for name, tensor in left.tensors().items():
        assert torch.equal(tensor[[0, 2]], left_started.tensors()[name][[0, 2]]), name


@BOTH_WAYS
@pytest.mark.parametrize("starts", [None, starts_at(2, 2, (1, 1))], ids=["no other start", "another start"])
def test_no_carry_equals_a_start_of_every_lane_in_front_of_block_0(starts: Tensor | None, feedback: bool) -> None:
    model = model_of(feedback=feedback)
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


@BOTH_WAYS
def test_a_start_puts_the_learned_initial_state_in_place(feedback: bool) -> None:
    model = small_model(feedback=feedback)
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


@BOTH_WAYS
def test_the_returned_carry_is_detached_and_keeps_no_memory_of_the_segment(feedback: bool) -> None:
    model = small_model(feedback=feedback).train()
    logits, carry = model(some_tokens(2, 8 * WINDOW))
    assert logits.requires_grad
    for name, tensor in carry.tensors().items():
        assert not tensor.requires_grad, name
        assert tensor.grad_fn is None, name
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name


@BOTH_WAYS
def test_reading_a_segment_leaves_the_carry_that_came_in_as_it_was(feedback: bool) -> None:
    model = model_of(feedback=feedback)
    carry = some_carry(model.config, 2)
    before = carry.detach()
    model(some_tokens(2, 2 * WINDOW), carry, starts_at(2, 2, (0, 0), (1, 1)))
    assert_same_carry(carry, before, tolerance=0)


@pytest.mark.parametrize("variant", CELLS, ids=variant_name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_state_is_float32_whatever_the_model_and_the_cache_is_the_models(
    dtype: torch.dtype, variant: dict[str, Any]
) -> None:
    model = small_model(**variant).to(dtype)
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
    assert_same_carry(all_lanes([first, others]), carry, tolerance=0)


@pytest.mark.parametrize("name", ["layers.2.values", "layers.2.keys", "layers.0.keys"])
def test_a_missing_tensor_of_a_carry_is_named(name: str) -> None:
    named = some_carry(small_config(), 1).tensors()
    del named[name]
    with pytest.raises(KeyError, match=name.replace(".", r"\.")):
        Carry.from_tensors(named)


def test_tensors_that_a_plain_carry_does_not_have_are_named() -> None:
    named = some_carry(small_config(), 1).tensors()
    with pytest.raises(KeyError, match="compressed_keys"):
        Carry.from_tensors(named | {"layers.0.compressed_keys": named["layers.0.keys"]})
