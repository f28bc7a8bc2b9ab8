"""Records on their way to a file that appears under its name only when it is whole, and that a kill does not lose.

Records are appended to ``OUT.part``, a .npy file; ``OUT.journal`` says what the run is and how many records of the
part are good. Its first line is the run, each other line what was reached. A line that was cut off while it was
written counts for nothing, and records beyond the last line are written again. At the end the part becomes
the output, or is written out in its format (`fastxent.io.publish`).
"""

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from fastxent.io import publish

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

_EVERY = 0.1  # seconds between lines of the journal; at most so much work is done twice


class ResumeError(ValueError):
    """A part that this run cannot go on with; the message says why."""


class Spool:
    """Records of a run; used in a ``with`` block, which keeps what was written however it is left.

    Parameters
    ----------
    path : path-like
    dtype : dtype
        Of a record: fields are scalars or arrays of a fixed shape.
    shape : tuple of int
    run : dict
        What makes this run the same as another, in JSON values.
    file_format : str
        One of `fastxent.io.publish.FORMATS`.
    replace : bool
        Whether an output that is already there gives way, and a part of another run.
    resume : bool
        Whether to go on with the part, if there is one.
    inputs : sequence of path-like
        Files that must not be written over.

    Attributes
    ----------
    done : int
        How many records the part holds.
    published : dict or None
        What was given to `publish`, where the run to be resumed was killed after that.

    Raises
    ------
    FileExistsError
        If the output exists and may not be replaced, or is no regular file, or a file to be written is an input; if
        another process is writing it; if there is a part and neither ``replace`` nor ``resume`` says what to do.
    ResumeError
        If the part was begun by a different run, or is damaged.
    """

    def __init__(self, path, dtype, shape, run, file_format=".npy", replace=False, resume=False, inputs=()):
        self.path = Path(path)
        self.part, self.journal = self._beside("part"), self._beside("journal")
        self._new = self.part if file_format == ".npy" else self._beside("new")
        self._dtype, self._shape, self._rows = np.dtype(dtype), shape, math.prod(shape)
        self._run = json.loads(json.dumps(run | {"record": np.lib.format.dtype_to_descr(self._dtype), "shape": shape}))
        self._format, self._replace, self._resume = file_format, replace, resume
        self._file: Any = None
        self._begun, self._noted, self._noted_at = False, 0, 0.0
        self.done, self.published = 0, None
        for mine in (self.path, self.part, self.journal, self._new):
            self._check_place(mine, inputs)

    def _beside(self, suffix):
        return self.path.with_name(f"{self.path.name}.{suffix}")

    def _check_place(self, mine, inputs):
        if mine.exists() and any(mine.samefile(theirs) for theirs in inputs if Path(theirs).exists()):
            raise FileExistsError(f"{mine} is an input of this run")
        if mine != self.path and mine.is_symlink():
            raise FileExistsError(f"{mine} is a link")
        folder = self._format == ".zarr" and mine in (self.path, self._new)
        if (mine.exists() or mine.is_symlink()) and not (publish.is_store(mine) if folder else mine.is_file()):
            raise FileExistsError(f"{mine} is not a {'zarr store' if folder else 'regular file'}")

    def __enter__(self):
        try:
            self._open()
            known = self._read_journal()
            if self._resume and known:
                self._go_on(*known)
            else:
                self._begin(known)
            self._begun = True
        except BaseException:
            self._let_go()
            raise
        return self

    def _open(self):
        """Take hold of the part; a lock tells whether a living process does already."""
        if fcntl is None:
            raise NotImplementedError("scores are written to files on POSIX systems only: their part is held by flock")
        descriptor = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), self.part.stat()):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            self._file.close()
            self._file = None
            raise FileExistsError(f"{self.part} is being written by another process") from None

    def _read_journal(self):
        """``run, reached`` by the last whole line, and the journal without what follows it; None if there is none."""
        try:
            content = self.journal.read_bytes()
        except FileNotFoundError:
            return None
        whole = content[: content.rfind(b"\n") + 1]
        try:
            first, *lines = map(json.loads, whole.splitlines())
            reached = lines[-1] if lines else {"done": 0}
            if not (isinstance(first, dict) and 0 <= reached["done"] <= self._rows):
                raise ValueError
        except (ValueError, TypeError, KeyError):
            if self._resume:
                raise ResumeError(f"{self.journal}: is damaged") from None
            return None
        if len(whole) < len(content) and self._resume:
            os.truncate(self.journal, len(whole))
        return first, reached

    def _begin(self, known):
        if self.path.exists() and not self._replace:
            raise FileExistsError(f"{self.path} exists")
        if known and known[1]["done"] and not self._replace and not self._is_empty():
            raise FileExistsError(f"{self.part} is unfinished")
        self.journal.unlink(missing_ok=True)
        self._file.truncate(0)
        self._write_header()
        self._note(self._run)

    def _is_empty(self):
        return os.fstat(self._file.fileno()).st_size == 0

    def _go_on(self, run, reached):
        for name in self._run.keys() | run.keys():
            if (was := run.get(name)) != (now := self._run.get(name)):
                was, now = _first_difference(was, now)
                raise ResumeError(f"{self.part}: was begun with another {name}: {was}, not {now}")
        if "output" in reached and self._is_ours(reached["output"]):
            self.done = self._noted = self._rows
            self.published = reached["figures"]
            return
        if self.path.exists() and not self._replace:
            raise FileExistsError(f"{self.path} exists")
        end = self._write_header() + reached["done"] * self._dtype.itemsize
        if os.fstat(self._file.fileno()).st_size < end:
            raise ResumeError(f"{self.part}: holds fewer records than its journal says")
        self._file.truncate(end)
        self._file.seek(end)
        self.done = self._noted = reached["done"]

    def _is_ours(self, identity):
        """Whether the output is what a killed run had made ready."""
        return self.path.exists() and _identity(self.path) == identity

    def _write_header(self):
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": self._shape}
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()

    def _note(self, line):
        """Add a line to the journal; what it says is on the disk before."""
        os.fdatasync(self._file.fileno())
        descriptor = os.open(self.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        with os.fdopen(descriptor, "wb", buffering=0) as journal:
            _write_all(journal, json.dumps(line).encode() + b"\n")
        self._noted, self._noted_at = self.done, time.monotonic()

    def append(self, records):
        """Write the next records."""
        _write_all(self._file, np.ascontiguousarray(records).view(np.uint8))
        self.done += len(records)
        if time.monotonic() - self._noted_at > _EVERY:
            self._note({"done": self.done})

    def written(self):
        """The records so far, (done,), a memory map."""
        if not self.done:
            return np.empty(0, self._dtype)
        offset = os.fstat(self._file.fileno()).st_size - self.done * self._dtype.itemsize
        return np.memmap(self._file, self._dtype, "r", offset, (self.done,))

    def records(self):
        """All records (N,), a memory map."""
        if self.done < self._rows:
            raise ValueError(f"{self.path}: {self._rows - self.done} records were never written")
        return self.written()

    def publish(self, figures):
        """Make the records the output; ``figures``, in JSON values, are what `published` is if that is cut short."""
        if self.published is None:
            records = self.records()
            if self._new != self.part:
                self._note({"done": self.done})
                publish.WRITERS[self._format](records, self._shape, self._new)
            self._note({"done": self.done, "output": _identity(self._new), "figures": figures})
            publish.rename(self._new, self.path, self._replace)
        if self._format != ".zarr":
            self._new.unlink(missing_ok=True)  # linked, and killed before it was removed
        self.part.unlink(missing_ok=True)  # while it is held: whoever takes it next would write into the output
        self.journal.unlink(missing_ok=True)

    def __exit__(self, kind, error, trace):
        try:
            if error is not None and self._noted < self.done:
                with contextlib.suppress(OSError):
                    self._note({"done": self.done})
        finally:
            self._let_go()

    def _let_go(self):
        """Close the part; remove it if nothing is in it, or no record, with its journal."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._file.fileno()), self.part.stat()):
                if self._begun and self.done == 0:
                    self.journal.unlink(missing_ok=True)
                    self.part.unlink()
                elif self._is_empty():
                    self.part.unlink()
        with contextlib.suppress(OSError):
            self._file.close()


def _write_all(file, content):
    """``content`` to an unbuffered file, which may take less than all of it at a time."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


def _identity(path):
    """What a file or folder keeps when it is renamed."""
    status = path.stat()
    return [status.st_dev, status.st_ino]


def _first_difference(was, now):
    """The smallest lists that differ, or values outside of lists."""
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for one, other in zip(was, now, strict=True):
            if one != other and isinstance(one, list):
                return _first_difference(one, other)
    return was, now
