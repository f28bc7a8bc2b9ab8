"""Losses of the caller's own targets, made where a row ends: what `fastxent.terms` does on the host, within a kernel.

A row's loss goes to memory; of each group of rows the last block to have ended its own sums theirs, and the last of
these blocks sums all groups. So one kernel makes a loss, and two its mean with the gradient, which is divided before it
is written. What is added to what depends on the number of rows alone.
"""

from typing import NamedTuple

import numpy as np

from fastxent.backends.cuda.forms import of_kind
from fastxent.backends.cuda.group import build_group
from fastxent.rowmath import Table
from fastxent.state import IGNORED, LARGEST

KERNELS = ("total_weight", "total_loss")
GROUP = 256  # rows that are summed together


class Loss(NamedTuple):
    """What is made of each row. In place of `fastxent.backends.cuda.ends.Results`.

    Targets: class indices with ``step`` bytes from one to the next, int64 or else int32, and which of them counts for
    nothing; or, of a kind whose largest logit is left out, all rows count. Addresses of weights (V,) and of weights of
    rows (N,), of the kind that is computed with, 0 for none. A row's loss is own w_t nll + shared gap + z_loss lse^2.

    Addresses of room for it: ``of_rows`` float64, ``losses`` and ``lse`` of the kind that is computed with, 0 where
    they are not wanted. Where ``total`` is not 0, all rows are summed to it, by way of ``parts``, 16 bytes a group, and
    ``tickets``, int64 and 0, one a group and one more; and divided by the number at ``divisor``, or if that is 0 by
    what the rows weigh where they are ``averaged``, or by ``denominator``. ``left`` rows of the caller's begin here.
    As it stands nothing is made of a row.
    """

    step: int = 0
    wide: int = 0
    ignored: int = 0
    has_ignored: int = 0
    weight: int = 0
    sample_weight: int = 0
    own: float = 0.0
    shared: float = 0.0
    z_loss: float = 0.0
    of_rows: int = 0
    losses: int = 0
    lse: int = 0
    total: int = 0
    parts: int = 0
    tickets: int = 0
    averaged: int = 0
    divisor: int = 0
    denominator: float = 1.0
    left: int = 0


class Upstream(NamedTuple):
    """What becomes of a loss. In place of `fastxent.backends.cuda.ends.Coefficients`.

    The temperature, and the address of upstream gradients of the kind that is computed with, 0 for 1; ``step`` is 0
    where all rows have the same. ``extra`` is the probabilities' own factor, ``factor`` that of all.
    """

    temperature: float
    gradient: int
    step: int
    extra: float
    factor: float


def from_row(loss, start, itemsize):
    """The `Loss` of the rows from ``start`` on, without their sum."""

    def shifted(address, each):
        return address and address + each * start

    return loss._replace(
        sample_weight=shifted(loss.sample_weight, itemsize),
        of_rows=shifted(loss.of_rows, 8),
        losses=shifted(loss.losses, itemsize),
        lse=shifted(loss.lse, itemsize),
        total=0,
        left=loss.left - start,
    )


