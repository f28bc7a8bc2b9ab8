"""Whatever is passed: a result that agrees with the reference backend, or one documented error of one line.

``fuzz/`` drives the same functions by coverage and for longer.
"""

import copy
import decimal
import functools
import inspect
import math
import re
import warnings

import ml_dtypes
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

import fastxent
from fastxent import information
from fastxent.checks import DTYPES, is_floating, loss_dtype
from tests import exact

ERRORS = (TypeError, ValueError, IndexError, NotImplementedError, fastxent.backends.BackendUnavailableError)
NUMBERS = [0.0, -0.0, 1.0, -1.0, 30.0, 1e-3, 1e30, -1e30, 1e-40, np.inf, -np.inf, np.nan]
NEAR = [number for number in NUMBERS if not 100 < abs(number) < math.inf]
ODD_DTYPES = ["i8", "u1", "?", "c8", "O", "U3", "M8[s]", "g", "V2", ">f4", ">f8", ">i2", "u8"]


class Repr:
    """Speaks in several lines."""

    def __repr__(self):
        return "one\ntwo"


ODD = [
    None, True, 0, 1, -1, 2, 2.5, -100, 10**400, -(10**400), 2**63, math.nan, math.inf, 1e-320, 1j,
    "", "mean", "sum", "none", b"x", "two\nlines", (), [], [[1.0, 2.0], [3.0]], {}, {1}, object(), Repr(), Ellipsis,
    slice(None), range(3), len, int, decimal.Decimal("0.5"), np.float32(0.5), np.int8(1), np.bool_(True),
    np.float16(np.nan), np.eye(30), np.zeros(0), np.array(0.5), np.array("two\nlines"),
    np.ma.masked_array([1.0, 2.0], [True, False]), iter([1, 2]), memoryview(b"abc"), bytearray(b"abcd"),
    np.zeros((2, 0)), np.zeros((0, 2), np.float32), np.array([None, 1.0]), np.zeros(3, "f4,i4"),
]  # fmt: skip
odd = st.sampled_from(ODD)


def lay(array, layout):
    """The same numbers lying otherwise."""
    array = np.array(array)
    if layout == "reversed":
        return array[..., ::-1].copy()[..., ::-1] if array.ndim else array
    if layout == "fortran":
        return np.asfortranarray(array)
    if layout == "stepped":
        return np.repeat(array, 2, axis=-1)[..., ::2] if array.ndim else array
    if layout == "other byte order":
        return array.astype(array.dtype.newbyteorder(">")) if array.dtype.kind in "iuf" else array
    if layout == "unaligned":
        return np.frombuffer(b"x" + array.tobytes(), array.dtype, offset=1).reshape(array.shape)
    if layout == "list":
        return array.tolist()
    if layout == "read-only":
        array.flags.writeable = False
    return array


LAYOUTS = ["as it is"] * 4 + ["reversed", "fortran", "stepped", "other byte order", "unaligned", "list", "read-only"]


@st.composite
def numbers(draw, shape, dtype, special=NUMBERS, scales=(0.0, 1.0, 4.0, 100.0)):
    """Real numbers of a shape: normal ones, and some of ``special``."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    values = rng.standard_normal(shape) * draw(st.sampled_from(scales))
    for _ in range(draw(st.integers(0, 3)) if values.size else 0):
        values.reshape(-1)[draw(st.integers(0, values.size - 1))] = draw(st.sampled_from(special))
    with np.errstate(all="ignore"):
        return lay(values.astype(dtype), draw(st.sampled_from(LAYOUTS)))


@st.composite
def amounts(draw, shape):
    """What weights may be, mostly."""
    values = np.random.default_rng(draw(st.integers(0, 9))).random(shape)
    if values.size and draw(st.integers(0, 4)) == 0:
        values.reshape(-1)[draw(st.integers(0, values.size - 1))] = draw(st.sampled_from(NUMBERS))
    with np.errstate(all="ignore"):
        return lay(values.astype(draw(st.sampled_from(["f4", "f8", "f8", "f2"]))), draw(st.sampled_from(LAYOUTS)))


shapes = st.one_of(
    st.tuples(st.integers(0, 4), st.sampled_from([1, 2, 3, 5, 17, 130])),
    st.lists(st.integers(0, 4), max_size=4).map(tuple),
)
dtypes = st.one_of(st.sampled_from(["f4", "f4", "f8"]), st.sampled_from(DTYPES))


@st.composite
def indices(draw, shape, classes, sane):
    """Class indices; all in range or ignored where the call is ``sane``."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    values = rng.integers(0, max(1, classes), shape)
    if values.size and draw(st.booleans()):
        values.reshape(-1)[0] = draw(st.sampled_from([-100, 0] if sane else [-100, -1, classes, 2**62, 0]))
    kinds = ["i8", "i4"] if sane else ["i8", "i4", "u1", "u8"]
    with np.errstate(all="ignore"):
        return lay(values.astype(draw(st.sampled_from(kinds))), draw(st.sampled_from(LAYOUTS)))


