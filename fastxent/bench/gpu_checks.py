"""Every verb of the CUDA backend, on inputs nobody has seen before, against the reference in float64.

A verb's function yields figures: a name, what was got, what is wanted, what is promised, and in units of what (by
default of each number itself). Promises are those of every backend, see docs/numerics.md; in float64 a part in 10^12,
as the reference is float64 too.
"""

import functools
from typing import Any

import numpy as np

import fastxent
from fastxent import backends, checks, shards
from fastxent.backends.cuda.scheduler import NONSENSE
from fastxent.bench import exact, gpu_figures, gpu_tensors
from fastxent.bench.cases import Case
from fastxent.bench.gpu_problem import Problem, Scoring
from fastxent.bench.gpu_record import Check

_ROWS = 5
# rows of eight threads, of a warp, of two and of eight, of a few strips and of many, with ragged ends: in the widest
# format each is a step further; and of more strips than wait for each other
CLASSES, MANY_CLASSES = (40, 601, 3001, 12_289, 50_257, 300_001), 2_200_001
# several groups of rows that are summed together, each of several rows; and more than 2^31 logits, in rows that begin
# anywhere
MANY_ROWS, LARGE = 10_000, (16_500, 131_073)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "weights": {"weights": True, "label_smoothing": 0.1},
    "ignored": {"ignored": 0.5},
    "z-loss": {"z_loss": 1e-3},
    "softcap": {"softcap": 30.0, "temperature": 0.8},
    "probabilities": {"targets": "dense", "weights": True},
    "softcap and all else": {
        "softcap": 30.0,
        "temperature": 0.8,
        "label_smoothing": 0.1,
        "weights": True,
        "z_loss": 1e-3,
        "ignored": 0.3,
    },
    "sparse": {"targets": "sparse", "label_smoothing": 0.1},
}


def each(dtypes=checks.DTYPES, classes=CLASSES, seed=None, many=True, large=LARGE):
    """``problem, check`` of everything: a name, and a function that gives the `Check`; of the shape ``large`` none if
    that is None, ``many`` rows and many classes or not.
    """
    fresh = np.random.default_rng(seed)
    for dtype in map(np.dtype, dtypes):
        for width in classes:
            for name in OPTIONS:
                yield _named(dtype, width, name), functools.partial(of_options, dtype, width, name, fresh)
            for verb in VERBS if dtype.itemsize > 1 and gpu_tensors.torch_of_the_device() else _OF_ALL:
                yield _named(dtype, width, verb), functools.partial(of_verb, dtype, width, verb, fresh)
    for dtype in map(np.dtype, ("bfloat16", "float32") if many else ()):  # rows that are read again for their gradient
        yield (
            _named(dtype, MANY_CLASSES, "plain"),
            functools.partial(of_options, dtype, MANY_CLASSES, "plain", fresh),
        )
        width = classes[1]
        yield _of_shape((MANY_ROWS, width), dtype, "summed"), functools.partial(of_many_rows, dtype, width, fresh)
    if large is not None:
        yield _of_shape(large, "bfloat16", "some rows"), functools.partial(of_large, np.dtype("bfloat16"), large)


def of_options(dtype, classes, name, fresh):
    """The loss with its gradient under some options: written in the dtype of the loss, and in that of the logits."""
    options = dict(OPTIONS[name])
    named = {key: options.pop(key) for key in ("weights", "ignored", "targets") if key in options}
    case = Case(_ROWS, classes, "wide", dtype.name, options=tuple((options | {"reduction": "none"}).items()), **named)
    logits, targets, options = case.build()
    logits = (logits[:, fresh.permutation(classes)] * fresh.uniform(0.5, 1.5)).astype(dtype)
    options = {name: _representable(value, dtype) for name, value in options.items()}
    targets = targets if isinstance(targets, tuple) else _representable(targets, dtype)
    wanted = fastxent.cross_entropy_with_grad(logits.astype(float), targets, backend="reference", **options)
    figures = []
    for kind in dict.fromkeys((checks.loss_dtype(dtype), checks.gradient_dtype(dtype))):
        out = np.full(logits.shape, np.nan, kind)
        got = fastxent.cross_entropy_with_grad(logits, targets, out=out, backend="cuda", **options)
        scale = None if name == "plain" else np.abs(wanted[1]).max(axis=1, keepdims=True)  # options add and subtract
        more = exact.SOFTCAP if "softcap" in options else 0.0
        figures += exact.loss_and_gradient(got, wanted, dtype, f"gradient in {kind}", scale, more)
    if not isinstance(targets, tuple):
        figures += _of_placed(logits, targets, options, wanted, scale, more)
    return _check(dtype, classes, name, figures)


