"""Every error a caller can meet: its kind, its message, and that nothing was written."""

import numpy as np
import pytest

import fastxent
from fastxent import checks, rowmath

LOGITS = np.zeros((3, 4), np.float32)
TARGETS = np.array([0, 1, 2])


class _Tensor:
    requires_grad = True


class _Dask:
    pass


_Dask.__module__ = "dask.array.core"


def _overlapping():
    room = np.zeros(13, np.float32)
    return room[:12].reshape(3, 4), room[1:].reshape(3, 4)


ERRORS = {
    "integer logits": (
        TypeError,
        "logits must have one of the dtypes float32, float64, float16, bfloat16, float8_e4m3fn, float8_e5m2, not int64",
        {"logits": LOGITS.astype(int)},
    ),
    "logits of extended precision": (TypeError, "not (longdouble|float128)", {"logits": LOGITS.astype(np.longdouble)}),
    "scalar logits": (ValueError, "at least one axis", {"logits": np.float32(1), "targets": 0}),
    "no classes": (ValueError, r"at least one class; got shape \(3, 0\)", {"logits": LOGITS[:, :0]}),
    "a tensor that requires grad": (TypeError, "pass logits.detach", {"logits": _Tensor()}),
    "a dask array": (TypeError, "not a dask array", {"logits": _Dask()}),
    "float targets": (
        TypeError,
        "targets must be integer class indices, or probabilities of .*; not float64",
        {"targets": TARGETS * 1.0},
    ),
    "boolean targets": (
        TypeError,
        "targets must be integer class indices, or probabilities of .*; not bool",
        {"targets": TARGETS > 0},
    ),
    "shape of targets": (ValueError, r"\(3,\); got \(2,\)", {"targets": TARGETS[:2]}),
    "integers of the logits' shape": (
        TypeError,
        r"must be probabilities, floating; got int64 of shape \(3, 4\)",
        {"targets": LOGITS.astype(int)},
    ),
    "shape of probabilities": (ValueError, r"logits' shape, \(3, 4\); got \(4, 3\)", {"targets": LOGITS.T}),
    "negative probability": (ValueError, "targets must be finite and not negative; got -1", {"targets": LOGITS - 1}),
    "infinite probability": (ValueError, "targets must be finite .* got inf", {"targets": LOGITS + np.inf}),
    "nan as probability": (ValueError, "targets must be finite .* got nan", {"targets": LOGITS + np.nan}),
    "an ignored class among probabilities": (
        ValueError,
        "ignore_index must be negative or None where targets are probabilities; got 1",
        {"targets": LOGITS, "ignore_index": 1},
    ),
    "three sparse arrays": (ValueError, r"two arrays, \(ids, probabilities\); got 3", {"targets": (TARGETS,) * 3}),
    "float ids": (TypeError, "ids of sparse targets must be integers, not float32", {"targets": (LOGITS, LOGITS)}),
    "integer probabilities of ids": (
        TypeError,
        "probabilities of sparse targets must be real numbers, not int64",
        {"targets": (LOGITS.astype(int), LOGITS.astype(int))},
    ),
    "shape of ids": (ValueError, r"shape \(3,\) and one axis more; got \(3,\)", {"targets": (TARGETS, LOGITS)}),
    "shape of the ids' probabilities": (
        ValueError,
        r"probabilities of sparse targets must have the ids' shape \(3, 1\), not \(3, 4\)",
        {"targets": (TARGETS[:, None], LOGITS)},
    ),
    "id too large": (
        IndexError,
        r"\[0, 3\] or be -100; 3 of 3 do not, the first in row 0 with value 4",
        {"targets": (np.full((3, 1), 4), LOGITS[:, :1])},
    ),
    "negative probability of an id": (
        ValueError,
        "probabilities of sparse targets must be finite and not negative; got -1",
        {"targets": (TARGETS[:, None], LOGITS[:, :1] - 1)},
    ),
    "axis too large": (ValueError, r"axis must lie in \[-2, 1\] for logits of shape \(3, 4\); got 2", {"axis": 2}),
    "axis' kind": (TypeError, "axis must be an integer, not 1.0", {"axis": 1.0}),
    "targets of another axis": (ValueError, r"got \(4,\); with axis=0 it would fit", {"targets": [0, 1, 2, 0]}),
    "negative z_loss": (ValueError, "z_loss must be finite and not negative; got -1", {"z_loss": -1}),
    "z_loss's kind": (TypeError, "z_loss must be a real number, not None", {"z_loss": None}),
    "temperature 0": (ValueError, "temperature must be positive and finite; got 0", {"temperature": 0}),
    "temperature nan": (ValueError, "temperature must be positive and finite; got nan", {"temperature": np.nan}),
    "no temperature": (TypeError, "temperature must be a real number, not None", {"temperature": None}),
    "negative softcap": (ValueError, "softcap must be positive and finite; got -3", {"softcap": -3}),
    "sample_weight's shape": (
        ValueError,
        r"sample_weight must have shape \(3,\), one number a row; got \(4,\)",
        {"sample_weight": np.ones(4)},
    ),
    "negative sample_weight": (
        ValueError,
        "sample_weight must be finite and not negative; got -1",
        {"sample_weight": [1, -1, 1]},
    ),
    "sample_weight's kind": (TypeError, "sample_weight must hold real numbers", {"sample_weight": list("abc")}),
    "target too large": (
        IndexError,
        r"\[0, 3\] or be -100; 1 of 3 do not, the first in row 1 with value 4",
        {"targets": [0, 4, 1]},
    ),
    "negative target": (IndexError, "2 of 3 do not, the first in row 0 with value -1", {"targets": [-1, -1, 1]}),
    "large unsigned target": (
        IndexError,
        "value 18446744073709551615",
        {"targets": np.array([2**64 - 1, 0, 0], np.uint64)},
    ),
    "nothing ignored": (IndexError, r"\[0, 3\]; 1 of 3 do not", {"targets": [-100, 0, 0], "ignore_index": None}),
    "kind of ignore_index": (TypeError, "ignore_index must be an integer or None", {"ignore_index": 1.5}),
    "weight's length": (ValueError, r"weight must have shape \(4,\)", {"weight": np.ones(3)}),
    "weight's kind": (TypeError, "weight must hold real numbers", {"weight": np.array(list("abcd"))}),
    "negative weight": (ValueError, "weight must be finite and not negative; got -2", {"weight": [1, -2, 1, 1]}),
    "infinite weight": (ValueError, "weight must be finite and not negative; got inf", {"weight": [1, np.inf, 1, 1]}),
    "smoothing above 1": (ValueError, r"label_smoothing must lie in \[0, 1\]; got 1.5", {"label_smoothing": 1.5}),
    "smoothing nan": (ValueError, r"label_smoothing must lie in \[0, 1\]; got nan", {"label_smoothing": np.nan}),
    "smoothing's kind": (TypeError, "label_smoothing must be a real number, not 'a'", {"label_smoothing": "a"}),
    "reduction": (ValueError, "reduction must be one of none, sum, mean; got 'avg'", {"reduction": "avg"}),
    "denominator with sum": (ValueError, "denominator goes with", {"reduction": "sum", "denominator": 2.0}),
    "denominator nan": (ValueError, "denominator must be a number", {"denominator": np.nan}),
    "unknown option": (TypeError, "unknown option 'smoothing'; the options are weight, ", {"smoothing": 0.1}),
    "unknown backend": (
        fastxent.backends.BackendUnavailableError,
        "there is no backend 'abacus'",
        {"backend": "abacus"},
    ),
    "grad_output's shape": (
        ValueError,
        r"targets' shape \(3,\), not \(2,\)",
        {"reduction": "none", "grad_output": [1, 2]},
    ),
    "grad_output with mean": (ValueError, 'scalar unless reduction is "none"', {"grad_output": [1, 2, 3]}),
    "out's kind": (TypeError, "out must be a NumPy array, not list", {"out": [0]}),
    "out's shape": (ValueError, r"shape \(3, 4\), not \(3, 3\)", {"out": LOGITS[:, :3].copy()}),
    "out's dtype": (
        TypeError,
        "out must have the logits' dtype float32 or float32 or float64, in native byte order; not <f2",
        {"out": np.zeros((3, 4), np.float16)},
    ),
    "out in the other byte order": (TypeError, "native byte order; not >f4", {"out": np.zeros((3, 4), ">f4")}),
    "out with several elements in one place": (
        ValueError,
        "out must not overlap itself",
        {"out": np.lib.stride_tricks.as_strided(np.zeros(4, np.float32), (3, 4), (0, 4))},
    ),
    "out whose rows slide over one another": (
        ValueError,
        r"out must not overlap itself; got shape \(3, 4\) with strides \(4, 4\)",
        {"out": np.lib.stride_tricks.sliding_window_view(np.zeros(6, np.float32), 4, writeable=True)},
    ),
    "overlapping out": (ValueError, "not overlap", dict(zip(("logits", "out"), _overlapping(), strict=True))),
}


