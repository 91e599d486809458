"""Compressed memories: what is compressed, who may read it, and that what isn't there weighs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from port_models import port_model
from small_models import WINDOW, some_tokens, starts_at
from torch import Tensor

from brt_dist.model import compressed_memory
from brt_dist.model.carry import Carry, LayerCarry
from brt_dist.model.compressed_memory import CompressedMemory, Compression, RememberingCarry, attend_where
from brt_dist.model.config import ModelConfig
from brt_dist.model.transformer_layer import TokenViews, unit

LANES, BLOCKS, HEADS, WIDTH, FACTOR = 2, 7, 2, 4, 2
MODEL_FOLDER = Path(compressed_memory.__file__).parent


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def memory_and_inputs(kept: bool) -> tuple[CompressedMemory, TokenViews, RememberingCarry]:
    """A memory, a segment's queries, keys and values, and a carry with or without memories of an earlier segment."""
    config = ModelConfig(
        dim=6, num_heads=HEADS, head_dim=WIDTH, window=WINDOW, num_layers=1, recurrent_layers=(), position="none"
    )
    memory = CompressedMemory(config, FACTOR).double()
    with torch.no_grad():
        memory.compress_keys.weight_HKJ.add_(random(HEADS, WIDTH, WIDTH * FACTOR, seed=1))
        memory.compress_values.weight_HKJ.add_(random(HEADS, WIDTH, WIDTH * FACTOR, seed=2))
        memory.scale_H.copy_(torch.tensor([2.0, -3.0]))
    segment = (LANES, BLOCKS * WINDOW, HEADS, WIDTH)
    views = TokenViews(unit(random(*segment, seed=3)), unit(random(*segment, seed=4)), random(*segment, seed=5), None)
    block = (LANES, WINDOW, HEADS, WIDTH)
    carry = LayerCarry(unit(random(*block, seed=6)), random(*block, seed=7))
    keys, values = unit(random(*block, seed=8)), random(*block, seed=9)
    return memory, views, RememberingCarry.behind(carry, keys * kept, values * kept)


def read_one_by_one(memory: CompressedMemory, views: TokenViews, carry: RememberingCarry, starts_BC: Tensor) -> Tensor:
    """The definition: lane by lane and block by block, a softmax over a list that grows and is emptied at a start."""
    out_BLD = torch.zeros(LANES, BLOCKS * WINDOW, 6, dtype=torch.float64)
    for lane in range(LANES):
        pairs = list(zip(carry.compressed_keys_BMHK[lane], carry.compressed_values_BMHK[lane], strict=True))
        pairs = [(key, value) for key, value in pairs if key.any()]
        previous: tuple[Tensor, Tensor] | None = (carry.keys_BWHK[lane], carry.values_BWHK[lane])
        for block in range(BLOCKS):
            if starts_BC[lane, block]:
                pairs, previous = [], None
            tokens = slice(block * WINDOW, (block + 1) * WINDOW)
            if pairs:
                keys_MHK, values_MHK = (torch.stack(each) for each in zip(*pairs[-WINDOW:], strict=True))
                scores_HWM = torch.einsum("whk,mhk->hwm", views.queries_BLHK[lane, tokens], keys_MHK)
                weights_HWM = (scores_HWM * memory.scale_H.abs()[:, None, None]).softmax(-1)
                heads_WHK = torch.einsum("hwm,mhk->whk", weights_HWM, values_MHK)
                out_BLD[lane, tokens] = memory.output(heads_WHK.flatten(-2))
            if previous is not None:  # one block back when the next block reads: out of its window
                keys, values = (each[None] for each in previous)
                pairs += zip(unit(memory.compress_keys(keys))[0], memory.compress_values(values)[0], strict=True)
            previous = (views.keys_BLHK[lane, tokens], views.values_BLHK[lane, tokens])
    return out_BLD


@pytest.mark.parametrize("kept", [False, True], ids=["none kept", "memories kept"])
@pytest.mark.parametrize("places", [(), ((0, 0), (1, 2), (1, 4))], ids=["one document", "documents start inside"])
def test_the_whole_segment_at_once_equals_one_block_after_the_other(
    kept: bool, places: tuple[tuple[int, int], ...]
) -> None:
    memory, views, carry = memory_and_inputs(kept)
    starts_BC = starts_at(LANES, BLOCKS, *places)
    out_BLD, keys_BMHK, values_BMHK = memory(views, carry, starts_BC)
    expected_BLD = read_one_by_one(memory, views, carry, starts_BC)
    assert expected_BLD[:, -1].any(-1).all()
    torch.testing.assert_close(out_BLD, expected_BLD, rtol=0, atol=1e-13)
    assert keys_BMHK.shape == values_BMHK.shape == (LANES, WINDOW, HEADS, WIDTH)


def test_compression_is_a_convolution_over_time_with_stride_and_kernel_of_the_factor() -> None:
    heads, width, factor = 3, 4, 5
    compression = Compression(heads, width, factor).double()
    with torch.no_grad():
        compression.weight_HKJ.copy_(random(heads, width, factor * width))
    vectors_BLHK = random(2, 20, heads, width, seed=1)
    taps = compression.weight_HKJ.unflatten(-1, (factor, width)).transpose(-1, -2).flatten(0, 1)
    expected = F.conv1d(vectors_BLHK.flatten(-2).transpose(1, 2), taps, stride=factor, groups=heads)
    torch.testing.assert_close(compression(vectors_BLHK).flatten(-2), expected.transpose(1, 2), rtol=0, atol=1e-13)