def _representable(value, dtype):
    """Numbers that what is computed with has too."""
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        return value
    return value.astype(checks.loss_dtype(dtype)).astype(np.float64)


def _of_placed(logits, targets, options, wanted, scale, more):
    """The same of arrays that are on the device, one by one and summed."""
    real = checks.loss_dtype(logits.dtype)

    def placed(value):
        if not isinstance(value, np.ndarray):
            return value
        return _placed(value if value.dtype.kind in "iu" else value.astype(real))

    given, there = (_placed(logits), placed(targets)), {name: placed(value) for name, value in options.items()}
    found = tuple(map(_fetched, fastxent.cross_entropy_with_grad(*given, **there)))
    yield from exact.loss_and_gradient(found, wanted, logits.dtype, "gradient on the device", scale, more)
    summed = {"reduction": "mean"}
    mean = fastxent.cross_entropy(logits.astype(float), targets, backend="reference", **(options | summed))
    promised = 2 * exact.promised(logits.dtype)[0] + more
    alone, with_gradient = (
        function(*given, **(there | summed)) for function in (fastxent.cross_entropy, fastxent.cross_entropy_with_grad)
    )
    yield "mean on the device", _fetched(alone), mean, promised
    yield "mean with its gradient", _fetched(with_gradient[0]), mean, promised


def of_verb(dtype, classes, verb, fresh):
    """One verb on its plain problem."""
    logits = (4 * fresh.standard_normal((_ROWS, classes))).astype(dtype)
    return _check(dtype, classes, verb, list(VERBS[verb](logits, fresh.integers(0, classes, _ROWS))))


