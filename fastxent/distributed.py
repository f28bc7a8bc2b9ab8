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


class Cluster:
    """A client's workers; `score_blocks` is `fastxent.runs.score_blocks` on them."""

    def __init__(self, client):
        self._client, self._address = client, client.scheduler.address
        self._shunned: dict[str, str] = {}

    def score_blocks(self, job, rows, step, first):
        """Records of rows ``first`` to ``rows``, ``step`` at a time, in order.

        Raises
        ------
        fastxent.runs.RunError
            If the scheduler is lost, no worker can read the files, or workers die of a block again and again.
        """
        window: collections.deque = collections.deque()
        starts = iter(range(first, rows, step))
        try:
            most = self._window()
            while True:
                for start in starts:
                    window.append((start, self._submit(job, start, min(rows, start + step))))
                    if len(window) >= most:
                        break
                if not window:
                    return
                start, future = window.popleft()
                yield self._result(job, start, min(rows, start + step), future)
        except _LOST as error:
            raise runs.RunError(f"the scheduler at {self._address} was lost: {line(error)}") from error
        finally:
            with contextlib.suppress(*_LOST):
                self._client.cancel([future for _, future in window], force=True)

    def _window(self):
        self._client.wait_for_workers(1, timeout=_PATIENCE)
        return _AHEAD * max(1, sum(self._client.nthreads().values()))

    def _submit(self, job, start, stop):
        return self._client.submit(
            _score, job, start, stop, workers=self._allowed(), pure=False, key=f"fastxent-{os.urandom(8).hex()}-{start}"
        )

    def _allowed(self):
        """The workers that can read the files; None while no other is known."""
        if not self._shunned:
            return None
        good = [address for address in self._client.nthreads() if address not in self._shunned]
        if not good:
            address, reason = next(iter(self._shunned.items()))
            raise runs.RunError(f"no worker can read the files; {address}: {reason}")
        return good

    def _result(self, job, start, stop, future):
        while True:
            try:
                return future.result(timeout=_PATIENCE)
            except TimeoutError:
                self._check_alive()
            except distributed.KilledWorker as error:
                raise runs.RunError(
                    f"rows {start} to {stop} cost one worker after another its life, the last at "
                    f"{error.last_worker.address}; give workers more memory, or take fewer rows at a time"
                ) from error
            except BlockError as error:
                kind, reason, address = error.args
                if kind != "source":
                    raise runs.RunError(f"worker {address}: {reason}") from error
                self._shunned[address] = reason
                future = self._submit(job, start, stop)

    def _check_alive(self):
        """Somebody is there to compute what is waited for, or a RunError says that nobody is."""
        if not self._client.nthreads().keys() - self._shunned.keys():
            raise runs.RunError(f"the scheduler at {self._address} has no worker left")


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
    """Without the library's own lines on stderr: what matters becomes an error of ours."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