@st.composite
def targets_of(draw, shape, sane):
    """Targets of logits of this shape: indices, probabilities, sparse ones, or something else."""
    batch, classes = shape[:-1], (shape or (1,))[-1]
    kind = draw(st.sampled_from(["index"] * 4 + ["dense", "sparse"] + ["odd"] * (not sane)))
    if kind == "dense":
        return draw(amounts(shape))
    if kind == "sparse":
        of_ids = (*batch, draw(st.integers(0, 3)))
        return draw(indices(of_ids, classes, sane)), draw(amounts(of_ids))
    return draw(odd) if kind == "odd" else draw(indices(batch, classes, sane))


@st.composite
def options_of(draw, shape, names, sane):
    """Some of the options of these names; few and within their bounds where the call is ``sane``."""
    batch, classes = shape[:-1], (shape or (1,))[-1]
    floats = st.sampled_from([0.1, 0.5, 1.0, *([] if sane else [0.0, 2.0, 1e-30, 1e30, -1.0, math.inf, math.nan])])
    known = {
        "weight": amounts((classes,)), "sample_weight": amounts(batch), "pos_weight": amounts((classes,)),
        "ignore_index": st.sampled_from([-100, None, 0, 1, -1, 2**70]),
        "reduction": st.sampled_from(["mean", "sum", "none", "Mean"]), "axis": st.integers(-4, 3),
        "return_lse": st.booleans(), "top_k": st.integers(-1, 7), "shift": st.integers(-1, 3),
        "ids": indices((draw(st.integers(0, 3)),), classes, sane), "keepdims": st.booleans(), "grad_output": floats,
        "where": st.sampled_from([None, True, np.ones(shape, bool), np.zeros(shape, bool)]),
        "memory": st.sampled_from([None, 1, 10**6, 2**80]), "progress": st.none(),
    }  # fmt: skip
    if sane:
        known |= {"ignore_index": st.sampled_from([-100, None]), "axis": st.just(-1), "top_k": st.integers(0, 1)}
        known |= {"reduction": st.sampled_from(["mean", "sum", "none"]), "shift": st.just(0), "memory": st.none()}
    found = {}
    for name in names:
        if draw(st.integers(0, 9 if sane else 3)) == 0:
            found[name] = draw(odd if not sane and draw(st.integers(0, 5)) == 0 else known.get(name, floats))
    return found


SKIPPED = {"backend", "out", "progress"}
OPTIONS = [name for name in inspect.signature(fastxent.cross_entropy).parameters if name not in ("logits", "targets")]


def options_for(function):
    """The names of its keyword-only parameters, and of those it passes on to the cross entropy."""
    parameters = inspect.signature(function).parameters.values()
    names = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        of_binary = list(inspect.signature(fastxent.binary_cross_entropy_with_logits).parameters)[2:]
        names += of_binary if function.__name__.startswith("binary") else OPTIONS
    return sorted(set(names) - SKIPPED)


FUNCTIONS = {
    name: getattr(fastxent, name)
    for name in fastxent.__all__
    if inspect.isfunction(getattr(fastxent, name)) and not name.endswith("num_threads")
} | {
    f"information.{name}": function
    for name, function in inspect.getmembers(information, inspect.isfunction)
    if not name.startswith("_") and function.__module__ == information.__name__
}


