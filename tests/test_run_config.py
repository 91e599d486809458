"""A configuration is read whole, and whatever is wrong with it is one line that names the key and the numbers."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import yaml

from brt_dist.run_config import ConfigError, RunConfig, load_run_config


def load(folder: Path, text: str, *overrides: str) -> RunConfig:
    """The configuration in `text`, as a file of `folder`."""
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_run_config(path, overrides)


def refusal(folder: Path, text: str, *overrides: str) -> str:
    """The one line with which `text` and `overrides` are refused."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


# --- files, includes, overrides ---


def test_an_empty_file_gives_the_defaults_of_every_section(tmp_path: Path):
    assert load(tmp_path, "").train.steps == RunConfig().train.steps


def test_values_of_the_file_reach_the_typed_sections(tmp_path: Path):
    config = load(tmp_path, "model: {recurrent_layers: [1, 3], num_layers: 4}\noptimizer: {betas: [0.8, 0.9]}\n")
    assert config.model.recurrent_layers == (1, 3)
    assert config.optimizer.betas == (0.8, 0.9)


def test_an_override_wins_over_the_file_and_the_last_override_over_the_first(tmp_path: Path):
    config = load(tmp_path, "train: {steps: 5, seed: 3}\n", "train.steps=6", "train.steps=7")
    assert (config.train.steps, config.train.seed) == (7, 3)


def test_an_override_holds_lists_null_and_values_with_an_equals_sign(tmp_path: Path):
    overrides = ["model.recurrent_layers=[0, 2]", "model.num_layers=3", "tokenizer.model=null", "run.dir=runs/lr=1"]
    config = load(tmp_path, "tokenizer: {model: old.model}\n", *overrides)
    assert config.model.recurrent_layers == (0, 2)
    assert config.tokenizer.model is None
    assert config.run.dir == "runs/lr=1"


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "3.0e-4", ".3e-3", "0.0003"])
def test_every_way_to_write_a_small_number_is_a_number(tmp_path: Path, text: str):
    assert load(tmp_path, f"optimizer: {{lr: {text}}}\n").optimizer.lr == 3e-4
    assert load(tmp_path, "", f"optimizer.lr={text}").optimizer.lr == 3e-4


def test_a_whole_number_in_scientific_notation_counts_steps(tmp_path: Path):
    assert load(tmp_path, "train: {steps: 1e5}\n").train.steps == 100_000


def test_the_including_file_wins_over_its_includes_and_a_later_include_over_an_earlier(tmp_path: Path):
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "first.yaml").write_text("train: {steps: 1, seed: 1, save_every: 1}\n")
    (shared / "second.yaml").write_text("train: {steps: 2, seed: 2}\n")
    config = load(tmp_path, "include: [shared/first.yaml, shared/second.yaml]\ntrain: {steps: 3}\n")
    assert (config.train.steps, config.train.seed, config.train.save_every) == (3, 2, 1)


def test_an_include_is_found_beside_the_file_that_names_it(tmp_path: Path):
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "middle.yaml").write_text("include: base.yaml\n")
    (shared / "base.yaml").write_text("train: {steps: 9}\n")
    assert load(tmp_path, "include: shared/middle.yaml\n").train.steps == 9


def test_files_that_include_each_other_are_refused(tmp_path: Path):
    (tmp_path / "other.yaml").write_text("include: run.yaml\n")
    assert "includes itself" in refusal(tmp_path, "include: other.yaml\n")


# --- what is wrong, in one line ---


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"absent\.yaml.*No such file"):
        load_run_config(tmp_path / "absent.yaml", [])


def test_a_missing_include_is_named_with_the_file_that_asks_for_it(tmp_path: Path):
    line = refusal(tmp_path, "include: absent.yaml\n")
    assert "absent.yaml" in line
    assert "run.yaml" in line


def test_broken_yaml_names_its_line(tmp_path: Path):
    assert "run.yaml line 3" in refusal(tmp_path, "model:\n  dim: 8\n  : [\n")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"model: \xff\n")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 7"):
        load_run_config(path, [])


def test_a_key_that_stands_twice_is_refused_with_its_second_line(tmp_path: Path):
    line = refusal(tmp_path, "train:\n  steps: 1\n  seed: 0\n  steps: 2\n")
    assert "line 4" in line
    assert "'steps'" in line


