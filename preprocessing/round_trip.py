"""Whether a document comes back from its tokens."""

from __future__ import annotations

import numpy as np
import xxhash

from brt_dist.data.tokenizer import Tokenizer, line_chunks

# Of a sample one document in so many is checked, and of each as many characters.
_ONE_IN, _CHECKED = 16, 1 << 16


def is_checked(document_id: str, check_all: bool) -> bool:
    """Whether it is this document's turn, decided by a hash of its id."""
    return check_all or xxhash.xxh3_64_intdigest(document_id.encode()) % _ONE_IN == 0


def find_difference(tokenizer: Tokenizer, text: str, tokens: np.ndarray, whole: bool) -> int | None:
    """The first character in which `text` differs from what its tokens decode to; None if it comes back unchanged.

    whole: to the end of the document; otherwise its beginning.
    """
    start = text if whole else next(line_chunks(text, _CHECKED), "")
    if len(start) == len(text):
        return _difference_by_parts(tokenizer, text, tokens)
    # Mostly a token is at least a character; it is always at least a byte, and no character has more than four.
    for count in (len(start), 4 * len(start)):
        decoded = tokenizer.decode(tokens[:count])
        if decoded.startswith(start):
            return None
    return _first_difference(decoded, start)


def _difference_by_parts(tokenizer: Tokenizer, text: str, tokens: np.ndarray) -> int | None:
    """The first character that differs; what was decoded is never there as a whole, for it may be as long as `text`."""
    at = 0
    for part in tokenizer.decode_parts(tokens):
        if not text.startswith(part, at):
            return at + _first_difference(part, text[at : at + len(part)])
        at += len(part)
    return None if at == len(text) else at


def _first_difference(decoded: str, text: str) -> int:
    return next(
        (at for at, (a, b) in enumerate(zip(decoded, text, strict=False)) if a != b), min(len(decoded), len(text))
    )