def test_compression_starts_as_the_mean_of_the_tokens_it_stands_for() -> None:
    vectors_BLHK = random(2, 6, 2, 4)
    expected = torch.stack([vectors_BLHK[:, :3].mean(1), vectors_BLHK[:, 3:].mean(1)], dim=1)
    torch.testing.assert_close(Compression(2, 4, 3).double()(vectors_BLHK), expected, rtol=0, atol=1e-7)


def test_memories_that_do_not_exist_yet_take_no_weight() -> None:
    """All values alike: whatever the weights, a softmax over the existing ones alone gives just this value."""
    visible_BCM = torch.tensor([[[False, False, True], [True, True, True]]])
    values_BCMHK = torch.full((1, 2, 3, 1, 4), 7.0, dtype=torch.float64) * visible_BCM[..., None, None]
    keys_BCMHK = random(1, 2, 3, 1, 4) * visible_BCM[..., None, None]
    out = attend_where(random(1, 8, 1, 4), keys_BCMHK, values_BCMHK, visible_BCM, torch.ones(1))
    torch.testing.assert_close(out, torch.full_like(out, 7.0), rtol=0, atol=1e-12)


def test_a_fresh_lane_gets_exactly_nothing_until_a_block_has_left_its_window() -> None:
    model, plain = port_model(), port_model(use_compressed_mem=False)
    own = model.state_dict()
    plain.load_state_dict({name: own[name if name in own else behind_memory(name)] for name in plain.state_dict()})
    tokens_BL = some_tokens(2, 3 * WINDOW)
    ours, others = model(tokens_BL)[0], plain(tokens_BL)[0]
    assert torch.equal(ours[:, : 2 * WINDOW], others[:, : 2 * WINDOW])
    assert not torch.isclose(ours[:, 2 * WINDOW :], others[:, 2 * WINDOW :]).all(-1).any()


def behind_memory(name: str) -> str:
    """model.layers.1.cell... -> model.layers.1.layer.cell..."""
    model, layers, index, rest = name.split(".", 3)
    return f"{model}.{layers}.{index}.layer.{rest}"


def test_without_any_memory_all_gradients_are_finite() -> None:
    model = port_model().train()
    loss, _, _ = model(some_tokens(2, 2 * WINDOW), return_loss=True)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_layer_reaches_one_window_and_behind_it_as_many_blocks_as_the_factor_says() -> None:
    """One layer, no recurrence: M = W memories of F tokens each cover F blocks."""
    model = port_model(depth=1, recurrent_layers=())
    tokens_BL = some_tokens(1, 8 * WINDOW)
    before, _, _ = model(tokens_BL)
    for block in range(8):
        other_BL = tokens_BL.clone()
        other_BL[:, block * WINDOW] = (other_BL[:, block * WINDOW] + 1) % 11
        after, _, _ = model(other_BL)
        changed = (before != after).any(-1)[0].unflatten(0, (8, WINDOW)).any(-1)
        assert changed.tolist() == [block <= reader <= block + 1 + FACTOR for reader in range(8)]


def test_memories_do_not_grow_with_the_document() -> None:
    model, memories, states = port_model(), None, None
    for segment in range(4):
        _, memories, states = model(some_tokens(1, 3 * WINDOW, seed=segment), xl_memories=memories, states=states)
        assert [memory.shape for memory in memories] == [(2, 1, 2 * WINDOW, 2, 4)] * 3


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[-1] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module).split(".")[-1], *(alias.name for alias in node.names)}
    return found


def test_the_plain_model_never_learns_of_compressed_memories() -> None:
    own = {"compressed_memory", "port"}
    importers = {path.stem for path in MODEL_FOLDER.rglob("*.py") if imports_of(path) & own}
    assert importers == {"port"}
    program = "import sys, brt_dist; brt_dist.BlockRecurrentTransformer; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "brt_dist.model.window_attention" in loaded
    assert not {f"brt_dist.model.{name}" for name in own} & set(loaded)


def test_a_model_forgets_its_states_and_keeps_its_compressed_memories() -> None:
    model = port_model().model
    _, carry = model(some_tokens(2, 4 * WINDOW))
    forgotten = model.forget_state(carry)
    for before, after in zip(carry.layers, forgotten.layers, strict=True):
        assert isinstance(before, RememberingCarry)
        assert isinstance(after, RememberingCarry)
        assert torch.equal(after.compressed_keys_BMHK, before.compressed_keys_BMHK)
        assert torch.equal(after.compressed_values_BMHK, before.compressed_values_BMHK)
        assert torch.equal(after.keys_BWHK, before.keys_BWHK)
        if before.state_BSD is not None:
            assert not torch.isclose(after.states(), before.state_BSD).all()


def test_a_carry_with_compressed_memories_is_not_taken_for_a_plain_one() -> None:
    _, carry = port_model().model(some_tokens(2, 4 * WINDOW))
    with pytest.raises(KeyError, match="compressed_keys, compressed_values"):
        Carry.from_tensors(carry.tensors())
