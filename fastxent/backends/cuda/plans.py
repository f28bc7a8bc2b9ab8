"""What a call asks of its stream, kept to be asked again: the same kernels for the caller's next arrays.

A call's checks, layouts and arguments depend on shapes and options alone. So the first call of a kind is carried out
through a `Recorder`; those that follow it put their arrays' addresses in place of the first one's and ask again.
"""

from typing import Any


class Place(int):
    """The address of an array of the caller's, by the name it goes by in a call."""

    name: str

    def __new__(cls, address, name):
        """As an int."""
        place = super().__new__(cls, address)
        place.name = name
        return place


class Recorder:
    """A machine that takes down what is asked of a stream, but for what is allocated."""

    def __init__(self, machine):
        self._machine, self.steps = machine, []

    def __getattr__(self, name):
        return getattr(self._machine, name)

    def launch(self, stream, name, kind, arguments, blocks, **how):
        """Run a kernel."""
        prepared = self._machine.prepared(name, kind, arguments, blocks, **how)
        numbers = list(flat(arguments))
        places = [(k, number.name) for k, number in enumerate(numbers) if isinstance(number, Place)]
        numbers = [int(number) if isinstance(number, Place) else number for number in numbers]
        self._machine.run(stream, prepared, numbers)
        self.steps.append((self._machine.run, prepared, numbers, places))

    def clear(self, stream, address, size):
        """Zeros."""
        self._machine.clear(stream, address, size)
        self.steps.append((self._machine.clear, None, (address, size), ()))


class Plan:
    """The steps of a call, and what the caller gets: ``new`` arrays by name, with shape and dtype; ``lengths`` are the
    bytes of the caller's arrays.
    """

    def __init__(self, steps, new, note, pieces, lengths):
        self._steps, self.new, self.note, self.pieces = steps, new, note, pieces
        self._length = lengths.pop("out", 0)
        self._others = tuple(lengths.items())

    def may_write(self, addresses):
        """Whether ``out`` is none or the logits or apart from all else: what it overlaps, the call itself says."""
        start = addresses.get("out")
        if start is None or start == addresses["logits"]:
            return True
        end = start + self._length
        for name, size in self._others:
            if addresses[name] < end and start < addresses[name] + size:
                return False
        return True

    def ask(self, stream, addresses: dict[str, Any]):
        """All steps again, with the caller's arrays at these addresses."""
        for what, prepared, arguments, places in self._steps:
            if prepared is None:
                what(stream, *arguments)
                continue
            for k, name in places:
                arguments[k] = addresses[name]
            what(stream, prepared, arguments)


def flat(arguments):
    """The numbers of named tuples, one after the other."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from argument
        else:
            yield argument
