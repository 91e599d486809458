"""The predicted memory of a rank agrees with the bytes that are really alive in a forward and a backward pass."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_ranks import fake_tensor_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from brt_dist.model.carry import Carry
from brt_dist.model.config import ModelConfig
from brt_dist.model.loss import CHUNK
from brt_dist.model.recompute import Recompute, set_recompute
from brt_dist.parallel.config import ParallelConfig
from brt_dist.parallel.memory import RankMemory, memory_of_rank
from brt_dist.parallel.parallelize import cut_by_heads
from brt_dist.parallel.stage import Stage
from brt_dist.parallel.stages import divide_layers

# All sizes differ, so that no term hides behind another.
MODEL = ModelConfig(
    vocab_size=512,
    dim=96,
    num_layers=3,
    num_heads=4,
    head_dim=32,
    mlp_dim=320,
    window=16,
    num_states=24,
    recurrent_layers=(1,),
    position="rotary",
)
LANES, SEGMENT = 2, 128
# Largest relative differences: of what is kept, and
KEPT = 0.02
# of the most that is alive: the prediction adds up what need not meet, and must not be less.
PEAK_BELOW, PEAK_ABOVE = 0.02, 0.15


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on that are still alive, now and at most."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now = self.most = 0
        # Held here: a new storage could come to lie where one of these was.
        self._known = [tensor.untyped_storage() for tensor in known]
        self._storages = {storage._cdata for storage in self._known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.now -= size


class NormAsOnCuda(torch.autograd.Function):
    """Keeps input, gain and root, as CUDA's kernel does; the norm of torch on the CPU keeps what is normalised too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, gain, root)
        return (wide * root * gain).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, _ = ctx.saved_tensors
        return torch.zeros_like(x), torch.zeros_like(gain), None


@pytest.fixture(autouse=True)
def _norms_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "rms_norm", lambda x, _, gain, epsilon: NormAsOnCuda.apply(x, gain, epsilon))


@contextmanager
def built(model: ModelConfig, parallel: ParallelConfig, number: int) -> Iterator[Stage]:
    """Stage `number` as training builds it, whose parameters drop their gradients: another part predicts those."""
    with fake_tensor_ranks(parallel.tensor) as processes:
        with torch.device("meta"):
            stage = Stage(model, divide_layers(model, parallel.pipeline)[number])
            if parallel.tensor > 1:
                cut_by_heads(stage, processes, parallel.sequence)
        stage.to_empty(device="cpu").to(getattr(torch, model.dtype))
        for parameter in stage.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        set_recompute(stage.layers_by_number(), Recompute(parallel.recompute), parallel.recompute_layers)
        yield stage


def gathered_tokens() -> int:
    """The bytes of megatron-core's buffer, which is used again and again and counts as temporary."""
    if "megatron.core.parallel_state" not in sys.modules:
        return 0
    buffers = sys.modules["megatron.core.parallel_state"]._GLOBAL_MEMORY_BUFFER
    return sum(buffer.nbytes for buffer in buffers.buffer.values()) if buffers else 0


def measure_kept(model: ModelConfig, parallel: ParallelConfig, number: int) -> int:
    """Bytes alive between the forward and the backward pass of a stage, when the next carry is in its slot."""
    with built(model, parallel, number) as stage:
        live, result, carry = forward(stage, parallel)
        del carry
        assert result.requires_grad
        return live.now - gathered_tokens()


def measure_most(model: ModelConfig, parallel: ParallelConfig, segment: int = SEGMENT) -> int:
    """The most bytes alive in a forward and a backward pass of the whole model; between them the carry is written."""
    with built(model, parallel, 0) as stage:
        live, nats, carry = forward(stage, parallel, segment)
        del carry
        with live:
            nats.backward()
        return live.most


