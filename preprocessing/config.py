"""What `brt prepare` is told: the corpus, its documents, the tokenizer, the splits and the shards."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from brt_dist.data.errors import BadInput
from brt_dist.data.tokenizer import BYTES_SIZE

DEFAULT_VOCAB_SIZE = 16000

PATTERNS = {
    "files": ("**/*",),
    "jsonl": ("**/*.jsonl", "**/*.jsonl.gz", "**/*.jsonl.zst"),
    "parquet": ("**/*.parquet",),
    "arrow": ("**/*.arrow", "**/*.feather", "**/*.ipc", "**/*.arrows"),
    "pg19": ("train/*.txt", "validation/*.txt", "test/*.txt"),
    "arxiv": ("**/*.tar", "**/*.tar.gz", "**/*.tgz"),
    "huggingface": ("**/*.arrow",),
}


@dataclass(frozen=True)
class CorpusConfig:
    """Where the documents come from.

    `reader` tells what the files are:

    - `files`: texts, each a document (or see `group`).
    - `jsonl`: JSON Lines, plain or compressed with gzip (.gz) or zstd (.zst); each line is a document.
    - `parquet`, `arrow`: tables whose rows are documents; `arrow` takes Arrow's file format and its stream format.
    - `huggingface`: what `save_to_disk` of the library `datasets` wrote, a Dataset or a DatasetDict. A DatasetDict that
      has a validation or a test split decides on the split of its documents.
    - `pg19`: folders train, validation and test of NAME.txt, with metadata.csv beside them. The folder decides on the
      split of a book.
    - `arxiv`: arXiv's source archives, tar files of NNNN/ID.gz. A document is the TeX of a paper.

    `path` is a file, a folder, or a folder with a glob behind it ("texts/**/*.txt"; without one, every file for `files`
    and every file with one of the reader's suffixes for the others). "{stdlib}" in it stands for the folder of Python's
    standard library. A path with "://" in it is opened by fsspec: "s3://bucket/texts/**/*.txt", or chained
    "zip://**/*.txt::/data/all.zip". `exclude` leaves out each path below the folder that has a part (a folder's or
    file's name) matching one of its patterns.

    `group: file` makes each file a document; `group: folder` joins the files that lie directly in one folder, in path
    order, into one document; `group: top` joins all files below one top-level folder. The other readers ignore it;
    `text_key` and `id_key` name the fields or columns of those that have any.
    """

    reader: Literal["files", "jsonl", "parquet", "arrow", "pg19", "arxiv", "huggingface"] = "files"
    path: str = ""
    exclude: tuple[str, ...] = ()
    group: Literal["file", "folder", "top"] = "file"
    text_key: str = "text"
    id_key: str = "id"

    def __post_init__(self) -> None:
        if isinstance(self.exclude, str):
            raise BadInput(f"corpus.exclude must be a list of names, not {self.exclude!r}")
        object.__setattr__(self, "exclude", tuple(self.exclude))
        _check_choice("corpus.reader", self.reader, tuple(PATTERNS))
        _check_choice("corpus.group", self.group, ("file", "folder", "top"))
        if not self.text_key:
            raise BadInput("corpus.text_key is empty: name the field that holds a document's text")

    @property
    def url(self) -> str:
        """What fsspec is to open, without the glob; "" where the corpus lies on this machine."""
        return _split_url(self.path)[0] if "://" in self.path else ""

    @property
    def names_folder(self) -> bool:
        """Whether the URL, as it is written, can only be a folder: a glob or "/" stands at its end."""
        url, glob = _split_url(self.path)
        return bool(glob) or url.split("::")[0].endswith("/")

    @property
    def root(self) -> Path:
        """The file or folder in `path` on this machine, without the glob and with "{stdlib}" put in."""
        return self._split[0]

    @property
    def place(self) -> str:
        """The folder, file or URL, for messages."""
        return self.url or str(self.root)

    @property
    def pattern(self) -> str:
        """The globs of `patterns` in one line."""
        return " or ".join(self.patterns)

    @property
    def patterns(self) -> tuple[str, ...]:
        """Globs below the folder; a file of the corpus matches one of them."""
        glob = _split_url(self.path)[1] if "://" in self.path else self._split[1]
        return (glob,) if glob else PATTERNS[self.reader]

    @property
    def _split(self) -> tuple[Path, str]:
        path = Path(self.path.replace("{stdlib}", sysconfig.get_paths()["stdlib"])).expanduser()
        globs = [index for index, part in enumerate(path.parts) if set(part) & set("*?[")]
        if not globs or path.exists():
            return path, ""
        return Path(*path.parts[: globs[0]]), "/".join(path.parts[globs[0] :])


def _split_url(url: str) -> tuple[str, str]:
    """The folder or file, and the glob behind it; of a chained URL, in its first link."""
    first, *rest = url.split("::")
    scheme, _, path = first.partition("://")
    parts = path.split("/")
    globs = [index for index, part in enumerate(parts) if set(part) & set("*?[")]
    at = globs[0] if globs else len(parts)
    return "::".join([f"{scheme}://{'/'.join(parts[:at])}", *rest]), "/".join(parts[at:])


@dataclass(frozen=True)
class DocumentsConfig:
    """What happens to a document that cannot be taken as it is; what is left out is counted and named in the report.

    `invalid_utf8`, for one whose bytes are not UTF-8: `skip` leaves it out, `replace` mends it with U+FFFD, `fatal`
    ends the run. `damaged`, for what cannot be read (a line that is no JSON object, a broken archive): left out as far
    as the damage reaches, or the end of the run. `too_long`, for documents of more than `max_bytes` bytes of UTF-8:
    left out, or the end of the run. `duplicates`, of one text that stands in several documents of any of the corpora:
    all kept, or the first kept and the others left out; either way they fall into one split: the most held-back
    that a corpus itself gives one of them, else that of the first.
    """

    invalid_utf8: Literal["skip", "replace", "fatal"] = "fatal"
    damaged: Literal["skip", "fatal"] = "fatal"
    too_long: Literal["skip", "fatal"] = "fatal"
    max_bytes: int = 134_217_728
    duplicates: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        _check_choice("documents.invalid_utf8", self.invalid_utf8, ("skip", "replace", "fatal"))
        _check_choice("documents.damaged", self.damaged, ("skip", "fatal"))
        _check_choice("documents.too_long", self.too_long, ("skip", "fatal"))
        _check_choice("documents.duplicates", self.duplicates, ("keep", "drop"))
        if self.max_bytes < 1:
            raise BadInput(f"documents.max_bytes must be at least 1, not {self.max_bytes}")


@dataclass(frozen=True)
class TokenizerConfig:
    """A sentencepiece model: trained on up to `sample_bytes` of the train split, or brought along as `model`.

    With `model` set, `vocab_size` may stay at its default; any other value must be the size of that model. The kind
    "bytes" is not trained and has 260 entries, the paper's for text read as bytes.
    """

    kind: Literal["bpe", "unigram", "bytes"] = "bpe"
    vocab_size: int = DEFAULT_VOCAB_SIZE
    model: str | None = None
    sample_bytes: int = 100_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("tokenizer.kind", self.kind, ("bpe", "unigram", "bytes"))
        if self.kind == "bytes" and self.model is None:
            if self.vocab_size not in (DEFAULT_VOCAB_SIZE, BYTES_SIZE):
                raise BadInput(f"tokenizer.vocab_size is {self.vocab_size}, but a vocabulary of bytes has {BYTES_SIZE}")
            object.__setattr__(self, "vocab_size", BYTES_SIZE)
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
    """Where the shards go, and how many bytes of the corpus make one unit of work, which is one shard.

    Without a number it follows from the size of the corpus: 64 MB, of a small one a 32nd but at least 2 MB, so that
    several ranks find something to do.
    """

    dir: str = ""
    unit_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.unit_bytes is not None and self.unit_bytes < 1:
            raise BadInput(f"shards.unit_bytes must be at least 1, not {self.unit_bytes}")


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise BadInput(f"{key} must be {', '.join(choices[:-1])} or {choices[-1]}, not {value!r}")