@st.composite
def positional(draw, function, shape, sane):
    """What the function takes before its options, by the names of its parameters."""
    arguments = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            continue
        name = parameter.name
        if not sane and draw(st.integers(0, 19)) == 0:
            arguments.append(draw(odd))
        elif not sane and draw(st.integers(0, 29)) == 0:
            arguments.append(np.zeros(shape, draw(st.sampled_from(ODD_DTYPES))))
        elif name == "targets" and not function.__name__.startswith("binary"):
            arguments.append(draw(targets_of(shape, sane)))
        elif name == "linear_weight":
            arguments.append(draw(numbers((draw(st.integers(0, 5)), (shape or (1,))[-1]), draw(dtypes))))
        elif name in ("p", "q", "y", "targets"):
            values = np.random.default_rng(draw(st.integers(0, 9))).random(shape)
            sums = values.sum(axis=-1, keepdims=True) if shape and (sane or draw(st.booleans())) else 1.0
            arguments.append(lay(values / sums, draw(st.sampled_from(LAYOUTS))))
        else:
            # see test_divergences_of_logits_far_apart, and test_a_probability_too_small_is_ruled_out
            near = name.endswith(("_p", "_q")) or function is fastxent.compare_models
            how = (NEAR, (0.0, 1.0, 4.0)) if near else ()
            arguments.append(draw(numbers(shape, draw(dtypes), *how)))
    return arguments


@st.composite
def calls(draw, function):
    """``arguments, options`` of a call, half of the time of one that should be answered with numbers."""
    sane = draw(st.booleans())
    shape = draw(st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 3, 5, 17, 130])) if sane else shapes)
    arguments = draw(positional(function, shape, sane))
    options = draw(options_of(shape, options_for(function), sane))
    if "out" in inspect.signature(function).parameters and draw(st.integers(0, 7)) == 0:
        options["out"] = np.zeros(shape, draw(st.sampled_from(["f4", "f8", "f2"])))
    return arguments, options


def outcome(function, arguments, options):
    """The result as a list of arrays, or the error."""
    arguments, options = copied(arguments), copied(options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "invalid value encountered in cast")  # of the odd objects themselves
        try:
            return flattened(function(*arguments, **options))
        except ERRORS as raised:
            error = raised
    assert "\n" not in str(error), f"{error!r} is more than a line"
    return error