def of_many_rows(dtype, classes, fresh):
    """Losses that several groups of rows add up, the gradient of their mean, and the same bits of some rows alone."""
    logits = (4 * fresh.standard_normal((MANY_ROWS, classes))).astype(dtype)
    targets = fresh.integers(0, classes, MANY_ROWS)
    targets[fresh.random(MANY_ROWS) < 0.1] = -100
    given, promised = (_placed(logits), _placed(targets)), exact.promised(dtype)
    figures = []
    for reduction in ("mean", "sum"):
        wanted = fastxent.cross_entropy_with_grad(
            logits.astype(float), targets, reduction=reduction, backend="reference"
        )
        found = fastxent.cross_entropy_with_grad(*given, reduction=reduction)
        figures += exact.loss_and_gradient(map(_fetched, found), wanted, dtype, f"gradient of the {reduction}")
        again = fastxent.cross_entropy(*given, reduction=reduction)
        figures.append((f"{reduction} alone", _fetched(again), wanted[0], promised[0]))
    some = slice(MANY_ROWS // 3, MANY_ROWS // 2)
    losses, gradient = fastxent.cross_entropy_with_grad(*given, reduction="none")
    alone = fastxent.cross_entropy_with_grad(_placed(logits[some]), _placed(targets[some]), reduction="none")
    for name, whole, part in zip(("losses", "gradient"), (losses, gradient), alone, strict=True):
        figures.append((f"bits of some {name}", _fetched(part), _fetched(whole)[some].astype(float), 0.0))
    return _check_of((MANY_ROWS, classes), dtype, "summed", figures)


def of_large(dtype, shape):
    """Some rows of arrays that are on the device: the first, the last and those about logit 2^31 among them."""
    from fastxent.backends.cuda.run import runner

    machine = runner().machine
    with machine.current():
        problem = Problem(machine, shape, dtype)
        try:
            scoring = Scoring(problem, 5)
            return _check_of(shape, dtype, "some rows", gpu_figures.figures(problem, [scoring]))
        finally:
            problem.release()


def _of_shape(shape, dtype, name):
    return f"{shape[0]:,} x {shape[1]:,} {dtype}, {name}"


def _named(dtype, classes, name):
    return _of_shape((_ROWS, classes), dtype, name)


def _check(dtype, classes, name, figures):
    return _check_of((_ROWS, classes), dtype, name, figures)


def _check_of(shape, dtype, name, figures):
    return Check.of(_of_shape(shape, dtype, name), figures)


def _both(function, logits, *arguments, **options):
    """What the GPU gives, and the reference of the same numbers in float64."""
    return (
        function(logits, *arguments, backend="cuda", **options),
        function(*(given.astype(float) if given.dtype == logits.dtype else given for given in (logits, *arguments)),
                 backend="reference", **options),
    )  # fmt: skip


def _of_a_loss(logits, targets):
    promised = exact.promised(logits.dtype)
    yield "loss", *_both(fastxent.cross_entropy, logits, targets, reduction="none"), promised[0]
    got, want = _both(fastxent.cross_entropy_grad, logits, targets, reduction="sum")
    yield "gradient", got, want, promised[1]


def _in_place(logits, targets):
    wanted = fastxent.cross_entropy_with_grad(logits.astype(float), targets, reduction="none", backend="reference")
    if logits.dtype.itemsize == 1:  # float8 holds no gradient
        logits = logits.astype(np.float32)
    kept = logits.copy()
    got = fastxent.cross_entropy_with_grad(kept, targets, reduction="none", out=kept, backend="cuda")
    yield from exact.loss_and_gradient((got[0], kept), wanted, logits.dtype)


def _score(logits, targets):
    got, want = _both(fastxent.score, logits, targets, top_k=5)
    for name, figures in want.as_dict().items():
        scale = np.abs(logits).astype(float).max(axis=1) + np.abs(figures) if name == "lse" else None
        yield name, getattr(got, name), figures, 2 * exact.promised(logits.dtype)[0], scale


def _softmax(logits, targets):
    promised = exact.promised(logits.dtype)[1]
    out = np.full(logits.shape, np.nan, checks.gradient_dtype(logits.dtype))
    for function in (fastxent.softmax, fastxent.log_softmax):
        _, want = _both(function, logits)
        yield function.__name__, function(logits, out=out, backend="cuda").copy(), want, promised
    got, want = _both(fastxent.logsumexp, logits)
    yield "logsumexp", got, want, exact.promised(logits.dtype)[0], np.abs(logits).astype(float).max(axis=1) + abs(want)


def _binary(logits, targets):
    outcomes = (np.arange(logits.size).reshape(logits.shape) % 5 < 2).astype(np.float64)
    function = fastxent.binary_cross_entropy_with_logits_with_grad
    (loss, gradient), (want, exactly) = _both(function, logits, outcomes, reduction="none")
    yield "loss", loss, want, exact.promised(logits.dtype)[0]
    yield "gradient", gradient, exactly, exact.promised(logits.dtype)[1]


def _count(logits, targets):
    levels = logits[np.arange(len(logits)), targets].astype(float)
    yield "counts", *(backends.get(name).count(logits, levels) for name in ("cuda", "reference")), 0.0


def _divergences(logits, targets):
    other = np.roll(logits, 1, axis=0)
    for function in (fastxent.kl_divergence_from_logits, fastxent.js_divergence_from_logits):
        yield function.__name__, *_both(function, logits, other), 4 * exact.promised(logits.dtype)[1]
    entropy = fastxent.entropy_from_logits
    yield entropy.__name__, *_both(entropy, logits), 2 * exact.promised(logits.dtype)[0]


def _shards(logits, targets):
    classes, cut = logits.shape[1], logits.shape[1] // 3
    blocks = {0: np.ascontiguousarray(logits[:, :cut]), cut: np.ascontiguousarray(logits[:, cut:])}
    own = shards.target_logits(logits, targets)
    state: Any = None
    scores: Any = None
    for start, block in blocks.items():
        named = {"vocab_start": start, "backend": "cuda"}
        state = shards.accumulate(block, targets, classes=classes, state=state, **named)
        part = shards.accumulate_scores(block, targets, own, top_k=5, **named)
        scores = part if scores is None else scores.merge(part)
    loss = shards.finalize(state, targets, classes=classes, reduction="none")
    gradients = [
        shards.gradient(block, targets, state, vocab_start=start, classes=classes, reduction="none", backend="cuda")
        for start, block in blocks.items()
    ]
    wanted = fastxent.cross_entropy_with_grad(logits.astype(float), targets, reduction="none", backend="reference")
    yield from exact.loss_and_gradient((loss, np.hstack(gradients)), wanted, logits.dtype)
    got = shards.finalize_scores(scores, targets, top_k=5, dtype=checks.loss_dtype(logits.dtype))
    want = fastxent.score(logits.astype(float), targets, top_k=5, backend="reference")
    for name in ("log_prob", "rank", "top_ids"):
        yield name, getattr(got, name), getattr(want, name), 2 * exact.promised(logits.dtype)[0]


def _on_the_device(logits, targets):
    """Arrays that are there already, and the wait that ``check`` asks for."""
    wanted = fastxent.cross_entropy_with_grad(logits.astype(float), targets, reduction="none", backend="reference")
    given = _placed(logits), _placed(targets)
    for check in (False, True):
        found = fastxent.cross_entropy_with_grad(*given, reduction="none", check=check)
        yield from exact.loss_and_gradient(map(_fetched, found), wanted, logits.dtype)
        loss = fastxent.cross_entropy(*given, reduction="none", check=check)
        yield "loss alone", _fetched(loss), wanted[0], exact.promised(logits.dtype)[0]
    promised = exact.promised(logits.dtype)
    for function in (fastxent.softmax, fastxent.log_softmax):
        _, want = _both(function, logits)
        yield function.__name__, _fetched(function(given[0])), want, promised[1]
    _, want = _both(fastxent.logsumexp, logits)
    scale = np.abs(logits).astype(float).max(axis=1) + abs(want)
    yield "logsumexp", _fetched(fastxent.logsumexp(given[0])), want, promised[0], scale
    if logits.dtype.itemsize > 1:  # float8 holds no gradient
        inside, _ = fastxent.cross_entropy_with_grad(*given, reduction="none", out=given[0])
        found = _fetched(inside), _fetched(given[0])
        yield from exact.loss_and_gradient(found, wanted, logits.dtype, "gradient in place")
    beyond = _placed(np.where(np.arange(len(targets)) == 1, logits.shape[1], targets))
    try:
        fastxent.cross_entropy(_placed(logits), beyond, check=True)
        seen = False
    except IndexError:
        seen = True
    yield "a target out of range is seen", np.array(seen), np.array(True), 0.0


def _placed(values):
    """An array of the device, on its default stream."""
    from fastxent.backends.cuda.arrays import DeviceArray
    from fastxent.backends.cuda.run import runner

    machine = runner().machine
    array = DeviceArray(machine, 0, values.shape, values.dtype)
    with machine.current():
        machine.copy_to_device(machine.stream_of(0), np.ascontiguousarray(values), array.address)
        machine.wait(machine.stream_of(0))
    return array


def _fetched(array):
    """Its numbers; where they were is nonsense from then on, and so is what is made there next."""
    from fastxent.backends.cuda.run import runner

    machine, values = runner().machine, np.empty(array.shape, array.dtype)
    nonsense = np.full(values.nbytes, NONSENSE, np.uint8)
    with machine.current():
        machine.copy_to_host(machine.stream_of(0), values, array.address)
        machine.copy_to_device(machine.stream_of(0), nonsense, array.address)
        machine.wait(machine.stream_of(0))
    return values


_OF_ALL = {
    "loss and gradient alone": _of_a_loss,
    "gradient in place": _in_place,
    "score with top 5": _score,
    "softmax": _softmax,
    "binary": _binary,
    "counts": _count,
    "divergences": _divergences,
    "blocks of classes": _shards,
    "arrays of the device": _on_the_device,
}
VERBS = {**_OF_ALL, **gpu_tensors.VERBS}
