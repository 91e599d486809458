"""The attention rungs and the whole model on CUDA, against the twin and the model in float64 on CPU.

The tests marked `gpu` share their bodies with tests of the CPU: those of single rungs with `test_window_attention.py`
and its neighbours, that of the whole model with the last test here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from attention_cases import AttentionCase, assert_near, assert_rung_is_the_twin, attend, gradients
from small_models import starts_at
from torch import Tensor

from brt_dist.model import flash_attention, flex_attention
from brt_dist.model.carry import Carry
from brt_dist.model.config import ModelConfig
from brt_dist.model.transformer import BlockRecurrentTransformer
from brt_dist.model.window_attention import rung_here

CUDA = torch.cuda.is_available()
SIZES = [(16, 64), (64, 64), (128, 32), (128, 64), (128, 128), (512, 64)]
SMALL_SIZE = (64, 32)


def on_gpu(test: object) -> object:
    """Marks a test `gpu`, and skips it where there is no CUDA device."""
    return pytest.mark.gpu(pytest.mark.skipif(not CUDA, reason="needs a CUDA device")(test))


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """Float32 products in float32, not in TF32; and every compiled kernel made anew, so that no limit is reached."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    if CUDA:
        torch._dynamo.reset()
    yield
    torch.set_float32_matmul_precision(before)


# --- single rungs ---


@on_gpu
@pytest.mark.parametrize("by", ["varlen_attn", "operators"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("window", "head_dim"), SIZES)
def test_flash_on_cuda_is_the_twin(
    monkeypatch: pytest.MonkeyPatch, by: str, dtype: torch.dtype, window: int, head_dim: int
) -> None:
    offered = {"varlen_attn": flash_attention._varlen_offers_window, "operators": flash_attention._ops_offer_window}
    if not offered[by]():
        pytest.skip(f"this torch's {by} takes no window")
    monkeypatch.setattr(flash_attention, "_varlen_offers_window", lambda: by == "varlen_attn")
    assert_rung_is_the_twin("flash", AttentionCase(window, head_dim, False, dtype), "cuda")


@on_gpu
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("window", "head_dim"), SIZES)
def test_flex_on_cuda_is_the_twin(with_bias: bool, dtype: torch.dtype, window: int, head_dim: int) -> None:
    if not flex_attention.flex_is_usable(torch.device("cuda"), head_dim):
        pytest.skip("FlexAttention cannot be compiled here")
    assert_rung_is_the_twin("flex", AttentionCase(window, head_dim, with_bias, dtype), "cuda")


@on_gpu
@pytest.mark.parametrize("rung", ["sdpa", "explicit"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("window", "head_dim"), [(12, 20), *SIZES])
def test_a_rung_of_plain_torch_on_cuda_is_the_twin(
    rung: str, with_bias: bool, dtype: torch.dtype, window: int, head_dim: int
) -> None:
    assert_rung_is_the_twin(rung, AttentionCase(window, head_dim, with_bias, dtype), "cuda")


@on_gpu
def test_flex_trains_behind_an_evaluation_that_made_its_mask() -> None:
    window, head_dim = SMALL_SIZE
    if not flex_attention.flex_is_usable(torch.device("cuda"), head_dim):
        pytest.skip("FlexAttention cannot be compiled here")
    flex_attention._window_mask.cache_clear()
    case = AttentionCase(window, head_dim, True, torch.float32)
    leaves, starts_BC = case.leaves("cuda"), case.starts("cuda")
    with torch.inference_mode():
        seen = attend("flex", leaves, starts_BC)
    out = attend("flex", leaves, starts_BC)
    assert_near(out, seen, 1e-5, "output")
    assert all(gradient.isfinite().all() for gradient in gradients(out, leaves).values())


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_rung_on_cuda_can_be_one_that_runs_here(dtype: torch.dtype) -> None:
    window, head_dim = SMALL_SIZE
    for with_bias in (False, True):
        rung = rung_here(torch.device("cuda"), dtype, head_dim, with_bias)
        assert rung in ("flash", "flex", "sdpa")
        assert_rung_is_the_twin(rung, AttentionCase(window, head_dim, with_bias, dtype), "cuda")


# --- the whole model ---

MODEL = ModelConfig(
    vocab_size=61,
    dim=64,
    num_layers=3,
    num_heads=2,
    head_dim=32,
    mlp_dim=96,
    window=64,
    num_states=24,
    recurrent_layers=(1,),
)


@on_gpu
@pytest.mark.parametrize("position", ["t5", "rotary", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_on_cuda_is_the_model_on_cpu(dtype: torch.dtype, position: str) -> None:
    assert_model_is_exact_but_for_rounding("cuda", dtype, position)


@pytest.mark.parametrize("position", ["t5", "rotary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_in_less_precision_is_the_model_in_float64_but_for_rounding(
    dtype: torch.dtype, position: str
) -> None:
    assert_model_is_exact_but_for_rounding("cpu", dtype, position)


def assert_model_is_exact_but_for_rounding(device: str, dtype: torch.dtype, position: str) -> None:
    """Two segments with carry and starts inside: losses, logits, carry and gradients of the same rounded values."""
    torch.manual_seed(0)
    model = BlockRecurrentTransformer(ModelConfig(**(vars(MODEL) | {"position": position})))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias.table"):
                parameter.normal_(std=0.5)
    model = model.to(dtype)
    exact = copy.deepcopy(model).double()
    model = model.to(device)
    tokens_GBL = torch.randint(MODEL.vocab_size, (2, 2, 3 * MODEL.window))
    targets_GBL = tokens_GBL.roll(-1, -1).masked_fill(torch.rand(tokens_GBL.shape) < 0.1, -100)
    starts_GBC = torch.stack([starts_at(2, 3, (0, 0), (1, 0), (1, 2)), starts_at(2, 3, (0, 1))])
    ours = run(model, tokens_GBL.to(device), targets_GBL.to(device), starts_GBC.to(device))
    expected = run(exact, tokens_GBL, targets_GBL, starts_GBC)
    assert ours.keys() == expected.keys()
    values, matrices, sums = (1e-5, 1e-5, 1e-4) if dtype == torch.float32 else (0.03, 0.2, 0.5)
    for name, value in expected.items():
        # The gradients of scales and biases are sums over all tokens that nearly cancel; those of an MLP jump where
        # rounding takes a unit over the edge of its ReLU.
        gradient = sums if name.endswith(("scale_H", "bias.table", "bias_D")) else matrices
        assert_near(ours[name], value, gradient if name.startswith("gradient") else values, name)


def run(
    model: BlockRecurrentTransformer, tokens_GBL: Tensor, targets_GBL: Tensor, starts_GBC: Tensor
) -> dict[str, Tensor]:
    """By name: what two consecutive segments give, and the gradients of the loss of each."""
    found: dict[str, Tensor] = {}
    carry: Carry | None = None
    for segment, (tokens_BL, targets_BL, starts_BC) in enumerate(zip(tokens_GBL, targets_GBL, starts_GBC, strict=True)):
        model.zero_grad()
        with torch.no_grad():
            found[f"logits {segment}"] = model(tokens_BL, carry, starts_BC)[0]
        nats, nats_BL, carry = model.loss(tokens_BL, targets_BL, carry, starts_BC)
        nats.backward()
        found[f"nats {segment}"] = nats_BL
        for name, tensor in carry.tensors().items():
            found[f"carry {segment} {name}"] = tensor
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            found[f"gradient {segment} {name}"] = parameter.grad.clone()
    return found
