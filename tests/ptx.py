"""PTX run on a CPU: what the compilers made of a kernel, instruction by instruction, where there is no GPU.

A register of all threads of a block is one array, and an instruction is run for all threads that have come to it.
Threads that have gone apart go on from where the hindmost are, so they meet again, or as chance has it; where one has
to wait for others it waits until they have come. An instruction that is not known, here or in `ptx_arithmetic`, is an
error.
"""

import functools
import re
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastxent.backends.cuda import simulated
from fastxent.backends.cuda.plans import flat
from fastxent.backends.cuda.scheduler import NONSENSE, WARP, SimulationError
from tests.ptx_arithmetic import ARITHMETIC, KINDS

_REGISTERS = {"pred": "?", "b16": "u2", "b32": "u4", "f32": "f4", "b64": "u8", "f64": "f8"}
_BETWEEN_BLOCKS = "between blocks"  # what is ordered against other blocks, and sums that they share
_PATIENCE = 2000  # turns of blocks in which none stores anything
_MOST = 50_000_000  # instructions of a block


class _Instruction(NamedTuple):
    """What it does for threads that have come to it under its ``guard``, a register and whether that is negated:
    ``run(block, mask)``, if it computes; where they go, if that is a ``target``; and ``members(block)``, the lanes of
    its warp each waits for, if it waits for some.
    """

    name: str
    run: Callable[..., Any] | None = None
    members: Callable[..., Any] | None = None
    target: int = -1
    guard: tuple[int, bool] | None = None


