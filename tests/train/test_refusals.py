"""What a user can get wrong costs one line and exit status 2, and no file of a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from training_runs import Runs

from brt_dist.cli import main
from brt_dist.data.atomic_file import write_json
from brt_dist.data.token_shards import ShardRow, file_hash, manifest_hash, write_shard

Refused = Callable[..., str]


@pytest.fixture
def runs(tmp_path: Path, shards: Path) -> Runs:
    return Runs(tmp_path / "runs", shards)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """refused(arguments) is the one line on standard error with which `brt` ends, status 2."""

    def call(arguments: list[str]) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith("brt: ")
        assert told.err.count("\n") == 1
        return told.err

    return call


def everything(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file below `folder`."""
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def test_a_vocabulary_that_is_not_the_tokenizers_is_refused_with_both_numbers(runs: Runs, refused: Refused):
    line = refused(runs.command("run", "tokenizer.vocab_size=300"))
    assert "300" in line
    assert "384" in line
    assert not (runs.folder / "run" / "config.yaml").exists()


def test_lanes_that_cannot_be_shared_are_refused_with_both_numbers(runs: Runs, refused: Refused):
    line = refused(runs.command("run", "parallel.micro_batches=3"))
    assert "data.lanes is 8" in line
    assert "parallel.micro_batches 3" in line
    assert not (runs.folder / "run").exists()


@pytest.mark.parametrize("name", ["adafactor", "muon"])
@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_an_optimizer_of_whole_matrices_is_refused_with_the_reason_wherever_zero_cuts_them(
    name: str, stage: int | None, pipeline: int, runs: Runs, refused: Refused
):
    if (stage, pipeline) == (0, 1):
        assert runs.loaded(f"optimizer.name={name}", "parallel.zero_stage=0").optimizer.name == name
        return
    layout = [f"parallel.pipeline={pipeline}"] + ([] if stage is None else [f"parallel.zero_stage={stage}"])
    line = refused(runs.command("run", f"optimizer.name={name}", *layout))
    assert f"optimizer.name is {name}, which looks at whole matrices, and " in line
    if stage == 0:
        assert "parallel.pipeline 2 needs ZeRO, which flattens and cuts them" in line
    else:
        assert f"parallel.zero_stage {1 if stage is None else stage} flattens and cuts them" in line
    assert "set parallel.zero_stage=0, parallel.tensor=1 and parallel.pipeline=1, or optimizer.name=adamw" in line
    assert not (runs.folder / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("parallel.tensor=2",), "1 processes were started, which tensor 2 x pipeline 1 = 2 does not divide"),
        (("parallel.pipeline=2",), "1 processes were started, which tensor 1 x pipeline 2 = 2 does not divide"),
        (("parallel.tensor=4",), "model.num_heads is 2, which parallel.tensor 4 does not divide"),
        (
            ("parallel.tensor=2", "tokenizer.vocab_size=385"),
            "model.vocab_size is 385, which parallel.tensor 2 does not",
        ),
        (("parallel.pipeline=4",), "parallel.pipeline is 4, but there are only 3 layers"),
        (("parallel.pipeline=2", "model.feedback=true"), "set parallel.pipeline=1 or model.feedback=false"),
        (("parallel.pipeline=2", "parallel.zero_stage=2"), "parallel.zero_stage is 2 with parallel.pipeline 2"),
        (("parallel.tensor=2", "parallel.zero_stage=3"), "parallel.zero_stage is 3 with parallel.tensor 2"),
        (("parallel.recompute=ful",), 'parallel.recompute is "ful"; expected one of none, selective, full'),
        (
            ("data.lanes=3", "parallel.micro_batches=2"),
            "data.lanes is 3, which parallel.micro_batches 2 does not divide",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_with_the_numbers(
    overrides: tuple[str, ...], words: str, runs: Runs, refused: Refused
):
    assert words in refused(runs.command("run", *overrides))
    assert not (runs.folder / "run").exists()


def test_micro_batches_along_segments_divide_no_lanes(runs: Runs):
    config = runs.loaded("data.lanes=3", "parallel.micro_batches=2", "parallel.micro_batch_axis=segments")
    config.check_world(3)


def test_a_run_does_not_go_on_with_another_number_of_segments_in_a_step(alone: Runs, refused: Refused):
    before = everything(alone.folder / "plain")
    overrides = ("parallel.micro_batch_axis=segments", "parallel.micro_batches=2")
    line = refused(alone.command("plain", *overrides))
    assert (
        "the number of segments in a step (parallel.micro_batch_axis, parallel.micro_batches) is 1 there and 2" in line
    )
    assert everything(alone.folder / "plain") == before


def test_zero_0_is_refused_in_a_pipeline_with_the_reason(runs: Runs, refused: Refused):
    line = refused(runs.command("run", "parallel.zero_stage=0", "parallel.pipeline=2"))
    assert "parallel.zero_stage is 0 with parallel.pipeline 2" in line
    assert "common gradient norm" in line


def test_a_run_does_not_go_on_with_another_optimizer(alone: Runs, refused: Refused):
    before = everything(alone.folder / "zero_0")
    line = refused(alone.command("zero_0", "parallel.zero_stage=0", "optimizer.name=adafactor"))
    assert "optimizer.name is adamw there and adafactor here" in line
    assert everything(alone.folder / "zero_0") == before


def altered(shards: Path, copy: Path) -> Path:
    """A copy of the shards in which one byte of the last one differs."""
    shutil.copytree(shards, copy)
    shard = sorted(copy.glob("*.arrow"))[-1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return shard


def test_an_altered_shard_is_named_before_anything_is_written(
    runs: Runs, shards: Path, tmp_path: Path, refused: Refused
):
    shard = altered(shards, tmp_path / "copy")
    line = refused(runs.command("run", f"data.shards={shard.parent}"))
    assert shard.name in line
    assert "hash" in line
    assert not (runs.folder / "run" / "config.yaml").exists()


def test_a_run_with_a_checkpoint_stays_as_it_is_when_its_shards_were_altered(
    runs: Runs, alone: Runs, shards: Path, tmp_path: Path, refused: Refused
):
    shard = altered(shards, tmp_path / "copy")
    runs.broken_copy(alone.folder / "plain", "run")
    before = everything(runs.folder / "run")
    refused(runs.command("run", f"data.shards={shard.parent}"))
    after = everything(runs.folder / "run")
    memory = str(runs.folder / "run" / "verified_shards.json")
    assert {name: file for name, file in after.items() if name != memory} == {
        name: file for name, file in before.items() if name != memory
    }


def test_a_folder_without_shards_is_named(runs: Runs, tmp_path: Path, refused: Refused):
    assert str(tmp_path / "nowhere") in refused(runs.command("run", f"data.shards={tmp_path / 'nowhere'}"))
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused(runs.command("run", f"data.shards={tmp_path / 'empty'}"))
    assert not (runs.folder / "run" / "config.yaml").exists()


def test_shards_without_a_training_document_are_refused(runs: Runs, tmp_path: Path, refused: Refused):
    folder = tmp_path / "no training"
    folder.mkdir()
    row = ShardRow("only", "", "validation", 4, 1, np.array([5, 6, 7], dtype=np.uint16))
    entry = write_shard(folder / "0.arrow", [row], 384)
    (folder / "tokenizer.model").write_bytes(b"a tokenizer")
    tokenizer = {"file": "tokenizer.model", "hash": file_hash(folder / "tokenizer.model"), "eos": 1}
    manifest = {"format": 1, "vocab_size": 384, "documents": 1, "tokenizer": tokenizer, "shards": [vars(entry)]}
    write_json(folder / "manifest.json", {**manifest, "hash": manifest_hash(manifest)})
    assert f"the train split of {folder} holds no document" in refused(runs.command("run", f"data.shards={folder}"))


def test_a_finished_run_started_again_changes_nothing(alone: Runs, capsys: pytest.CaptureFixture[str]):
    before = everything(alone.folder / "plain")
    assert main(alone.command("plain")) == 0
    told = capsys.readouterr()
    assert "is finished" in told.out
    assert told.err == ""
    assert everything(alone.folder / "plain") == before


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lr=0.004", "optimizer.lr is 0.003 there and 0.004 here"),
        ("model.num_states=16", "model.num_states is 8 there and 16 here"),
        ("data.seed=1", "data.seed is 0 there and 1 here"),
    ],
)
def test_a_run_folder_of_another_configuration_is_left_alone(override: str, words: str, alone: Runs, refused: Refused):
    before = everything(alone.folder / "plain")
    assert words in refused(alone.command("plain", override))
    assert everything(alone.folder / "plain") == before


