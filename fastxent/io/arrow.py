"""Columns of parquet and Arrow (feather) files: numbers, and fixed-size lists of numbers, nested or not."""

import math
from pathlib import Path

import numpy as np

from fastxent.io.source import Source, SourceError, check_claim, line, package, pick, plain, stamp_of


class ColumnSource(Source):
    """A column: rows of the file are the first axis, fixed-size lists the others.

    The file is decoded batch by batch, in order; going back begins at its start.
    """

    kind: str

    def __init__(self, path, column=None):
        self._path, self.name = Path(path), str(path)
        self._pyarrow = package("pyarrow", self.name)
        self._stamp = self.stamp()
        with self._failures("not a readable", f"{self.kind} file"):
            schema, rows = self._read_schema()
            self._column = pick(self.name, column, schema.names, "column")
            kind = schema.field(self._column).type
        self.name = f"{self._path}::{plain(self._column)}"
        self.shape, self.dtype = self._read_type(kind, rows)
        check_claim(self.name, self.shape, self.dtype)
        self._stored = self.dtype
        self._batches, self._next, self._rest = iter(()), -1, np.empty(0, self.dtype)

    def _read_schema(self):
        """The schema, and the number of rows."""
        raise NotImplementedError

    def _read_batches(self, row):
        """``first row, batches``: the column's arrays from some row not after ``row`` on."""
        raise NotImplementedError

    def _failures(self, *what):
        return _Failures(self.name, *what)

    def _read_type(self, kind, rows):
        shape = [rows]
        while self._pyarrow.types.is_fixed_size_list(kind):
            shape.append(kind.list_size)
            kind = kind.value_type
        if self._pyarrow.types.is_list(kind) or self._pyarrow.types.is_large_list(kind):
            raise SourceError(f"{self.name}: holds lists of any length; cast it to a fixed-size list")
        if not (self._pyarrow.types.is_floating(kind) or self._pyarrow.types.is_integer(kind)):
            raise SourceError(f"{self.name}: holds {kind}, not numbers or fixed-size lists of numbers")
        return tuple(shape), np.dtype(kind.to_pandas_dtype())

    def paths(self):
        """The file."""
        return [self._path]

    def stamp(self):
        """Path, size and time of change."""
        return stamp_of(self._path)

    def close(self):
        """Drop what was decoded."""
        self._batches, self._next, self._rest = iter(()), -1, np.empty(0, self._stored)

    def block(self, start, stop):
        """Elements ``start`` to ``stop`` in C order, decoded."""
        self.check_unchanged()
        found = np.empty(stop - start, self._stored)
        if start == stop:
            return found.view(self.dtype)
        if start != self._next:
            self._seek(start)
        filled = 0
        while filled < len(found):
            if not len(self._rest):
                self._rest = np.empty(0, self._stored)  # a view of the last batch would keep it
                self._rest = self._read_on()
            piece = self._rest[: len(found) - filled]
            found[filled : filled + len(piece)] = piece
            self._rest = self._rest[len(piece) :]
            filled += len(piece)
        self._next = stop
        return found.view(self.dtype)

    def _seek(self, start):
        width = math.prod(self.shape[1:])
        with self._failures("cannot be read"):
            row, self._batches = self._read_batches(start // width if width else 0)
        self._rest, skip = np.empty(0, self._stored), start - row * width
        while skip > len(self._rest):
            skip -= len(self._rest)
            self._rest = np.empty(0, self._stored)
            self._rest = self._read_on()
        self._rest = self._rest[skip:]

    def _read_on(self):
        """The numbers of the next batch that has any."""
        with self._failures("cannot be read"):
            batch = next(self._batches, None)
            if batch is None:
                raise EOFError("it ends too early")
            while self._pyarrow.types.is_fixed_size_list(batch.type) and not batch.null_count:
                batch = batch.flatten()
            if batch.null_count:
                raise ValueError("it holds nulls")
            return batch.to_numpy(zero_copy_only=False)


class _Failures:
    """Whatever a library raises for a damaged file becomes a SourceError."""

    def __init__(self, name, *what):
        self._message = f"{name}: {' '.join(what)}"

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, Exception) and not isinstance(error, SourceError):
            raise SourceError(f"{self._message}: {line(error)}") from error


class ParquetSource(ColumnSource):
    """A column of a .parquet file."""

    kind = "parquet"
    piece_bytes = 16 << 20  # pages and a batch

    def _read_schema(self):
        with self._file() as file:
            rows = file.metadata.num_rows
            in_groups = sum(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
            if rows != in_groups:
                raise ValueError(f"it claims {rows:,} rows, and its groups {in_groups:,}")
            return file.schema_arrow, rows

    def _file(self):
        # a buffer makes it read a column's pages one after the other instead of the whole row group
        return package("pyarrow.parquet", self.name).ParquetFile(self._path, buffer_size=1 << 20, pre_buffer=False)

    def _read_batches(self, row):
        group, first = self._find_group(row)
        return first, self._read_groups(group)

    def _find_group(self, row):
        """The group of rows that holds ``row``, and its first row."""
        first = 0
        with self._file() as file:
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if row < first + size:
                    return group, first
                first += size
        return 0, 0

    def _read_groups(self, group):
        width = max(1, math.prod(self.shape[1:]) * self._stored.itemsize)
        with self._file() as file:
            for batch in file.iter_batches(
                batch_size=max(1, min(1 << 16, (4 << 20) // width)),
                row_groups=range(group, file.num_row_groups),
                columns=[self._column],
                use_threads=False,
            ):
                yield _column(batch)


class ArrowSource(ColumnSource):
    """A column of an Arrow IPC file: .arrow, .feather, .ipc.

    A batch is decoded whole, and no batch is taken to be larger than the first.
    """

    kind = "Arrow"

    def __init__(self, path, column=None):
        super().__init__(path, column)
        with self._failures("cannot be read"):
            _, batches = self._read_batches(0)
            first = next(batches, None)
        # the batch, its bytes as stored, and what the library's allocator holds back
        self.piece_bytes = 0 if first is None else 3 * first.nbytes

    def _read_schema(self):
        with self._reader() as reader:
            return reader.schema, reader.count_rows()

    def _reader(self, columns=None):
        ipc = package("pyarrow.ipc", self.name)
        return ipc.open_file(
            self._pyarrow.memory_map(str(self._path)),
            options=ipc.IpcReadOptions(included_fields=columns, use_threads=False),
        )

    def _read_batches(self, row):
        return 0, self._read_all()

    def _read_all(self):
        with self._reader() as reader:
            place = reader.schema.get_field_index(self._column)
        with self._reader([place]) as reader:
            for number in range(reader.num_record_batches):
                yield _column(reader.get_batch(number))


def _column(batch):
    """The only column of a batch, whose lengths its buffers hold: the library believes what a file says of them."""
    batch.validate()
    return batch.column(0)
