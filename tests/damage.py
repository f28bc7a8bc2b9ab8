"""Damage to files, and what may come of it."""

import contextlib

from fastxent.io import SourceError


def damage_file(path, damage):
    """Write each ``(place, byte)`` of ``damage`` to the file, places wrapping around at its end."""
    content = bytearray(path.read_bytes())
    for at, byte in damage:
        content[at % len(content)] = byte
    path.write_bytes(content)


@contextlib.contextmanager
def readable_or_one_clear_line():
    """A SourceError may come out of the block, if its message is one line; nothing else."""
    said = ""
    try:
        yield
    except SourceError as error:
        said = str(error)
    assert "\n" not in said
