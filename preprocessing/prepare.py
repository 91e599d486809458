"""From corpora to token shards: survey, tokenizer, one shard for each unit of work, manifest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from brt_dist.data.atomic_file import whole_file, write_json
from brt_dist.data.errors import BadInput
from brt_dist.data.token_shards import LEDGER, MANIFEST, SPLITS, TokenShards, file_hash, writing
from brt_dist.data.tokenizer import HARD_TEXTS, Tokenizer, byte_tokenizer, train_tokenizer
from preprocessing.config import (
    DEFAULT_VOCAB_SIZE,
    CorpusConfig,
    DocumentsConfig,
    ShardsConfig,
    SplitsConfig,
    TokenizerConfig,
)
from preprocessing.corpora import list_units, read_unit
from preprocessing.documents import Document
from preprocessing.ledger import Ledger, check_settings
from preprocessing.lengths import draw_lengths, lengths_by_corpus
from preprocessing.manifest import TOKENIZER, make_manifest
from preprocessing.ranks import Ranks
from preprocessing.repeats import Repeats, find_repeats
from preprocessing.report import Progress, Reporter
from preprocessing.sample import Block, Sample
from preprocessing.shard_unit import Recipe, ShardReport, shard_name, write_unit
from preprocessing.survey import Survey, check_ids_differ, survey_unit
from preprocessing.units import Units

REPEATS = "repeats.npy"
# Bytes from which on it is worth a word that one core alone would work for more than a minute.
LARGE = 200_000_000


@dataclass(frozen=True)
class _Job:
    """What the steps of one `prepare` share; every rank has the same."""

    corpora: Mapping[str, CorpusConfig]
    documents: DocumentsConfig
    tokenizer: TokenizerConfig
    splits: SplitsConfig
    folder: Path
    units: Units
    settings: dict[str, Any]
    ranks: Ranks
    reporter: Reporter


def prepare(
    corpora: Mapping[str, CorpusConfig],
    documents: DocumentsConfig,
    tokenizer: TokenizerConfig,
    splits: SplitsConfig,
    shards: ShardsConfig,
    *,
    threads: int = 1,
    check_round_trip: bool = False,
    plot: bool = False,
    ranks: Ranks | None = None,
    reporter: Reporter | None = None,
) -> Path:
    """Make the shard folder `shards.dir` from corpora, by name, and return the path of its manifest.

    Takes up an unfinished run where it stopped, and does nothing to a finished one. Equal settings and files give equal
    bytes, whatever the machine and the number of threads and ranks; every rank calls this together.
    threads: of each rank. check_round_trip: decode every document again and compare, not only some. plot: draw the
    lengths of documents into the folder.
    Raises BadInput for what is wrong with the corpora, the settings or the folder; nothing is overwritten then.
    """
    if not shards.dir:
        raise BadInput("shards.dir is empty: name the folder for the shards")
    folder = Path(shards.dir)
    ranks = ranks or Ranks()
    reporter = reporter or Reporter(Console(quiet=ranks.rank > 0))
    units = ranks.lead(lambda: list_units(corpora, shards.unit_bytes, folder.resolve(), reporter.say))
    settings = ranks.lead(lambda: _settings(corpora, documents, tokenizer, splits, shards, units))
    job = _Job(corpora, documents, tokenizer, splits, folder, units, settings, ranks, reporter)
    if ranks.size == threads == 1 and units.size > LARGE and (cores := os.cpu_count() or 1) > 1:
        reporter.say(
            f"one of {cores} cores is at work; `mpiexec -n {cores} brt prepare ...` shares it, to the same bytes"
        )
    if not ranks.lead(lambda: _is_finished(job, check_round_trip)):
        _make(job, check_round_trip, threads)
    ranks.lead(lambda: _report(job, plot))
    return folder / MANIFEST


def _make(job: _Job, check_round_trip: bool, threads: int) -> None:
    ranks, ledger = job.ranks, Ledger(job.folder, job.settings)
    with ExitStack() as stack:
        ranks.lead(lambda: stack.enter_context(ledger.held()))
        if not ranks.lead(lambda: _is_surveyed(job, ledger)):
            _survey(job, ledger)
        model, repeats = ranks.lead(lambda: ((job.folder / TOKENIZER).read_bytes(), _load_repeats(job, ledger)))
        recipe = Recipe(job.corpora, job.documents, job.splits, Tokenizer(model), repeats, check_round_trip, threads)
        _write_shards(job, recipe, ledger)
        ranks.lead(lambda: _finish(job, recipe.tokenizer, ledger))


def _settings(
    corpora: Mapping[str, CorpusConfig],
    documents: DocumentsConfig,
    tokenizer: TokenizerConfig,
    splits: SplitsConfig,
    shards: ShardsConfig,
    units: Units,
) -> dict[str, Any]:
    """All that decides the bytes of the shards.

    Where a corpus lies does not, nor where a tokenizer comes from that is brought along: its content counts.
    """
    by_name = {
        name: {**{key: value for key, value in asdict(corpus).items() if key != "path"}, "pattern": corpus.pattern}
        for name, corpus in corpora.items()
    }
    brought = {"model": Tokenizer.open(tokenizer.model).hash} if tokenizer.model is not None else None
    return {
        **({"corpus": by_name[""]} if "" in corpora else {"corpora": by_name}),
        "documents": asdict(documents),
        "tokenizer": brought or asdict(tokenizer),
        "splits": asdict(splits),
        "shards": {"unit_bytes": shards.unit_bytes},
        "corpus_files": units.fingerprint(),
    }


def _is_finished(job: _Job, check_round_trip: bool) -> bool:
    """Whether the manifest is there and every file has its hash; damage that the ledger lets us mend is reported."""
    check_settings(job.folder, job.settings)
    if not (job.folder / MANIFEST).exists():
        return False
    job.reporter.say(f"checking the finished shards in {job.folder}")
    try:
        manifest = TokenShards.open(job.folder, verify="full").manifest
    except BadInput as error:
        if not (job.folder / LEDGER).exists():
            raise
        job.reporter.say(f"to be mended: {error}")
        return False
    if check_round_trip and manifest["tokenizer"]["checked_documents"] < manifest["documents"]:
        job.reporter.say("not every document was decoded again: encoding all of them once more")
        return False
    job.reporter.say(f"{job.folder / MANIFEST} is complete: nothing to do")
    return True


def _is_surveyed(job: _Job, ledger: Ledger) -> bool:
    """Whether what the survey made, the tokenizer and the table of repeated texts, is there and whole."""
    made = ((ledger.tokenizer, job.folder / TOKENIZER), (ledger.survey, job.folder / REPEATS))
    return all(
        digest is not None and (not digest or (path.exists() and file_hash(path) == digest)) for digest, path in made
    )


def _load_repeats(job: _Job, ledger: Ledger) -> Repeats:
    return Repeats.load(job.folder / REPEATS) if ledger.survey else find_repeats([])


def _survey(job: _Job, ledger: Ledger) -> None:
    """Read the corpora once and check them; find repeated texts, and make the tokenizer."""
    trained = job.tokenizer.model is None and job.tokenizer.kind != "bytes"
    sample = Sample(job.tokenizer.sample_bytes if trained else 0, job.tokenizer.seed)
    surveys: dict[int, Survey] = {}

    def work(number: int, tell: Callable[[Progress], None]) -> Survey:
        return survey_unit(job.units[number], job.corpora, job.documents, job.splits, sample, tell)

    with job.reporter.steps("reading", job.units.sizes) as steps:
        job.ranks.divide(range(len(job.units)), work, surveys.__setitem__, steps.advance)

    def judge() -> Repeats:
        in_order = [surveys[number] for number in range(len(job.units))]
        repeats = find_repeats([survey.contents for survey in in_order])
        _check_not_empty(job, in_order)
        check_ids_differ(np.concatenate([survey.id_hashes for survey in in_order]), lambda: _names(job))
        return repeats

    repeats = job.ranks.lead(judge)
    blocks = [block for block in sample.agreed(job.ranks) if _is_for_training(block, repeats)]

    def keep() -> None:
        content = _tokenizer(job, [block.text for block in blocks])
        # One may be left of a run that was stopped before it could tell of it, with other settings perhaps.
        (job.folder / REPEATS).unlink(missing_ok=True)
        ledger.add_survey(repeats.save(job.folder / REPEATS) if len(repeats) else "")
        with writing(job.folder / TOKENIZER), whole_file(job.folder / TOKENIZER) as temporary:
            temporary.write_bytes(content)
        ledger.add_tokenizer(file_hash(job.folder / TOKENIZER))

    job.ranks.lead(keep)


def _is_for_training(block: Block, repeats: Repeats) -> bool:
    """Whether no held-back document has the text that a block is of."""
    found = repeats.find(block.content)
    return found is None or found[0] == "train"


def _tokenizer(job: _Job, sample: list[str]) -> bytes:
    """The content of the tokenizer's file: brought along, of bytes, or trained on the sample."""
    config = job.tokenizer
    if config.model is not None:
        return _brought_tokenizer(config)
    if config.kind == "bytes":
        return byte_tokenizer()
    text = f"{sum(map(len, sample)) / 1e6:.1f} million characters"
    job.reporter.say(f"training a {config.kind} tokenizer of {config.vocab_size} pieces on {text}")
    began = time.monotonic()
    content = train_tokenizer(sample, config.kind, config.vocab_size)
    job.reporter.say(f"trained in {time.monotonic() - began:.1f} s")
    model = Tokenizer(content)
    if failed := [text for text in HARD_TEXTS if not model.is_exact(text)]:
        raise BadInput(f"the tokenizer just trained does not give back {failed[0]!r}")
    return content


