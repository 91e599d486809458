"""Who shares the work of `prepare`: one process, or the ranks of an MPI launch. The door of mpi4py.

Rank 0 hands out one item at a time to whoever is free, and works itself: between two documents it looks for messages.
All waiting is done by looking and sleeping, because a rank that waits inside MPI keeps a whole core busy.
"""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from brt_dist.data.errors import BadInput

Item = TypeVar("Item")
Result = TypeVar("Result")
News = TypeVar("News")

_TO_THE_LEADER, _FROM_THE_LEADER = 1, 2
# Seconds between two looks for a message, and between two messages of how far a rank is.
_LOOK, _NEWS = 0.002, 0.5
# Seconds in which rank 0 ends a launch that was interrupted, and the exit status, that of one process.
_FOR_RANK_0, _INTERRUPTED = 2.0, 130


class SharedBadInput(BadInput):
    """A BadInput that every rank raises alike, so that one of them may speak for all."""


class Ranks:
    """One process that does everything."""

    rank = 0
    size = 1

    def lead(self, act: Callable[[], Result]) -> Result:
        """What `act` returns in rank 0, which alone calls it, in every rank; a BadInput too, as a SharedBadInput."""
        return act()

    def gather(self, value: Result) -> list[Result]:
        """The values of all ranks, in rank 0; an empty list elsewhere."""
        return [value]

    def divide(
        self,
        items: Iterable[Item],
        work: Callable[[Item, Callable[[News], None]], Result],
        take: Callable[[Item, Result], None],
        hear: Callable[[News], None],
    ) -> None:
        """Have every item worked on by some rank; all ranks call this together, `items` counts in rank 0 alone.

        `work` is given a function that it tells how far it is; `hear` is told that, and `take` each result, in rank 0
        and in the order in which they come. After a BadInput in any rank nothing new is begun, what is begun is
        finished and taken, and then it is raised in every rank.
        """
        for item in items:
            take(item, work(item, hear))


class MpiRanks(Ranks):
    """The ranks of a communicator of mpi4py."""

    def __init__(self, communicator: Any):
        self._communicator = communicator
        self.rank, self.size = communicator.Get_rank(), communicator.Get_size()

    def lead(self, act: Callable[[], Result]) -> Result:
        outcome: tuple[Any, str | None] | None = None
        if self.rank == 0:
            try:
                outcome = act(), None
            except BadInput as error:
                outcome = None, str(error)
            for rank in range(1, self.size):
                self._communicator.send(None, rank, _FROM_THE_LEADER)
        else:
            self._wait(_FROM_THE_LEADER)
            self._communicator.recv(source=0, tag=_FROM_THE_LEADER)
        value, message = self._communicator.bcast(outcome)
        if message is not None:
            raise SharedBadInput(message)
        result: Result = value
        return result

    def gather(self, value: Result) -> list[Result]:
        return self._communicator.gather(value) or []

    def divide(
        self,
        items: Iterable[Item],
        work: Callable[[Item, Callable[[News], None]], Result],
        take: Callable[[Item, Result], None],
        hear: Callable[[News], None],
    ) -> None:
        message = None
        if self.rank == 0:
            message = _Leader(self._communicator, iter(items), take, hear).lead(work)
        else:
            self._follow(work)

        def verdict() -> None:
            if message is not None:
                raise BadInput(message)

        self.lead(verdict)

    def _follow(self, work: Callable[[Item, Callable[[News], None]], Result]) -> None:
        """Ask for items, and work on them, until there are none."""
        told: list[News] = []
        last = time.monotonic()

        def tell(news: News) -> None:
            nonlocal last
            told.append(news)
            if time.monotonic() - last >= _NEWS:
                self._tell_leader("news", told)
                told.clear()
                last = time.monotonic()

        done: Any = None
        while True:
            self._tell_leader("free", (told, done))
            told.clear()
            self._wait(_FROM_THE_LEADER)
            given = self._communicator.recv(source=0, tag=_FROM_THE_LEADER)
            if not given:
                return
            try:
                done = given[0], work(given[0], tell)
            except BadInput as error:
                self._tell_leader("failed", str(error))
                return

    def _tell_leader(self, kind: str, value: object) -> None:
        self._communicator.send((kind, value), 0, _TO_THE_LEADER)

    def _wait(self, tag: int) -> None:
        while not self._communicator.iprobe(source=0, tag=tag):
            time.sleep(_LOOK)


