"""The error for what a user can cause and can mend."""

from __future__ import annotations


class BadInput(ValueError):  # noqa: N818  (it is the input that is bad)
    """Input that cannot be worked on; the message is one line that names the thing and the numbers.

    Whatever bytes are found in an input file, the message stays one printable line.
    """

    def __init__(self, message: str):
        super().__init__("".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in message))
