"""From a corpus to token shards: survey, tokenizer, one shard for each unit of work, manifest."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brt_dist.data.atomic_file import whole_file, write_json
from brt_dist.data.errors import BadInput
from brt_dist.data.token_shards import LEDGER, MANIFEST, TokenShards, file_hash, writing
from brt_dist.data.tokenizer import HARD_TEXTS, Tokenizer, train_tokenizer
from preprocessing.config import (
    DEFAULT_VOCAB_SIZE,
    CorpusConfig,
    DocumentsConfig,
    ShardsConfig,
    SplitsConfig,
    TokenizerConfig,
)
from preprocessing.corpora import list_units, read_unit
from preprocessing.ledger import Ledger, check_settings
from preprocessing.manifest import TOKENIZER, make_manifest
from preprocessing.report import Reporter
from preprocessing.shard_unit import ShardReport, shard_name, write_unit
from preprocessing.survey import check_ids_differ, survey_unit
from preprocessing.units import Unit, fingerprint


@dataclass(frozen=True)
class _Job:
    """What the steps of one `prepare` share."""

    corpus: CorpusConfig
    documents: DocumentsConfig
    tokenizer: TokenizerConfig
    splits: SplitsConfig
    units: list[Unit]
    folder: Path
    threads: int
    reporter: Reporter

    @property
    def size(self) -> int:
        """Bytes of work."""
        return sum(unit.size for unit in self.units)


def prepare(
    corpus: CorpusConfig,
    documents: DocumentsConfig,
    tokenizer: TokenizerConfig,
    splits: SplitsConfig,
    shards: ShardsConfig,
    *,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> Path:
    """Make the shard folder `shards.dir` from a corpus and return the path of its manifest.

    Takes up an unfinished run where it stopped, and does nothing to a finished one. Equal settings and files give equal
    bytes, whatever the machine and the number of threads (by default every processor this process may use).
    Raises BadInput for what is wrong with the corpus, the settings or the folder; nothing is overwritten then.
    """
    if not shards.dir:
        raise BadInput("shards.dir is empty: name the folder for the shards")
    folder = Path(shards.dir)
    reporter = reporter or Reporter()
    units = list_units(corpus, shards.unit_bytes, folder.resolve(), reporter.say)
    job = _Job(corpus, documents, tokenizer, splits, units, folder, threads or _processors(), reporter)
    settings = _settings(job, shards)
    check_settings(folder, settings)
    if _is_finished(job):
        reporter.say(f"{folder / MANIFEST} is complete: nothing to do")
        return folder / MANIFEST
    with Ledger.open(folder, settings) as ledger:
        model = _tokenizer(job, ledger)
        _write_shards(job, model, ledger)
        reports = [ledger.reports[unit.number] for unit in units]
        manifest = make_manifest(folder, reports, model, tokenizer, settings)
        with writing(folder / MANIFEST):
            write_json(folder / MANIFEST, manifest)
    reporter.summary(manifest)
    return folder / MANIFEST


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _settings(job: _Job, shards: ShardsConfig) -> dict[str, Any]:
    """All that decides the bytes of the shards.

    Where the corpus lies does not, nor where a tokenizer comes from that is brought along: its content counts.
    """
    corpus = {key: value for key, value in asdict(job.corpus).items() if key != "path"}
    tokenizer = asdict(job.tokenizer)
    if job.tokenizer.model is not None:
        tokenizer = {"model": Tokenizer.open(job.tokenizer.model).hash}
    return {
        "corpus": {**corpus, "pattern": job.corpus.pattern, "exclude": list(job.corpus.exclude)},
        "documents": asdict(job.documents),
        "tokenizer": tokenizer,
        "splits": asdict(job.splits),
        "shards": {"unit_bytes": shards.unit_bytes},
        "corpus_files": fingerprint(job.units),
    }


def _is_finished(job: _Job) -> bool:
    """Whether the manifest is there and every file has its hash; damage that the ledger lets us mend is reported."""
    if not (job.folder / MANIFEST).exists():
        return False
    job.reporter.say(f"checking the finished shards in {job.folder}")
    try:
        TokenShards.open(job.folder, verify="full")
    except BadInput as error:
        if not (job.folder / LEDGER).exists():
            raise
        job.reporter.say(f"to be mended: {error}")
        return False
    return True


def _tokenizer(job: _Job, ledger: Ledger) -> Tokenizer:
    """The shard folder's tokenizer: the one already there, the one that is brought along, or a new one."""
    path = job.folder / TOKENIZER
    if ledger.tokenizer_hash and path.exists() and file_hash(path) == ledger.tokenizer_hash:
        return Tokenizer.open(path)
    content = _trained_tokenizer(job) if job.tokenizer.model is None else _brought_tokenizer(job)
    with writing(path), whole_file(path) as temporary:
        temporary.write_bytes(content)
    model = Tokenizer.open(path)
    ledger.add_tokenizer(model.hash)
    return model


