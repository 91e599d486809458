"""What `brt prepare` is told: the corpus, its documents, the tokenizer, the splits and the shards."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from brt_dist.data.errors import BadInput

DEFAULT_VOCAB_SIZE = 16000

PATTERNS = {"files": "**/*", "jsonl": "**/*.jsonl", "parquet": "**/*.parquet"}


@dataclass(frozen=True)
class CorpusConfig:
    """Where the documents come from.

    `path` is a file, a folder, or a folder with a glob behind it ("texts/**/*.txt"; without one, every file for
    `files` and every file with the reader's suffix for the others). "{stdlib}" in it stands for the folder of Python's
    standard library. `exclude` leaves out each path below the folder that has a part (a folder's or file's name)
    matching one of its patterns.

    `group: file` makes each file a document; `group: top` joins all files below one top-level folder, in path order,
    into one document. The other readers ignore it; `text_key` and `id_key` name their fields or columns.
    """

    reader: Literal["files", "jsonl", "parquet"] = "files"
    path: str = ""
    exclude: tuple[str, ...] = ()
    group: Literal["file", "top"] = "file"
    text_key: str = "text"
    id_key: str = "id"

    def __post_init__(self) -> None:
        if isinstance(self.exclude, str):
            raise BadInput(f"corpus.exclude must be a list of names, not {self.exclude!r}")
        object.__setattr__(self, "exclude", tuple(self.exclude))
        _check_choice("corpus.reader", self.reader, tuple(PATTERNS))
        _check_choice("corpus.group", self.group, ("file", "top"))
        if not self.text_key:
            raise BadInput("corpus.text_key is empty: name the field that holds a document's text")

    @property
    def root(self) -> Path:
        """The file or folder in `path`, without the glob and with "{stdlib}" put in."""
        return self._split[0]

    @property
    def pattern(self) -> str:
        """The glob that files below `root` must match."""
        return self._split[1] or PATTERNS[self.reader]

    @property
    def _split(self) -> tuple[Path, str]:
        path = Path(self.path.replace("{stdlib}", sysconfig.get_paths()["stdlib"])).expanduser()
        globs = [index for index, part in enumerate(path.parts) if set(part) & set("*?[")]
        if not globs or path.exists():
            return path, ""
        return Path(*path.parts[: globs[0]]), "/".join(path.parts[globs[0] :])


@dataclass(frozen=True)
class DocumentsConfig:
    """What happens to a document whose bytes are not UTF-8: left out, mended with U+FFFD, or the end of the run."""

    invalid_utf8: Literal["skip", "replace", "fatal"] = "fatal"

    def __post_init__(self) -> None:
        _check_choice("documents.invalid_utf8", self.invalid_utf8, ("skip", "replace", "fatal"))


@dataclass(frozen=True)
class TokenizerConfig:
    """A sentencepiece model: trained on up to `sample_bytes` of the train split, or brought along as `model`.

    With `model` set, `vocab_size` may stay at its default; any other value must be the size of that model.
    """

    kind: Literal["bpe", "unigram"] = "bpe"
    vocab_size: int = DEFAULT_VOCAB_SIZE
    model: str | None = None
    sample_bytes: int = 100_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("tokenizer.kind", self.kind, ("bpe", "unigram"))
        if self.vocab_size < 1:
            raise BadInput(f"tokenizer.vocab_size must be at least 1, not {self.vocab_size}")
        if self.sample_bytes < 1:
            raise BadInput(f"tokenizer.sample_bytes must be at least 1, not {self.sample_bytes}")


@dataclass(frozen=True)
class SplitsConfig:
    """The fractions of all documents held back; the rest is for training."""

    validation: float = 0.1
    test: float = 0.1

    def __post_init__(self) -> None:
        for name, fraction in (("validation", self.validation), ("test", self.test)):
            if not 0 <= fraction < 1:
                raise BadInput(f"splits.{name} must be at least 0 and below 1, not {fraction}")
        if self.validation + self.test >= 1:
            raise BadInput(
                f"splits.validation {self.validation} and splits.test {self.test} leave nothing to train on: "
                f"together {self.validation + self.test:g}, and it must be below 1"
            )


@dataclass(frozen=True)
class ShardsConfig:
    """Where the shards go, and how many bytes of the corpus make one unit of work, which is one shard."""

    dir: str = ""
    unit_bytes: int = 64_000_000

    def __post_init__(self) -> None:
        if self.unit_bytes < 1:
            raise BadInput(f"shards.unit_bytes must be at least 1, not {self.unit_bytes}")


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise BadInput(f"{key} must be {', '.join(choices[:-1])} or {choices[-1]}, not {value!r}")