def test_a_checkpoint_of_other_documents_is_not_gone_on_with(
    runs: Runs, alone: Runs, corpus: Path, tmp_path: Path, refused: Refused
):
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("".join(f"{line}\n" for line in corpus.read_text().splitlines()[:-3]))
    prepared = tmp_path / "shards"
    settings = ["corpus.reader=jsonl", f"corpus.path={shorter}", f"shards.dir={prepared}"]
    assert main(["prepare", str(runs.config), *settings]) == 0
    runs.broken_copy(alone.folder / "plain", "run")
    metrics = (runs.folder / "run" / "metrics.jsonl").read_bytes()
    line = refused(runs.command("run", f"data.shards={prepared}"))
    assert "was made with other shards: hash " in line
    assert (runs.folder / "run" / "metrics.jsonl").read_bytes() == metrics


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_again_over_them(alone: Runs, refused: Refused):
    folder = shutil.copytree(alone.folder / "plain", alone.folder / "damaged")
    for parameters in folder.glob("checkpoints/*/parameters.safetensors"):
        parameters.write_bytes(parameters.read_bytes()[:100])
    before = everything(folder)
    assert "none of the 3 checkpoints" in refused(alone.command("damaged"))
    assert everything(folder) == before


def test_a_folder_with_checkpoints_but_no_configuration_is_left_alone(alone: Runs, refused: Refused):
    folder = shutil.copytree(alone.folder / "plain", alone.folder / "nameless")
    (folder / "config.yaml").unlink()
    before = everything(folder)
    assert "no config.yaml" in refused(alone.command("nameless"))
    assert everything(folder) == before


def test_a_run_that_has_no_checkpoint_yet_is_not_replaced_by_one_on_other_documents(
    runs: Runs, alone: Runs, corpus: Path, tmp_path: Path, refused: Refused
):
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("".join(f"{line}\n" for line in corpus.read_text().splitlines()[:-3]))
    settings = ["corpus.reader=jsonl", f"corpus.path={shorter}", f"shards.dir={tmp_path / 'shards'}"]
    assert main(["prepare", str(runs.config), *settings]) == 0
    folder = shutil.copytree(alone.folder / "plain", runs.folder / "run")
    shutil.rmtree(folder / "checkpoints")
    before = everything(folder)
    assert "was made with other shards: hash " in refused(runs.command("run", f"data.shards={tmp_path / 'shards'}"))
    assert everything(folder) == before


def test_a_run_folder_that_is_a_file_is_named(runs: Runs, refused: Refused):
    (runs.folder / "run").write_text("")
    assert "is a file" in refused(runs.command("run"))
