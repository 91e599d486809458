"""Every file under configs/ is a run or a part of runs that loads; the paper's rows differ in what their names say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from no_memory import count_parameters
from paper_sizes import CELLS, FAMILY, FEEDBACK, TALL, WIDTHS

from brt_dist.run_config import RunConfig, load_run_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PAPER = CONFIGS / "paper"
PARTS = PAPER / "parts"
FILES = sorted(CONFIGS.rglob("*.yaml"))
ROWS = {path.stem: path for path in sorted(PAPER.glob("*.yaml"))}
SIZES = {path.stem: path for path in sorted((PAPER / "sizes").glob("*.yaml"))}
TINY = {path.stem: path for path in sorted((PAPER / "tiny").glob("*.yaml"))}
TOKENS_PER_STEP = 131_072

SLIDE_12L = {"model.recurrent_layers": []}
SLIDE_13L = SLIDE_12L | {"model.num_layers": 13}
# What each row of the paper's main table changes of Rec:fixed:skip, and how many parameters it then has.
TABLE: dict[str, tuple[dict[str, Any], int]] = {
    "rec_fixed_skip": ({}, CELLS["fixed", "skip"]),
    "rec_fixed_dual": ({"model.cell": "dual"}, CELLS["fixed", "dual"]),
    "rec_fixed_single": ({"model.cell": "single"}, CELLS["fixed", "single"]),
    "rec_lstm_skip": ({"model.gate": "lstm"}, CELLS["lstm", "skip"]),
    "rec_lstm_dual": ({"model.gate": "lstm", "model.cell": "dual"}, CELLS["lstm", "dual"]),
    "rec_lstm_single": ({"model.gate": "lstm", "model.cell": "single"}, CELLS["lstm", "single"]),
    "rec_fixed_skip_feedback": ({"model.feedback": True}, CELLS["fixed", "skip"] + FEEDBACK),
    "rec_lstm_skip_feedback": ({"model.gate": "lstm", "model.feedback": True}, CELLS["lstm", "skip"] + FEEDBACK),
    "slide_12l": (SLIDE_12L, FAMILY["160m"][0]),
    "slide_13l": (SLIDE_13L, FAMILY["160m"][1]),
    "xl_512": (SLIDE_13L | {"data.segment": 512, "data.lanes": 256}, FAMILY["160m"][1]),
    "xl_1024": (SLIDE_13L | {"model.window": 1024, "data.segment": 1024, "data.lanes": 128}, FAMILY["160m"][1]),
    "xl_2048": (SLIDE_13L | {"model.window": 2048, "data.segment": 2048, "data.lanes": 64}, FAMILY["160m"][1]),
}
TALL_RECURRENT = {"model.num_layers": 24, "model.recurrent_layers": [9, 19]}
# Further sizes: the row each is of, the widths it has, what else it changes, and how many parameters it then has.
FURTHER: dict[str, tuple[str, str, dict[str, Any], int]] = {
    **{
        f"{row}_{size}": (row, size, {}, FAMILY[size][place])
        for place, row in enumerate(("slide_12l", "slide_13l", "rec_fixed_skip"))
        for size in WIDTHS
        if size != "160m"
    },
    "rec_fixed_skip_650m_tall": ("rec_fixed_skip", "320m", TALL_RECURRENT, TALL["320m"][0]),
    "rec_fixed_skip_1300m_tall": ("rec_fixed_skip", "650m", TALL_RECURRENT, TALL["650m"][0]),
    "slide_26l_650m": ("slide_12l", "320m", {"model.num_layers": 26}, TALL["320m"][1]),
    "slide_26l_1300m": ("slide_12l", "650m", {"model.num_layers": 26}, TALL["650m"][1]),
}
# All that tiny.yaml may change: sizes, data and rhythm, but neither layers nor cells.
SHRUNK = (
    *("model.dim", "model.num_heads", "model.head_dim", "model.mlp_dim", "model.window", "model.num_states"),
    *("model.vocab_size", "tokenizer.vocab_size", "model.dtype", "data.shards", "data.segment", "data.lanes"),
    *("optimizer.lr", "optimizer.warmup_steps"),
    *("train.steps", "train.save_every", "train.evaluate_every", "train.evaluate_documents", "train.evaluate_tokens"),
)


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(""))


def flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Sections as one dict with dotted keys."""
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}


def resolved(config: RunConfig) -> dict[str, Any]:
    """All keys of a run but the folder it writes to."""
    values = flat(config.as_dict())
    del values["run.dir"]
    return values


def differences(path: Path, other: Path) -> dict[str, Any]:
    """What a run has otherwise than another, whatever their folders."""
    values, others = resolved(load_run_config(path)), resolved(load_run_config(other))
    return {key: value for key, value in values.items() if value != others[key]}


def widths(size: str) -> dict[str, int]:
    return dict(zip(("model.dim", "model.num_heads", "model.head_dim", "model.mlp_dim"), WIDTHS[size], strict=True))


