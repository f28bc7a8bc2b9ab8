"""Losses of hidden states that are on the device, under an output matrix that is there too.

The products are those of the arrays' own library, torch or cupy, on the caller's stream, a block of rows at a time;
kernels make losses of a block's logits and put their gradient in their place. Nothing waits.
"""

import math
from typing import Any

from fastxent import arguments, checks
from fastxent.backends.cuda import arrangement, calls, launches, losses, resident
from fastxent.backends.cuda.arrays import check_device, library_of
from fastxent.backends.cuda.device import LossCall, ready
from fastxent.backends.cuda.lent import is_lent
from fastxent.backends.cuda.run import runner
from fastxent.backends.cuda.scratch import scratch_of
from fastxent.backends.cuda.write import Written
from fastxent.products import slices

_MEMORY = 1 << 30  # bytes of a block's logits and what is made of them: some thousand rows, for products of full speed

_NAMES = "hidden", "linear_weight", "linear_bias"


def linear_cross_entropy(given, targets, options, *, memory=None, check=False):
    """See `fastxent.linear_cross_entropy`; ``given`` are hidden states, an output matrix, and a bias or None."""
    return _asked(given, targets, options, memory, check)


def linear_cross_entropy_with_grad(
    given, targets, options, *, grad_output=1.0, out=None, wanted=(True, True, True), memory=None, check=False
):
    """See `fastxent.linear_cross_entropy_with_grad`."""
    if out is not None:
        raise NotImplementedError("gradients of hidden states on a device are new arrays: out must be None")
    checks.check_wanted(wanted, _NAMES)
    return _asked(given, targets, options, memory, check, wanted, grad_output)


def _asked(given, targets, options, memory, check, wanted=None, grad_output=1.0):
    layer, options = Layer(given), arguments.options_of_layer(options)
    blocks, (count, classes) = layer.blocks(memory, copies=1 if wanted is None else 2), layer.shape
    targets = arrangement.targets_in_rows(targets, given[0], -1, layer.library)
    slot = scratch_of(layer.machine, layer.handle)
    with slot.lock, slot.machine.current():
        slot.raise_for_earlier(check)
        rows = resident.DeviceRows(0, count, classes, classes, layer.real)
        about = rows, layer.batch, layer.real, layer.library, slot, layer.handle
        call = LossCall(layer.hidden, targets, options, *about)
        if wanted is None:
            found = _losses(call, layer, blocks)
        else:
            found = _losses_and_gradients(call, layer, blocks, _Gradients(layer, wanted), grad_output)
        call.let_go()
        if check:
            slot.raise_at_once(*call.note, calls.numbers_of(slot, layer.library.view(targets)))
    answer = (call.arrays["loss"], *([call.arrays["lse"]] if options.return_lse else []), *found)
    return answer if len(answer) > 1 else answer[0]


def _losses(call, layer, blocks):
    """The losses of all rows, asked for block by block."""
    results = call.results()
    for rows in blocks:
        logits = layer.logits(rows)
        launches.statistics(call.slot, call.kind, *_block(call, rows, layer.library.view(logits), results))
        del logits  # before there are more
    call.ask_total(results)
    return ()


def _losses_and_gradients(call, layer, blocks, gradients, grad_output):
    """The same, and the gradients of what was multiplied."""
    upstream = call.upstream(grad_output)
    call.weigh()
    results = call.results()
    for rows in blocks:
        logits = layer.logits(rows)
        given, shares, scaling, of_block = _block(call, rows, layer.library.view(logits), results)
        above = upstream._replace(gradient=upstream.gradient + upstream.step * rows.start)
        launches.entries(
            call.slot, call.kind, given, shares, above, scaling, of_block,
            Written(given.logits, given.stride), True, written=layer.real.name, entries="gradient",
        )  # fmt: skip
        gradients.add(rows, logits)
        del logits
    call.ask_total(results)
    return gradients.finished()


def _block(call, rows, logits, results):
    """What kernels are told of some of the rows."""
    given, shares, itemsize = call.given, call.shares, call.real.itemsize
    given = given._replace(
        logits=logits.address, stride=logits.shape[1], targets=given.targets + results.step * rows.start,
        rows=rows.stop - rows.start,
    )  # fmt: skip
    if shares.probabilities:
        place = shares.probabilities + shares.stride * itemsize * rows.start
        shares = shares._replace(probabilities=place)
    return given, shares, call.scaling, losses.from_row(results, rows.start, itemsize)