@pytest.mark.parametrize(("kind", "message", "arguments"), ERRORS.values(), ids=ERRORS)
def test_error_names_rule_and_value(kind, message, arguments):
    out = arguments.get("out", np.full((3, 4), 7, np.float32))
    before = np.array(out)
    with pytest.raises(kind, match=message):
        fastxent.cross_entropy_with_grad(**{"logits": LOGITS, "targets": TARGETS, "out": out} | arguments)
    np.testing.assert_array_equal(out, before)


def test_an_out_beside_the_logits_in_one_buffer():
    room = np.zeros((3, 8), np.float32)
    room[:, :4] = LOGITS
    found = fastxent.cross_entropy_grad(room[:, :4], TARGETS, out=room[:, 4:])
    np.testing.assert_array_equal(found, fastxent.cross_entropy_grad(LOGITS, TARGETS))
    np.testing.assert_array_equal(room[:, :4], LOGITS)


def test_an_empty_out_of_any_strides():
    logits = np.zeros((0, 4), np.float32)
    out = np.lib.stride_tricks.as_strided(logits, (0, 4), (0, 0))
    assert fastxent.cross_entropy_grad(logits, np.zeros(0, int), reduction="sum", out=out) is out


def test_read_only_out():
    out = np.zeros((3, 4), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        fastxent.softmax(LOGITS, out=out)


@pytest.mark.parametrize("dtype", [f"{kind}int{bits}" for kind in ("", "u") for bits in (8, 16, 32, 64)])
def test_targets_of_every_integer_dtype(dtype):
    logits = np.random.default_rng(0).standard_normal((3, 200))
    want = fastxent.cross_entropy(logits, np.array([0, 100, 127]))
    assert fastxent.cross_entropy(logits, np.array([0, 100, 127], dtype)) == want


def test_ignore_index_inside_the_classes():
    losses = fastxent.cross_entropy(LOGITS, TARGETS, ignore_index=1, reduction="none")
    np.testing.assert_allclose(losses, np.log(4) * np.array([1, 0, 1]), rtol=1e-6)


def test_lists_are_read():
    assert fastxent.cross_entropy([[0.0, 0.0]], [0]) == pytest.approx(np.log(2))


class _Exported:
    """What only speaks DLPack."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


def test_dlpack_is_read_without_a_copy():
    logits = np.random.default_rng(0).standard_normal((3, 4))
    want = fastxent.cross_entropy_with_grad(logits, TARGETS)
    got = fastxent.cross_entropy_with_grad(_Exported(logits), TARGETS)
    assert got[0] == want[0]
    np.testing.assert_array_equal(got[1], want[1])
    assert np.shares_memory(checks.read_array(_Exported(logits)), logits)


@pytest.mark.parametrize("classes", [1, 7, 300])
def test_targets_may_have_any_stride(classes):
    logits, targets = np.random.default_rng(0).standard_normal((20, classes), np.float32), np.arange(20) % classes
    apart = np.stack([targets, np.zeros(20, np.int64)], axis=1)[:, 0]
    for given in (apart, targets[::-1].copy()[::-1]):
        for call in (fastxent.cross_entropy, fastxent.cross_entropy_grad, fastxent.shards.accumulate):
            want, got = call(logits, targets), call(logits, given)
            np.testing.assert_array_equal(getattr(got, "columns", got), getattr(want, "columns", want))
        assert fastxent.score(logits, given) == fastxent.score(logits, targets)


def test_gradients_of_hidden_states_are_new_arrays_where_no_out_is_given():
    hidden, weight = np.eye(2, dtype=np.float32), np.eye(3, 2, dtype=np.float32)
    _, dhidden, dweight, dbias = fastxent.linear_cross_entropy_with_grad(hidden, weight, [0, 2])
    assert (dhidden.shape, dweight.shape, dbias) == ((2, 2), (3, 2), None)
    with pytest.raises(ValueError, match=r"out must be a tuple of an array or None for each of hidden, linear_weight"):
        fastxent.linear_cross_entropy_with_grad(hidden, weight, [0, 2], out=(None, None))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int64])
def test_options_may_be_numbers_of_numpy(kind, backend):
    """Found by fuzzing: a TypeError for a softcap in float32."""
    logits, named = np.float32([[1, 2, 3]]), {"softcap": 3, "temperature": 7, "z_loss": 5, "denominator": 9}
    want = fastxent.cross_entropy(logits, [0], backend=backend, **named)
    rowmath.rate.cache_clear()  # which takes equal numbers for one
    got = fastxent.cross_entropy(logits, [0], backend=backend, **{name: kind(n) for name, n in named.items()})
    assert got == want
    scored = fastxent.score(logits, [0], backend=backend, softcap=kind(3), temperature=kind(7))
    assert np.isfinite(scored.log_prob).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"temperature": 1e-39}, "1 / temperature"),
        ({"temperature": 5e-324}, "1 / temperature"),
        ({"softcap": 1e39}, "softcap / temperature"),
        ({"softcap": 1e9, "temperature": 1e-30}, "softcap / temperature"),
        ({"softcap": 1e-320}, "1 / softcap"),
    ],
)
def test_a_scale_beyond_a_float_is_one_clear_error(options, what, backend):
    """Of a float32, whatever the logits are."""
    for function in (fastxent.cross_entropy, fastxent.score):
        for logits in (np.ones((1, 3)), np.ones((1, 3), np.float32)):
            with pytest.raises(ValueError, match=rf"{what} must be less than 1e\+38"):
                function(logits, [0], backend=backend, **options)
    with pytest.raises(ValueError, match=r"scale must be less than 1e\+38; got 1e\+39"):
        fastxent.logsumexp(np.ones(3, np.float32), scale=1e39, backend=backend)
    assert np.isfinite(fastxent.cross_entropy(np.ones((1, 3), np.float32), [0], backend=backend, softcap=1e37))


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("bad", [None, -1.0, np.nan, np.inf])
def test_probabilities_of_every_dtype(dtype, bad):
    """One that has no infinity has none to be compared with."""
    targets = np.full((2, 4), 0.25, dtype)
    if bad is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            targets[1, 2] = bad
        with pytest.raises(ValueError, match=r"targets must be finite and not negative; got (-1|nan|inf)"):
            fastxent.cross_entropy(LOGITS[:2, :4], targets)
    else:
        want = fastxent.cross_entropy(LOGITS[:2, :4], targets.astype(np.float64))
        np.testing.assert_allclose(fastxent.cross_entropy(LOGITS[:2, :4], targets), want, rtol=1e-6)