def forward(stage: Stage, parallel: ParallelConfig, segment: int = SEGMENT) -> tuple[LiveBytes, Tensor, Carry]:
    """The bytes of a forward pass, what it gave, and the next carry; what a slot holds is not counted."""
    model = stage.config
    dtype = getattr(torch, model.dtype)
    inputs = torch.zeros(LANES, segment, dtype=torch.int64)
    starts_BC = torch.zeros(LANES, segment // model.window, dtype=torch.bool)
    targets_BL = torch.zeros(LANES, segment, dtype=torch.int64)
    slot = stage.fresh_carry(LANES, torch.device("cpu"), dtype)
    with LiveBytes([*stage.parameters(), *slot.tensors().values(), inputs, starts_BC, targets_BL]) as live:
        if not stage.is_first:
            tokens = segment // (parallel.tensor if parallel.sequence else 1)
            inputs = torch.zeros(LANES, tokens, model.dim, dtype=dtype, requires_grad=True)
        read = slot.map(torch.clone)
        result, carry = stage(inputs, read, starts_BC, targets_BL if stage.is_last else None)
    return live, result[0] if stage.is_last else result, carry


def predict(model: ModelConfig, parallel: ParallelConfig, number: int = 0, segment: int = SEGMENT) -> RankMemory:
    return memory_of_rank(model, parallel, segment, LANES, data_ranks=1, stage=number, parameters=0)


CELLS = list(product(("fixed", "lstm"), ("skip", "dual", "single")))
HOW = ("none", "selective", "full")


@pytest.mark.parametrize(("dtype", "how"), list(product(("bfloat16", "float32"), HOW)))
@pytest.mark.parametrize("number", [0, 1, 2], ids=["first, ordinary", "recurrent", "last, ordinary"])
def test_what_autograd_keeps_is_as_predicted(dtype: str, how: str, number: int) -> None:
    model, parallel = replace(MODEL, dtype=dtype), ParallelConfig(pipeline=3, recompute=how)
    kept = measure_kept(model, parallel, number)
    assert predict(model, parallel, number).activations == pytest.approx(kept, rel=KEPT)


@pytest.mark.parametrize("how", HOW)
def test_what_is_kept_without_positions_is_as_predicted(how: str) -> None:
    model, parallel = replace(MODEL, dtype="bfloat16", position="none"), ParallelConfig(pipeline=3, recompute=how)
    for number in range(3):
        kept = measure_kept(model, parallel, number)
        assert predict(model, parallel, number).activations == pytest.approx(kept, rel=KEPT)


@pytest.mark.parametrize(("gate", "cell"), CELLS)
def test_what_every_gate_and_cell_keeps_is_as_predicted(gate: str, cell: str) -> None:
    for dtype in ("bfloat16", "float32"):
        model, parallel = replace(MODEL, dtype=dtype, gate=gate, cell=cell), ParallelConfig(pipeline=3)
        kept = measure_kept(model, parallel, 1)
        assert predict(model, parallel, 1).activations == pytest.approx(kept, rel=KEPT)


@pytest.mark.parametrize("sequence", [False, True], ids=["tokens whole", "tokens shared"])
@pytest.mark.parametrize("how", HOW)
def test_what_a_tensor_rank_keeps_is_as_predicted(sequence: bool, how: str) -> None:
    model = replace(MODEL, dtype="bfloat16", cell="dual")
    parallel = ParallelConfig(pipeline=3, tensor=2, sequence=sequence, recompute=how)
    for number in range(3):
        kept = measure_kept(model, parallel, number)
        assert predict(model, parallel, number).activations == pytest.approx(kept, rel=KEPT)


LAYOUTS = [
    ParallelConfig(),
    ParallelConfig(recompute="selective"),
    ParallelConfig(recompute="full"),
    ParallelConfig(tensor=2),
    ParallelConfig(tensor=2, sequence=True, recompute="selective"),
    ParallelConfig(tensor=2, sequence=True, recompute="full"),
]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=lambda p: f"tensor {p.tensor}, recompute {p.recompute}")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_most_that_is_alive_is_as_predicted_and_not_more(parallel: ParallelConfig, dtype: str) -> None:
    for recurrent in ((), (1,)):
        model = replace(MODEL, dtype=dtype, recurrent_layers=recurrent)
        assert_peak(measure_most(model, parallel), predict(model, parallel))


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_most_that_is_alive_of_a_loss_in_chunks_is_as_predicted(tensor: int, dtype: str) -> None:
    # So few layers, of so many entries, that the loss is most of it; nothing of a chunk outlives it.
    model = replace(MODEL, dtype=dtype, num_layers=1, recurrent_layers=(), vocab_size=2048)
    parallel, segment = ParallelConfig(tensor=tensor), 2 * CHUNK // LANES
    assert_peak(measure_most(model, parallel, segment), predict(model, parallel, segment=segment))


