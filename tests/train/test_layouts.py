"""Every layout computes what one plain torch loop does: losses, gradient norms, parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from training_runs import ADAFACTOR, BFLOAT16, STEPS, Runs

from brt_dist.checkpoint.files import load_carry, load_optimizer, load_parameters, read_facts
from brt_dist.data.lanes import plan_lanes
from brt_dist.data.loader import read_batch
from brt_dist.data.token_shards import TokenShards
from brt_dist.inference.documents import ChosenDocuments, score_documents
from brt_dist.model.initialization import initialize
from brt_dist.model.transformer import BlockRecurrentTransformer
from brt_dist.parallel.config import ParallelConfig
from brt_dist.run_config import RunConfig
from brt_dist.train.engine import deepspeed_config
from brt_dist.train.optimizer import build_adamw, learning_rate

LAYOUTS = ["plain", "micro_batches_2_zero_2", "zero_0", "micro_batches_2_zero_0"]
TOLERANCE = 1e-5


def plain_loop(config: RunConfig, shards: Path, clip_norm: float) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, norms before clipping and final parameters of a training loop without DeepSpeed, all lanes at once."""
    opened = TokenShards.open(shards, "none")
    documents = opened.split("train")
    data = config.data
    plan = plan_lanes(documents.lengths, data.lanes, data.segment, config.model.window, seed=data.seed)
    model = BlockRecurrentTransformer(config.model)
    initialize(model, config.train.seed)
    optimizer = build_adamw(dict(model.named_parameters()), config.optimizer)
    losses, norms, carry = [], [], None
    for step in range(1, config.train.steps + 1):
        batch = read_batch(documents, plan, opened.eos, step - 1, range(data.lanes))
        nats, _, carry = model.loss(batch.tokens_BL, batch.targets_BL, carry, batch.starts_BC)
        loss = nats / batch.predicted
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.train.steps, config.optimizer) * group["lr_ratio"]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def test_one_process_equals_a_plain_torch_loop(alone: Runs, shards: Path):
    config = alone.loaded()
    losses, norms, parameters = plain_loop(config, shards, config.train.clip_norm)
    for name in ("plain", "zero_0"):
        assert alone.losses(name) == pytest.approx(losses, rel=TOLERANCE)
        assert alone.norms(name) == pytest.approx(norms, rel=TOLERANCE)
        trained = load_parameters(alone.checkpoint(name))
        assert largest_difference(trained, parameters) < 2e-6
    assert losses[-1] < losses[0] - 0.1


def test_clipping_acts_in_these_runs(alone: Runs, shards: Path):
    config = alone.loaded()
    assert min(alone.norms("plain")) > config.train.clip_norm
    losses, _, parameters = plain_loop(config, shards, clip_norm=1e9)
    assert largest_difference(load_parameters(alone.checkpoint("plain")), parameters) > 1e-4
    assert alone.losses("plain") != pytest.approx(losses, rel=TOLERANCE)


def test_documents_start_inside_segments_in_these_runs(alone: Runs, shards: Path):
    config = alone.loaded()
    lengths = TokenShards.open(shards, "none").split("train").lengths
    plan = plan_lanes(lengths, config.data.lanes, config.data.segment, config.model.window, seed=config.data.seed)
    pieces = [piece for step in range(STEPS) for lane in plan.at(step).pieces for piece in lane]
    assert sum(piece.offset == 0 and piece.column > 0 for piece in pieces) > 5
    assert sum(piece.offset > 0 for piece in pieces) > 20