class _Leader:
    """Rank 0 while items are divided."""

    def __init__(
        self, communicator: Any, items: Iterator[Any], take: Callable[[Any, Any], None], hear: Callable[[Any], None]
    ):
        self._communicator, self._items, self._take, self._hear = communicator, items, take, hear
        self._followers = communicator.Get_size() - 1
        self._message: str | None = None

    def lead(self, work: Callable[[Any, Callable[[Any], None]], Any]) -> str | None:
        """Work and hand out until all is done; returns the first error's message."""

        def tell(news: object) -> None:
            self._hear(news)
            self._answer()

        self._answer()
        while given := self._next():
            try:
                self._take(given[0], work(given[0], tell))
            except BadInput as error:
                self._fail(str(error))
            self._answer()
        while self._followers:
            self._answer()
            time.sleep(_LOOK)
        return self._message

    def _next(self) -> tuple[Any] | tuple[()]:
        """The next item, in a tuple of its own; an empty one where there is none, or there was an error."""
        if self._message is not None:
            return ()
        return next(((item,) for item in self._items), ())

    def _answer(self) -> None:
        """Take what the other ranks have sent, and give those that are free something to do."""
        while self._communicator.iprobe(tag=_TO_THE_LEADER):
            status = _status()
            kind, value = self._communicator.recv(tag=_TO_THE_LEADER, status=status)
            if kind == "news":
                self._hear_all(value)
            elif kind == "failed":
                self._fail(value)
                self._followers -= 1
            else:
                told, done = value
                self._hear_all(told)
                if done is not None:
                    try:
                        self._take(*done)
                    except BadInput as error:
                        self._fail(str(error))
                given = self._next()
                self._followers -= not given
                self._communicator.send(given, status.Get_source(), _FROM_THE_LEADER)

    def _hear_all(self, told: list[Any]) -> None:
        for news in told:
            self._hear(news)

    def _fail(self, message: str) -> None:
        self._message = self._message or message


@contextmanager
def opened_ranks(processes: int) -> Iterator[Ranks]:
    """The ranks that share the work, of `processes` that were started together.

    BadInput where they do not find each other: every one of them would do all the work and write over the others'.
    """
    if processes == 1:
        yield Ranks()
        return
    communicator = _communicator(processes)
    try:
        yield MpiRanks(communicator)
    except (BadInput, SystemExit):
        raise
    except KeyboardInterrupt:
        if communicator.Get_rank():
            # The launcher interrupts all ranks, and one line is enough: rank 0 ends the others while they wait.
            time.sleep(_FOR_RANK_0)
        print("brt: interrupted", file=sys.stderr, flush=True)
        communicator.Abort(_INTERRUPTED)
    except BaseException:
        # The others would wait for this rank for ever.
        traceback.print_exc()
        communicator.Abort(1)


def _communicator(processes: int) -> Any:
    # While MPI starts no Python runs, and a rank that is interrupted would wait for those that have ended already.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise SharedBadInput(
            f"{processes} processes were started, but MPI cannot be loaded: {error} (install an MPI, or start one)"
        ) from None
    finally:
        signal.signal(signal.SIGINT, before)
    if MPI.COMM_WORLD.Get_size() != processes:
        raise SharedBadInput(
            f"{processes} processes were started, but MPI sees {MPI.COMM_WORLD.Get_size()}: start them with the "
            "mpiexec of the MPI that mpi4py finds"
        )
    return MPI.COMM_WORLD


def _status() -> Any:
    from mpi4py import MPI

    return MPI.Status()