def test_a_misspelt_key_names_the_nearest_right_one(tmp_path: Path):
    expected = "model has no key 'num_state'; did you mean 'num_states'?"
    assert refusal(tmp_path, "model: {num_state: 8}\n").endswith(expected)
    assert refusal(tmp_path, "", "model.num_state=8") == expected


def test_a_key_of_another_section_is_pointed_to(tmp_path: Path):
    assert refusal(tmp_path, "", "train.lr=1") == "train has no key 'lr'; did you mean optimizer.lr?"


def test_a_key_like_no_other_lists_the_keys_of_its_section(tmp_path: Path):
    line = refusal(tmp_path, "", "splits.qqqq=1")
    assert line == "splits has no key 'qqqq'; its keys are validation, test"


def test_a_misspelt_section_names_the_nearest_right_one(tmp_path: Path):
    assert "there is no section 'modle'; did you mean 'model'?" in refusal(tmp_path, "modle: {dim: 8}\n")


def test_a_section_like_no_other_lists_the_sections(tmp_path: Path):
    assert "the sections are model, corpus" in refusal(tmp_path, "", "zzzz.dim=8")


def test_a_misspelt_key_of_an_include_names_the_included_file(tmp_path: Path):
    (tmp_path / "base.yaml").write_text("train: {step: 9}\n")
    assert "base.yaml: train has no key 'step'" in refusal(tmp_path, "include: base.yaml\n")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.steps=many", 'train.steps is "many"; expected an integer'),
        ("train.steps=true", "train.steps is true; expected an integer"),
        ("train.steps=1.5", "train.steps is 1.5; expected an integer"),
        ("train.steps=", "train.steps is null; expected an integer"),
        ('optimizer.lr="3e-4"', 'optimizer.lr is "3e-4"; expected a number'),
        ("optimizer.lr=.nan", "optimizer.lr is NaN; expected a number"),
        ("optimizer.betas=[0.9]", "optimizer.betas is [0.9]; expected a list of 2: a number, a number"),
        ("model.recurrent_layers=3", "model.recurrent_layers is 3; expected a list, each of them an integer"),
        ("model.recurrent_layers=[a]", 'model.recurrent_layers is ["a"]; expected a list, each of them an integer'),
        ("model.feedback=1", "model.feedback is 1; expected true or false"),
        ("model.position=absolute", 'model.position is "absolute"; expected one of t5, rotary, none'),
        ("tokenizer.model=5", "tokenizer.model is 5; expected text or null"),
        ("run.dir=2024", "run.dir is 2024; expected text"),
    ],
)
def test_a_value_of_the_wrong_type_names_key_value_and_type(tmp_path: Path, override: str, line: str):
    assert refusal(tmp_path, "", override) == line


def test_a_section_without_keys_below_it_is_refused(tmp_path: Path):
    assert "model is 3; expected keys under it" in refusal(tmp_path, "model: 3\n")


@pytest.mark.parametrize("override", ["train.steps", "nothing=3", "=", ""])
def test_an_override_of_another_form_is_refused(tmp_path: Path, override: str):
    assert refusal(tmp_path, "", override) == f"override {override!r} is not of the form section.key=value"


def test_an_override_of_broken_yaml_is_refused(tmp_path: Path):
    assert "model.recurrent_layers=[1," in refusal(tmp_path, "", "model.recurrent_layers=[1,")


def test_a_refusal_of_a_section_keeps_its_line(tmp_path: Path):
    line = refusal(tmp_path, "", "model.num_layers=4", "model.recurrent_layers=[4]")
    assert "recurrent_layers holds 4" in line
    assert "4 layers" in line


# --- sections that do not fit together ---


def test_a_segment_that_is_no_multiple_of_the_window_names_both(tmp_path: Path):
    line = refusal(tmp_path, "", "data.segment=100", "model.window=32")
    assert "100" in line
    assert "32" in line


def test_one_block_a_segment_is_refused_with_recurrent_layers_and_allowed_without(tmp_path: Path):
    sizes = ["data.segment=32", "model.window=32"]
    line = refusal(tmp_path, "", *sizes)
    assert "32" in line
    assert "64" in line
    assert load(tmp_path, "", *sizes, "model.recurrent_layers=[]").data.segment == 32


