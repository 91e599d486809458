"""Megatron-core's indexed datasets, PREFIX.bin and PREFIX.idx, as documents of tokens. A door of megatron-core.

Megatron-LM and GPT-NeoX read and write them too.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from brt_dist.data.atomic_file import whole_file
from brt_dist.data.errors import BadInput
from brt_dist.data.token_shards import writing

with warnings.catch_warnings():
    # It tells at every import which optional packages it does without.
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

# Mark, version, code of the token type, number of sequences, number of document ends.
_HEADER = struct.Struct("<9sQBQQ")
_MARK, _VERSION = b"MMIDIDX\x00\x00", 1
_LONGEST = _LARGEST = 2**31 - 1


class MegatronDataset:
    """The documents of PREFIX.bin and PREFIX.idx under a memory map; BadInput where they cannot be read."""

    def __init__(self, prefix: Path):
        self.prefix, self.name = prefix, prefix.name
        self.bin, self.idx = (prefix.with_name(f"{prefix.name}.{kind}") for kind in ("bin", "idx"))
        # Checked first, for the library's own reader fails with assertions, and once more while it is taken down.
        self._check_header()
        try:
            self._sequences = IndexedDataset(str(prefix))
        except AssertionError:
            raise BadInput(f"{self.idx} is damaged: its documents do not end with its last sequence") from None
        self._check_index()

    def __len__(self) -> int:
        return len(self._sequences.document_indices) - 1

    @property
    def sequences(self) -> int:
        """How many there are; a document is one or several."""
        return len(self._sequences)

    @property
    def tokens(self) -> int:
        """How many there are, the ends of documents included where they were written."""
        return int(self._sequences.sequence_lengths.sum(dtype=np.int64))

    def documents(self) -> Iterator[np.ndarray]:
        """The tokens of each document in order, its sequences joined; of the type in which they are stored."""
        ends = self._sequences.document_indices
        nothing = np.zeros(0, self._sequences.index.dtype)
        for number in range(len(self)):
            first, end = int(ends[number]), int(ends[number + 1])
            parts = [self._sequences[sequence] for sequence in range(first, end)]
            yield parts[0] if len(parts) == 1 else np.concatenate([nothing, *parts])

    def _check_header(self) -> None:
        for path in (self.bin, self.idx):
            if not path.is_file():
                raise BadInput(f"there is no dataset {self.prefix}: {path} does not exist")
        with self.idx.open("rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or _HEADER.unpack(header)[:2] != (_MARK, _VERSION):
            raise BadInput(f"{self.idx} is not the index of a Megatron dataset of version {_VERSION}")
        code, sequences, ends = _HEADER.unpack(header)[2:]
        integers = {kind.value for kind in DType if "int" in kind.name}
        if code not in integers:
            raise BadInput(f"{self.idx} says that tokens are of type {code}, which is no whole number")
        expected, found = _HEADER.size + sequences * (4 + 8) + ends * 8, self.idx.stat().st_size
        if found != expected:
            raise BadInput(f"{self.idx} is damaged: {sequences} sequences need {expected} bytes, found {found}")
        if sequences == 0 or self.bin.stat().st_size == 0:
            raise BadInput(f"the dataset {self.prefix} is empty ({sequences} sequences)")

    def _check_index(self) -> None:
        ends, lengths = self._sequences.document_indices, self._sequences.sequence_lengths
        pointers = self._sequences.index.sequence_pointers
        if ends[0] != 0 or (np.diff(ends) < 0).any() or lengths.min() < 0 or pointers.min() < 0:
            raise BadInput(f"{self.idx} is damaged: its documents do not follow each other")
        width = np.dtype(self._sequences.index.dtype).itemsize
        expected, found = int((pointers + lengths.astype(np.int64) * width).max()), self.bin.stat().st_size
        if found != expected:
            raise BadInput(f"{self.bin} does not belong to {self.idx}: expected {expected} bytes, found {found}")


def write_dataset(prefix: Path, documents: Iterable[np.ndarray], vocab_size: int) -> None:
    """Write each document as one sequence to PREFIX.bin and PREFIX.idx, whole or not at all.

    Tokens have the type that Megatron takes for a vocabulary of this size: uint16 below 65,500, int32 above.
    BadInput if one of the files is there already or cannot be written, or a document or an id is too large for it.
    """
    bin_path, idx_path = (prefix.with_name(f"{prefix.name}.{kind}") for kind in ("bin", "idx"))
    for path in (bin_path, idx_path):
        if path.exists():
            raise BadInput(f"{path} is there already, and an export overwrites nothing")
    # The index is given its name last: without one, the tokens are no dataset.
    with writing(prefix), whole_file(idx_path) as index, whole_file(bin_path) as tokens:
        builder = IndexedDatasetBuilder(str(tokens), dtype=DType.optimal_dtype(vocab_size))
        for number, document in enumerate(documents):
            if len(document) > _LONGEST:
                raise BadInput(f"document {number} has {len(document)} tokens, Megatron reads at most {_LONGEST}")
            if vocab_size > _LARGEST and len(document) and document.max() > _LARGEST:
                raise BadInput(f"document {number} has the id {document.max()}, Megatron's are at most {_LARGEST}")
            builder.add_document(document, [len(document)])
        builder.finalize(str(index))