class Kernel:
    """One kernel's PTX, read."""

    def __init__(self, text):
        head, body = re.search(r"\.entry\s+\S+\((.*?)\)[^{]*\{(.*)\}", text, re.DOTALL).groups()
        self._parameters = [(name, KINDS[kind]) for kind, name in re.findall(r"\.param \.(\w+) (\w+)", head)]
        self._numbers = {name: k for k, (name, _) in enumerate(self._parameters)}
        self.registers: dict[str, np.dtype] = {}
        self.kinds: list[np.dtype] = []
        instructions, labels = [], {}
        for words in _statements(body):
            if label := re.fullmatch(r"(\$\w+):", words):
                labels[label[1]] = len(instructions)
            elif declared := re.match(r"\.reg \.(\w+) (%?\w+)", words):
                self.registers[declared[2]] = np.dtype(_REGISTERS[declared[1]])
            elif not words.startswith("."):
                instructions.append(words)
        self._indices: dict[str, int] = {}
        self.program = [self._read(words, labels) for words in instructions]

    def launch(self, memory, numbers, blocks, threads, shared, together, apart=False):
        """Run it to its end on `Memory`: ``blocks`` gives their numbers in order, ``together`` of them are on the way
        at once; the warps of a block go side by side, or ``apart``, these and parts of them as chance has it.
        """
        values = [np.array(number).astype(kind) for number, (_, kind) in zip(numbers, self._parameters, strict=True)]
        left, running, idle = deque(blocks), deque(), 0
        with np.errstate(all="ignore"):
            while left or running:
                while left and len(running) < together:
                    block = _Block(self, memory, values, left.popleft(), threads, shared)
                    running.append(block.run(apart))
                block = running.popleft()
                before = memory.written
                if next(block, None) is not None:
                    running.append(block)
                    idle = 0 if memory.written != before else idle + 1
                if idle > _PATIENCE:
                    raise SimulationError("blocks wait for each other for ever")

    def _read(self, words, labels):
        guard = None
        if words[0] == "@":
            condition, words = words[1:].split(None, 1)
            guard = self._index(condition.lstrip("!")), condition[0] == "!"
        operation, _, rest = words.partition(" ")
        operands = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)]
        name, *modifiers = operation.split(".")
        if name == "bra":
            return _Instruction(name, target=labels[operands[0]], guard=guard)
        if operation == "ret" or (operation, operands) == ("bar.sync", ["0"]):
            return _Instruction(operation, guard=guard)
        if operation == "bar.warp.sync":
            return _Instruction(operation, members=self._source(operands[0], np.dtype("u4")), guard=guard)
        if operation == "shfl.sync.bfly.b32":
            return self._shuffle(operation, operands)._replace(guard=guard)
        if name in ("ld", "st", "atom", "red"):
            make = {"ld": self._load, "st": self._store, "atom": self._atomic, "red": self._atomic}[name]
            order = [one for one in modifiers if one in ("acquire", "release", "acq_rel", "gpu")]
            run = make([one for one in modifiers if one not in order], operands)
            return _Instruction(_BETWEEN_BLOCKS if order or name == "red" else name, run, guard=guard)
        return _Instruction(name, self._computed(operation, operands), guard=guard)

    def _computed(self, operation, operands):
        if operation.startswith("mov.") and "{" in operands[0] + operands[1]:
            return self._regrouped(operands)
        if operation == "mov.u32" and operands[1] in ("%tid.x", "%ctaid.x"):
            to, of_thread = self._sink(operands[0]), operands[1] == "%tid.x"
            return lambda block, mask: to(block, block.indices if of_thread else np.uint32(block.number), mask)
        if operation not in ARITHMETIC:
            raise NotImplementedError(f"{operation} {operands}")
        given, result, function = ARITHMETIC[operation]
        sources = [self._source(operand, kind) for operand, kind in zip(operands[1:], given, strict=True)]
        to = self._sink(operands[0], result)
        return lambda block, mask: to(block, function(*(source(block) for source in sources)), mask)

    def _index(self, name):
        """The place of a register among a block's."""
        if name not in self._indices:
            kind = self.registers.get(name) or self.registers[name.rstrip("0123456789")]
            self._indices[name] = len(self.kinds)
            self.kinds.append(kind)
        return self._indices[name]

    def _source(self, operand, kind):
        """A function of a block that gives an operand of all threads, as numbers of a kind."""
        if operand.startswith("0f"):
            value = np.array(int(operand[2:], 16), "u4").view(kind)[()]
        elif operand.startswith("0d"):
            value = np.array(int(operand[2:], 16), "u8").view(kind)[()]
        elif operand == "fastxent_shared":
            value = kind.type(0)
        elif re.fullmatch(r"-?\d+|0x[0-9A-F]+", operand):
            whole = np.array(int(operand, 0) % (1 << 64), np.uint64)
            value = whole.astype(kind if kind.kind == "b" else f"u{kind.itemsize}").view(kind)[()]
        else:
            index = self._index(operand)
            have = self.kinds[index]
            if have.itemsize == kind.itemsize:
                return lambda block: block.registers[index].view(kind)
            low = np.dtype(f"u{kind.itemsize}")
            return lambda block: block.registers[index].astype(low).view(kind)
        return lambda block: value

    def _sink(self, operand, kind=None):
        """A function of a block, values and a mask that gives a register values in some threads."""
        index = self._index(operand)
        want = self.kinds[index]

        def put(block, values, mask):
            values = np.asarray(values)
            if values.dtype != want:
                if values.dtype.itemsize != want.itemsize:  # narrower: low bits, a sign with what is signed
                    values = values.astype(f"{'i' if values.dtype.kind == 'i' else 'u'}{want.itemsize}")
                values = np.ascontiguousarray(values).view(want)
            np.copyto(block.registers[index], values, where=mask)

        return put

    def _address(self, operand, wide):
        """A function of a block that gives what stands between brackets."""
        base, _, offset = operand.strip("[]").partition("+")
        source, kind = self._source(base, np.dtype("u8" if wide else "u4")), np.uint64 if wide else np.uint32
        more = kind(int(offset or 0) % (1 << (64 if wide else 32)))
        return lambda block: np.broadcast_to(source(block) + more, block.indices.shape).astype(np.int64)

    def _load(self, modifiers, operands):
        space, *vector, kind = modifiers
        parts = [self._sink(part.strip()) for part in operands[0].strip("{}").split(",")]
        if space == "param":
            number = self._numbers[operands[1].strip("[]")]
            return lambda block, mask: parts[0](block, block.values[number], mask)
        where, kind = self._address(operands[1], space == "global"), KINDS[kind]
        assert len(parts) == int((vector or ["v1"])[0][1:])

        def load(block, mask):
            found = np.zeros((len(mask), len(parts)), kind)
            found[mask] = block.memory_of(space).load(where(block)[mask], kind, len(parts))
            for part, column in zip(parts, found.T, strict=True):
                part(block, column, mask)

        return load

    def _store(self, modifiers, operands):
        space, *vector, kind = modifiers
        kind, where = KINDS[kind], self._address(operands[0], space == "global")
        parts = [self._source(part.strip(), kind) for part in operands[1].strip("{}").split(",")]
        assert len(parts) == int((vector or ["v1"])[0][1:])

        def store(block, mask):
            columns = [np.broadcast_to(part(block), mask.shape)[mask] for part in parts]
            block.memory_of(space).store(where(block)[mask], np.stack(columns, axis=1))

        return store

    def _atomic(self, modifiers, operands):
        """One thread after the other."""
        space, operation, kind = modifiers
        combine, kind = {"add": np.add, "max": np.maximum}[operation], KINDS[kind]
        *result, place, value = operands
        where, source, sinks = self._address(place, True), self._source(value, kind), [self._sink(r) for r in result]

        def run(block, mask):
            memory, before = block.memory_of(space), np.zeros(len(mask), kind)
            addresses, values = where(block), np.broadcast_to(source(block), mask.shape)
            for thread in np.flatnonzero(mask):
                at = addresses[thread : thread + 1]
                before[thread] = memory.load(at, kind, 1)[0, 0]
                memory.store(at, combine(before[thread], values[thread]).reshape(1, 1))
            for sink in sinks:
                sink(block, before, mask)

        return run

    def _regrouped(self, operands):
        """One register made of several, or several of one."""
        to, of = ([part.strip() for part in one.strip("{}").split(",")] for one in operands)
        sinks = [self._sink(part) for part in to]
        each = [self.kinds[self._index(part)] for part in to]
        if len(of) > 1:
            given = [self.kinds[self._index(part)] for part in of]
            sources = [self._source(part, kind) for part, kind in zip(of, given, strict=True)]

            def join(block, mask):
                sinks[0](block, np.stack([source(block) for source in sources], axis=1).view(each[0])[:, 0], mask)

            return join
        whole = self._source(of[0], self.kinds[self._index(of[0])])

        def cut(block, mask):
            columns = np.ascontiguousarray(whole(block))[:, None].view(each[0])
            for sink, column in zip(sinks, columns.T, strict=True):
                sink(block, column, mask)

        return cut

    def _shuffle(self, name, operands):
        result, value, distance, clamp, members = operands
        sinks = [self._sink(name) for name in result.split("|")]
        source, over, clamp, among = (
            self._source(operand, np.dtype("u4")) for operand in (value, distance, clamp, members)
        )

        def run(block, mask):
            there = np.where(mask, block.indices ^ over(block), block.indices)
            lanes = (np.broadcast_to(among(block), mask.shape) >> (there % WARP)) & 1 == 1
            whole = (clamp(block) == WARP - 1) & (over(block) < WARP)
            if not (whole & lanes)[mask].all():
                raise SimulationError("a shuffle over parts of a warp, or with a thread that is not named")
            for sink, values in zip(sinks, (np.broadcast_to(source(block), mask.shape)[there], lanes), strict=False):
                sink(block, values, mask)

        return _Instruction(name, run, among)