def test_lanes_that_micro_batches_do_not_divide_name_both(tmp_path: Path):
    line = refusal(tmp_path, "", "data.lanes=8", "parallel.micro_batches=3")
    assert line == "data.lanes is 8, which parallel.micro_batches 3 does not divide"


def test_lanes_that_data_ranks_and_micro_batches_do_not_divide_name_all(tmp_path: Path):
    config = load(tmp_path, "", "data.lanes=8", "parallel.micro_batches=2")
    config.check_world(1)
    config.check_world(4)
    with pytest.raises(ConfigError, match=r"lanes is 8, which 3 data ranks x parallel\.micro_batches 2 = 6 does not"):
        config.check_world(3)
    with pytest.raises(ConfigError, match="= 16 does not"):
        config.check_world(8)


def test_two_vocabulary_sizes_that_differ_name_both(tmp_path: Path):
    line = refusal(tmp_path, "", "model.vocab_size=300", "tokenizer.vocab_size=301")
    assert line == "model.vocab_size is 300, but tokenizer.vocab_size is 301"


@pytest.mark.parametrize("owner", ["model", "tokenizer"])
def test_the_vocabulary_size_given_in_one_section_holds_in_the_other(tmp_path: Path, owner: str):
    config = load(tmp_path, "", f"{owner}.vocab_size=300")
    assert (config.model.vocab_size, config.tokenizer.vocab_size) == (300, 300)


def test_the_model_follows_the_tokenizer_where_neither_size_is_given(tmp_path: Path):
    config = load(tmp_path, "")
    assert config.model.vocab_size == config.tokenizer.vocab_size == RunConfig().tokenizer.vocab_size


def test_training_reads_the_prepared_shards_unless_it_names_others(tmp_path: Path):
    assert load(tmp_path, "", "shards.dir=shards/books").data.shards == "shards/books"
    assert load(tmp_path, "", "shards.dir=shards/books", "data.shards=other").data.shards == "other"


def test_a_required_key_without_a_value_is_named(tmp_path: Path):
    config = load(tmp_path, "run: {dir: runs/a}\n")
    config.require("run.dir")
    with pytest.raises(ConfigError, match=r"corpus\.path is not set"):
        config.require("run.dir", "corpus.path")


# --- out again ---


def test_a_resolved_configuration_survives_yaml_and_loads_as_itself(tmp_path: Path):
    overrides = ["optimizer.lr=1e-7", "model.vocab_size=300", "shards.dir=s", "corpus.exclude=[test, '*.txt']"]
    config = load(tmp_path, "model: {recurrent_layers: [1, 3], num_layers: 4}\n", *overrides)
    again = load(tmp_path, yaml.safe_dump(config.as_dict()))
    assert again == config
    assert again.as_dict() == config.as_dict()


def test_a_resolved_configuration_is_plain_and_holds_every_section(tmp_path: Path):
    resolved = load(tmp_path, "").as_dict()
    assert resolved["model"]["recurrent_layers"] == [9]
    assert set(resolved) == set(RunConfig.__dataclass_fields__)


@pytest.mark.parametrize("scale", [0.5, 0.0, 1000.0])
def test_a_loss_scale_that_would_round_gradients_is_refused(tmp_path: Path, scale: float):
    assert f"train.loss_scale is {scale}; it must be a power of 2" in refusal(tmp_path, "", f"train.loss_scale={scale}")


def test_a_configuration_cannot_be_changed_after_loading(tmp_path: Path):
    config = load(tmp_path, "")
    with pytest.raises(FrozenInstanceError):
        config.train = config.train  # type: ignore[misc]


def test_an_override_without_a_section_names_where_its_key_stands(tmp_path: Path):
    assert refusal(tmp_path, "", "steps=3").endswith("did you mean train.steps?")


def test_seeds_and_learning_rates_have_limits(tmp_path: Path):
    for override in ("train.seed=99999999999999999999", "data.seed=-1", "optimizer.lr=1e38"):
        assert override.split("=")[0] in refusal(tmp_path, "", override)


# --- weights of corpora ---


CORPORA = "corpora:\n  books: {reader: pg19, path: pg19}\n  code: {path: repositories, group: top}\n"


