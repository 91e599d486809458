"""`brt` hands each part what it needs; a user's error is one line and status 2, a bug keeps its traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from brt_dist.cli import main
from brt_dist.data.errors import BadInput
from brt_dist.parallel import process_groups
from brt_dist.parallel.launcher import NAMES

SUBCOMMANDS = ["prepare", "train", "evaluate", "verify", "data", "bench"]
# What is run: of `data` and `bench` their kinds.
DATA = ["data check", "data show", "data import", "data export"]
COMMANDS = [*SUBCOMMANDS[:-2], *DATA, "bench layers", "bench step"]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (name for names in NAMES for name in names):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        "corpus: {path: books}\nshards: {dir: shards/books}\nrun: {dir: runs/a}\n"
        "model: {window: 8, vocab_size: 300}\ndata: {segment: 16, lanes: 4}\n"
    )
    return path


class Recorder:
    """Stands in for a part's function: notes its calls and answers with `answer`, or raises it."""

    def __init__(self, answer: Any = None):
        self.answer = answer
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls.append((arguments, options))
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer(*arguments) if callable(self.answer) else self.answer


Stand = Callable[..., Recorder]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Stand:
    """stand_in("a.b.f", answer) puts a Recorder in the place of function f of module a.b."""

    def put(dotted: str, answer: Any = None) -> Recorder:
        name, _, function = dotted.rpartition(".")
        module = ModuleType(name)
        recorder = Recorder(answer)
        setattr(module, function, recorder)
        monkeypatch.setitem(sys.modules, name, module)
        return recorder

    return put


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int = 2) -> str:
    """The one line on standard error with which `arguments` end, without its newline."""
    assert main(arguments) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("brt: ")
    return captured.err.removesuffix("\n")


# --- help ---


@pytest.mark.parametrize("subcommand", COMMANDS)
def test_the_help_of_every_subcommand_has_an_example(subcommand: str, capsys: pytest.CaptureFixture[str]):
    assert main([*subcommand.split(), "--help"]) == 0
    assert f" brt {subcommand} " in capsys.readouterr().out.split("Example", 1)[1]


