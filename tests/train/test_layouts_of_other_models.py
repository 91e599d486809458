"""What the parity matrix leaves out: other models, weights that come and go at ZeRO-3, and other precisions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import STEPS, Runs, finished

from brt_dist.checkpoint.files import load_carry, load_parameters, read_facts

TOLERANCE = 1e-5
TENSOR, PIPELINE = "parallel.tensor=2", "parallel.pipeline=2"
SEQUENCE, FULL, SELECTIVE = "parallel.sequence=true", "parallel.recompute=full", "parallel.recompute=selective"
ZERO_3, TWO, FOUR = "parallel.zero_stage=3", "parallel.micro_batches=2", "parallel.micro_batches=4"
EVALUATED = ("train.evaluate_every=6", "train.evaluate_documents=5", "train.evaluate_tokens=100")
# DeepSpeed never takes away parameters of fewer than 100,000 entries; here the embedding and the MLP have more, and
# many parameters have an odd number of them. Of millions of ReLUs a few are so near to zero that the order of a sum
# decides whether they open (measured: three hidden units at step 3); the first steps are exact all the same.
LARGE = (
    *("model.dim=321", "model.mlp_dim=641", "model.num_heads=3", "model.head_dim=81", "model.position=none"),
    *("optimizer.lr=0.0003", *EVALUATED),
)


@dataclass(frozen=True)
class Case:
    """A model, and layouts of two processes of it; tolerance: of all steps but the first two, which must be exact."""

    model: tuple[str, ...]
    layouts: dict[str, tuple[str, ...]]
    tolerance: float = TOLERANCE


CASES = {
    "feedback": Case(("model.feedback=true",), {"tensor": (TENSOR,), "tensor recomputed": (TENSOR, FULL)}),
    "dropout": Case(
        ("model.dropout=0.2", TWO), {"pipeline recomputed": (PIPELINE, FULL), "tensor by tokens": (TENSOR, SEQUENCE)}
    ),
    "rotary": Case(("model.position=rotary",), {"tensor by tokens": (TENSOR, SEQUENCE, SELECTIVE)}),
    "Transformer-XL": Case(
        ("model.recurrent_layers=[]", "data.segment=8", "model.position=none"),
        {"pipeline": (PIPELINE,), "tensor": (TENSOR,)},
    ),
    "untied": Case(
        ("model.tie_embeddings=false", "model.gate=lstm", *EVALUATED),
        {"pipeline": (PIPELINE, TWO), "tensor": (TENSOR,)},
    ),
    "large": Case(
        LARGE,
        {
            "zero 3": (ZERO_3,),
            "zero 3 recomputed": (ZERO_3, FULL),
            "zero 3 selective offloaded": (ZERO_3, SELECTIVE, "parallel.offload=all"),
            "zero 2 offloaded": ("parallel.zero_stage=2", "parallel.offload=optimizer"),
        },
        tolerance=1e-3,
    ),
}
ALL = [(model, layout) for model, case in CASES.items() for layout in case.layouts]
HALVES = ("bfloat16", "float16")
ZERO_STAGES = {f"zero {stage}": (f"parallel.zero_stage={stage}",) for stage in range(4)}
# Tensor ranks are slow in half precision, the more so the smaller their micro-batches.
PRECISIONS = {**ZERO_STAGES, "tensor": (TENSOR, SEQUENCE, TWO), "pipeline": (PIPELINE,)}
FLOAT16 = "model.dtype=float16"
HAS_FLOAT16 = torch.ops.mkldnn._is_mkldnn_fp16_supported()
needs_float16 = pytest.mark.skipif(not HAS_FLOAT16, reason="this processor cannot compute in float16")
# So much that gradients leave float16 in the first steps.
OVERFLOWING = (FLOAT16, FOUR, "train.loss_scale=16777216")

# All runs of two processes by name, and those of the short form.
RUNS = {f"{model} {layout}": (*CASES[model].model, *CASES[model].layouts[layout]) for model, layout in ALL}
RUNS |= {
    f"{dtype} {name}": (f"model.dtype={dtype}", FOUR, *PRECISIONS[name]) for dtype in HALVES for name in PRECISIONS
}
RUNS |= {f"overflow {name}": (*OVERFLOWING, *layout) for name, layout in PRECISIONS.items()}
RUNS |= {"overflow resumed": OVERFLOWING, "large resumed": (*LARGE, ZERO_3)}
SHORT = {
    *("feedback tensor recomputed", "dropout tensor by tokens", "rotary tensor by tokens", "Transformer-XL pipeline"),
    *("untied pipeline", "large zero 3 selective offloaded", "large resumed"),
    *(f"{dtype} {layout}" for dtype in HALVES for layout in ("zero 0", "zero 1", "tensor", "pipeline")),
    *("overflow zero 1", "overflow tensor", "overflow pipeline", "overflow resumed"),
}


def marked(runs: Iterable[Sequence[str]]) -> list[Any]:
    """Parameters whose words together name a run; those that the short form lacks are long."""

    def marks(name: str) -> list[pytest.MarkDecorator]:
        applies = [(pytest.mark.long, name not in SHORT), (needs_float16, FLOAT16 in RUNS[name])]
        return [mark for mark, true in applies if true]

    return [pytest.param(*words, marks=marks(" ".join(words))) for words in runs]


def computable(wanted: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Without what this processor cannot compute."""
    return {name: overrides for name, overrides in wanted.items() if HAS_FLOAT16 or FLOAT16 not in overrides}