def test_corpora_have_names_and_the_keys_of_a_corpus(tmp_path: Path):
    overrides = ["corpora.code.exclude=[test]", "corpora.mail={reader: jsonl, path: mail.jsonl}"]
    corpora = load(tmp_path, CORPORA, *overrides).corpora_by_name()
    assert {name: (corpus.reader, corpus.path) for name, corpus in corpora.items()} == {
        "books": ("pg19", "pg19"),
        "code": ("files", "repositories"),
        "mail": ("jsonl", "mail.jsonl"),
    }
    assert (corpora["code"].group, corpora["code"].exclude) == ("top", ("test",))


def test_a_single_corpus_has_no_name(tmp_path: Path):
    corpora = load(tmp_path, "corpus: {path: books}\n").corpora_by_name()
    assert [(name, corpus.path) for name, corpus in corpora.items()] == [("", "books")]


def test_corpora_come_back_from_the_written_configuration(tmp_path: Path):
    config = load(tmp_path, CORPORA)
    assert load(tmp_path, yaml.safe_dump(config.as_dict())) == config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("corpora.code.redaer=files", "corpora.code has no key 'redaer'; did you mean 'reader'?"),
        ("corpora.code.group=3", "corpora.code.group is 3; expected one of file, folder, top"),
        ("corpora.code=files", 'corpora.code is "files"; expected keys under it: reader, path'),
        ("corpora=[books]", "override 'corpora=[books]' is not of the form section.key=value"),
        ("corpora.my books.path=x", "is no name of letters, digits, '_' and '-'"),
    ],
)
def test_what_is_wrong_with_one_of_several_corpora_is_named(tmp_path: Path, override: str, said: str):
    assert said in refusal(tmp_path, CORPORA, override)


def test_a_corpus_and_corpora_or_a_corpus_without_a_path_are_refused(tmp_path: Path):
    for text, said in (
        (CORPORA + "corpus: {path: more}\n", "corpus.path is more, but there are corpora too (books, code)"),
        (CORPORA + "  mail: {reader: jsonl}\n", "corpora.mail.path is not set"),
        ("", "corpus.path is not set"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            load(tmp_path, text).corpora_by_name()


def test_a_vocabulary_of_bytes_has_the_size_that_the_model_gets_too(tmp_path: Path):
    config = load(tmp_path, "tokenizer: {kind: bytes}\n")
    assert (config.model.vocab_size, config.tokenizer.vocab_size) == (260, 260)
    assert "a vocabulary of bytes has 260" in refusal(tmp_path, "tokenizer: {kind: bytes, vocab_size: 300}\n")


def test_weights_of_corpora_are_set_one_by_one_or_together(tmp_path: Path):
    text = "data: {weights: {books: 1, code: 0.5}}\n"
    assert load(tmp_path, text).data.weights == {"books": 1, "code": 0.5}
    assert load(tmp_path, text, "data.weights.code=3").data.weights == {"books": 1, "code": 3}
    assert load(tmp_path, "", "data.weights={books: 0.7, code: 0.3}").data.weights == {"books": 0.7, "code": 0.3}
    assert load(tmp_path, "").data.weights == {}
    # Weights that are given together are all that there are: none of the file's is mixed in unseen.
    assert load(tmp_path, text, "data.weights={wiki: 1}", "data.weights.code=2").data.weights == {"wiki": 1, "code": 2}
    assert load(tmp_path, text, "data.weights={}").data.weights == {}


def test_weights_come_back_from_the_written_configuration(tmp_path: Path):
    config = load(tmp_path, "data: {weights: {books: 1, code: 0.5}}\n")
    assert load(tmp_path, yaml.safe_dump(config.as_dict())) == config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.weights.books=-1", "data.weights.books is -1"),
        ("data.weights.books=0", "data.weights are all 0 (books)"),
        ("data.weights.books=many", 'data.weights is {"books": "many"}; expected names, and for each a number'),
        ("data.weights=[1, 2]", "data.weights is [1, 2]; expected names, and for each a number"),
        ("data.weights.books=.inf", "expected names, and for each a number"),
        ("data.weights={books: 1e308, code: 1e308}", "data.weights (books, code) are too large for their sum"),
    ],
)
def test_weights_that_are_none_are_refused(tmp_path: Path, override: str, said: str):
    assert said in refusal(tmp_path, "", override)