@of_kind
def build_ends_of_loss(ops, kind):
    """As `fastxent.backends.cuda.ends.build_ends`, and ``add_group`` and ``sum_rows`` of a group of rows."""
    form, warps = ops.form(kind.form), kind.threads * kind.rows // 32
    load_one, store_one, to_real, to_float64 = form.load_one, form.store_one, form.to_real, ops.to_float64
    of_real = np.dtype(form.real).itemsize
    load_float64, store_float64, store_int64 = ops.load_float64, ops.store_float64, ops.store_int64
    load_int64, load_int32, fetch_add = ops.load_int64, ops.load_int32, ops.fetch_add
    add_to, raise_flag, sync_block, thread = ops.add_to, ops.raise_flag, ops.sync_block, ops.thread
    put_shared, get_shared = ops.shared_store_float64, ops.shared_load_float64
    total_of_warp = build_group(ops, 32).total
    function, int64, largest = ops.function, ops.int64, kind.largest
    chunks = GROUP // 32
    of_weights = chunks * 8

    @function
    def number_at(address, i):
        """A number of an array that may be left out."""
        return to_float64(load_one(address + i * of_real)) if address != 0 else 1.0

    @function
    def target_of(i, rows, results):
        """A target out of range becomes one that no kernel reads with."""
        if number_at(results.sample_weight, i) == 0.0:
            return int64(IGNORED)
        if largest:
            return int64(LARGEST)
        at = rows.targets + i * results.step
        target = load_int64(at) if results.wide != 0 else int64(load_int32(at))
        if results.has_ignored != 0 and target == results.ignored:
            return int64(IGNORED)
        return target if target >= 0 else rows.classes

    @function
    def note_bad(i, rows, results):
        add_to(rows.flag, int64(1))
        raise_flag(rows.flag + 8, results.left - i)

    @function
    def weight_of_target(target, results):
        if largest:
            return 1.0
        return number_at(results.weight, target)

    @function
    def weight_of(i, rows, results):
        """What a row counts in a mean."""
        target = target_of(i, rows, results)
        if target == IGNORED:
            return 0.0
        if target >= rows.classes:
            return np.nan
        return weight_of_target(target, results) * number_at(results.sample_weight, i)

    @function
    def divisor_of(weight, results):
        if results.divisor != 0:
            return load_float64(results.divisor)
        return weight if results.averaged != 0 else results.denominator

    @function
    def coefficients_of(i, target, coefficients, rows, results):
        g = coefficients.factor
        if coefficients.gradient != 0:
            g *= number_at(coefficients.gradient + i * coefficients.step, int64(0))
        g = g / divisor_of(1.0, results) * number_at(results.sample_weight, i) / coefficients.temperature
        hit, extra = g * results.own * weight_of_target(target, results), g * coefficients.extra
        return hit, g * results.shared, extra, 2.0 * results.z_loss * g

    @function
    def store(i, loss, lse, results):
        if results.of_rows != 0:
            store_float64(results.of_rows + i * 8, loss)
        if results.losses != 0:
            store_one(results.losses + i * of_real, to_real(loss))
        if results.lse != 0:
            store_one(results.lse + i * of_real, to_real(lse))

    @function
    def put(i, target, nll, target_logit, peak, lse, gap, rows, results):
        """As `fastxent.rowmath.index_loss`, with the z-loss and the row's own weight."""
        weight, loss = weight_of_target(target, results), 0.0
        if results.own > 0.0 and (results.shared == 0.0 or weight != 0.0 or nll != np.inf):
            loss = results.own * weight * nll
        if results.shared > 0.0:
            loss += results.shared * gap
        if results.z_loss != 0.0:
            loss += results.z_loss * lse * lse
        store(i, loss * number_at(results.sample_weight, i), lse, results)

    @function
    def ignore(i, nothing, rows, results):
        store(i, nothing, np.nan, results)

    @function
    def all_have_come(counter, come, wanted, slot):
        """Whether, with so many more, all that are wanted have: the counter is 0 again then. All of a block see it."""
        if thread() == 0:
            before = fetch_add(counter, come)
            if before + come == wanted:
                store_int64(counter, 0)
            put_shared(slot, to_float64(before + come))
        sync_block()
        return int64(get_shared(slot)) == wanted

    @function
    def note_chunk(chunk, loss, weight):
        """What the threads of a warp have, added up."""
        loss, weight = total_of_warp(loss, 0), total_of_warp(weight, 0)
        if thread() & 31 == 0:
            put_shared(chunk * 8, loss)
            put_shared(of_weights + chunk * 8, weight)

    @function
    def chunks_of(count):
        """By how many warps so many numbers of at most `GROUP` are added up."""
        return max(int64(1), min(int64(chunks), (count + 31) // 32))

    @function
    def sum_chunks(count):
        sync_block()
        loss, weight = get_shared(0), get_shared(of_weights)
        for chunk in range(1, count):
            loss += get_shared(chunk * 8)
            weight += get_shared(of_weights + chunk * 8)
        return loss, weight

    @function
    def sum_group(number, has_losses, has_weights, rows, results):
        """The losses and weights of a group of rows: of each 32 by a warp, however many a block has."""
        count = chunks_of(rows.rows - number * GROUP)
        sync_block()
        for chunk in range(thread() // 32, count, warps):
            i, loss, weight = number * GROUP + chunk * 32 + (thread() & 31), 0.0, 0.0
            if i < rows.rows:
                if has_losses:
                    loss = load_float64(results.of_rows + i * 8)
                if has_weights:
                    weight = weight_of(i, rows, results)
            note_chunk(chunk, loss, weight)
        return sum_chunks(count)

    @function
    def sum_groups(groups, results):
        """The same of all groups, whose sums are there."""
        each = (groups + GROUP - 1) // GROUP
        count = chunks_of((groups + each - 1) // each)
        sync_block()
        for chunk in range(thread() // 32, count, warps):
            first, loss, weight = (chunk * 32 + (thread() & 31)) * each, 0.0, 0.0
            for k in range(first, min(groups, first + each)):
                loss += load_float64(results.parts + k * 16)
                weight += load_float64(results.parts + k * 16 + 8)
            note_chunk(chunk, loss, weight)
        return sum_chunks(count)

    @function
    def add_group(number, has_losses, has_weights, rows, results):
        """Add up a group of rows; the last one to come, all of them. Whether it is, and both sums, for one thread."""
        groups = max(int64(1), (rows.rows + GROUP - 1) // GROUP)
        loss, weight = sum_group(number, has_losses, has_weights, rows, results)
        if thread() == 0:
            store_float64(results.parts + number * 16, loss)
            store_float64(results.parts + number * 16 + 8, weight)
        last = all_have_come(results.tickets, 1, groups, 0)
        if last:
            loss, weight = sum_groups(groups, results)
        return last and thread() == 0, loss, weight

    @function
    def sum_rows(number, rows, results):
        """The losses of a group of rows, which are there; all of them, where it is the last."""
        last, loss, weight = add_group(number, True, results.averaged != 0, rows, results)
        if last:
            store_one(results.total, to_real(loss / divisor_of(weight, results)))

    @function
    def close(first, most, rows, results):
        """Of rows from ``first`` on, ``most`` at most, which are all of one group."""
        if results.total != 0:
            sync_block()
            number = first // GROUP
            size, come = min(rows.rows - number * GROUP, int64(GROUP)), min(rows.rows - first, int64(most))
            if all_have_come(results.tickets + 8 + number * 8, come, size, of_weights):
                sum_rows(number, rows, results)

    return Table(
        target_of=target_of, note_bad=note_bad, coefficients_of=coefficients_of, put=put, ignore=ignore, close=close,
        add_group=add_group, sum_rows=sum_rows,
    )  # fmt: skip


@of_kind
def build(ops, kind):
    """Kernels of rows of whatever logits are computed with in the format of a `Kind`, by name."""
    ends = build_ends_of_loss(ops, kind)
    add_group, sum_rows, store_float64, int64, block = (
        ends.add_group, ends.sum_rows, ops.store_float64, ops.int64, ops.block
    )  # fmt: skip

    def total_weight(rows, loss, divisor):
        """Targets (N,) -> what a mean of their losses is divided by; a block for a group of rows."""
        last, _, weight = add_group(int64(block()), False, True, rows, loss)
        if last:
            store_float64(divisor, weight)

    def total_loss(rows, loss):
        """Losses (N,) that are there -> their sum, divided; a block for a group of rows."""
        sum_rows(int64(block()), rows, loss)

    return Table(total_weight=total_weight, total_loss=total_loss)