def _brought_tokenizer(config: TokenizerConfig) -> bytes:
    path = Path(str(config.model))
    size = Tokenizer.open(path).vocab_size
    if config.vocab_size not in (size, DEFAULT_VOCAB_SIZE):
        asked = config.vocab_size
        raise BadInput(
            f"tokenizer.vocab_size is {asked}, but {path} has {size} pieces (leave tokenizer.vocab_size out)"
        )
    return path.read_bytes()


def _check_not_empty(job: _Job, surveys: Sequence[Survey]) -> None:
    found = sum(len(survey.id_hashes) for survey in surveys)
    kept = sum(len(survey.contents) for survey in surveys)
    train = sum(int((survey.contents["split"] == SPLITS.index("train")).sum()) for survey in surveys)
    place = " and ".join(map(_place, job.corpora.values()))
    if found == 0:
        raise BadInput(f"corpus is empty: no documents in {place}")
    if kept == 0:
        all_of_them = f"all {found} documents of {place} are" if found > 1 else f"the only document of {place} is"
        raise BadInput(f"corpus is empty: {all_of_them} empty or not valid UTF-8")
    if train == 0:
        fall = (
            f"none of the {kept} documents of {place} falls" if kept > 1 else f"the only text, {place}, does not fall"
        )
        raise BadInput(f"{fall} into the train split, so there is nothing to train on")