@pytest.fixture(scope="module")
def one(folder: Path, shards: Path) -> Runs:
    """Every model in one process, once in float32 and once in each half precision."""
    wanted = {model: case.model for model, case in CASES.items()}
    wanted |= {"float32": (FOUR,)} | {dtype: (f"model.dtype={dtype}", FOUR) for dtype in HALVES}
    wanted |= {"overflow": (*OVERFLOWING, "parallel.zero_stage=0")}
    return finished(Runs(folder / "other models, one process", shards), "python", 1, computable(wanted))


@pytest.fixture(scope="module")
def short_form(folder: Path, shards: Path, one: Runs) -> Runs:
    """Every model and precision in a few layouts; some runs go on from what one process left."""
    runs = Runs(folder / "other models", shards)
    wanted = computable({name: RUNS[name] for name in RUNS if name in SHORT})
    for name in wanted:
        if name.endswith(" resumed"):
            runs.broken_copy(one.folder / name.removesuffix(" resumed"), name)
    return finished(runs, "torchrun", 2, wanted)


@pytest.fixture(scope="module")
def long_form(short_form: Runs) -> Runs:
    """The other layouts beside those of the short form."""
    return finished(short_form, "torchrun", 2, computable({name: RUNS[name] for name in RUNS if name not in SHORT}))


@pytest.fixture
def two(request: pytest.FixtureRequest) -> Runs:
    """The runs of two processes that a test needs: the long form's are trained for its tests alone."""
    runs: Runs = request.getfixturevalue("long_form" if request.node.get_closest_marker("long") else "short_form")
    return runs


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].float() - theirs[name].float()).abs().max()) for name in ours)


def test_the_short_form_has_every_model_and_every_precision():
    assert RUNS.keys() >= SHORT
    for kind in (*CASES, *HALVES, "overflow"):
        assert any(name.startswith(f"{kind} ") for name in SHORT)


@pytest.mark.parametrize(("model", "layout"), marked(ALL))
def test_other_models_give_the_losses_norms_and_parameters_of_one_process(
    model: str, layout: str, one: Runs, two: Runs
):
    name = f"{model} {layout}"
    tolerance = CASES[model].tolerance
    for ours, theirs in ((two.losses(name), one.losses(model)), (two.norms(name), one.norms(model))):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=0)
        assert ours[:2] == pytest.approx(theirs[:2], rel=TOLERANCE, abs=0)
    here, there = two.checkpoint(name), one.checkpoint(model)
    assert largest_difference(load_parameters(here), load_parameters(there)) < tolerance
    assert largest_difference(load_carry(here, range(8)), load_carry(there, range(8))) < 10 * tolerance
    for scored, expected in zip(two.evaluations(name), one.evaluations(model), strict=True):
        assert scored == pytest.approx(expected, abs=tolerance)


