"""The class that is called as the PyTorch port is: its calls, what it remembers, and what it refuses."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from port_models import port_model
from small_models import VOCAB, WINDOW, some_tokens, starts_at
from torch import Tensor

from brt_dist import PortBlockRecurrentTransformer

COMPRESSION = pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])


def close(ours: Tensor, others: Tensor) -> None:
    torch.testing.assert_close(ours, others, rtol=0, atol=1e-11)


# --- the port's calls ---


@COMPRESSION
def test_the_ports_readme_example_runs(compressed: bool) -> None:
    """Its arguments, all of them, its default types and its three calls; only the sizes are smaller."""
    torch.manual_seed(0)
    model = PortBlockRecurrentTransformer(
        num_tokens=200,
        dim=16,
        depth=6,
        dim_head=8,
        heads=2,
        max_seq_len=32,
        block_width=16,
        num_state_vectors=16,
        recurrent_layers=(4,),
        use_compressed_mem=compressed,
        compressed_mem_factor=4,
        use_flash_attn=True,
    )
    seq = torch.randint(0, 200, (1, 32))
    out, mems1, states1 = model(seq)
    assert out.shape == (1, 32, 200)
    out2, mems2, states2 = model(seq, xl_memories=mems1, states=states1)
    out3, mems3, states3 = model(seq, xl_memories=mems2, states=states2)
    assert len(mems3) == 6
    assert [state.shape for state in states3] == [(1, 16, 16)]
    assert not torch.isclose(out, out2).all()
    assert not torch.isclose(out2, out3).all()


def test_the_ports_defaults_hold() -> None:
    defaults = {
        name: each.default for name, each in inspect.signature(PortBlockRecurrentTransformer).parameters.items()
    }
    required = inspect.Parameter.empty
    assert defaults == {
        "num_tokens": required,
        "dim": required,
        "depth": required,
        "dim_head": 64,
        "heads": 8,
        "max_seq_len": 1024,
        "block_width": 512,
        "num_state_vectors": None,
        "recurrent_layers": None,
        "use_compressed_mem": False,
        "compressed_mem_factor": 4,
        "use_flash_attn": False,
    }
    with torch.device("meta"):
        model = PortBlockRecurrentTransformer(num_tokens=20000, dim=512, depth=6)
    assert model.recurrent_layers == (3,)
    assert model.model.config.num_states == 512
    with torch.device("meta"):
        assert PortBlockRecurrentTransformer(num_tokens=10, dim=8, depth=1).recurrent_layers == (1,)


def test_recurrent_layers_are_counted_from_one() -> None:
    model = port_model(recurrent_layers=(3, 1))
    assert model.model.config.recurrent_layers == (2, 0)
    named = {name for name, _ in model.named_parameters() if name.endswith("initial_state_SD")}
    assert {name.split(".")[2] for name in named} == {"0", "2"}


@COMPRESSION
@pytest.mark.parametrize("extra", [0, 1], ids=["whole blocks", "one token more"])
def test_the_loss_is_the_mean_cross_entropy_of_every_token_but_the_first(extra: int, compressed: bool) -> None:
    model = port_model(use_compressed_mem=compressed)
    _, mems, states = model(some_tokens(2, 3 * WINDOW, seed=5))
    x = some_tokens(2, 3 * WINDOW + extra)
    loss, new_mems, new_states = model(x, return_loss=True, xl_memories=mems, states=states)
    logits, expected_mems, expected_states = model(x[:, : 3 * WINDOW], xl_memories=mems, states=states)
    predictions = logits if extra else logits[:, :-1]
    close(loss, F.cross_entropy(predictions.flatten(0, 1), x[:, 1:].flatten()))
    for ours, others in zip((*new_mems, *new_states), (*expected_mems, *expected_states), strict=True):
        assert torch.equal(ours, others)


def test_flash_attention_or_not_the_result_is_the_same() -> None:
    tokens_BL = some_tokens(2, 3 * WINDOW)
    outs = [port_model(use_flash_attn=flash)(tokens_BL)[0] for flash in (False, True)]
    assert torch.equal(*outs)


# --- memories and states ---


@COMPRESSION
@pytest.mark.parametrize("sizes", [(2, 10), (10, 2), (1, 4, 7), (3, 3, 3, 3), (1,) * 12])
def test_any_split_into_whole_blocks_gives_the_logits_of_one_pass(sizes: tuple[int, ...], compressed: bool) -> None:
    model = port_model(use_compressed_mem=compressed)
    tokens_BL = some_tokens(2, 12 * WINDOW)
    starts_BC = starts_at(2, 12, (0, 5), (1, 2), (1, 9))
    whole, whole_mems, whole_states = model(tokens_BL, starts=starts_BC)
    mems, states, outs, first = None, None, [], 0
    for size in sizes:
        tokens = tokens_BL[:, first * WINDOW : (first + size) * WINDOW]
        out, mems, states = model(tokens, xl_memories=mems, states=states, starts=starts_BC[:, first : first + size])
        outs.append(out)
        first += size
    close(torch.cat(outs, dim=1), whole)
    for ours, others in zip((*mems, *states), (*whole_mems, *whole_states), strict=True):
        close(ours, others)


def test_states_go_back_to_the_layers_they_came_from_in_whatever_order_these_were_named() -> None:
    model = port_model(recurrent_layers=(3, 1))
    x = some_tokens(2, 6 * WINDOW)
    _, mems, states = model(x[:, : 3 * WINDOW])
    close(model(x[:, 3 * WINDOW :], xl_memories=mems, states=states)[0], model(x)[0][:, 3 * WINDOW :])


def test_a_part_of_a_block_gives_the_logits_of_the_whole_one_but_no_memories() -> None:
    model = port_model()
    tokens_BL = some_tokens(2, 3 * WINDOW)
    whole, _, _ = model(tokens_BL)
    for length in (1, WINDOW + 1, 3 * WINDOW - 1):
        out, mems, states = model(tokens_BL[:, :length], return_memories_and_states=False)
        assert mems is states is None
        close(out, whole[:, :length])
        if length > 2:
            loss, _, _ = model(tokens_BL[:, :length], return_loss=True, return_memories_and_states=False)
            close(loss, F.cross_entropy(whole[:, : length - 1].flatten(0, 1), tokens_BL[:, 1:length].flatten()))


@COMPRESSION
def test_memories_and_states_are_constants_that_a_call_leaves_alone(compressed: bool) -> None:
    model = port_model(use_compressed_mem=compressed, recurrent_layers=(1, 3))
    _, mems, states = model(some_tokens(2, 3 * WINDOW))
    assert (len(mems), len(states)) == (3, 2)
    assert not any(tensor.requires_grad for tensor in (*mems, *states))
    before = [tensor.clone() for tensor in (*mems, *states)]
    first = model(some_tokens(2, 2 * WINDOW, seed=3), xl_memories=mems, states=states)[0]
    again = model(some_tokens(2, 2 * WINDOW, seed=3), xl_memories=mems, states=states)[0]
    assert torch.equal(first, again)
    assert all(torch.equal(*each) for each in zip(before, (*mems, *states), strict=True))


def test_none_and_empty_lists_begin_afresh_each_for_itself() -> None:
    model = port_model()
    _, mems, states = model(some_tokens(2, 4 * WINDOW))
    x = some_tokens(2, 4 * WINDOW, seed=3)
    fresh, _, _ = model(x)
    assert torch.equal(fresh, model(x, xl_memories=[], states=())[0])
    outs = [fresh, *(model(x, **given)[0] for given in ({"xl_memories": mems}, {"states": states}))]
    outs.append(model(x, xl_memories=mems, states=states)[0])
    for index, out in enumerate(outs):
        assert not any(torch.isclose(out, other).all() for other in outs[index + 1 :])
    blank = [torch.zeros_like(memory) for memory in mems]
    initial = [layer.initial_state_SD.expand(2, -1, -1) for layer in model.modules() if hasattr(layer, "recur")]
    close(model(x, xl_memories=blank, states=states)[0], outs[2])
    close(model(x, xl_memories=mems, states=initial)[0], outs[1])


def test_lanes_can_be_picked_and_reordered() -> None:
    model = port_model()
    _, mems, states = model(some_tokens(3, 4 * WINDOW))
    x = some_tokens(3, 4 * WINDOW, seed=3)
    out, _, _ = model(x, xl_memories=mems, states=states)
    picked = torch.tensor([2, 0])
    some, _, _ = model(
        x[picked], xl_memories=[memory[:, picked] for memory in mems], states=[state[picked] for state in states]
    )
    close(some, out[picked])


def test_a_model_saved_and_loaded_with_its_memories_goes_on_alike(tmp_path: Any) -> None:
    model = port_model()
    x = some_tokens(2, 4 * WINDOW)
    _, mems, states = model(x)
    torch.save({"model": model.state_dict(), "mems": mems, "states": states}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    other = port_model(seed=7)
    assert not torch.isclose(other(x)[0], model(x)[0]).all()
    other.load_state_dict(saved["model"])
    assert torch.equal(
        other(x, xl_memories=saved["mems"], states=saved["states"])[0], model(x, xl_memories=mems, states=states)[0]
    )


# --- what may influence what ---


@COMPRESSION
@pytest.mark.parametrize("recurrent_layers", [(), (2,)], ids=["no recurrence", "recurrent"])
def test_no_gradient_flows_from_a_token_to_a_later_one(recurrent_layers: tuple[int, ...], compressed: bool) -> None:
    model = port_model(recurrent_layers=recurrent_layers, use_compressed_mem=compressed)
    length = 12 * WINDOW
    tokens_BL = some_tokens(1, length)
    embedded = model.model.embedding(tokens_BL).detach().requires_grad_()
    handle = model.model.embedding.register_forward_hook(lambda module, inputs, output: embedded)
    logits, _, _ = model(tokens_BL)
    handle.remove()
    chosen_L = logits[0] @ torch.randn(VOCAB, dtype=torch.float64)
    rows_LL = torch.eye(length, dtype=torch.float64)
    (gradient_LBLD,) = torch.autograd.grad(chosen_L, embedded, rows_LL, is_grads_batched=True)
    reach_LL = gradient_LBLD[:, 0].abs().amax(-1)
    distance_LL = torch.arange(length)[:, None] - torch.arange(length)
    assert (reach_LL[distance_LL < 0] == 0).all()
    assert (reach_LL[(distance_LL >= 0) & (distance_LL <= WINDOW)] > 0).all()
    # Without states or compressed memories nothing from before three layers' windows arrives; either brings it.
    arrives = (reach_LL[distance_LL > 3 * WINDOW] > 0).any()
    assert bool(arrives) == (compressed or bool(recurrent_layers))


def test_a_lane_changes_no_other() -> None:
    model = port_model()
    x, other_x = some_tokens(2, 6 * WINDOW), some_tokens(2, 6 * WINDOW)
    other_x[0] = some_tokens(1, 6 * WINDOW, seed=9)[0]
    results = [model(each) for each in (x, other_x)]
    results += [model(x, xl_memories=mems, states=states) for _, mems, states in results]
    for one, other in (results[:2], results[2:]):
        (out, mems, states), (other_out, other_mems, other_states) = one, other
        assert torch.equal(out[1], other_out[1])
        assert not torch.isclose(out[0], other_out[0]).all()
        assert all(torch.equal(a[:, 1], b[:, 1]) for a, b in zip(mems, other_mems, strict=True))
        assert all(torch.equal(a[1], b[1]) for a, b in zip(states, other_states, strict=True))


@COMPRESSION
def test_a_start_makes_a_lane_forget_all_and_no_other_lane_anything(compressed: bool) -> None:
    model = port_model(use_compressed_mem=compressed)
    _, mems, states = model(some_tokens(2, 8 * WINDOW))
    x = some_tokens(2, 8 * WINDOW, seed=3)
    fresh, _, _ = model(x[:, 3 * WINDOW :])
    carried, _, _ = model(x, xl_memories=mems, states=states)
    out, _, _ = model(x, xl_memories=mems, states=states, starts=starts_at(2, 8, (1, 3)))
    close(out[1, 3 * WINDOW :], fresh[1])
    assert torch.equal(out[0], carried[0])
    assert torch.equal(out[1, : 3 * WINDOW], carried[1, : 3 * WINDOW])


# --- learning ---


def idle_parameters(model: PortBlockRecurrentTransformer, loss: Tensor) -> set[str]:
    """Those whose gradient of `loss` is zero; all have one."""
    model.zero_grad()
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    return {name for name, parameter in model.named_parameters() if not parameter.grad.any()}


def test_in_a_second_call_of_two_blocks_all_learn_but_the_initial_state_which_learns_in_the_first() -> None:
    """In the first call no block has left the window yet, so that there is nothing to compress or to remember."""
    model = port_model().train()
    x = some_tokens(2, 4 * WINDOW + 1)
    loss, mems, states = model(x[:, : 2 * WINDOW + 1], return_loss=True)
    assert idle_parameters(model, loss) == {name for name, _ in model.named_parameters() if ".memory." in name}
    loss, _, _ = model(x[:, 2 * WINDOW :], return_loss=True, xl_memories=mems, states=states)
    assert idle_parameters(model, loss) == {"model.layers.1.layer.initial_state_SD"}
    loss, _, _ = model(x[:, 2 * WINDOW :], return_loss=True, xl_memories=mems)
    assert idle_parameters(model, loss) == set()


def test_gradients_reach_every_parameter_in_one_call_of_three_blocks() -> None:
    model = port_model(max_seq_len=3 * WINDOW).train()
    loss, _, _ = model(some_tokens(2, 3 * WINDOW), return_loss=True)
    assert idle_parameters(model, loss) == set()


def test_without_compressed_memories_two_blocks_reach_every_parameter() -> None:
    model = port_model(use_compressed_mem=False).train()
    loss, _, _ = model(some_tokens(2, 2 * WINDOW), return_loss=True)
    assert idle_parameters(model, loss) == set()


@COMPRESSION
def test_bfloat16_stays_near_float32_over_many_calls(compressed: bool) -> None:
    exact = port_model(use_compressed_mem=compressed).bfloat16().float()
    rounded = port_model(use_compressed_mem=compressed).bfloat16()
    mems = states = rounded_mems = rounded_states = None
    for call in range(4):
        x = some_tokens(2, 2 * WINDOW, seed=call)
        expected, mems, states = exact(x, xl_memories=mems, states=states)
        out, rounded_mems, rounded_states = rounded(x, xl_memories=rounded_mems, states=rounded_states)
        assert out.dtype == rounded_mems[0].dtype == torch.bfloat16
        assert rounded_states[0].dtype == torch.float32
        assert (out - expected).norm() <= 0.06 * expected.norm()
    loss, _, _ = rounded(x, return_loss=True, xl_memories=rounded_mems, states=rounded_states)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in rounded.parameters())


@COMPRESSION
def test_calls_under_autocast_take_what_calls_under_autocast_return(compressed: bool) -> None:
    model = port_model(use_compressed_mem=compressed).float()
    x = some_tokens(2, 3 * WINDOW)
    _, exact_mems, exact_states = model(x)
    expected, _, _ = model(x, return_loss=True, xl_memories=exact_mems, states=exact_states)
    with torch.autocast("cpu", torch.bfloat16):
        _, mems, states = model(x)
        loss, _, _ = model(x, return_loss=True, xl_memories=mems, states=states)
    assert {memory.dtype for memory in mems} == {torch.bfloat16}
    assert {state.dtype for state in states} == {torch.float32}
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recurrent_layers": (0,)}, r"recurrent_layers holds 0; layers are counted from 1 to depth, 3"),
        ({"recurrent_layers": (4,)}, r"recurrent_layers holds 4; .* from 1 to depth, 3"),
        ({"recurrent_layers": (2, 2)}, r"recurrent_layers \(2, 2\) names a layer twice"),
        ({"recurrent_layers": 2}, r"recurrent_layers is 2; it must be a tuple"),
        ({"max_seq_len": WINDOW}, r"max_seq_len 4 is less than two blocks of block_width 4"),
        ({"max_seq_len": 10}, r"max_seq_len 10 is not a multiple of block_width 4"),
        ({"compressed_mem_factor": 3}, r"compressed_mem_factor 3 does not divide block_width 4"),
        ({"compressed_mem_factor": 0}, r"compressed_mem_factor is 0"),
        ({"dim_head": 3}, r"dim_head is 3; rotary positions need an even number"),
        ({"heads": 0}, r"heads is 0; it must be at least 1"),
        ({"num_state_vectors": 0}, r"num_state_vectors is 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name_and_number(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        port_model(**changes)


def test_what_does_not_matter_is_not_refused() -> None:
    port_model(compressed_mem_factor=3, use_compressed_mem=False)
    port_model(max_seq_len=WINDOW, recurrent_layers=())


def test_an_argument_that_is_not_there_is_named() -> None:
    with pytest.raises(TypeError, match="ff_mult"):
        port_model(ff_mult=2)


@pytest.mark.parametrize(
    ("length", "return_loss", "message"),
    [
        (10, False, "x has 10 tokens a lane, but .* whole blocks of 4; with return_memories_and_states=False any"),
        (10, True, "x has 10 tokens a lane, but .* whole blocks of 4"),
        (13 * WINDOW, False, "x has 52 tokens a lane; max_seq_len is 48"),
        (0, False, "x has 0 tokens a lane"),
        (1, True, "x has 1 tokens a lane"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(length: int, return_loss: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        port_model()(some_tokens(1, length), return_loss=return_loss)


def test_tokens_that_do_not_fit_are_refused() -> None:
    model, x = port_model(), some_tokens(2, 2 * WINDOW)
    with pytest.raises(ValueError, match=r"x has shape \(8,\); expected lanes x tokens"):
        model(x[0])
    x[1, 3] = VOCAB
    with pytest.raises(ValueError, match=f"hold {VOCAB} in lane 1 at position 3"):
        model(x)
    with pytest.raises(ValueError, match=r"starts have shape \(2, 3\)"):
        model(some_tokens(2, 2 * WINDOW), starts=starts_at(2, 3))


def test_memories_and_states_of_other_lanes_layers_or_dtypes_are_refused() -> None:
    model, x = port_model(), some_tokens(2, 2 * WINDOW)
    _, mems, states = model(x)
    plain_mems = port_model(use_compressed_mem=False)(x)[1]
    for given, message in [
        ({"xl_memories": mems[:2]}, "xl_memories are 2 tensors; this model has 3"),
        ({"states": (*states, *states)}, "states are 2 tensors; this model has 1"),
        ({"xl_memories": plain_mems}, r"xl_memories\[0\] has shape \(2, 2, 4, 2, 4\); expected \(2, 2, 8, 2, 4\)"),
        ({"states": [state[:1] for state in states]}, r"states\[0\] has shape \(1, 3, 6\); expected \(2, 3, 6\)"),
        ({"xl_memories": [memory.float() for memory in mems]}, r"xl_memories\[0\] has dtype torch.float32"),
        ({"states": [state.to("meta") for state in states]}, r"states\[0\] is on meta, the model on cpu"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(x, **given)
    with pytest.raises(ValueError, match=r"xl_memories\[0\] has shape \(2, 2, 8, 2, 4\); expected \(2, 3, 8, 2, 4\)"):
        model(some_tokens(3, 2 * WINDOW), xl_memories=mems, states=states)
