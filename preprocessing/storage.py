"""Where the files of a corpus lie: a folder of this machine, or anything that fsspec opens. The door of fsspec."""

from __future__ import annotations

import errno
import io
import os
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from lzma import LZMAError
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

from brt_dist.data.errors import BadInput

# How what reads a file out of an archive says that the archive is damaged.
_DAMAGE = (EOFError, zlib.error, BadZipFile, LZMAError, tarfile.TarError)

# Bytes asked for at once.
_PIECE = 1 << 16


class DamagedFileError(OSError):
    """A file in an archive that cannot be had as it was put there."""


class Storage(ABC):
    """A folder of files. Their names are relative to it, with "/" between folders.

    What fails raises an OSError, or BadInput where the storage itself cannot be had.
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
        with _failures_named(self.url):
            return bool(path) and bool(system.isfile(path))

    def files(self) -> Iterator[tuple[str, int | None]]:
        """Name and size of all files below, in no order; nothing where the folder does not exist."""
        system, path = self._opened
        with _failures_named(self.url):
            entries = system.find(path, detail=True)
        for found, entry in entries.items():
            if entry.get("type") == "file":
                yield found[len(path) :].lstrip("/"), entry.get("size")

    def open(self, name: str) -> BinaryIO:
        system, path = self._opened
        with _failures_named(self.shown(name)):
            file = system.open(_joined(path, name), "rb")
        return io.BufferedReader(_RemoteFile(file, self.shown(name)), _PIECE)

    def size(self, name: str) -> int:
        system, path = self._opened
        with _failures_named(self.shown(name)):
            size = system.size(_joined(path, name))
        if size is None:
            raise BadInput(f"{self.shown(name)}: its size is not known, so it cannot be divided into units of work")
        return int(size)

    def path(self, name: str) -> Path | None:
        return None

    def shown(self, name: str) -> str:
        """The name put before what the URL is chained to."""
        first, *rest = self.url.split("::")
        return "::".join([_joined(first, name), *rest])


class _RemoteFile(io.RawIOBase):
    """A file that fsspec opened, made like any other: each file system has its own, that can do more or less, and fails
    in its own way.
    """

    def __init__(self, file: Any, shown: str):
        self._file = file
        self._shown = shown

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _failures_named(self._shown):
            piece = self._file.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with _failures_named(self._shown):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@contextmanager
def _failures_named(shown: str) -> Iterator[None]:
    """Whatever a file system raises becomes an OSError that names the file; what is not found stays that."""
    try:
        yield
    except FileNotFoundError:
        raise
    except _DAMAGE as error:
        raise DamagedFileError(f"{shown} is damaged: {error}") from None
    except Exception as error:
        # With a number, for this is no damage: it may go well another time.
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(number, str(error) or type(error).__name__, shown) from None


def _joined(folder: str, name: str) -> str:
    if not folder or folder.endswith("/"):
        return folder + name
    return f"{folder}/{name}"