def test_a_tied_embedding_is_gathered_for_the_loss_at_zero_3_and_whole_in_the_checkpoint(one: Runs, two: Runs):
    shapes = {name: tensor.shape for name, tensor in load_parameters(two.checkpoint("large resumed")).items()}
    assert shapes["embedding.weight"].numel() > 100_000
    assert "head.weight" not in shapes
    assert [line["step"] for line in two.evaluations("large resumed")] == [6, 12]


def test_a_run_of_one_process_goes_on_at_zero_3(one: Runs, two: Runs):
    ours, theirs = two.metrics("large resumed"), one.metrics("large")
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=1e-3, abs=0)
        # Behind step 5 weights and moments are those of the checkpoint.
        assert [line[key] for line in ours[:7]] == pytest.approx([line[key] for line in theirs[:7]], rel=TOLERANCE)
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(("dtype", "layout"), marked(product(HALVES, PRECISIONS)))
def test_half_precision_trains_like_float32_in_every_layout(dtype: str, layout: str, one: Runs, two: Runs):
    """Measured: losses within 0.0016 nats, norms within 0.7 %."""
    name = f"{dtype} {layout}"
    assert two.losses(name) == pytest.approx(one.losses("float32"), abs=0.005)
    assert two.norms(name) == pytest.approx(one.norms("float32"), rel=0.02)
    assert two.losses(name) != one.losses("float32")
    carry = load_carry(two.checkpoint(name), range(8))
    assert {tensor.dtype for name, tensor in carry.items() if name.endswith(".state")} == {torch.float32}
    assert {tensor.dtype for name, tensor in carry.items() if not name.endswith(".state")} == {getattr(torch, dtype)}


@pytest.mark.parametrize(("dtype", "layout"), marked(product(HALVES, ZERO_STAGES)))
def test_gradients_of_ranks_and_micro_batches_are_added_up_in_float32(dtype: str, layout: str, one: Runs, two: Runs):
    """In half precision two ranks with four micro-batches would be off by a thousandth."""
    first = two.norms(f"{dtype} {layout}")[0]
    assert first == pytest.approx(two.norms(f"{dtype} zero 0")[0], rel=1e-6)
    assert first == pytest.approx(one.norms(dtype)[0], rel=1e-4)


@pytest.mark.parametrize("name", marked([[name] for name in RUNS if name.startswith("overflow")]))
def test_a_step_that_float16_skips_still_advances_carry_and_position(name: str, two: Runs):
    lines = two.metrics(name)
    skipped = [line["step"] for line in lines if line["skipped"]]
    assert skipped[:3] == [1, 2, 3]
    assert len(skipped) < 8
    assert [line["grad_norm"] for line in lines[:3]] == [None] * 3
    assert all(math.isfinite(line["grad_norm"]) for line in lines if not line["skipped"])
    for before, line in pairwise(lines):
        assert line["loss_scale"] == (before["loss_scale"] / 2 if before["skipped"] else before["loss_scale"])
    # The weights stood still, and the lanes read on.
    plain = two.metrics("float16 zero 1")
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in plain]
    assert lines[0]["loss"] == pytest.approx(plain[0]["loss"], abs=1e-3)
    assert lines[1]["loss"] != lines[0]["loss"]
    facts = read_facts(two.checkpoint(name))
    assert (facts["position"], facts["skipped_steps"]) == (STEPS, len(skipped))
    assert facts["optimizer"]["loss_scale"] == lines[-1]["loss_scale"]


@needs_float16
def test_a_float16_run_goes_on_with_its_loss_scale_and_its_count_of_steps(one: Runs, two: Runs):
    ours, theirs = two.metrics("overflow resumed"), one.metrics("overflow")
    assert [line["loss_scale"] for line in ours] == [line["loss_scale"] for line in theirs]
    told = [read_facts(runs.checkpoint(name)) for runs, name in ((two, "overflow resumed"), (one, "overflow"))]
    for fact in ("optimizer", "skipped_steps"):
        assert told[0][fact] == told[1][fact]
    assert told[0]["optimizer"]["good_steps"] > 0
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], abs=0.005)