def copied(value):
    if isinstance(value, dict):
        return {name: copied(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(copied, value))
    return copy.copy(value) if type(value).__name__ == "list_iterator" else value


def flattened(result):
    if isinstance(result, tuple):
        return [array for one in result for array in flattened(one)]
    if isinstance(result, fastxent.Scores):
        return [np.asarray(getattr(result, name)) for name in result.to_records().dtype.names if hasattr(result, name)]
    if isinstance(result, fastxent.ModelComparison):
        return [np.asarray(getattr(result, name)) for name in result.__slots__]
    return [] if result is None else [np.array(result)]


# the losses and gradients that are one term, whose relative error is promised, in the order they are returned
LOSS, GRADIENT = exact.LOSS, exact.GRADIENT
ONE_TERM = {
    "cross_entropy": (LOSS,), "cross_entropy_grad": (GRADIENT,), "cross_entropy_with_grad": (LOSS, GRADIENT),
    "binary_cross_entropy_with_logits": (LOSS,), "binary_cross_entropy_with_logits_with_grad": (LOSS, None),
    "softmax": (GRADIENT,), "log_softmax": (GRADIENT,),
}  # fmt: skip
# what a probability, or a loss, may be multiplied or divided by
FACTORS, DIVISORS = ("grad_output", "weight", "pos_weight", "sample_weight", "scale"), ("denominator", "temperature")


def promised(name, arguments, options, results):
    """For each result the relative error that two backends may be apart, and the absolute one below which nothing is
    asked; None where it is a sum of terms of either sign, which are not known here.
    """
    errors = ONE_TERM.get(name, ())
    capped = options.get("softcap") is not None or options.get("z_loss", 0.0) != 0.0
    if capped or len(errors) != len(results):  # with an lse among them
        return [None] * len(results)
    if "label_smoothing" in options or np.asarray(arguments[-1]).dtype.kind not in "iu":
        errors = [None if error is GRADIENT and name.startswith("cross") else error for error in errors]
    computed = loss_dtype(np.asarray(arguments[0]).dtype)
    most = 1.0
    for option in FACTORS:
        most *= max(1.0, float(np.abs(np.asarray(options.get(option, 1.0), np.float64)).max(initial=1.0)))
    for option in DIVISORS:
        most /= min(1.0, options.get(option) or 1.0)
    limits = np.finfo(computed)
    # the reference rounds z - z_t, which counts until exp underflows
    slack = 2 * 750 * float(limits.eps) if computed == np.float64 else float(limits.eps)
    floor = float(limits.tiny) * most
    return [error and (error[computed.name] + slack, floor) for error in errors]


def agree(got, want, upstream=1.0, held=None):
    """The same shapes and dtypes, and numbers as close as was `promised`, else as their dtype has digits, or as what
    they are made of.
    """
    assert [(one.shape, one.dtype) for one in got] == [(one.shape, one.dtype) for one in want]
    for one, other, promise in zip(got, want, held or [None] * len(got), strict=True):
        if is_floating(one.dtype):
            limits = ml_dtypes.finfo(one.dtype)
            eps = float(limits.eps)
            one, other = one.astype(np.float64), other.astype(np.float64)
            if promise:
                narrow = (eps, float(limits.smallest_subnormal)) if limits.bits < 32 else (0.0, 0.0)
                close = {"rtol": promise[0] + narrow[0], "atol": promise[1] + narrow[1]}
            else:
                size = min(np.abs(other[np.isfinite(other)]).max(initial=upstream), 1e30)
                close = {"rtol": 1e-4 + 4 * eps, "atol": (1e-6 + eps) * size}
            np.testing.assert_allclose(one, other, **close)
        else:
            np.testing.assert_array_equal(one, other)


def chosen(log_probs, targets, weight=None, ignore_index=-100, reduction="mean", axis=-1):
    """Of class indices: rows, which of them count, their classes, what they weigh, and the divisor."""
    rows = np.moveaxis(np.asarray(log_probs).astype(np.float64), axis, -1)
    targets = np.asarray(targets).reshape(rows.shape[:-1])  # an empty list has lost its axes
    counts = np.full(targets.shape, True) if ignore_index is None else targets != ignore_index
    classes = np.where(counts, targets, 0).astype(np.int64)
    weights = np.ones(rows.shape[-1]) if weight is None else np.asarray(weight, np.float64)
    weights = np.where(counts, weights[classes], 0.0)
    return rows, counts, classes, weights, weights.sum() if reduction == "mean" else np.float64(1)


def nll_loss(log_probs, targets, reduction="mean", **options):
    rows, _, classes, weights, divisor = chosen(log_probs, targets, reduction=reduction, **options)
    found = np.take_along_axis(rows, classes[..., None], -1)[..., 0]
    losses = np.where(weights == 0.0, 0.0, -weights * found)
    return losses if reduction == "none" else losses.sum() / divisor


def nll_loss_grad(log_probs, targets, grad_output=1.0, out=None, axis=-1, **options):
    rows, counts, classes, weights, divisor = chosen(log_probs, targets, axis=axis, **options)
    gradient = np.zeros(rows.shape)
    entries = np.where(counts, -weights / divisor * np.asarray(grad_output, np.float64), 0.0)
    np.put_along_axis(gradient, classes[..., None], entries[..., None], -1)
    return np.moveaxis(gradient, -1, axis)


def log_loss(y, p, clip=None):
    y, p = np.asarray(y, np.float64), np.asarray(p, np.float64)
    p = p if clip is None else np.clip(p, clip, 1 - clip)
    return -scipy.special.xlogy(y, p) - scipy.special.xlog1py(1 - y, -p)


def log_loss_grad(y, p, clip=None):
    y, p = np.broadcast_arrays(np.asarray(y, np.float64), np.asarray(p, np.float64))
    slope = np.where(y == 1, 0, (1 - y) / (1 - p)) - np.where(y == 0, 0, y / p)
    return slope if clip is None else np.where((p < clip) | (p > 1 - clip), 0, slope)


def in_nats(terms):
    """Of distributions: the sum of scipy's terms."""
    return lambda *distributions, axis=-1: terms(*(np.asarray(p, np.float64) for p in distributions)).sum(axis=axis)


def halves(p, q):
    return (scipy.special.rel_entr(p, (p + q) / 2) + scipy.special.rel_entr(q, (p + q) / 2)) / 2


# functions that know no backend, by formulas that share nothing with ours
INDEPENDENT = {
    "nll_loss": nll_loss,
    "nll_loss_grad": nll_loss_grad,
    "information.self_information": lambda p: -np.log(np.asarray(p, np.float64)),
    "information.entropy": in_nats(scipy.special.entr),
    "information.cross_entropy": in_nats(lambda p, q: -scipy.special.xlogy(p, q)),
    "information.cross_entropy_grad": lambda p, q: np.where(np.equal(p, 0), 0, -np.divide(p, q)),
    "information.kl_divergence": in_nats(scipy.special.rel_entr),
    "information.js_divergence": in_nats(halves),
    "information.log_loss": log_loss,
    "information.log_loss_grad": log_loss_grad,
}


def independently(name, arguments, options):
    """The same by another formula, in float64."""
    options = dict(options)
    base = math.log(options.pop("base", math.e)) if name.startswith("information") else 1.0
    with np.errstate(all="ignore"):
        return INDEPENDENT[name](*copied(arguments), **copied(options)) / base


def largest(values):
    """The largest finite number."""
    values = np.abs(np.asarray(values).astype(np.float64))
    return float(values[np.isfinite(values)].max(initial=0.0))


def check(name, call):
    """The property; what `fuzz/` calls too."""
    function, (arguments, options) = FUNCTIONS[name], call
    before = [one.tobytes() for one in arguments if isinstance(one, np.ndarray)]
    if "backend" not in inspect.signature(function).parameters:
        got = outcome(function, arguments, options)
        if not isinstance(got, Exception):
            (got,), want = got, independently(name, arguments, options)
            assert got.shape == np.shape(want)
            eps = float(ml_dtypes.finfo(got.dtype).eps)
            size = min(np.abs(want, where=np.isfinite(want), out=np.zeros(np.shape(want))).max(initial=1.0), 1e30)
            with np.errstate(over="ignore"):
                want = np.asarray(want).astype(got.dtype).astype(np.float64)
            np.testing.assert_allclose(got.astype(np.float64), want, rtol=8 * eps, atol=8 * eps * size)
    else:
        got, want = (
            outcome(functools.partial(function, backend=backend), arguments, options)
            for backend in ("cpu", "reference")
        )
        if isinstance(want, Exception) or isinstance(got, Exception):
            assert (type(got), _without_addresses(got)) == (type(want), _without_addresses(want))
        else:
            upstream = options.get("grad_output", 1.0)
            upstream = upstream if isinstance(upstream, float) and 1.0 < upstream < math.inf else 1.0
            if 0.0 < abs(options.get("denominator") or 1.0) < 1.0:
                upstream /= abs(float(options["denominator"]))
            if name == "linear_cross_entropy_with_grad":  # whose gradients are products with its inputs
                upstream *= max(1.0, *(largest(given) for given in arguments[:2]))
            agree(got, want, upstream, promised(name, arguments, options, got))
    assert [one.tobytes() for one in arguments if isinstance(one, np.ndarray)] == before, "an input was changed"


def _without_addresses(error):
    return re.sub("0x[0-9a-f]+", "", str(error))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_arguments(name):
    """What takes no backend is compared with `INDEPENDENT`."""

    @given(call=calls(FUNCTIONS[name]))
    @settings(deadline=None, max_examples=40, derandomize=True)  # the same in every run; `fuzz/` looks for what is new
    def run(call):
        check(name, call)

    run()


@pytest.mark.parametrize(
    ("dtype", "offset"), [("float32", 1e3), ("float32", -1e8), ("float64", 1e6), ("float64", 1e12)]
)
def test_divergences_of_logits_far_apart(dtype, offset):
    """Found by `test_any_arguments`: a common offset of one model's logits changes no probability. What is lost is its
    logsumexp's last digit.
    """
    p, q = np.array([[0, 0, -16]], dtype), np.array([[0, 1, 0.5]], dtype)
    far = p + p.dtype.type(offset)
    lost = 4 * abs(offset) * np.finfo(float).eps
    for divergence in (fastxent.kl_divergence_from_logits, fastxent.js_divergence_from_logits):
        for moved, near in (((far, q), (p, q)), ((q, far), (q, p)), ((far, far), (p, p))):
            np.testing.assert_allclose(divergence(*moved), divergence(*near), rtol=4 * np.finfo(dtype).eps, atol=lost)


def test_a_probability_too_small_is_ruled_out():
    """Found by `test_any_arguments`: p = e^-90 is below the smallest normal number of float32 and taken for 0, so that
    a q of 0 there costs nothing. In float64 it costs all.
    """
    p, q = np.array([[0.0, -90.0]]), np.array([[0.0, -np.inf]])
    assert fastxent.kl_divergence_from_logits(np.float32(p), np.float32(q)) == 0
    assert fastxent.kl_divergence_from_logits(p, q) == np.inf


@pytest.mark.parametrize("call", [fastxent.cross_entropy, fastxent.score])
def test_numbers_too_large_for_a_float(call):
    with pytest.raises(ValueError, match=r"temperature must be within a float's range; got 10{59}$"):
        call(np.zeros((1, 2)), [0], temperature=10**400)


def test_a_value_that_speaks_in_lines():
    for option, error in (("reduction", ValueError), ("axis", TypeError), ("temperature", TypeError)):
        with pytest.raises(error, match=r"one two$"):
            fastxent.cross_entropy(np.zeros((1, 2)), [0], **{option: Repr()})
    with pytest.raises(ValueError, match="reduction must be one of none, sum, mean"):
        fastxent.cross_entropy(np.zeros((1, 2)), [0], reduction=np.eye(2))


@pytest.mark.parametrize(
    "divergence", [fastxent.kl_divergence_from_logits_grad, fastxent.js_divergence_from_logits_grad]
)
def test_two_gradients_need_two_arrays(divergence):
    p, out = np.zeros((1, 2)), np.zeros((1, 2))
    with pytest.raises(ValueError, match="out must be two arrays that do not overlap each other"):
        divergence(p, p + 1, out=(out, out))
    with pytest.raises(ValueError, match="out must be a pair of arrays or None"):
        divergence(p, p + 1, out=out)
    assert np.isnan(divergence(p, p, grad_output=np.inf)[0]).all()


def test_an_infinite_upstream_gradient_is_no_warning():
    """Found by fuzzing: 0 times inf in the entries of sparse targets."""
    sparse = np.array([[0, 1]]), np.array([[0.5, 0.0]])
    for targets in (sparse, [0], np.array([[0.5, 0.5]])):
        for options in ({}, {"label_smoothing": 0.1}, {"z_loss": 0.1}):
            gradient = fastxent.cross_entropy_grad(np.zeros((1, 2)), targets, grad_output=np.inf, **options)
            assert not np.isfinite(gradient).all()


def test_losses_of_log_probabilities_take_no_pairs():
    """Found by fuzzing: a pair of nothing passed for integers."""
    for function in (fastxent.nll_loss, fastxent.nll_loss_grad):
        with pytest.raises(TypeError, match="targets must be integer class indices, not a tuple"):
            function(np.zeros((1, 1)), (np.zeros((1, 0), int), [[]]))


def test_a_logsumexp_beyond_float32_is_no_warning():
    """Found by fuzzing."""
    assert fastxent.logsumexp(np.float32([[3e38, 0]]), scale=10.0) == np.inf


def test_a_scale_whose_inverse_is_no_float():
    for function in (fastxent.softmax, fastxent.log_softmax, fastxent.softmax_grad):
        with pytest.raises(ValueError, match=r"scale must be at least 5.56e-309; got 1e-320"):
            function(np.zeros((1, 2)), scale=1e-320)
    np.testing.assert_array_equal(fastxent.softmax(np.eye(2), scale=1e-300), 0.5)
