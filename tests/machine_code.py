"""Machine code of a kernel, read: what it takes of a multiprocessor, its instructions, and which of them are in loops.

Works without a GPU, on the disassembler that NVIDIA publishes as Python packages.
"""

import heapq
import importlib.util
import operator
import os
import re
import subprocess
import sysconfig
from pathlib import Path

_TOOLS = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin"
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+\s+)?)([^;]*);", re.M)
_TARGET = re.compile(r"0x([0-9a-f]+)")


def why_missing():
    """What is not installed, in words, or None."""
    names = [name for name in ("numba_cuda", "cuda") if importlib.util.find_spec(name) is None]
    names += [tool for tool in ("cuobjdump", "nvdisasm") if not (_TOOLS / tool).exists()]
    return f"needs {', '.join(names)}: pip install fastxent[cuda-check]" if names else None


def _run(*arguments):
    environment = os.environ | {"PATH": f"{_TOOLS}:{os.environ['PATH']}"}
    command = [str(_TOOLS / "cuobjdump"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout


class MachineCode:
    """``registers``, ``stack`` and ``local`` bytes a thread, and instructions by address."""

    def __init__(self, cubin, folder):
        file = folder / "kernel.cubin"
        file.write_bytes(cubin)
        found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _run("--dump-resource-usage", file)))
        self.registers, self.stack, self.local = (int(found[name]) for name in ("REG", "STACK", "LOCAL"))
        self.instructions = [
            (int(at, 16), bool(predicate), text.split()[0], text)
            for at, predicate, text in _LINE.findall(_run("--dump-sass", file))
        ]

    def names(self):
        """Every instruction's name."""
        return [name for _, _, name, _ in self.instructions]

    def loops(self, pattern):
        """Loops in which an instruction matches, without those around them: a list of names for each."""
        position = {at: k for k, (at, *_) in enumerate(self.instructions)}
        following = [self._following(k, position) for k in range(len(self.instructions))]
        names, found, left = self.names(), [], [range(len(following))]
        while left:
            within = left.pop()
            for part in map(set, _cycles({k: [after for after in following[k] if after in within] for k in within})):
                if any(re.match(pattern, names[k]) for k in part):
                    found.append(part)
                    # without where it is entered, what is left of a loop are those in it
                    left.append(part - {after for k, edges in enumerate(following) if k not in part for after in edges})
        return [[names[k] for k in sorted(loop)] for loop in found if not any(loop > other for other in found)]

    def shortest_way_round(self, wanted):
        """How many instructions are between one time control comes back and the next, on the shortest way on which as
        many match each pattern as are wanted of it.
        """
        position = {at: k for k, (at, *_) in enumerate(self.instructions)}
        following = [self._following(k, position) for k in range(len(self.instructions))]
        matches = [tuple(int(re.match(pattern, name) is not None) for pattern in wanted) for name in self.names()]
        ends = [(k, after) for k, edges in enumerate(following) for after in edges if after <= k]
        return min(_shortest(following, matches, first, last, tuple(wanted.values())) for last, first in ends)

    def _following(self, k, position):
        _, predicate, name, text = self.instructions[k]
        operation = name.split(".")[0]
        if operation in ("EXIT", "RET", "KILL", "BPT") and not predicate:
            return []
        after = [k + 1] if k + 1 < len(self.instructions) else []
        if operation in ("BRA", "CALL"):  # a call that nobody returns from is a branch
            target = position[int(_TARGET.findall(text)[-1], 16)]
            conditional = operation == "CALL" or predicate or re.search(r"\bU?!?U?P\d", text) or ".DIV" in name
            return [target, *after] if conditional else [target]
        return after


def _shortest(following, matches, first, last, times):
    """Instructions from ``first`` to ``last``, forwards, so many of which match at least; infinity if none do."""
    ways, seen = [(1, first, matches[first])], set()
    while ways:
        length, k, matched = heapq.heappop(ways)
        if k == last and matched == times:
            return length
        if (k, matched) in seen:
            continue
        seen.add((k, matched))
        for after in following[k]:
            if k < after <= last:
                together = tuple(map(min, times, map(operator.add, matched, matches[after])))
                heapq.heappush(ways, (length + 1, after, together))
    return float("inf")


def _cycles(following):
    """Strongly connected parts of a graph with an edge within, by Tarjan's algorithm without recursion."""
    order, lowest, stack, on_stack, parts = {}, {}, [], set(), []
    for root in following:
        if root in order:
            continue
        work = [(root, iter(following[root]))]
        order[root] = lowest[root] = len(order)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, edges = work[-1]
            deeper = next((edge for edge in edges if edge not in order or edge in on_stack), None)
            if deeper is None:
                work.pop()
                if work:
                    lowest[work[-1][0]] = min(lowest[work[-1][0]], lowest[node])
                if lowest[node] == order[node]:
                    part = []
                    while not part or part[-1] != node:
                        part.append(stack.pop())
                        on_stack.discard(part[-1])
                    if len(part) > 1:
                        parts.append(sorted(part))
            elif deeper in order:
                lowest[node] = min(lowest[node], order[deeper])
            else:
                order[deeper] = lowest[deeper] = len(order)
                stack.append(deeper)
                on_stack.add(deeper)
                work.append((deeper, iter(following[deeper])))
    return parts