def _statements(body):
    """Labels, and statements without comments; what opens and closes a scope is not kept."""
    for words in re.sub(r"(\$\w+:)", r"\1;", re.sub(r"//[^\n]*", "", body)).split(";"):
        if words := re.sub(r"\s+", " ", words).lstrip(" {}").rstrip():
            yield words


class _Block:
    """Threads with registers and shared memory of their own."""

    def __init__(self, kernel, memory, values, number, threads, shared):
        self.number, self.values, self.indices = number, values, np.arange(threads, dtype=np.uint32)
        self.registers = [
            np.full(threads * kind.itemsize, 0 if kind.kind == "b" else NONSENSE, np.uint8).view(kind)
            for kind in kernel.kinds
        ]
        room = np.full(shared + 16, NONSENSE, np.uint8)
        self._memories = {"global": memory, "shared": Memory({0: room[-room.ctypes.data % 16 :][:shared]})}
        self.memory_of = self._memories.__getitem__
        self._program = kernel.program
        self._places, self._waits = np.zeros(threads, np.int64), np.zeros(threads, bool)
        self._lives, self._left = np.ones(threads, bool), _MOST
        self._chance = np.random.default_rng(number)

    def run(self, apart):
        """A generator: it stops where other blocks may see what this one does, or this one what they do."""
        while self._lives.any():
            running = self._lives & ~self._waits
            if not running.any():
                raise SimulationError("threads wait for each other for ever")
            mask, others = self._apart(running) if apart else self._hindmost(running)
            place = int(self._places[mask][0])
            ahead = self._places[others & (self._places > place)]
            if self._go(place, mask, int(ahead.min()) if len(ahead) else len(self._program)):
                yield self.number

    def _hindmost(self, running):
        """Those that go on, and those they may meet."""
        mask = running & (self._places == self._places[running].min())
        return mask, running & ~mask

    def _apart(self, running):
        """Of a warp those at one place, or some of them, by chance."""
        chosen = self._chance.choice(np.flatnonzero(running))
        running = running & (self.indices // WARP == chosen // WARP)
        mask = running & (self._places == self._places[chosen])
        if self._chance.random() < 0.5:
            mask &= self._chance.random(len(mask)) < 0.5
            mask[chosen] = True
        return mask, running & ~mask

    def _go(self, place, mask, stop):
        """From a place until others are met or control parts; whether other blocks may see it."""
        while place < stop:
            self._left -= 1
            if not self._left:
                raise SimulationError("a block that does not come to an end")
            name, run, members, target, guard = self._program[place]
            chosen = mask if guard is None else mask & (self.registers[guard[0]] ^ guard[1])
            if name == "bra":
                self._places[mask], self._places[chosen] = place + 1, target
                if not (chosen == mask).all():
                    if chosen.any():
                        return False
                    place += 1
                elif target <= stop:
                    place = target
                else:
                    return False
            elif name == "ret":
                self._lives[chosen] = False
                self._places[mask] = place + 1
                for waited in np.unique(self._places[self._lives & self._waits]):
                    self._released(int(waited))
                return False
            elif name == "bar.sync" or members is not None:
                if guard is not None:
                    raise NotImplementedError(f"{name} under a condition")
                self._places[mask], self._waits[mask] = place, True
                if not (self._released(place) == mask).all():
                    return False
                place += 1
            else:
                if chosen.any():
                    run(self, chosen)
                place += 1
                if name == _BETWEEN_BLOCKS:
                    self._places[mask] = place
                    return True
        self._places[mask] = place
        return False

    def _released(self, place):
        """Those whose wait at a place is over: what they met for is done, and they go on."""
        name, run, members, *_ = self._program[place]
        come = self._lives & self._waits & (self._places == place)
        if members is None:
            met = come if (come == self._lives).all() else np.zeros_like(come)
        else:
            met = self._met(come, np.broadcast_to(members(self), come.shape), name)
            if run is not None and met.any():
                run(self, met)
        self._waits[met], self._places[met] = False, place + 1
        return met

    def _met(self, come, members, name):
        """Those of who have come whose whole part of a warp has, each naming the same."""
        of_warps, named = come.reshape(-1, WARP), members.reshape(-1, WARP)
        lanes = np.arange(WARP, dtype=np.uint32)
        there = (of_warps.astype(np.uint32) << lanes).sum(axis=1, dtype=np.uint32)[:, None]
        met = of_warps & (named & ~there == 0)
        if (of_warps & ((named >> lanes) & 1 == 0)).any():
            raise SimulationError(f"{name} by a thread that is not among those it names")
        each, other = named[:, :, None], named[:, None, :]
        if (met[:, :, None] & ((each >> lanes) & 1 == 1) & (each != other)).any():
            raise SimulationError(f"{name} by threads that do not name the same")
        return met.reshape(-1)


class Memory:
    """Arrays by address; every access is whole within one of them, and at a multiple of its size."""

    def __init__(self, arrays):
        self._starts = np.array(sorted(arrays), np.int64)
        self._arrays = [arrays[start] for start in self._starts.tolist()]
        self._ends = self._starts + [array.nbytes for array in self._arrays]
        self.written = 0

    def load(self, addresses, kind, count):
        """(n, ``count``) numbers of a kind."""
        found = np.empty((len(addresses), count), kind)
        for some, array, indices in self._found(addresses, kind, count):
            found[some] = array[indices]
        return found

    def store(self, addresses, values):
        """(n, count) numbers."""
        self.written += 1
        for some, array, indices in self._found(addresses, values.dtype, values.shape[1]):
            array[indices] = values[some]
            if not np.array_equal(array[indices].view(np.uint8), np.ascontiguousarray(values[some]).view(np.uint8)):
                raise SimulationError("threads that store different numbers at one address at once")

    def _found(self, addresses, kind, count):
        size = kind.itemsize * count
        which = np.searchsorted(self._starts, addresses, side="right") - 1
        outside = (which < 0) | (addresses + size > self._ends[which])
        if outside.any():
            raise SimulationError(f"{size} bytes at {addresses[outside][0]:#x} lie outside every buffer of the launch")
        if (addresses % size).any():
            raise SimulationError(f"{size} bytes are taken from {addresses[addresses % size != 0][0]:#x}")
        for one in np.unique(which):
            some = which == one
            first = (addresses[some] - self._starts[one]) // kind.itemsize
            yield some, self._arrays[one].view(kind), first[:, None] + np.arange(count)


class Machine(simulated.Machine):
    """The simulator's memory, and kernels as the compilers made them; ``ptx_of`` gives that of a `compiler.Code`."""

    def __init__(self, layout, together, ptx_of, apart=False):
        super().__init__()
        self.layout, self.together, self._apart = layout, together, apart
        self._kernel_of = functools.cache(lambda code: Kernel(ptx_of(code)))

    def carry_out(self, code, arguments, blocks, shared, resident):
        """Run a kernel to its end."""
        numbers, threads = list(flat(arguments)), code.kind.threads * code.kind.rows
        self._kernel_of(code).launch(Memory(self._memory), numbers, blocks, threads, shared, resident, self._apart)