def _place(corpus: CorpusConfig) -> str:
    root = Path(corpus.root)
    return str(root) if root.is_file() else f"{corpus.root} (pattern {corpus.pattern!r})"


def _names(job: _Job) -> Iterator[tuple[str, str]]:
    for unit in job.units:
        for document in read_unit(job.corpora, unit, job.documents):
            if isinstance(document, Document):
                yield document.id, document.source


def _write_shards(job: _Job, recipe: Recipe, ledger: Ledger) -> None:
    """One shard for each unit, by whichever rank is free; those that are finished are kept after a look at them."""
    finished = {
        number: report.shard.hash
        for number, report in ledger.reports.items()
        if report.all_checked or not recipe.check_all
    }
    if finished:
        job.reporter.say(f"{len(finished)} of {len(job.units)} shards are finished and kept")

    def work(item: tuple[int, str | None], tell: Callable[[Progress], None]) -> ShardReport | None:
        unit = job.units[item[0]]
        path = job.folder / shard_name(unit)
        if item[1] is not None and path.is_file() and file_hash(path) == item[1]:
            tell(Progress(unit.corpus, unit.size, 0, 0))
            return None
        return write_unit(unit, recipe, job.folder, tell)

    def take(item: tuple[int, str | None], report: ShardReport | None) -> None:
        if report is None:
            return
        if report.inexact and job.tokenizer.model is None:
            lost = report.inexact[0]
            raise BadInput(f"document {lost['id']!r} ({lost['source']}) {lost['why']}")
        ledger.add_unit(item[0], report)

    items = [(number, finished.get(number)) for number in range(len(job.units))]
    with job.reporter.steps("encoding", job.units.sizes) as steps:
        job.ranks.divide(items, work, take, steps.advance)


def _finish(job: _Job, model: Tokenizer, ledger: Ledger) -> None:
    ledger.put_in_order()
    manifest = make_manifest(job.folder, ledger.reports.values(), model, job.tokenizer, job.settings)
    with writing(job.folder / MANIFEST):
        write_json(job.folder / MANIFEST, manifest)


def _report(job: _Job, plot: bool) -> None:
    shards = TokenShards.open(job.folder, verify="none")
    lengths = lengths_by_corpus(shards.split("all"))
    job.reporter.summary(shards.manifest, lengths)
    if plot:
        job.reporter.say(f"{draw_lengths(lengths, job.folder)} shows the lengths of documents")