class Layer:
    """Hidden states, an output matrix and a bias, checked; their logits are in ``real``."""

    def __init__(self, given):
        self.machine = runner().machine
        if is_lent(given[0]) or not hasattr(library_of(given[0], self.machine), "product"):
            kind = type(given[0]).__module__.partition(".")[0]
            raise NotImplementedError(f"hidden states on a device must be torch's or cupy's, not arrays of {kind}")
        self.library = library_of(given[0], self.machine)
        self.handle = self.library.stream(given[0])
        hidden, weight, bias = (self._view(*named) for named in zip(_NAMES, given, strict=True))
        self.real, self.dtype = arguments.check_layer(hidden, weight, bias), hidden.dtype
        narrow = self.dtype.itemsize == 1 or self.real != checks.loss_dtype(self.dtype)
        if narrow or weight.dtype != self.dtype:
            found = ", ".join(str(view.dtype) for view in (hidden, weight, bias) if view is not None)
            raise NotImplementedError(
                "on a device hidden and linear_weight must have one dtype, of two bytes at least, and linear_bias none "
                f"that is wider than their products; got {found}"
            )
        self.batch, count = hidden.shape[:-1], math.prod(hidden.shape[:-1])
        self.shape, self.weight = (count, weight.shape[0]), given[1]
        self.hidden = given[0].reshape((count, hidden.shape[-1]))
        self.bias, self.bias_dtype = None, None
        if bias is not None:
            self.bias, self.bias_dtype = self.library.converted(given[2], self.real), bias.dtype

    def _view(self, name, array):
        if array is None:
            return None
        checks.refuse_misread(array, name)
        if not checks.is_on_device(array) or not isinstance(library_of(array, self.machine), type(self.library)):
            raise TypeError(f"{name} must be on the device too, in hidden's library; got {type(array).__name__}")
        check_device(self.library, array, name)
        return self.library.view(array)

    def blocks(self, memory, copies=1):
        """Slices of rows, one at least, whose logits take ``memory`` bytes or the default, in so many formats."""
        count, classes = self.shape
        each = classes * (self.real.itemsize + (copies - 1) * self.dtype.itemsize)
        blocks = -(-count // max(1, checks.read_memory(memory, _MEMORY) // each))
        return slices(0, count, -(-count // blocks)) if count else [slice(0, 0)]

    def ready(self, memory):
        """Slices of rows with the `DeviceRows` of their logits, once these are there."""
        for rows in self.blocks(memory):
            logits = self.logits(rows)
            yield rows, ready(logits)[1]
            del logits  # before there are more

    def logits(self, rows):
        """The logits of some rows, a new array."""
        logits = self.library.product(self.hidden[rows], self.weight.T, self.real)
        if self.bias is not None:
            logits += self.bias
        return logits


class _Gradients:
    """Where the gradients of a `Layer` that are wanted are summed, in what its logits are computed with, and rounded
    once.
    """

    def __init__(self, layer, wanted):
        self._layer, self._weight, self._bias = layer, None, None
        self._hidden: Any = None
        self._of_hidden, self._of_weight, self._of_bias = wanted
        if self._of_hidden:
            self._hidden = layer.library.empty(layer.hidden, layer.hidden.shape, layer.dtype)

    def add(self, rows, dlogits):
        """Those of a block, whose products with what it is multiplied with have one dtype."""
        layer, library = self._layer, self._layer.library
        if layer.bias is not None and self._of_bias:
            self._bias = _sum(self._bias, dlogits.sum(0))
        if not (self._of_hidden or self._of_weight):
            return
        narrow = library.converted(dlogits, layer.dtype)
        if self._of_hidden:
            self._hidden[rows] = library.product(narrow, layer.weight, layer.dtype)
        if self._of_weight:
            self._weight = _sum(self._weight, library.product(narrow.T, layer.hidden[rows], layer.real))

    def finished(self):
        """Those of hidden states, matrix and bias, or None."""
        layer, converted = self._layer, self._layer.library.converted
        hidden = None if self._hidden is None else self._hidden.reshape((*layer.batch, layer.hidden.shape[1]))
        weight = None if self._weight is None else converted(self._weight, layer.dtype)
        return hidden, weight, None if self._bias is None else converted(self._bias, layer.bias_dtype)


def _sum(total, part):
    if total is None:
        return part
    total += part
    return total
