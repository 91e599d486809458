"""`evaluate`: from run folders to figures, JSON and a picture; and what it refuses before it scores anything."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from brt_dist.checkpoint import files
from brt_dist.data.atomic_file import write_json
from brt_dist.data.errors import BadInput
from brt_dist.data.token_shards import ShardRow, TokenShards, file_hash, manifest_hash, write_shard
from brt_dist.inference.documents import score_documents
from brt_dist.inference.evaluate import evaluate
from brt_dist.model.config import ModelConfig
from brt_dist.model.transformer import BlockRecurrentTransformer

VOCABULARY, EOS = 13, 1
MODEL: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "dim": 16, "num_layers": 2, "num_heads": 2, "head_dim": 8, "mlp_dim": 32},
    **{"window": 4, "num_states": 4, "recurrent_layers": [1]},
}
LENGTHS = {"train": [9, 30], "test": [45, 6, 0, 21, 13]}


def make_shards(folder: Path, seed: int = 0, vocabulary: int = VOCABULARY, texts: bool = True) -> Path:
    """A shard folder as preprocessing leaves it, or an import without a tokenizer; with an empty validation split."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    rows = [
        ShardRow(
            f"{split}-{index}",
            "",
            split,
            (3 * n + 1) * texts,
            (n + 1) * texts,
            generator.integers(2, VOCABULARY, n).astype("u2"),
        )
        for split, lengths in LENGTHS.items()
        for index, n in enumerate(lengths)
    ]
    entry = write_shard(folder / "0.arrow", rows, vocabulary)
    (folder / "tokenizer.model").write_bytes(b"a tokenizer")
    tokenizer = {"file": "tokenizer.model", "hash": file_hash(folder / "tokenizer.model"), "eos": EOS}
    tokenizer |= {} if texts else {"file": None}
    counts = {"format": 1, "vocab_size": vocabulary, "documents": len(rows)}
    manifest = {**counts, "tokenizer": tokenizer, "shards": [vars(entry)]}
    write_json(folder / "manifest.json", {**manifest, "hash": manifest_hash(manifest)})
    return folder


