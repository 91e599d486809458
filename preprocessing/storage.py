"""Where the files of a corpus lie: a folder of this machine, or anything that fsspec opens. The door of fsspec."""

from __future__ import annotations

import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast
from zipfile import BadZipFile

from brt_dist.data.errors import BadInput

# What reading a file may raise: an archive that files are read out of has its own errors.
READ_ERRORS = (OSError, EOFError, zlib.error, BadZipFile)


class Storage(ABC):
    """A folder of files. Their names are relative to it, with "/" between folders.

    What fails raises one of READ_ERRORS, or BadInput where the storage itself cannot be had.
    """

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """The bytes of a file, to be read and sought in."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file."""

    @abstractmethod
    def path(self, name: str) -> Path | None:
        """Where the file lies on this machine, for those who map files into memory; None where it does not."""

    @abstractmethod
    def shown(self, name: str) -> str:
        """The name with the folder before it, for messages."""


class LocalFolder(Storage):
    """A folder of this machine."""

    def __init__(self, root: Path):
        self.root = root

    def open(self, name: str) -> BinaryIO:
        return open(f"{self.root}/{name}", "rb")

    def size(self, name: str) -> int:
        return os.stat(f"{self.root}/{name}").st_size

    def path(self, name: str) -> Path | None:
        return self.root / name

    def shown(self, name: str) -> str:
        return str(self.root / name)


class RemoteFolder(Storage):
    """What lies below a URL of fsspec, "s3://bucket/texts" or chained, "zip://texts::/data/all.zip"."""

    def __init__(self, url: str):
        self.url = url

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """The file system and the path in it. Made when first needed, so that this object can be sent to a process."""
        import fsspec

        try:
            system, path = fsspec.core.url_to_fs(self.url)
        except Exception as error:
            # Every file system has its own kinds: no module for it, no such archive, no right to see it.
            raise BadInput(f"corpus.path {self.url} cannot be opened: {error}") from None
        return system, path.rstrip("/")

    def is_file(self) -> bool:
        system, path = self._opened
        return bool(path) and bool(system.isfile(path))

    def files(self) -> Iterator[tuple[str, int | None]]:
        """Name and size of all files below, in no order; nothing where the folder does not exist."""
        system, path = self._opened
        for found, entry in system.find(path, detail=True).items():
            if entry.get("type") == "file":
                yield found[len(path) :].lstrip("/"), entry.get("size")

    def open(self, name: str) -> BinaryIO:
        system, path = self._opened
        return cast(BinaryIO, system.open(_joined(path, name), "rb"))

    def size(self, name: str) -> int:
        system, path = self._opened
        return int(system.size(_joined(path, name)))

    def path(self, name: str) -> Path | None:
        return None

    def shown(self, name: str) -> str:
        """The name put before what the URL is chained to."""
        first, *rest = self.url.split("::")
        return "::".join([_joined(first, name), *rest])


def _joined(folder: str, name: str) -> str:
    if not folder or folder.endswith("/"):
        return folder + name
    return f"{folder}/{name}"
