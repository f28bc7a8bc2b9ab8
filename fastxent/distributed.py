"""Runs of `fastxent score` on the workers of a Dask cluster: blocks of rows out as paths, records back in order.

The cluster may have been deployed in any way; `connect` is given the address of its scheduler, `local` starts workers
on this machine. A worker opens the files itself, so they must lie under the same paths there. Blocks are handed out a
few at a time, so neither the client nor the scheduler holds more than a window of them; a block of a worker that dies
is computed by another one, and has the same bits.
"""

import collections
import contextlib
import logging
import os
import time
from typing import Any, NamedTuple

import distributed
from distributed import Client, LocalCluster
from distributed.comm.core import CommClosedError

import fastxent
from fastxent import runs, threads
from fastxent.io.source import line

_PATIENCE = 30.0  # seconds for a scheduler to answer, and for a first worker
_AHEAD = 3  # blocks handed out for each thread of the workers: one computed, the next ones known to it
_LOST = (CommClosedError, distributed.client.FutureCancelledError, TimeoutError, ConnectionError)


class BlockError(Exception):
    """What kept a worker from scoring a block: the kind of trouble, its message, the worker's address."""


class _Block(NamedTuple):
    """Rows that are handed out; ``workers`` are the addresses they are kept to, None for any."""

    start: int
    stop: int
    future: Any
    workers: list[str] | None


class Cluster:
    """A client's workers; `score_blocks` is `fastxent.runs.score_blocks` on them."""

    def __init__(self, client):
        self._client, self._address = client, client.scheduler.address
        self._shunned: dict[str, str] = {}
        self._kept: list[str] = []

    def score_blocks(self, job, rows, step, first):
        """Records of rows ``first`` to ``rows``, ``step`` at a time, in order.

        Raises
        ------
        fastxent.runs.RunError
            If the scheduler is lost, no worker can read the files, or workers die of a block again and again.
        """
        window: collections.deque[_Block] = collections.deque()
        starts = iter(range(first, rows, step))
        try:
            most = self._window()
            while True:
                for start in starts:
                    window.append(self._submit(job, start, min(rows, start + step)))
                    if len(window) >= most:
                        break
                if not window:
                    return
                yield self._result(job, window.popleft())
        except _LOST as error:
            raise runs.RunError(f"the scheduler at {self._address} was lost: {line(error)}") from error
        finally:
            with contextlib.suppress(*_LOST):
                self._client.cancel([block.future for block in window], force=True)

    def _window(self):
        self._client.wait_for_workers(1, timeout=_PATIENCE)
        return _AHEAD * max(1, sum(self._client.nthreads().values()))

    def _submit(self, job, start, stop):
        workers, key = self._allowed(), f"fastxent-{os.urandom(8).hex()}-{start}"
        future = self._client.submit(_score, job, start, stop, workers=workers, pure=False, key=key)
        return _Block(start, stop, future, workers)

    def _allowed(self):
        """The workers that can read the files; None while no other is known. Some that are gone may come back."""
        if not self._shunned:
            return None
        until = time.monotonic() + (_PATIENCE if set(self._kept) - self._shunned.keys() else 0.0)
        while not (good := self._good()):
            if time.monotonic() >= until:
                address, reason = next(iter(self._shunned.items()))
                raise runs.RunError(f"no worker can read the files; {address}: {reason}")
            time.sleep(0.1)
        self._kept = good
        return good

    def _good(self):
        """The workers that are there and not known to fail."""
        return [address for address in self._client.nthreads() if address not in self._shunned]

    def _result(self, job, block):
        while True:
            if self._is_stranded(block):
                self._client.cancel([block.future], force=True)
                block = self._submit(job, block.start, block.stop)
            try:
                return block.future.result(timeout=_PATIENCE)
            except TimeoutError:
                if not self._good():
                    raise runs.RunError(f"the scheduler at {self._address} has no worker left") from None
            except distributed.KilledWorker as error:
                raise runs.RunError(
                    f"rows {block.start} to {block.stop} cost one worker after another its life, the last at "
                    f"{error.last_worker.address}; give workers more memory, or take fewer rows at a time"
                ) from error
            except BlockError as error:
                kind, reason, address = error.args
                if kind != "source":
                    raise runs.RunError(f"worker {address}: {reason}") from error
                self._shunned[address] = reason
                block = self._submit(job, block.start, block.stop)

    def _is_stranded(self, block):
        """Whether the workers that a block is kept to are gone, and others are there."""
        if block.workers is None:
            return False
        good = self._good()
        return bool(good) and not set(good) & set(block.workers)


def _score(job, start, stop):
    """On a worker: the records of a block."""
    address = distributed.get_worker().address
    if job.version != fastxent.__version__:
        raise BlockError("version", f"has fastxent {fastxent.__version__}, the run {job.version}", address)
    try:
        with threads.one_in_a_worker():
            return job.score(start, stop)
    except MemoryError as error:
        raise BlockError("memory", f"out of memory: {line(error)}", address) from error
    except (OSError, ValueError, ImportError) as error:
        raise BlockError("source", line(error), address) from error


@contextlib.contextmanager
def connect(address):
    """The `Cluster` of the scheduler at ``address``.

    Raises
    ------
    fastxent.runs.RunError
        If no scheduler answers there, or it has no worker.
    """
    with _quiet():
        try:
            client = Client(address, timeout=_PATIENCE, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            raise runs.RunError(f"no scheduler answers at {address}: {line(error)}") from error
        with client:
            yield Cluster(client)


@contextlib.contextmanager
def local(workers):
    """The `Cluster` of ``workers`` new processes on this machine, one thread each; they end with the block."""
    with (
        _quiet(),
        LocalCluster(
            n_workers=workers, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=logging.CRITICAL
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield Cluster(client)


@contextlib.contextmanager
def _quiet():
    """Without the lines of distributed's own loggers on stderr: what matters becomes an error of ours."""
    names = ["distributed", *(name for name in logging.root.manager.loggerDict if name.startswith("distributed."))]
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