def own(path: Path) -> dict[str, Any]:
    """What stands in a file itself, `include` too."""
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def includes(path: Path) -> list[Path]:
    named = own(path).get("include", [])
    return [path.parent / other for other in ([named] if isinstance(named, str) else named)]


def given(path: Path) -> dict[str, Any]:
    """What a file gives with its includes, by dotted key."""
    values = own(path)
    values.pop("include", None)
    beneath: dict[str, Any] = {}
    for other in includes(path):
        beneath |= given(other)
    return beneath | flat(values)


def composed(folder: Path, *paths: Path) -> RunConfig:
    """The run that includes `paths` in this order."""
    file = folder / "composed.yaml"
    file.write_text(yaml.safe_dump({"include": [str(path) for path in paths]}), encoding="utf-8")
    return load_run_config(file)


def is_part(path: Path) -> bool:
    return path.parent.name == "parts"


# --- every file ---


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_file_loads_begins_with_what_it_is_and_builds_a_model(path: Path) -> None:
    config = load_run_config(path)
    config.check_world(config.parallel.tensor * config.parallel.pipeline)
    assert count_parameters(config.model) > 0
    if not is_part(path):
        config.require("data.shards", "run.dir")
        assert config.optimizer.ignored() == []
    if path.parent != PAPER / "tiny":
        assert path.read_text(encoding="utf-8").startswith("# ")


def test_no_two_runs_write_to_one_folder() -> None:
    folders = [load_run_config(path).run.dir for path in FILES if not is_part(path)]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_file_says_again_what_it_includes(path: Path) -> None:
    beneath: dict[str, Any] = {}
    for other in includes(path):
        beneath |= given(other)
    values = own(path)
    values.pop("include", None)
    assert [key for key, value in flat(values).items() if key in beneath and beneath[key] == value] == []


def test_no_two_files_say_the_same() -> None:
    said = [yaml.safe_dump({key: values for key, values in own(path).items() if key != "run"}) for path in FILES]
    assert len(set(said)) == len(said)


def test_no_two_runs_are_the_same_run() -> None:
    runs = [yaml.safe_dump(resolved(load_run_config(path))) for path in FILES if not is_part(path)]
    assert len(set(runs)) == len(runs)


def test_every_part_is_included_or_offered() -> None:
    reached = {part.resolve() for path in FILES for part in includes(path)}
    stems = ("tiny_adamw", "corpus_arxiv", "corpus_github", "corpus_pg19_bytes")
    alternatives = {PARTS / f"{stem}.yaml" for stem in stems}
    assert {path for path in PARTS.iterdir() if path not in reached} == alternatives


# --- the paper's rows ---


def test_there_is_a_file_for_every_row_and_size() -> None:
    assert set(ROWS) == set(TABLE)
    assert set(TINY) == set(TABLE)
    assert set(SIZES) == set(FURTHER)
    assert {f"size_{size}" for size in WIDTHS} == {path.stem for path in PARTS.glob("size_*.yaml")}


@pytest.mark.parametrize("row", TABLE)
def test_a_row_differs_from_the_papers_main_model_in_what_its_name_says(row: str) -> None:
    changes, parameters = TABLE[row]
    assert differences(ROWS[row], ROWS["rec_fixed_skip"]) == changes
    assert count_parameters(load_run_config(ROWS[row]).model) == parameters


@pytest.mark.parametrize("run", FURTHER)
def test_a_further_size_differs_from_its_row_in_width_and_depth_alone(run: str) -> None:
    row, size, changes, parameters = FURTHER[run]
    ordinary = load_run_config(ROWS[row])
    expected = {key: value for key, value in widths(size).items() if value != resolved(ordinary)[key]}
    assert differences(SIZES[run], ROWS[row]) == expected | changes
    assert count_parameters(load_run_config(SIZES[run]).model) == parameters


def test_the_main_table_is_trained_by_the_papers_recipe() -> None:
    run = load_run_config(ROWS["rec_fixed_skip"])
    assert (run.optimizer.name, run.optimizer.schedule, run.optimizer.lr) == ("adafactor", "rsqrt", 1.0)
    assert (run.optimizer.warmup_steps, run.train.steps, run.model.dropout) == (1000, 500_000, 0.05)
    assert (run.data.segment, run.model.window, run.model.num_states) == (4096, 512, 512)
    assert (run.model.num_layers, run.model.recurrent_layers) == (12, (9,))
    assert (run.model.vocab_size, run.tokenizer.vocab_size) == (32_128, 32_128)


@pytest.mark.parametrize("path", [*ROWS.values(), *SIZES.values()], ids=name)
def test_every_row_learns_from_as_many_tokens_a_step(path: Path) -> None:
    run = load_run_config(path)
    assert run.data.lanes * run.data.segment == TOKENS_PER_STEP