@pytest.mark.parametrize("ranks", ["alone", "pair", "four"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_losses_norms_and_parameters_of_one_process(
    ranks: str, layout: str, alone: Runs, request: pytest.FixtureRequest
):
    runs: Runs = request.getfixturevalue(ranks)
    assert runs.losses(layout) == pytest.approx(alone.losses("plain"), rel=TOLERANCE)
    assert runs.norms(layout) == pytest.approx(alone.norms("plain"), rel=TOLERANCE)
    ours, theirs = runs.checkpoint(layout), alone.checkpoint("plain")
    assert largest_difference(load_parameters(ours), load_parameters(theirs)) < 1e-5
    assert largest_difference(load_optimizer(ours), load_optimizer(theirs)) < 1e-5
    lanes = range(alone.loaded().data.lanes)
    assert largest_difference(load_carry(ours, lanes), load_carry(theirs, lanes)) < 1e-4
    assert read_facts(ours)["tokens"] == read_facts(theirs)["tokens"]


def test_four_micro_batches_give_the_losses_and_norms_of_one(alone: Runs):
    assert alone.losses("micro_batches_4") == pytest.approx(alone.losses("plain"), rel=TOLERANCE)
    assert alone.norms("micro_batches_4") == pytest.approx(alone.norms("plain"), rel=TOLERANCE)


@pytest.mark.parametrize(("name", "tolerance"), [("adafactor", TOLERANCE), ("muon", 2e-3)])
def test_an_optimizer_of_whole_matrices_gives_the_losses_and_norms_of_one_process_in_two(
    name: str, tolerance: float, alone: Runs, pair: Runs
):
    """Muon orthogonalises in bfloat16, which magnifies the order of a sum: measured 5e-6 and 1.2e-3."""
    assert pair.losses(name) == pytest.approx(alone.losses(name), rel=tolerance)
    assert pair.norms(name) == pytest.approx(alone.norms(name), rel=tolerance)
    ours, theirs = load_parameters(pair.checkpoint(name)), load_parameters(alone.checkpoint(name))
    assert largest_difference(ours, theirs) < tolerance


@pytest.mark.parametrize(("name", "fall"), [("adafactor", 0.3), ("muon", 0.2)])
def test_a_dozen_steps_reduce_the_loss(name: str, fall: float, alone: Runs):
    """Adafactor with the paper's schedule and no clipping; measured 0.39 and 0.31."""
    assert alone.losses(name)[-1] < alone.losses(name)[0] - fall


def test_norms_are_told_without_clipping(alone: Runs):
    assert alone.loaded(*ADAFACTOR).train.clip_norm == 0
    assert alone.norms("adafactor")[0] == pytest.approx(alone.norms("plain")[0], rel=TOLERANCE)
    assert min(alone.norms("adafactor")) > 0.1


def test_dropout_draws_the_same_masks_in_every_layout(alone: Runs, pair: Runs):
    assert pair.losses("dropout") == pytest.approx(alone.losses("dropout"), rel=TOLERANCE)
    assert pair.norms("dropout") == pytest.approx(alone.norms("dropout"), rel=TOLERANCE)
    assert alone.losses("dropout") != pytest.approx(alone.losses("plain"), rel=1e-3)


def test_metrics_hold_one_line_per_step_with_what_a_step_is(alone: Runs):
    lines = alone.metrics("plain")
    config = alone.loaded()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["lr"] for line in lines] == [learning_rate(s, STEPS, config.optimizer) for s in range(1, STEPS + 1)]
    for before, line in zip([{"tokens": 0}, *lines], lines, strict=False):
        predicted = line["tokens"] - before["tokens"]
        assert 0 < predicted <= config.data.lanes * config.data.segment
        assert line["tokens_per_second"] == pytest.approx(predicted / line["step_seconds"])
        assert 0 < line["data_seconds"] < line["step_seconds"]
        assert "mfu" not in line


def test_the_checkpoint_holds_parameters_and_moments_whole_in_float32(pair: Runs):
    model = BlockRecurrentTransformer(pair.loaded().model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    parameters = load_parameters(pair.checkpoint("plain"))
    assert {name: tensor.shape for name, tensor in parameters.items()} == shapes
    moments = load_optimizer(pair.checkpoint("plain"))
    assert {name: tensor.shape for name, tensor in moments.items()} == {
        f"{name}/{moment}": shape for name, shape in shapes.items() for moment in ("exp_avg", "exp_avg_sq")
    }
    assert {tensor.dtype for tensor in [*parameters.values(), *moments.values()]} == {torch.float32}
    assert [path.name for path in sorted(pair.checkpoint("plain").glob("carry*"))] == [
        "carry-00000-00004.safetensors",
        "carry-00004-00008.safetensors",
    ]


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16_zero_0"])
def test_bfloat16_trains_like_float32(name: str, alone: Runs):
    """Losses within 0.02 nats, three times what was measured; the state stays float32, the cache does not."""
    assert alone.losses(name) == pytest.approx(alone.losses("plain"), abs=0.02)
    assert alone.losses(name) != alone.losses("plain")
    checkpoint = alone.checkpoint(name)
    carry = load_carry(checkpoint, range(8))
    assert {tensor.dtype for name, tensor in carry.items() if name.endswith(".state")} == {torch.float32}
    assert {tensor.dtype for name, tensor in carry.items() if not name.endswith(".state")} == {torch.bfloat16}
    parameters = load_parameters(checkpoint)
    assert {tensor.dtype for tensor in parameters.values()} == {torch.float32}
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in parameters.values())


def test_the_first_bfloat16_step_is_the_same_at_zero_0_and_1(alone: Runs):
    assert alone.losses("bfloat16_zero_0")[0] == alone.losses("bfloat16")[0]
    assert alone.norms("bfloat16_zero_0")[0] == pytest.approx(alone.norms("bfloat16")[0], rel=TOLERANCE)


def test_an_evaluation_at_zero_0_sees_the_weights_in_bfloat16(alone: Runs, shards: Path):
    opened, config = TokenShards.open(shards, "none"), alone.loaded(BFLOAT16)
    model = BlockRecurrentTransformer(config.model)
    model.load_state_dict(load_parameters(alone.checkpoint("bfloat16_zero_0")))
    chosen = ChosenDocuments(opened.split("validation"), np.arange(5))
    expected = {}
    for dtype in (torch.bfloat16, torch.float32):
        nats = score_documents(model.to(dtype), chosen, opened.eos, lanes=5, segment=32, limit_tokens=100)
        expected[dtype] = float(np.concatenate(nats).mean())
        model.load_state_dict(load_parameters(alone.checkpoint("bfloat16_zero_0")))
    measured = alone.evaluations("bfloat16_zero_0")[-1]["carried"]
    assert measured == pytest.approx(expected[torch.bfloat16], rel=1e-6)
    assert measured != pytest.approx(expected[torch.float32], rel=1e-6)


def test_a_run_prints_its_size_its_steps_and_nothing_else(alone: Runs):
    for name in ("plain", "bfloat16"):
        lines = (alone.folder / f"{name}.txt").read_text().splitlines()
        assert len(lines) == 4, lines
        assert " parameters, data ranks: 1, on cpu, 8 lanes x 32 tokens a step, " in lines[0]
        assert lines[1].startswith("padding: ")
        assert lines[2].startswith("step 1/12  loss ")
        assert lines[3].startswith("step 12/12  loss ")


def test_a_run_names_the_keys_that_its_optimizer_does_not_use(alone: Runs):
    lines = (alone.folder / "adafactor.txt").read_text().splitlines()
    unused = "does not use optimizer.embedding_lr_ratio, optimizer.eps"
    assert lines[2] == f"optimizer adafactor with schedule rsqrt {unused}"
    assert "does not use" not in (alone.folder / "muon.txt").read_text()


def test_deepspeeds_settings_follow_from_ours():
    parallel = ParallelConfig(zero_stage=2, micro_batches=4)
    config = deepspeed_config(parallel, 0.5, torch.bfloat16, micro_batch_lanes=3)
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"]["stage"] == 2
    assert config["bf16"]["enabled"]
    assert not deepspeed_config(parallel, 0.5, torch.float32, 3)["bf16"]["enabled"]
    # At ZeRO-0 it is handed float32 weights, and clipping is ours.
    unsharded = deepspeed_config(ParallelConfig(zero_stage=0), 0.5, torch.bfloat16, 3)
    assert not unsharded["bf16"]["enabled"]
    assert unsharded["gradient_clipping"] == 0