@pytest.mark.parametrize("parallel", LAYOUTS, ids=lambda p: f"tensor {p.tensor}, recompute {p.recompute}")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_most_that_is_alive_of_much_carry_is_as_predicted(parallel: ParallelConfig, dtype: str) -> None:
    # Windows of half a segment, in many layers, and a small loss: what a forward pass reads and hands on counts.
    for recurrent in ((), (5,)):
        sizes = {"num_layers": 6, "window": 32, "vocab_size": 64, "mlp_dim": 200}
        model = replace(MODEL, dtype=dtype, recurrent_layers=recurrent, **sizes)
        assert_peak(measure_most(model, parallel, segment=64), predict(model, parallel, segment=64))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_carry_keeps_nothing_alive_but_its_own_bytes(dtype: str) -> None:
    parallel = ParallelConfig()
    with built(replace(MODEL, dtype=dtype), parallel, 0) as stage:
        _, _, carry = forward(stage, parallel)
    for name, tensor in carry.tensors().items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def assert_peak(most: int, memory: RankMemory) -> None:
    predicted = memory.activations + memory.temporary
    assert (1 - PEAK_BELOW) * most <= predicted <= (1 + PEAK_ABOVE) * most


# --- the parts that are no activations ---


def held(dtype: str, parallel: ParallelConfig, data_ranks: int = 4, parameters: int = 1000) -> RankMemory:
    return memory_of_rank(replace(MODEL, dtype=dtype), parallel, SEGMENT, LANES, data_ranks, 0, parameters)


@pytest.mark.parametrize(
    ("dtype", "zero_stage", "weights", "gradients", "optimizer"),
    [
        ("float32", 0, 4000, 4000, 8000),
        ("bfloat16", 0, 6000, 4000, 8000),
        ("float32", 1, 4000, 5000, 3000),
        ("bfloat16", 1, 2000, 6000, 3000),
        ("bfloat16", 2, 2000, 2000, 3000),
        ("bfloat16", 3, 500, 1000, 3000),
    ],
)
def test_a_zero_stage_holds_what_the_table_says(
    dtype: str, zero_stage: int, weights: int, gradients: int, optimizer: int
) -> None:
    memory = held(dtype, ParallelConfig(zero_stage=zero_stage))
    assert (memory.weights, memory.gradients, memory.optimizer) == (weights, gradients, optimizer)


def test_the_carry_is_that_of_all_groups_of_lanes() -> None:
    stage = Stage(MODEL, range(3))
    fresh = stage.fresh_carry(LANES, torch.device("cpu"), torch.bfloat16)
    size = sum(tensor.nbytes for tensor in fresh.tensors().values())
    assert held("bfloat16", ParallelConfig()).carry == size
    assert held("bfloat16", ParallelConfig(micro_batches=8)).carry == 8 * size
    assert held("bfloat16", ParallelConfig(micro_batches=8, micro_batch_axis="segments")).carry == size


def test_earlier_stages_keep_more_micro_batches_and_never_more_than_there_are() -> None:
    def kept(number: int, micro_batches: int) -> int:
        parallel = ParallelConfig(pipeline=3, micro_batches=micro_batches)
        return predict(replace(MODEL, recurrent_layers=()), parallel, number).activations

    assert (kept(0, 8), kept(0, 2)) == (3 * kept(0, 1), 2 * kept(0, 1))
    assert (kept(1, 8), kept(2, 8)) == (2 * kept(1, 1), kept(2, 1))


def test_a_step_has_room_for_its_gradients_once_more_but_not_beside_activations() -> None:
    memory = held("bfloat16", ParallelConfig(), parameters=10**9)
    fixed = memory.weights + memory.gradients + memory.optimizer + memory.carry
    assert memory.step == 4 * 10**9
    assert memory.total == fixed + memory.step


@pytest.mark.parametrize("settings", [{"zero_stage": 3, "offload": "all"}, {"zero_stage": 1, "offload": "optimizer"}])
def test_what_is_not_covered_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"without model\.feedback and without parallel\.offload"):
        held("bfloat16", ParallelConfig(**settings))
    with pytest.raises(ValueError, match=r"without model\.feedback and without parallel\.offload"):
        memory_of_rank(replace(MODEL, feedback=True), ParallelConfig(), SEGMENT, LANES, 1, 0, 0)