@pytest.mark.parametrize("path", [*ROWS.values(), *SIZES.values(), *TINY.values()], ids=name)
def test_a_segment_is_one_window_in_xl_rows_and_eight_in_all_others(path: Path) -> None:
    run = load_run_config(path)
    is_xl = path.stem.startswith("xl_")
    assert run.data.segment == (1 if is_xl else 8) * run.model.window
    assert bool(run.model.recurrent_layers) == path.stem.startswith("rec_")


@pytest.mark.parametrize(("row", "size"), list(product(ROWS, WIDTHS)))
def test_every_row_can_have_every_size(tmp_path: Path, row: str, size: str) -> None:
    run = resolved(composed(tmp_path, ROWS[row], PARTS / f"size_{size}.yaml"))
    assert run == resolved(load_run_config(ROWS[row])) | widths(size)


def test_a_composed_size_has_the_papers_number_of_parameters(tmp_path: Path) -> None:
    for size, (_, thirteen, recurrent) in FAMILY.items():
        part = PARTS / f"size_{size}.yaml"
        assert count_parameters(composed(tmp_path, ROWS["xl_2048"], part).model) == thirteen
        assert count_parameters(composed(tmp_path, ROWS["rec_fixed_skip"], part).model) == recurrent


@pytest.mark.parametrize(
    ("part", "alternative"),
    [
        ("optimizer_adafactor", "optimizer_adamw"),
        ("optimizer_adafactor", "tiny_adamw"),
        ("corpus_pg19", "corpus_arxiv"),
        ("corpus_pg19", "corpus_github"),
        ("corpus_pg19", "corpus_pg19_bytes"),
    ],
)
def test_an_alternative_leaves_nothing_of_the_part_it_replaces(part: str, alternative: str) -> None:
    assert set(given(PARTS / f"{part}.yaml")) <= set(given(PARTS / f"{alternative}.yaml"))


def test_a_corpus_must_be_named_before_it_is_prepared() -> None:
    assert {load_run_config(path).corpus.path for path in ROWS.values()} == {""}


# --- the same rows on a laptop ---


@pytest.mark.parametrize("row", TABLE)
def test_a_tiny_row_keeps_its_layers_cells_and_proportions(row: str) -> None:
    full, tiny = load_run_config(ROWS[row]), load_run_config(TINY[row])
    assert set(differences(TINY[row], ROWS[row])) <= set(SHRUNK)
    assert tiny.model.window * 32 == full.model.window
    assert tiny.model.num_states * 32 == full.model.num_states
    assert tiny.data.segment * 32 == full.data.segment
    assert tiny.data.segment * tiny.data.lanes * 64 == TOKENS_PER_STEP
    assert count_parameters(tiny.model) < 1_500_000


@pytest.mark.parametrize("row", TABLE)
def test_a_tiny_row_leaves_its_warm_up_early_with_either_optimizer(tmp_path: Path, row: str) -> None:
    adafactor, adamw = load_run_config(TINY[row]), composed(tmp_path, TINY[row], PARTS / "tiny_adamw.yaml")
    assert (adafactor.optimizer.name, adamw.optimizer.name) == ("adafactor", "adamw")
    for run in (adafactor, adamw):
        assert run.optimizer.warmup_steps <= run.train.steps / 3
        assert run.optimizer.ignored() == []


def test_adamw_takes_steps_of_the_same_relative_size_at_both_widths(tmp_path: Path) -> None:
    for row, part in ((ROWS["rec_fixed_skip"], "optimizer_adamw"), (TINY["rec_fixed_skip"], "tiny_adamw")):
        run = composed(tmp_path, row, PARTS / f"{part}.yaml")
        matrix, embedding = run.model.dim**-0.5, 1.0
        assert run.optimizer.lr / matrix == pytest.approx(0.032)
        assert run.optimizer.lr * run.optimizer.embedding_lr_ratio / embedding == pytest.approx(0.032)


def test_tiny_rows_read_the_shards_of_the_quickstart() -> None:
    quickstart = load_run_config(CONFIGS / "quickstart" / "recurrent.yaml")
    for path in TINY.values():
        tiny = load_run_config(path)
        assert tiny.data.shards == quickstart.data.shards
        assert tiny.model.vocab_size == quickstart.model.vocab_size


# --- what is written about them ---


def test_the_table_of_the_readme_names_every_run_with_its_parameters() -> None:
    text = (CONFIGS / "README.md").read_text(encoding="utf-8")
    for run, (_, parameters) in TABLE.items():
        assert re.search(rf"^\| .*`{run}\.yaml` \|.* {parameters / 1e6:.1f} M \|", text, re.MULTILINE), run
    for run, (*_, parameters) in FURTHER.items():
        assert re.search(rf"`{run}` {parameters / 1e6:.1f} M\b", text), run


def test_the_first_lines_of_a_file_name_its_parameters() -> None:
    for run, parameters in {**{r: p for r, (_, p) in TABLE.items()}, **{r: f[-1] for r, f in FURTHER.items()}}.items():
        first = (ROWS | SIZES)[run].read_text(encoding="utf-8").split("\n\n")[0]
        assert f"{parameters / 1e6:.1f} M" in first, run