def _trained_tokenizer(job: _Job) -> bytes:
    config = job.tokenizer
    sample = _survey(job, min(1.0, config.sample_bytes / max(job.size, 1)))
    text = f"{sum(map(len, sample)) / 1e6:.1f} million characters"
    job.reporter.say(f"training a {config.kind} tokenizer of {config.vocab_size} pieces on {text}")
    began = time.monotonic()
    content = train_tokenizer(sample, config.kind, config.vocab_size)
    job.reporter.say(f"trained in {time.monotonic() - began:.1f} s")
    model = Tokenizer(content)
    if failed := [text for text in HARD_TEXTS if not model.is_exact(text)]:
        raise BadInput(f"the tokenizer just trained does not give back {failed[0]!r}")
    return content


def _brought_tokenizer(job: _Job) -> bytes:
    path = Path(str(job.tokenizer.model))
    size = Tokenizer.open(path).vocab_size
    if job.tokenizer.vocab_size not in (size, DEFAULT_VOCAB_SIZE):
        asked = job.tokenizer.vocab_size
        raise BadInput(
            f"tokenizer.vocab_size is {asked}, but {path} has {size} pieces (leave tokenizer.vocab_size out)"
        )
    _survey(job, 0.0)
    return path.read_bytes()


def _survey(job: _Job, fraction: float) -> list[str]:
    """Read the whole corpus once and check it; returns the sample, blocks of text of at most `sample_bytes` bytes."""
    id_hashes: list[np.ndarray] = []
    sample: list[str] = []
    room = job.tokenizer.sample_bytes
    kept = train = 0
    with job.reporter.steps("reading", job.size) as step:
        for unit in job.units:
            survey = survey_unit(unit, job.corpus, job.documents, job.splits, fraction, job.tokenizer.seed)
            id_hashes.append(survey.id_hashes)
            kept, train = kept + survey.kept, train + survey.train
            for block in survey.sample:
                size = len(block.encode())
                if size <= room:
                    sample.append(block)
                    room -= size
            step.advance(unit.size)
    _check_not_empty(job.corpus, sum(map(len, id_hashes)), kept, train)
    check_ids_differ(np.concatenate(id_hashes), lambda: _names(job))
    return sample


def _check_not_empty(corpus: CorpusConfig, found: int, kept: int, train: int) -> None:
    place = str(corpus.root) if corpus.root.is_file() else f"{corpus.root} (pattern {corpus.pattern!r})"
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


def _names(job: _Job) -> Iterator[tuple[str, str]]:
    return ((document.id, document.source) for unit in job.units for document in read_unit(job.corpus, unit))


def _write_shards(job: _Job, tokenizer: Tokenizer, ledger: Ledger) -> None:
    missing = [unit for unit in job.units if not _is_kept(job.folder, unit, ledger.reports.get(unit.number))]
    if len(missing) < len(job.units):
        job.reporter.say(f"{len(job.units) - len(missing)} of {len(job.units)} shards are finished and kept")
    done = job.size - sum(unit.size for unit in missing)
    with job.reporter.steps("encoding", job.size, done) as step:
        for unit in missing:
            begun = step.done
            report = write_unit(
                unit, job.corpus, job.documents, job.splits, tokenizer, job.folder, job.threads, step.advance
            )
            # What was no text (JSON around it, documents left out) is done too.
            step.advance(begun + unit.size - step.done)
            if report.inexact and job.tokenizer.model is None:
                lost = report.inexact[0]
                raise BadInput(f"document {lost['id']!r} ({lost['source']}) {lost['why']}")
            ledger.add_unit(unit.number, report)


def _is_kept(folder: Path, unit: Unit, report: ShardReport | None) -> bool:
    path = folder / shard_name(unit)
    return report is not None and path.exists() and file_hash(path) == report.shard.hash
