"""Text to tokens and back without loss. The door of sentencepiece.

sentencepiece writes a space as U+2581 inside, so a U+2581 of the text would come back as a space. Here the text is cut
at that character, and the ids of its three UTF-8 bytes are put between the parts: every sentencepiece decoder turns
those bytes back into U+2581, so the tokens need no decoder of ours.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece
import xxhash

from brt_dist.data.errors import BadInput

SPACE_MARK = "\u2581"

# Threads change nothing about the pieces, but their number is recorded in the model file: fixed, so that the same
# sample gives the same file on every machine.
_TRAINING_THREADS = 8
# Longer blocks are left out by the trainer; bytes.
_LONGEST_BLOCK = 20_000
# Small pieces of text encode fastest (a priority queue per piece), and there are enough of them for all threads.
_CHUNK = 4096

# What tokenizers lose: white space, control characters, compatibility forms, bytes that look like pieces, the mark.
HARD_TEXTS = (
    "def f(x):\n\treturn  x  # \ufb01\u2460\r\n",
    "  leading and trailing  ",
    "\n\n\n \n\t\n",
    " ",
    "\r",
    "\ufeffbyte order mark",
    "a\x00b\x01\x7f\x85\u2028",
    "no\u00a0break\u3000space",
    "e\u0301 \u00e9 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0010ffff",
    "<0x0A></s><unk><s>\n<0xE2>",
    SPACE_MARK,
    f" {SPACE_MARK}{SPACE_MARK} a{SPACE_MARK}b\n{SPACE_MARK}",
    "1234567890 3.14159",
)


class Tokenizer:
    """A sentencepiece model, our own or any other that has an end-of-sentence piece."""

    def __init__(self, model: bytes, name: str = "the tokenizer"):
        """`model` is the content of a sentencepiece model file; BadInput, with `name`, if it is none."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise BadInput(f"{name} is not a sentencepiece model ({len(model)} bytes)") from None
        if self._processor.eos_id() < 0:
            raise BadInput(f"{name} has no end-of-sentence piece, which is needed between documents")
        self.hash = xxhash.xxh3_128(model).hexdigest()

    @classmethod
    def open(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a `.model` file; BadInput if it cannot be read."""
        try:
            return cls(Path(path).read_bytes(), str(path))
        except OSError as error:
            raise BadInput(f"tokenizer {path} cannot be read: {error.strerror}") from None

    @cached_property
    def vocab_size(self) -> int:
        return int(self._processor.get_piece_size())

    @cached_property
    def eos(self) -> int:
        """The id between documents; no text encodes to it."""
        return int(self._processor.eos_id())

    def encode(self, text: str) -> np.ndarray:
        """The tokens of `text`, without EOS, int32."""
        return self.encode_all([text], threads=1)[0]

    def encode_all(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """The tokens of each text, without EOS, int32; the same whatever the number of threads."""
        pieces: list[str] = []
        # For each text, numbers of `pieces` in order; -1 stands for one U+2581.
        plans: list[list[int]] = []
        for text in texts:
            plan: list[int] = []
            for piece in self._cut(text):
                if piece != SPACE_MARK:
                    plan.append(len(pieces))
                    pieces.append(piece)
                else:
                    plan.append(-1)
            plans.append(plan)
        encoded = self._processor.encode(pieces, num_threads=threads) if pieces else []
        mark = self._mark_ids or []
        return [_joined([mark if number < 0 else encoded[number] for number in plan]) for plan in plans]

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of `tokens`; EOS and other control pieces have none."""
        return self._processor.decode(np.asarray(tokens).tolist()) if len(tokens) else ""

    def is_exact(self, text: str) -> bool:
        """Whether `text` comes back from its tokens unchanged."""
        return self.decode(self.encode(text)) == text

    @cached_property
    def _mark_ids(self) -> list[int] | None:
        """The byte pieces of U+2581, or None for a model without byte pieces."""
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        return ids if all(self._processor.is_byte(number) for number in ids) else None

    @cached_property
    def _cuts_lines(self) -> bool:
        """Whether text cut behind a newline has the tokens of the whole text, so that it may be encoded in chunks.

        True where no piece joins a newline to anything else and nothing is added in front of, or taken from, a text.
        """
        names = (self._processor.id_to_piece(number) for number in range(self.vocab_size))
        if any("\n" in name and name != "\n" for name in names):
            return False
        encode = self._processor.encode
        probes = (("a\n", "b"), ("a \n", " b"), ("\n", "\n"), ("a\n", "\n\n a"), ("a\n", "  "))
        return all(encode(first + last) == encode(first) + encode(last) for first, last in probes)

    def _cut(self, text: str) -> Iterator[str]:
        """Parts of `text` whose tokens laid end to end are those of the whole; every U+2581 is a part of its own."""
        parts = re.split(f"({SPACE_MARK})", text) if self._mark_ids is not None and SPACE_MARK in text else [text]
        for part in parts:
            if self._cuts_lines and len(part) > _CHUNK:
                yield from line_chunks(part, _CHUNK)
            elif part:
                yield part


def line_chunks(text: str, size: int) -> Iterator[str]:
    """Cut `text` behind newlines into chunks of at most `size` characters, or of one line where a line is longer."""
    start = 0
    while len(text) - start > size:
        cut = text.rfind("\n", start, start + size) + 1 or text.find("\n", start + size) + 1
        if cut == 0:
            break
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def _joined(parts: list[list[int]]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *(np.asarray(part, np.int32) for part in parts)])


def train_tokenizer(blocks: Iterable[str], kind: Literal["bpe", "unigram"], vocab_size: int) -> bytes:
    """Train a lossless sentencepiece model on `blocks` of text and return its file's content.

    The same blocks in the same order give the same bytes. Newline and tab are pieces of their own, which no other piece
    contains; unknown characters become bytes; nothing is normalised. BadInput, with both numbers, if the text does not
    give that many pieces, or needs more.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_blocks(blocks),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n", "\t"],
            max_sentence_length=_LONGEST_BLOCK,
            character_coverage=0.9995,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise BadInput(_training_error(str(error), vocab_size)) from None
    return model.getvalue()


def _training_blocks(blocks: Iterable[str]) -> Iterator[str]:
    """Blocks the trainer takes: short enough, and without U+2581, which it would count as a space."""
    for block in blocks:
        clean = block.replace(SPACE_MARK, "\n")
        step = _LONGEST_BLOCK // 4
        for start in range(0, len(clean), step):
            yield clean[start : start + step]


def _training_error(message: str, vocab_size: int) -> str:
    if found := re.search(r"set it to a value <= (\d+)", message):
        return f"tokenizer.vocab_size {vocab_size} is too large for this text, which gives at most {found[1]} pieces"
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"tokenizer.vocab_size {vocab_size} is too small: bytes and single characters alone are {found[1]}"
    if "sentences_.empty()" in message:
        return "there is no text to train the tokenizer on"
    return f"the tokenizer could not be trained: {' '.join(message.split())}"