def test_help_names_every_subcommand_and_no_launcher_option(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {subcommand} " in text for subcommand in SUBCOMMANDS)
    assert "local" not in text
    assert "completion" not in text


def test_help_of_the_module_loads_nothing_slow():
    program = (
        "import sys; from brt_dist.cli import main; main(['--help'])\n"
        "sys.exit(', '.join({'torch', 'numpy', 'pyarrow', 'brt_dist.run_config'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert loaded.stderr.strip() == ""
    shown = subprocess.run([sys.executable, "-m", "brt_dist", "--help"], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("Usage: brt ")


# --- each part gets what it needs ---


def test_prepare_hands_over_the_sections_of_preprocessing(config: Path, stand_in: Stand):
    prepare = stand_in("preprocessing.prepare.prepare")
    assert main(["prepare", str(config), "corpus.reader=jsonl", "splits.test=0.2"]) == 0
    (corpora, documents, tokenizer, splits, shards), options = prepare.calls[0]
    corpus = corpora[""]
    assert (corpus.reader, corpus.path, splits.test, shards.dir) == ("jsonl", "books", 0.2, "shards/books")
    assert (documents.invalid_utf8, tokenizer.vocab_size) == ("fatal", 300)
    assert (options["threads"], options["check_round_trip"], options["plot"]) == (1, False, False)
    assert options["ranks"].size == 1


def test_prepare_takes_its_options_anywhere(config: Path, stand_in: Stand):
    prepare = stand_in("preprocessing.prepare.prepare")
    assert main(["prepare", "--report", "--threads", "3", str(config), "--check-round-trip"]) == 0
    _, options = prepare.calls[0]
    assert (options["threads"], options["check_round_trip"], options["plot"]) == (3, True, True)


LAUNCHER_ARGUMENTS = [
    (["train"], []),
    (["--local_rank=1", "train"], []),
    (["--local_rank", "1", "train"], []),
    (["--local-rank=1", "train"], []),
    (["train", "--local_rank=1"], []),
    (["train"], ["--local_rank", "1"]),
]


@pytest.mark.parametrize(("before", "after"), LAUNCHER_ARGUMENTS)
def test_train_runs_the_same_wherever_a_launcher_puts_its_rank(
    before: list[str], after: list[str], config: Path, stand_in: Stand
):
    train = stand_in("brt_dist.train.trainer.train")
    assert main([*before, str(config), "train.steps=7", *after]) == 0
    (model, data, _parallel, _optimizer, length, run), options = train.calls[0]
    assert (model.window, data.shards, length.steps, run.dir) == (8, "shards/books", 7, "runs/a")
    assert options["resolved"]["train"]["steps"] == 7


def test_evaluate_hands_over_runs_and_options(stand_in: Stand):
    evaluate = stand_in("brt_dist.inference.evaluate.evaluate")
    options = ["--split", "test", "--clear-carry-every", "512", "--out", "o", "--lanes", "3", "--segment", "64"]
    assert main(["evaluate", "runs/a", "runs/b", *options]) == 0
    expected = {"split": "test", "clear_carry_every": 512, "out": Path("o"), "lanes": 3, "segment": 64}
    assert evaluate.calls == [(([Path("runs/a"), Path("runs/b")],), expected)]


@pytest.mark.parametrize(("failing", "status"), [(None, 0), ("a.npz", 1), ("b.npz", 1)])
def test_verify_prints_one_json_line_a_file_and_fails_if_any_file_does(
    failing: str | None, status: int, stand_in: Stand, capsys: pytest.CaptureFixture[str]
):
    stand_in("brt_dist.inference.verify.verify", lambda path: {"file": str(path), "passed": path.name != failing})
    assert main(["verify", "a.npz", "b.npz"]) == status
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == ["a.npz", "b.npz"]


def test_bench_layers_prints_what_was_measured_of_the_model_and_the_segment(
    config: Path, stand_in: Stand, capsys: pytest.CaptureFixture[str]
):
    bench = stand_in("brt_dist.train.bench.bench_layers", {"ratio": 1.5})
    assert main(["bench", "layers", str(config), "model.gate=lstm", "--lanes", "3", "--repeat", "2"]) == 0
    ((model, segment, lanes, repeat), _), *others = bench.calls
    assert (model.gate, model.window, segment, lanes, repeat, others) == ("lstm", 8, 16, 3, 2, [])
    assert json.loads(capsys.readouterr().out) == {"ratio": 1.5}


@pytest.mark.parametrize(("before", "after"), LAUNCHER_ARGUMENTS)
def test_bench_step_prints_one_line_wherever_a_launcher_puts_its_rank(
    before: list[str], after: list[str], config: Path, stand_in: Stand, capsys: pytest.CaptureFixture[str]
):
    bench = stand_in("brt_dist.train.bench.bench_step", {"step_seconds": 0.5})
    words = [word for each in before for word in (["bench", "step"] if each == "train" else [each])]
    assert main([*words, str(config), "parallel.zero_stage=2", "--steps", "4", *after]) == 0
    ((model, segment, lanes, parallel, *_), options) = bench.calls[0]
    assert (model.window, segment, lanes, parallel.zero_stage, options["steps"]) == (8, 16, 4, 2, 4)
    assert options["resolved"]["parallel"]["zero_stage"] == 2
    assert capsys.readouterr().out == '{"step_seconds": 0.5}\n'


def test_bench_step_prints_nothing_in_processes_that_do_not_lead(
    config: Path, stand_in: Stand, capsys: pytest.CaptureFixture[str]
):
    stand_in("brt_dist.train.bench.bench_step", None)
    assert main(["bench", "step", str(config)]) == 0
    assert capsys.readouterr().out == ""


# --- what a user can cause ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Missing command"),
        (["trian", "x"], "'trian'"),
        (["train"], "'CONFIG'"),
        (["train", "--bogus", "x"], "--bogus"),
        (["evaluate"], "'RUN'"),
        (["evaluate", "r", "--lanes", "many"], "'--lanes'"),
        (["evaluate", "r", "--lanes"], "--lanes"),
        (["bench"], "Missing command"),
        (["bench", "stpe", "x"], "'stpe'"),
        (["bench", "layers", "x", "--repeat", "0"], "'--repeat'"),
        (["bench", "step", "x", "--steps", "0"], "'--steps'"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    line = refused(capsys, arguments)
    assert said in line
    assert "--help)" in line


def test_a_misspelt_key_is_one_line(config: Path, capsys: pytest.CaptureFixture[str]):
    line = refused(capsys, ["train", str(config), "model.num_state=8"])
    assert line == "brt: model has no key 'num_state'; did you mean 'num_states'?"


def test_a_missing_configuration_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert "absent.yaml" in refused(capsys, ["prepare", "absent.yaml"])


@pytest.mark.parametrize(
    ("subcommand", "key"),
    [("prepare", "corpus.path"), ("prepare", "shards.dir"), ("train", "data.shards"), ("train", "run.dir")],
)
def test_a_subcommand_names_the_key_that_it_cannot_do_without(
    subcommand: str, key: str, config: Path, capsys: pytest.CaptureFixture[str]
):
    emptied = [f'{key}=""', *(['shards.dir=""'] if key == "data.shards" else [])]
    assert f"{key} is not set" in refused(capsys, [subcommand, str(config), *emptied])


@pytest.mark.parametrize(
    ("command", "function"),
    [(["train"], "brt_dist.train.trainer.train"), (["bench", "step"], "brt_dist.train.bench.bench_step")],
)
@pytest.mark.parametrize(("rank", "size"), [names[:2] for names in NAMES])
def test_processes_that_cannot_share_the_lanes_are_refused_before_anything_is_loaded(
    rank: str,
    size: str,
    command: list[str],
    function: str,
    config: Path,
    stand_in: Stand,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    started = stand_in(function)
    # The others never come.
    monkeypatch.setattr(process_groups, "REFUSING", timedelta(seconds=1))
    monkeypatch.setenv(rank, "0")
    monkeypatch.setenv(size, "3")
    line = refused(capsys, [*command, str(config)])
    assert "lanes is 4" in line
    assert "3 data ranks" in line
    assert started.calls == []


ERRORS = [
    (BadInput("the corpus is empty"), "brt: the corpus is empty"),
    (FileNotFoundError(2, "No such file or directory", "books"), "brt: books: No such file or directory"),
    (PermissionError(13, "Permission denied", "runs/a"), "brt: runs/a: Permission denied"),
    (OSError(28, "No space left on device"), "brt: No space left on device"),
    (BadInput("two\nlines"), "brt: two"),
]


@pytest.mark.parametrize(("error", "line"), ERRORS)
def test_what_a_user_can_mend_is_one_line(
    error: Exception, line: str, config: Path, stand_in: Stand, capsys: pytest.CaptureFixture[str]
):
    stand_in("preprocessing.prepare.prepare", error)
    assert refused(capsys, ["prepare", str(config)]).startswith(line)


def test_a_checkpoint_that_cannot_be_read_is_one_line(
    config: Path, stand_in: Stand, capsys: pytest.CaptureFixture[str]
):
    files = pytest.importorskip("brt_dist.checkpoint.files")
    stand_in("brt_dist.train.trainer.train", files.CheckpointError("checkpoint step-00000006 is cut short"))
    assert refused(capsys, ["train", str(config)]) == "brt: checkpoint step-00000006 is cut short"


def test_a_file_that_holds_no_vectors_is_refused_with_status_two(stand_in: Stand, capsys: pytest.CaptureFixture[str]):
    stand_in("brt_dist.inference.verify.verify", BadInput("a.npz holds no reference vectors"))
    assert refused(capsys, ["verify", "a.npz"]) == "brt: a.npz holds no reference vectors"


@pytest.mark.parametrize("bug", [ValueError("shapes differ"), RuntimeError("x"), OSError(9, "Bad file descriptor")])
def test_a_bug_keeps_its_traceback(bug: Exception, config: Path, stand_in: Stand):
    stand_in("brt_dist.train.trainer.train", bug)
    with pytest.raises(type(bug)):
        main(["train", str(config)])


def test_an_interrupt_is_one_line_and_status_130(config: Path, stand_in: Stand, capsys: pytest.CaptureFixture[str]):
    stand_in("brt_dist.train.trainer.train", KeyboardInterrupt())
    assert refused(capsys, ["train", str(config)], status=130) == "brt: interrupted"


# --- several ranks ---


def test_an_error_that_all_ranks_make_is_told_by_the_first_alone(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(process_groups, "refuse_together", lambda *_: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "num_state" in refused(capsys, ["train", str(config), "model.num_state=8"])
    monkeypatch.setenv("RANK", "1")
    assert main(["train", str(config), "model.num_state=8"]) == 2
    assert capsys.readouterr().err == ""


def test_a_rank_that_meets_no_other_tells_its_error_by_itself(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(process_groups, "refuse_together", lambda *_: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    line = refused(capsys, ["train", str(config), "model.num_state=8"])
    assert line.startswith("brt: rank 1: ")
    assert "num_state" in line


def test_an_error_that_may_be_one_ranks_own_is_told_with_its_number(
    config: Path, stand_in: Stand, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    stand_in("brt_dist.train.trainer.train", FileNotFoundError(2, "No such file or directory", "shards/a.arrow"))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    line = refused(capsys, ["train", str(config)])
    assert line == "brt: rank 3: shards/a.arrow: No such file or directory"