def make_run(
    folder: Path, shards: Path, seed: int = 0, steps: tuple[int, ...] = (6,), segment: int = 8, **changes: Any
) -> Path:
    """A run folder as training leaves it, with a checkpoint at each of `steps`, each of another model."""
    model = {**MODEL, **changes}
    folder.mkdir(parents=True)
    config = {"model": model, "data": {"shards": "", "segment": segment}, "shards": {"dir": str(shards)}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for step in steps:
        partial = files.begin(folder, step)
        files.write_tensors(partial, files.PARAMETERS, dict(make_model(model, seed + step).named_parameters()))
        files.finish(partial, {"step": step})
    return folder


def make_model(model: dict[str, Any], seed: int) -> BlockRecurrentTransformer:
    torch.manual_seed(seed)
    return BlockRecurrentTransformer(ModelConfig(**model))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return make_shards(tmp_path / "shards")


def test_the_figures_are_those_of_the_newest_checkpoint_on_all_documents_of_the_split(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "runs" / "a", shards, steps=(2, 6))
    path = evaluate([run])
    assert path == run / "evaluation" / "test.json"
    assert path.with_suffix(".png").stat().st_size > 10_000
    report = json.loads(path.read_text())
    (entry,) = report["runs"]
    assert (entry["run"], entry["label"], entry["step"], entry["clear_carry_every"]) == (str(run), "a", 6, None)
    assert (entry["number_of_documents"], entry["tokens"]) == (5, sum(n + 1 for n in LENGTHS["test"]))
    assert entry["bytes"] == sum(3 * n + 1 for n in LENGTHS["test"])
    documents = TokenShards.open(shards).split("test")
    nats = score_documents(make_model(MODEL, 6), documents, EOS, lanes=1, segment=8)
    bits = [document.sum(dtype=np.float64) / math.log(2) for document in nats]
    assert [document["bits"] for document in entry["documents"]] == pytest.approx(bits, rel=1e-5)
    assert [document["id"] for document in entry["documents"]] == [f"test-{i}" for i in range(5)]
    assert entry["bits_per_byte"] == pytest.approx(sum(bits) / entry["bytes"], rel=1e-5)
    printed = capsys.readouterr().out
    value, error = entry["bits_per_byte"], entry["bits_per_byte_standard_error"]
    assert f"{value:.4f} ± {error:.4f}" in printed
    assert str(path) in printed
    assert str(path.with_suffix(".png")) in printed


def test_with_clearing_every_run_is_scored_twice_on_the_same_axes(tmp_path: Path, shards: Path) -> None:
    a, b = (make_run(tmp_path / "runs" / name, shards, seed) for seed, name in enumerate("ab"))
    out = tmp_path / "out"
    path = evaluate([a, b], clear_carry_every=8, out=out)
    assert sorted(p.name for p in out.iterdir()) == ["test-cleared-8.json", "test-cleared-8.png"]
    report = json.loads(path.read_text())
    assert [(Path(run["run"]).name, run["clear_carry_every"]) for run in report["runs"]] == [
        ("a", None),
        ("a", 8),
        ("b", None),
        ("b", 8),
    ]
    assert report["runs"][0]["bits_per_token"] != report["runs"][1]["bits_per_token"]
    difference = report["runs"][1]["bits_per_token"] - report["runs"][0]["bits_per_token"]
    assert report["differences"][0]["bits_per_token"] == pytest.approx(difference)


def test_lanes_and_segment_change_no_figure(tmp_path: Path, shards: Path) -> None:
    run = make_run(tmp_path / "a", shards)
    found = []
    for number, (lanes, segment) in enumerate([(None, None), (1, 16), (5, 8)]):
        path = evaluate([run], out=tmp_path / str(number), lanes=lanes, segment=segment)
        found.append(json.loads(path.read_text())["runs"][0]["bits_per_token"])
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


def test_where_texts_are_not_known_bits_per_byte_and_word_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_shards(tmp_path / "imported", texts=False)
    path = evaluate([make_run(tmp_path / "runs" / "a", shards)])
    (entry,) = json.loads(path.read_text())["runs"]
    assert (entry["bytes"], entry["bits_per_byte"], entry["bits_per_word"]) == (0, None, None)
    assert entry["bits_per_token"] > 0
    assert f"{entry['tokens']:,} tokens, bytes and words not known; " in capsys.readouterr().out


def test_a_repeated_evaluation_gives_the_same_bytes(tmp_path: Path, shards: Path) -> None:
    run = make_run(tmp_path / "a", shards)
    paths = [evaluate([run], out=tmp_path / name) for name in ("one", "two")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_runs_of_the_same_name_are_told_apart_by_their_path(tmp_path: Path, shards: Path) -> None:
    runs = [make_run(tmp_path / parent / "run", shards, seed) for seed, parent in enumerate("xy")]
    report = json.loads(evaluate(runs, out=tmp_path / "out").read_text())
    assert [run["label"] for run in report["runs"]] == [str(run) for run in runs]


def test_the_baseline_and_the_recurrent_model_can_have_different_windows(tmp_path: Path, shards: Path) -> None:
    recurrent = make_run(tmp_path / "recurrent", shards)
    baseline = make_run(tmp_path / "baseline", shards, recurrent_layers=[], window=8, segment=8)
    report = json.loads(evaluate([recurrent, baseline], clear_carry_every=8).read_text())
    assert len(report["runs"]) == 4


Refused = Callable[[Path, Path], dict[str, Any]]
REFUSALS: dict[str, tuple[Refused, str]] = {
    "a folder that is not there": (lambda t, s: {"runs": [t / "nowhere"]}, "no run folder .*nowhere"),
    "a folder without config.yaml": (lambda t, s: {"runs": [s]}, "shards is not a run folder: it has no config.yaml"),
    "a run without a checkpoint": (lambda t, s: {"runs": [make_run(t / "a", s, steps=())]}, "no finished checkpoint"),
    "no run at all": (lambda t, s: {"runs": []}, "no run folder was named"),
    "a run named twice": (lambda t, s: {"runs": [make_run(t / "a", s), t / "a"]}, "named twice"),
    "an empty split": (
        lambda t, s: {"runs": [make_run(t / "a", s)], "split": "validation"},
        r"split validation .* no documents \(documents: train 2, validation 0, test 5\)",
    ),
    "a split that does not exist": (lambda t, s: {"runs": [make_run(t / "a", s)], "split": "tset"}, "tset.*test"),
    "clearing inside a block": (
        lambda t, s: {"runs": [make_run(t / "a", s)], "clear_carry_every": 6},
        "every 6 tokens.* 4",
    ),
    "a segment that is no whole number of blocks": (
        lambda t, s: {"runs": [make_run(t / "a", s)], "segment": 10},
        "segment of 10 .* 4",
    ),
    "no lanes": (lambda t, s: {"runs": [make_run(t / "a", s)], "lanes": 0}, "0 lanes .* 5 documents"),
    "runs on different shards": (
        lambda t, s: {"runs": [make_run(t / "a", s), make_run(t / "b", make_shards(t / "other", seed=1))]},
        "different shards.* hash .* has ",
    ),
    "shards of another vocabulary": (
        lambda t, s: {"runs": [make_run(t / "a", make_shards(t / "other", vocabulary=16))]},
        "vocabulary of 13, .* 16",
    ),
    "an unknown model key": (lambda t, s: {"runs": [make_run(t / "a", s, steps=(), num_state=4)]}, "num_state"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_evaluated_is_refused_in_one_line_and_nothing_is_written(
    case: str, tmp_path: Path, shards: Path
) -> None:
    make, line = REFUSALS[case]
    arguments = make(tmp_path, shards)
    out = tmp_path / "out"
    with pytest.raises(BadInput, match=line) as refused:
        evaluate(**arguments, out=out)
    assert "\n" not in str(refused.value)
    assert not out.exists()


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path, shards: Path) -> None:
    run = make_run(tmp_path / "a", shards)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["dim"] = 24
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    line = r"step-00000006 does not fit the model of .*config.yaml: it has embedding.weight of shape \(13, 16\) "
    with pytest.raises(BadInput, match=line + r"instead of \(13, 24\)$"):
        evaluate([run], out=tmp_path / "out")


def test_a_checkpoint_of_another_gate_is_refused_with_the_tensors_that_lack_and_are_too_many(
    tmp_path: Path, shards: Path
) -> None:
    run = make_run(tmp_path / "a", shards)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["gate"] = "lstm"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    gate = r"layers\.1\.cell\.update\.gate"
    lacks = rf"it lacks {gate}\.input_bias_D \(2 more tensors\)"
    surplus = rf"has besides {gate}\.bias_D \(1 more tensor\)"
    with pytest.raises(BadInput, match=rf"{lacks} and {surplus}$"):
        evaluate([run], out=tmp_path / "out")


def test_a_model_whose_losses_are_no_numbers_is_not_reported(tmp_path: Path, shards: Path) -> None:
    run = make_run(tmp_path / "a", shards, steps=())
    model = make_model(MODEL, 0)
    torch.nn.init.constant_(model.embedding.weight, math.nan)
    partial = files.begin(run, 3)
    files.write_tensors(partial, files.PARAMETERS, dict(model.named_parameters()))
    files.finish(partial, {"step": 3})
    tokens = sum(n + 1 for n in LENGTHS["test"])
    with pytest.raises(BadInput, match=f"{tokens} of {tokens} tokens a loss that is not a finite number"):
        evaluate([run], out=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_damaged_newer_checkpoint_is_passed_over_and_said_so(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "a", shards, steps=(2, 6))
    damaged = files.folder_of(run, 6) / files.PARAMETERS
    damaged.write_bytes(damaged.read_bytes()[:-1])
    report = json.loads(evaluate([run], out=tmp_path / "out").read_text())
    assert report["runs"][0]["step"] == 2
    assert "step-00000006" in capsys.readouterr().err


def test_progress_goes_to_standard_error_and_ends_at_the_whole(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate([make_run(tmp_path / "a", shards)], out=tmp_path / "out")
    captured = capsys.readouterr()
    assert "scoring a: 90 of 90 tokens (100%)" in captured.err
    assert "scoring" not in captured.out
