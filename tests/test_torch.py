"""The bridge to torch: torch's own meaning, our digits, and every tool of torch that looks at an operator."""

import itertools
import math
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install fastxent[peers]")

import fastxent  # noqa: E402
import fastxent.torch as ours  # noqa: E402
from fastxent.torch import arrays, binary, linear, operators  # noqa: E402
from fastxent.torch.operators import TENSORS  # noqa: E402
from tests import exact, reference  # noqa: E402

functional = torch.nn.functional
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def problem(rows=6, classes=9, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    targets = torch.randint(0, classes, (rows,), generator=generator)
    return logits.requires_grad_(True), targets


def options_of(rows=6, classes=9):
    weight, sample_weight = torch.linspace(0, 2, classes), torch.linspace(0.5, 2, rows)
    yield {}
    yield {"weight": weight, "label_smoothing": 0.1, "ignore_index": 3}
    yield {"z_loss": 0.01, "softcap": 4.0, "temperature": 0.7, "sample_weight": sample_weight}
    yield {"label_smoothing": 0.2, "denominator": 3.5, "z_loss": 0.1}


def numbers(options):
    return {name: arrays.as_array(value) if torch.is_tensor(value) else value for name, value in options.items()}


class TestArrays:
    @pytest.mark.parametrize(
        ("dtype", "name"),
        [
            (torch.float16, "float16"),
            (torch.bfloat16, "bfloat16"),
            (torch.float8_e4m3fn, "float8_e4m3fn"),
            (torch.float8_e5m2, "float8_e5m2"),
            (torch.float32, "float32"),
            (torch.float64, "float64"),
            (torch.int64, "int64"),
        ],
    )
    def test_no_copy_whatever_the_dtype_and_the_strides(self, dtype, name):
        tensor = torch.arange(24).reshape(4, 6).to(dtype)
        for view in (tensor, tensor.t(), tensor[1:, ::2], tensor[0], tensor[2, 3]):
            array = arrays.as_array(view)
            assert array.dtype.name == name
            assert (array.shape, array.ctypes.data) == (tuple(view.shape), view.data_ptr())
            np.testing.assert_array_equal(array.astype(np.float64), view.to(torch.float64).numpy())

    def test_a_tensor_elsewhere_is_one_clear_error(self):
        with pytest.raises(NotImplementedError, match=r"must be on the CPU, not on meta.*move them with \.cpu"):
            arrays.as_array(torch.empty(2, device="meta"))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rows", [2, 3000])
    def test_a_new_gradient_is_laid_out_as_torch_would(self, dtype, rows):
        logits = torch.zeros(rows, 4, 1000, dtype=dtype)
        for view in (logits, logits.transpose(1, 2), logits[:, :2], logits[:1].expand(rows, 4, 1000)):
            got, want = arrays.new_gradient(view), torch.empty_like(view)
            assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)
            assert not got._is_view()

    def test_a_gradient_takes_the_memory_of_the_last_that_nobody_holds(self):
        ours.release_memory()
        logits = torch.zeros(3000, 1000)
        first, second = arrays.new_gradient(logits), arrays.new_gradient(logits)
        held, place = first[:10], first.data_ptr()
        assert second.data_ptr() != place
        del first
        assert not arrays._rooms  # a part of it is held still
        del held
        arrays.new_gradient(logits[:1499])
        assert arrays._rooms[0].nbytes == 1499 * 1000 * 4  # for less than half, the other would be wasted
        place = second.data_ptr()
        del second
        last = arrays.new_gradient(logits[:1501])
        assert last.data_ptr() == place
        assert last.untyped_storage().nbytes() == last.nbytes
        del last
        assert arrays.new_gradient(logits).data_ptr() == place
        assert len(arrays._rooms) == 1
        ours.release_memory()
        assert not arrays._rooms

    def test_memory_is_the_cpus_whatever_the_default_device(self):
        ours.release_memory()
        logits, targets = torch.randn(3000, 1000), torch.zeros(3000, dtype=torch.int64)
        with torch.device("meta"):
            assert arrays.new_gradient(logits).is_cpu
            ours.cross_entropy(logits.requires_grad_(True), targets).backward()
        assert logits.grad.is_cpu

    def test_a_loss_that_is_dropped_gives_its_gradients_memory_back(self, monkeypatch):
        monkeypatch.setattr(operators, "_was_scaled", False)
        ours.release_memory()
        loss = ours.cross_entropy(torch.zeros(3000, 1000, requires_grad=True), torch.zeros(3000, dtype=torch.int64))
        assert not arrays._rooms
        del loss
        assert arrays._rooms  # at once: nothing waits for the collector of cycles


class TestAgainstNumPy:
    """The bits of the functions on arrays, whatever the options."""

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", ["index", "dense", "sparse"])
    @pytest.mark.parametrize("scale", [1.0, 2.5])  # 1 is the gradient kept with the loss
    def test_cross_entropy(self, scale, kind, dtype, reduction):
        for options in options_of():
            if "denominator" in options and reduction != "mean":
                continue
            if kind != "index":
                options = options | {"ignore_index": -100}
            logits, targets = problem(dtype=dtype)
            if kind == "dense":
                targets = torch.rand(logits.shape)
            if kind == "sparse":
                targets = torch.stack([targets, (targets + 2) % 9], dim=1), torch.rand(6, 2)
            given = tuple(map(arrays.as_array, targets)) if kind == "sparse" else arrays.as_array(targets)
            loss, lse = ours.cross_entropy(logits, targets, reduction=reduction, return_lse=True, **options)
            upstream = torch.linspace(-1, 2, 6, dtype=loss.dtype) if reduction == "none" else scale
            (gradient,) = torch.autograd.grad((loss * upstream).sum(), logits)
            read = numbers(options) | {"reduction": reduction, "axis": 1}
            *want, dlogits = fastxent.cross_entropy_with_grad(
                arrays.as_array(logits), given, return_lse=True, grad_output=np.asarray(upstream), **read
            )
            for got, exactly in zip((loss, lse, gradient), (*want, dlogits), strict=True):
                assert arrays.as_array(got).dtype == np.asarray(exactly).dtype
                np.testing.assert_array_equal(arrays.as_array(got), exactly)
            assert not lse.requires_grad

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_binary(self, dtype, reduction):
        logits, _ = problem(dtype=dtype)
        targets, weight = torch.rand(6, 9), torch.rand(6, 1)
        options = {"pos_weight": torch.rand(9), "label_smoothing": 0.1, "reduction": reduction}
        loss = ours.binary_cross_entropy_with_logits(logits, targets, weight, **options)
        upstream = torch.rand(6, 9) if reduction == "none" else torch.tensor(1.0)
        (gradient,) = torch.autograd.grad(loss, logits, upstream.to(loss.dtype))
        want = fastxent.binary_cross_entropy_with_logits_with_grad(
            arrays.as_array(logits), targets.numpy(), weight=weight.numpy(), grad_output=upstream.numpy(),
            **numbers(options),
        )  # fmt: skip
        np.testing.assert_array_equal(arrays.as_array(loss), want[0])
        np.testing.assert_array_equal(arrays.as_array(gradient), want[1])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_log_softmax_and_score(self, dtype):
        logits, targets = problem(dtype=dtype)
        array = arrays.as_array(logits)
        got = arrays.as_array(ours.log_softmax(logits, 0))
        np.testing.assert_array_equal(got, fastxent.log_softmax(array, axis=0))
        scores = ours.score(logits, targets, top_k=2, ids=targets[:2])
        assert scores.numpy() == fastxent.score(array, targets.numpy(), top_k=2, ids=targets[:2].numpy())
        assert scores.log_prob.dtype == arrays.loss_dtype(dtype)

    def test_scores_of_one_row(self):
        scores = ours.score(torch.tensor([0.0, 1.0, 2.0]), torch.tensor(1))
        assert {name: tuple(values.shape) for name, values in scores._asdict().items()} == {
            name: np.shape(values) for name, values in scores.numpy().as_dict().items()
        }
        assert (scores.rank.shape, scores.rank.item()) == ((), 2)

    @pytest.mark.parametrize("margin", [5, 20, 80])
    def test_log_softmax_of_a_confident_row_has_its_gradient(self, margin):
        logits = torch.tensor([[0.0, float(margin)], [float(margin), 0.0]], requires_grad=True)
        ours.log_softmax(logits, 1)[[0, 1], [1, 0]].sum().backward()
        p = math.exp(-margin) / (1 + math.exp(-margin))
        np.testing.assert_allclose(logits.grad.numpy(), [[-p, p], [p, -p]], rtol=3e-7)

    def test_losses_of_half_are_not_rounded_to_half(self):
        for dtype in DTYPES:
            logits, targets = problem(dtype=dtype)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            assert ours.cross_entropy(logits, targets).dtype == wide
            assert ours.log_softmax(logits, -1).dtype == dtype


class TestDigits:
    @pytest.mark.parametrize("margin", [20, 30, 60])
    def test_confident_rows_go_on_learning(self, margin):
        logits = torch.tensor([[float(margin), 0.0]], requires_grad=True)
        loss = ours.cross_entropy(logits, torch.tensor([0]))
        loss.backward()
        want = np.log1p(np.exp(-float(margin)))
        assert loss.item() == pytest.approx(want, rel=5e-7)
        assert logits.grad[0, 0].item() == pytest.approx(-want, rel=1e-6)
        assert functional.cross_entropy(logits, torch.tensor([0])) == 0

    def test_loss_scaling_saves_the_gradient_of_a_float16_mean(self):
        """As it is meant to: 2^-26 of a float16 is 0, 2^16 times that is not."""
        logits, targets = problem(4096, 9, torch.float16)
        (plain,) = torch.autograd.grad(ours.cross_entropy(logits, targets), logits)
        (scaled,) = torch.autograd.grad(ours.cross_entropy(logits, targets) * 2.0**12, logits)
        wide = logits.detach().double().requires_grad_(True)
        (want,) = torch.autograd.grad(ours.cross_entropy(wide, targets) * 2.0**12, wide)
        lost = (plain == 0).sum()
        assert lost > (scaled == 0).sum()
        error, (relative, tiny) = (scaled.double() - want).abs(), exact.rounding("float16")
        assert (error <= relative * 1.01 * want.abs() + tiny).all()


def samples(name, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    info = next(info for info in op_db if info.name == name and not info.variant_test_name)
    torch.manual_seed(0)
    return list(info.sample_inputs("cpu", dtype, requires_grad=True))


def tensors_of(sample):
    """The tensors of a sample that take a gradient, as leaves of one more sample in another dtype."""
    return [value for value in (sample.input, *sample.args) if torch.is_tensor(value) and value.requires_grad]


def derivatives(function, tensors, order):
    """The result, its gradients for an upstream of numbers that are no rounding, and for order 2 those of a sum of
    their cosines.
    """
    result = function()
    upstream = (torch.arange(result.numel()) % 7 - 2.0).reshape(result.shape).to(result.dtype)
    first = torch.autograd.grad(result, tensors, upstream, create_graph=order > 1)
    if order == 1:
        return [result, *first]
    second = torch.autograd.grad(sum(torch.cos(gradient).sum() for gradient in first), tensors)
    return [result, *first, *second]


NAMES = {
    "nn.functional.cross_entropy": (ours.cross_entropy, functional.cross_entropy),
    "nn.functional.binary_cross_entropy_with_logits": (
        ours.binary_cross_entropy_with_logits,
        functional.binary_cross_entropy_with_logits,
    ),
    "log_softmax": (ours.log_softmax, functional.log_softmax),
}


class TestTorchsSamples:
    """torch's own inputs for its own tests, there and back: the result, the gradients and their gradients."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", NAMES)
    def test_operators(self, name, dtype):
        mine, theirs = NAMES[name]
        order, compared = 2 if dtype == torch.float64 else 1, 0
        for sample in samples(name, dtype):
            kwargs = {
                key: value.abs() if key in ("weight", "pos_weight") else value for key, value in sample.kwargs.items()
            }
            got = derivatives(lambda: mine(sample.input, *sample.args, **kwargs), tensors_of(sample), order)  # noqa: B023
            wide = [
                value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value
                for value in (sample.input, *(value for value in sample.args if torch.is_tensor(value)))
            ]
            rest = [value for value in sample.args if not torch.is_tensor(value)]
            in_double = {
                key: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
                for key, value in kwargs.items()
            }
            if "dtype" in in_double:
                continue  # torch's own conversions
            want = derivatives(
                lambda: theirs(*wide, *rest, **in_double),  # noqa: B023
                [value for value in wide if value.requires_grad],
                order,
            )
            # as torch does, a half log_softmax takes its gradient from rounded log-probabilities: p log p <= 0.37
            slack = 0.37 * 2 * sample.input.numel() if name == "log_softmax" else 0.0
            for mine_, theirs_ in zip(got, want, strict=True):
                self.compare(mine_, theirs_, dtype, slack)
                compared += 1
        assert compared > 8

    def compare(self, got, want, dtype, slack=0.0):
        """Within the promise of the dtype computed with, of the largest entry, and one rounding of the result."""
        relative, tiny = exact.rounding(str(got.dtype).removeprefix("torch."))
        promise = 1e-11 if dtype == torch.float64 else 2e-6
        scale = want.abs().max() if want.numel() else 0.0
        limit = promise * scale + relative * (1.01 * want.abs() + slack) + tiny + 1e-300
        assert got.shape == want.shape
        within = (got.double() - want).abs() <= limit
        assert (within | (got.isnan() & want.isnan())).all(), (got, want)

    def test_modules(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.testing._internal.common_modules import module_db
        (info,) = [info for info in module_db if info.module_cls is torch.nn.CrossEntropyLoss]
        torch.manual_seed(0)
        inputs = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=True)
        compared = 0
        for given in inputs:
            args, kwargs = given.constructor_input.args, dict(given.constructor_input.kwargs)
            if kwargs.get("weight") is not None:
                kwargs["weight"] = kwargs["weight"].abs()
            mine, theirs = ours.CrossEntropyLoss(*args, **kwargs), torch.nn.CrossEntropyLoss(*args, **kwargs)
            assert mine.state_dict().keys() == theirs.state_dict().keys()
            logits, targets = given.forward_input.args
            if kwargs.get("ignore_index", -100) >= 0 and targets.is_floating_point():
                with pytest.raises(ValueError, match="ignore_index must be negative"):
                    mine(logits, targets)
                continue
            for got, want in zip(
                *(derivatives(lambda: module(logits, targets), [logits], 2) for module in (mine, theirs)),  # noqa: B023
                strict=True,
            ):
                self.compare(got, want, torch.float64)
                compared += 1
        assert compared > 50


class TestOperators:
    """What torch asks of an operator: schema, autograd, fake tensors, ahead-of-time tracing with dynamic shapes."""

    OPTIONS = (None, None, None, -100, 0.1, 0.01, 3.0, 0.7, "mean", None, 1, None)

    def arguments(self):
        logits, targets = problem()
        leaf, g, v = logits.detach(), torch.tensor(2.0, dtype=torch.float64), torch.rand(6, 9, dtype=torch.float64)
        yield operators.cross_entropy, (logits, targets, False, True, *self.OPTIONS)
        yield operators.cross_entropy, (logits, targets, False, False, *self.OPTIONS)
        by_row = (*self.OPTIONS[:8], "none", *self.OPTIONS[9:])
        yield operators.cross_entropy, (leaf.float(), targets, False, True, *by_row)
        weights = torch.rand(9), torch.rand(6, dtype=torch.float64)
        sparse = torch.stack([targets, targets], dim=1), (torch.rand(6, 2), *weights, *self.OPTIONS[TENSORS:])
        weighted = targets, (None, *weights, *self.OPTIONS[TENSORS:])
        for given, options in (sparse, weighted):
            yield operators.cross_entropy, (logits, given, False, True, *options)
            yield operators.cross_entropy_gradient, (logits, g.requires_grad_(True), given, *options)
            yield operators.divisor, (leaf, given, *options)
        yield operators.divisor, (leaf, v, *self.OPTIONS)
        yield operators.cross_entropy_gradient, (logits, g.requires_grad_(True), targets, *self.OPTIONS)
        yield operators.cross_entropy_gradient_, (leaf.clone(), g.detach(), targets, *self.OPTIONS)
        yield operators.cross_entropy_hvp, (leaf, g.detach(), v, targets, *self.OPTIONS)
        yield operators.log_softmax, (logits, 1, None)
        yield binary.loss, (logits, v, None, None, 0.1, "mean", None)
        yield binary.loss, (logits, v.clone().requires_grad_(True), weights[0], weights[0], 0.1, "none", None)
        yield binary.gradient, (leaf, g.detach(), v, None, None, 0.1, "mean", None)

    def test_opcheck(self):
        for operator, arguments in self.arguments():
            torch.library.opcheck(operator, arguments)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("kind", ["index", "dense", "learned", "sparse"])
    def test_first_and_second_derivatives(self, kind, reduction):
        logits, targets = problem(4, 5)
        leaves = (logits,)
        if kind == "sparse":
            targets = torch.stack([targets, (targets + 1) % 5], dim=1), torch.rand(4, 2)
        if kind in ("dense", "learned"):
            targets = torch.rand(4, 5, dtype=torch.float64).requires_grad_(kind == "learned")
            leaves = (logits, targets) if kind == "learned" else leaves
        options = {
            "weight": torch.linspace(0, 2, 5, dtype=torch.float64),
            "label_smoothing": 0.1,
            "z_loss": 0.1,
            "softcap": 4.0,
            "temperature": 0.7,
            "sample_weight": torch.linspace(0.5, 1, 4, dtype=torch.float64),
            "reduction": reduction,
        }

        def loss(logits, given=targets):
            return ours.cross_entropy(logits, given, **options)

        assert torch.autograd.gradcheck(loss, leaves)
        assert torch.autograd.gradgradcheck(loss, leaves)

    def test_derivatives_of_the_others(self):
        logits, _ = problem(3, 4)
        targets = (0.8 * torch.rand(3, 4, dtype=torch.float64) + 0.1).requires_grad_(True)
        pos_weight = torch.linspace(0, 2, 4, dtype=torch.float64)
        for function, leaves in (
            (lambda x, y: ours.binary_cross_entropy_with_logits(x, y, pos_weight=pos_weight), (logits, targets)),
            (lambda x, y: ours.binary_cross_entropy_with_logits(x, y, reduction="none"), (logits, targets)),
            (lambda x: ours.log_softmax(x, 0), (logits,)),
        ):
            assert torch.autograd.gradcheck(function, leaves)
            assert torch.autograd.gradgradcheck(function, leaves)

    def test_the_short_way_round_the_dispatcher_is_the_same(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        logits, targets = problem()
        arguments = logits, targets, False, True
        found = operators.loss_of(*arguments, self.OPTIONS), operators.cross_entropy(*arguments, *self.OPTIONS)
        for got, want in zip(*found, strict=True):
            assert torch.equal(got, want)
            assert got.requires_grad == want.requires_grad
        mode = FakeTensorMode()
        fake = mode.from_tensor(logits.detach()), mode.from_tensor(targets)
        with mode:  # which must not compute
            assert type(ours.cross_entropy(*fake)).__name__ == "FakeTensor"

    def test_a_third_derivative_is_refused(self):
        logits, targets = problem()
        (first,) = torch.autograd.grad(ours.cross_entropy(logits, targets), logits, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), logits, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            torch.autograd.grad(second.sum(), logits)

    def test_tensors_without_memory_have_results_without(self):
        logits, targets = torch.empty(6, 9, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")
        for loss in (
            ours.cross_entropy(logits, targets),
            ours.binary_cross_entropy_with_logits(logits, logits),
            ours.linear_cross_entropy(logits, torch.empty(4, 9, device="meta"), targets),
        ):
            assert (loss.device.type, loss.shape, loss.dtype) == ("meta", (), torch.float32)
        assert ours.log_softmax(logits, 1).shape == (6, 9)

    def test_a_tangent_is_refused_where_it_would_be_lost(self):
        from torch.autograd import forward_ad

        (x, targets), weight = problem(), torch.rand(4, 9, dtype=torch.float64)
        x = x.detach()
        losses = (
            lambda x: ours.cross_entropy(x, targets),
            lambda x: ours.cross_entropy(torch.zeros(6, 9), x.exp()),
            lambda x: ours.binary_cross_entropy_with_logits(x, torch.sigmoid(x)),
            lambda x: ours.log_softmax(x, 1),
            lambda x: ours.linear_cross_entropy(x, weight, targets % 4),
            lambda x: ours.linear_cross_entropy(torch.zeros(6, 9), x, targets % 6),
        )
        for loss in losses:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own, of torch.jit
                with pytest.raises(NotImplementedError, match=r"carry a tangent: .* that of backward\(\) is"):
                    torch.func.jvp(loss, (x,), (x,))
            with forward_ad.dual_level():
                loss(x)
                with pytest.raises(NotImplementedError, match="must not carry a tangent"):
                    loss(forward_ad.make_dual(x, x))

    @pytest.mark.parametrize("name", ["cross_entropy", "log_softmax", "binary", "linear"])
    def test_a_trace_holds_the_operator_and_no_number(self, name):
        (x, targets), weight = problem(), torch.rand(4, 9, dtype=torch.float64)
        loss = {
            "cross_entropy": lambda x: ours.cross_entropy(2 * x, targets),
            "log_softmax": lambda x: ours.log_softmax(2 * x, 1),
            "binary": lambda x: ours.binary_cross_entropy_with_logits(2 * x, torch.sigmoid(x)),
            "linear": lambda x: ours.linear_cross_entropy(2 * x, weight, targets % 4),
        }[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            traced = torch.jit.trace(loss, x.detach())
        assert torch.equal(traced(1 - x.detach()), loss(1 - x.detach()))


class TestBackward:
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("name", ["cross_entropy", "binary", "linear"])
    def test_a_batch_of_upstream_gradients(self, name, reduction, monkeypatch):
        monkeypatch.setattr(operators, "_was_scaled", False)
        (logits, targets), weight = problem(), torch.rand(7, 9, dtype=torch.float64)
        loss = {
            "cross_entropy": lambda x: ours.cross_entropy(x, targets, reduction=reduction),
            "binary": lambda x: ours.binary_cross_entropy_with_logits(
                x, torch.sigmoid(weight[:6]), reduction=reduction
            ),
            "linear": lambda x: ours.linear_cross_entropy(x, weight, targets % 7, reduction=reduction),
        }[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, that it is slow
            got = torch.autograd.functional.jacobian(loss, logits, vectorize=True)
        torch.testing.assert_close(got, torch.autograd.functional.jacobian(loss, logits), rtol=4e-15, atol=1e-16)

    def test_what_is_freed_is_torchs_error(self):
        logits, targets = problem()
        loss = ours.cross_entropy(logits, targets)
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()

    @pytest.mark.parametrize("name", ["cross_entropy", "binary"])
    def test_a_scaled_loss_computes_its_gradient_once_and_in_one_array(self, name, monkeypatch):
        """After the first step, which could not know."""
        monkeypatch.setattr(operators, "_was_scaled", False)
        (logits, targets), made, original = problem(), [], arrays.new_gradient
        for module in (operators, binary):
            monkeypatch.setattr(module, "new_gradient", lambda like: made.append(original(like)) or made[-1])
        loss_of = {
            "cross_entropy": lambda: ours.cross_entropy(logits, targets),
            "binary": lambda: ours.binary_cross_entropy_with_logits(logits, torch.full((6, 9), 0.25)),
        }[name]
        (once,), known = torch.autograd.grad(loss_of(), logits), []
        for scale in (0.5, 0.5, 1.0, 1.0):
            guess = operators._was_scaled
            made.clear()
            loss = loss_of()
            assert len(made) == (not guess)
            known.append(loss.item())
            (gradient,) = torch.autograd.grad(loss * scale, logits)
            assert [one.data_ptr() for one in made] == [gradient.data_ptr()]
            torch.testing.assert_close(gradient, scale * once, rtol=4e-15, atol=0)
            assert operators._was_scaled == (scale != 1.0)
        assert len(set(known)) == 1

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("scale", [1.0, 0.5])
    def test_checkpoints(self, scale, reentrant):
        from torch.utils.checkpoint import checkpoint

        logits, targets = problem()
        (want,) = torch.autograd.grad(scale * ours.cross_entropy(2 * logits, targets), logits)
        loss = checkpoint(lambda x: ours.cross_entropy(2 * x, targets), logits, use_reentrant=reentrant)
        (scale * loss).backward()
        torch.testing.assert_close(logits.grad, want, rtol=4e-15, atol=0)

    def test_checkpoints_of_other_losses(self):
        """Which unpack what was saved, once."""
        from torch.utils.checkpoint import checkpoint

        def of_hidden(hidden, share):
            return ours.linear_cross_entropy(2 * hidden, weight, targets)

        def binary(x, share):
            return ours.binary_cross_entropy_with_logits(x, torch.sigmoid(share))

        (logits, targets), share = problem(), torch.rand(6, 9, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(9, 9, dtype=torch.float64, requires_grad=True)
        for loss in (of_hidden, binary):
            want = torch.autograd.grad(loss(logits, share), (logits, share, weight), allow_unused=True)
            got = torch.autograd.grad(
                checkpoint(loss, logits, share, use_reentrant=False), (logits, share, weight), allow_unused=True
            )
            for found, gradient in zip(got, want, strict=True):
                assert (found is None) == (gradient is None)
                assert found is None or torch.equal(found, gradient)

    def test_who_looks_at_what_is_saved_sees_no_gradient(self, monkeypatch):
        """And what is unpacked is computed from."""
        monkeypatch.setattr(operators, "_was_scaled", False)
        (logits, targets), saved = problem(), []
        (want,) = torch.autograd.grad(ours.cross_entropy(logits, targets), logits)
        with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one.clone(), lambda one: one):
            loss = ours.cross_entropy(logits, targets)
        assert loss.grad_fn.dlogits is None
        (got,) = torch.autograd.grad(loss, logits)
        assert sorted(one.dtype.is_floating_point for one in saved) == [False, True]
        assert torch.equal(got, want)

    def test_a_half_mean_has_the_derivative_of_its_scale(self):
        """Which is made of entries that a half would round to 0."""
        logits, targets = problem(dtype=torch.float16)
        scale, v = torch.tensor(2.0**26, requires_grad=True), torch.rand(6, 9, dtype=torch.float16)
        loss = ours.cross_entropy(logits, targets, denominator=2.0**26) * scale
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        (got,) = torch.autograd.grad(gradient, scale, v)
        wide = logits.detach().double().requires_grad_(True)
        (each,) = torch.autograd.grad(ours.cross_entropy(wide, targets, denominator=2.0**26), wide)
        assert got.item() == pytest.approx((each * v).sum().item(), rel=1e-5)

    def test_the_same_graph_twice_and_scaled(self):
        logits, targets = problem()
        loss = ours.cross_entropy(logits, targets)
        (once,) = torch.autograd.grad(loss, logits, retain_graph=True)
        kept = once.clone()
        (twice,) = torch.autograd.grad(3 * loss, logits, retain_graph=True)
        torch.testing.assert_close(twice, 3 * kept, rtol=4e-15, atol=0)
        loss.backward(retain_graph=True)
        loss.backward()
        torch.testing.assert_close(logits.grad, 2 * kept, rtol=4e-15, atol=0)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_in_place(self, dtype, reduction):
        leaf, targets = problem(dtype=dtype)
        (want,) = torch.autograd.grad(ours.cross_entropy(leaf, targets, reduction=reduction).sum() * 0.5, leaf)
        logits, seen = leaf * 1, []
        logits.register_hook(seen.append)
        loss = ours.cross_entropy(logits, targets, reduction=reduction, inplace_backward=True)
        before = logits.detach().clone()
        torch.testing.assert_close(logits.detach(), leaf.detach(), rtol=0, atol=0)
        (loss.sum() * 0.5).backward(retain_graph=True)
        assert torch.equal(leaf.grad, want)
        assert seen[0].data_ptr() == logits.data_ptr()
        assert not torch.equal(before, logits)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()

    def test_in_place_is_refused_where_it_would_be_wrong(self):
        leaf, targets = problem()
        with pytest.raises(ValueError, match="inplace_backward needs logits that were computed"):
            ours.cross_entropy(leaf, targets, inplace_backward=True)
        logits = torch.exp(leaf)  # whose own backward reads its result
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            ours.cross_entropy(logits, targets, inplace_backward=True).backward()

    @pytest.mark.parametrize(
        "view", [lambda p: p, lambda p: p.view(2, 3), lambda p: p[:], lambda p: p.T.T, lambda p: p.reshape(2, 3)]
    )
    def test_in_place_never_overwrites_a_parameter(self, view):
        parameter, targets = problem(2, 3)
        for leaf in (parameter, torch.nn.Parameter(parameter.detach())):
            with pytest.raises(ValueError, match="a leaf, or a view of one, would be its own gradient"):
                ours.cross_entropy(view(leaf), targets, inplace_backward=True)
        with torch.no_grad():  # where nothing will be written
            ours.cross_entropy(view(parameter), targets, inplace_backward=True)

    def test_in_place_is_refused_where_logits_share_memory(self):
        leaf, _ = problem(1, 9)
        for logits in ((2 * leaf).expand(6, 9), (2 * leaf)[0].unfold(0, 4, 1)):
            with pytest.raises(ValueError, match="logits of inplace_backward must not"):
                ours.cross_entropy(logits, torch.zeros(6, dtype=torch.int64), inplace_backward=True)

    def test_in_place_is_refused_where_targets_would_be_written_over(self):
        logits = problem(7, 9)[0] * 1
        ids = torch.zeros(6, 2, dtype=torch.int64)
        for targets in (logits.detach()[:-1], (ids, logits.detach()[:-1, :2])):
            with pytest.raises(ValueError, match="logits of inplace_backward must not overlap targets"):
                ours.cross_entropy(logits[1:], targets, inplace_backward=True)

    def test_weights_that_are_no_tensors_are_one_clear_error(self):
        with pytest.raises(TypeError, match="weight must be a tensor, not ndarray"):
            ours.cross_entropy(*problem(), weight=np.ones(9))

    @pytest.mark.parametrize("name", ["cross_entropy", "binary", "linear"])
    def test_every_gradient_has_memory_of_its_own(self, name):
        """Whoever writes to the first one spoils neither the second nor the next backward pass."""
        torch.manual_seed(0)
        logits, targets = problem()
        weight = torch.rand(9, 9, dtype=torch.float64)
        losses = {
            "cross_entropy": lambda: ours.cross_entropy(logits, targets),
            "binary": lambda: ours.binary_cross_entropy_with_logits(logits, torch.rand(6, 9)),
            "linear": lambda: ours.linear_cross_entropy(logits, weight, targets),
        }
        loss = losses[name]()
        (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
        want = first.clone()
        first.mul_(2)
        (second,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert second.data_ptr() != first.data_ptr()
        second.mul_(2)
        (third,) = torch.autograd.grad(3 * loss, logits)
        np.testing.assert_allclose(third.numpy(), 3 * want.numpy(), rtol=0, atol=32 * np.finfo(np.float64).eps)
        np.testing.assert_array_equal(second.numpy(), first.numpy())

    def test_in_place_leaves_the_logits_to_a_second_derivative(self):
        (leaf, targets), found = problem(), []
        for inplace in (False, True):
            logits = 2 * leaf
            loss = ours.cross_entropy(logits, targets, inplace_backward=inplace)
            (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), leaf)
            found.append(second)
        assert torch.equal(*found)


class TestLearnedProbabilities:
    """Targets that require grad are held to what the others are."""

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"reduction": "avg"}, ValueError, "reduction must be one of"),
            ({"reduction": "sum", "denominator": 3.0}, ValueError, "denominator goes with"),
            ({"label_smoothing": 3.0}, ValueError, "label_smoothing must lie in"),
            ({"temperature": -1.0}, ValueError, "temperature must be"),
            ({"backend": "none"}, fastxent.backends.BackendUnavailableError, "there is no backend"),
            ({"weight": torch.ones(1)}, ValueError, r"weight must have shape \(9,\)"),
            ({"sample_weight": -torch.ones(6)}, ValueError, "sample_weight must"),
            ({"inplace_backward": True}, ValueError, "inplace_backward needs targets that do not require grad"),
        ],
    )
    def test_checks(self, options, error, message):
        logits, _ = problem()
        with pytest.raises(error, match=message):
            ours.cross_entropy(2 * logits, torch.rand(6, 9, requires_grad=True), **options)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_as_the_others(self, dtype, reduction):
        """Loss, lse, dtypes and gradient of the logits, with a row that is not read."""
        torch.manual_seed(0)
        sample_weight = torch.tensor([0.0, 1, 2, 3, 4, 5], dtype=torch.float64)
        for options in options_of():
            if "denominator" in options and reduction != "mean":
                continue
            options = options | {"sample_weight": sample_weight, "reduction": reduction, "ignore_index": -1}
            if "weight" in options:
                options["weight"] = options["weight"].double()
            logits = problem(dtype=dtype)[0].detach()
            logits[0] = torch.nan
            logits.requires_grad_()
            targets = torch.rand(6, 9, dtype=torch.float64)
            found = []
            for given in (targets, targets.clone().requires_grad_()):
                loss, lse = ours.cross_entropy(logits, given, return_lse=True, **options)
                (gradient,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
                found.append((loss.detach(), lse, gradient))
            for got, want in zip(found[1], found[0], strict=True):
                budget = 64 * torch.finfo(dtype).eps * want.nan_to_num().abs().max().item()
                torch.testing.assert_close(got, want, equal_nan=True, rtol=0, atol=budget)
            (dtargets,) = torch.autograd.grad(loss.sum(), given)
            assert not dtargets[0].any()
            assert dtargets.isfinite().all()

    def test_smoothing_of_one_leaves_them_nothing(self):
        logits, targets = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.5, 0.5]], requires_grad=True)
        loss = ours.cross_entropy(logits, targets, label_smoothing=1.0)
        assert loss == torch.inf
        assert torch.autograd.grad(loss, targets)[0].tolist() == [[0.0, 0.0]]


# what a graph may hold: other targets, other results
GRAPHS = {
    "sparse": lambda x, t, y: ours.cross_entropy(2 * x, (torch.stack([t, (t + 1) % 9], 1), y[:, :2])),
    "dense": lambda x, t, y: ours.cross_entropy(2 * x, y, label_smoothing=0.1),
    "learned": lambda x, t, y: ours.cross_entropy(2 * x, torch.softmax(x, 1), z_loss=0.1),
    "by row": lambda x, t, y: ours.cross_entropy(2 * x, t, reduction="none", sample_weight=y[:, 0]).cos().sum(),
    "lse": lambda x, t, y: torch.stack([one.sum() for one in ours.cross_entropy(2 * x, t, return_lse=True)]).sum(),
    "linear": lambda x, t, y: ours.linear_cross_entropy(x, y, t % 6, return_lse=True)[0],
}


class TestCompiled:
    @staticmethod
    def step(x, targets, weight, **options):
        logits = 2 * x
        loss = ours.cross_entropy(logits, targets, weight, inplace_backward=True, **options)
        loss = loss + ours.binary_cross_entropy_with_logits(logits, torch.sigmoid(x.detach()))
        return loss - ours.log_softmax(x, 0)[0].mean()

    @pytest.mark.parametrize("dynamic", [False, True])
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_one_graph(self, backend, dynamic):
        if backend == "inductor" and not shutil.which("c++"):
            pytest.skip("needs a C++ compiler")
        if backend == "inductor" and dynamic:
            pytest.skip("shapes are traced the same for both")
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of its compiler
            compiled = torch.compile(self.step, fullgraph=True, backend=backend, dynamic=dynamic)
            for rows in (6, 8) if dynamic else (6,):
                x, targets = problem(rows)
                weight, options = torch.rand(9), {"label_smoothing": 0.1, "z_loss": 0.01}
                got, want = (
                    torch.autograd.grad(function(x, targets, weight, **options), x)[0]
                    for function in (compiled, self.step)
                )
                torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-15)

    @pytest.mark.parametrize("kind", GRAPHS)
    def test_one_graph_of_any_shape(self, kind):
        """Traced once, run with other numbers of rows, to the bits of what runs without a compiler."""
        torch._dynamo.reset()
        loss = GRAPHS[kind]
        with warnings.catch_warnings(), torch._dynamo.config.patch(error_on_recompile=True):
            warnings.simplefilter("ignore")  # torch's own, of its compiler
            compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
            for rows in (6, 8):
                x, targets = problem(rows)
                y = torch.rand(rows, 9, dtype=torch.float64)
                found = [(one := function(x, targets, y), torch.autograd.grad(one, x)) for function in (compiled, loss)]
                for (got, (gradient,)), (want, (exactly,)) in itertools.pairwise(found):
                    assert torch.equal(got, want)
                    torch.testing.assert_close(gradient, exactly, rtol=4e-15, atol=1e-15)

    def test_export(self):
        class Model(torch.nn.Module):
            def forward(self, x, targets):
                return ours.cross_entropy(2 * x, targets, label_smoothing=0.1)

        x, targets = problem()
        x = x.detach()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(Model(), (x, targets))
        assert any("fastxent.cross_entropy" in str(node.target) for node in exported.graph.nodes)
        assert torch.equal(exported.module()(x, targets), Model()(x, targets))


class TestTraining:
    def test_autocast(self):
        """Half logits go in as they are; loss dtype and gradients are those of torch under autocast."""
        torch.manual_seed(0)
        layer, x, targets = torch.nn.Linear(8, 9), torch.randn(6, 8), torch.arange(6)
        found = []
        for loss_of in (ours.cross_entropy, functional.cross_entropy):
            layer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                logits = layer(x)
                loss = loss_of(logits, targets)
            loss.backward()
            found.append((loss, layer.weight.grad.clone()))
        assert logits.dtype == torch.bfloat16
        assert found[0][0].dtype == found[1][0].dtype == torch.float32
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=2**-7, atol=2**-9)

    def test_loader_workers_that_are_forked_live(self):
        code = """
import torch, fastxent.torch
logits, targets = torch.randn(256, 4000), torch.arange(256)
want = fastxent.torch.cross_entropy(logits, targets).item()  # the parent's threads are up before it forks
class Data(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return fastxent.torch.cross_entropy(logits, targets).item()
loader = torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context="fork")
for batch in loader:
    assert batch.item() == want and fastxent.torch.cross_entropy(logits, targets).item() == want
print("alive")
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


class TestErrors:
    def test_before_anything_is_written(self):
        logits, targets = problem()
        with pytest.raises(IndexError, match=r"targets must lie in \[0, 8\] or be -100; 1 of 6 do not, .* value 9"):
            ours.cross_entropy(logits, targets.index_fill(0, torch.tensor(2), 9))
        for arguments, options, error, message in (
            ((logits, targets[:3]), {}, ValueError, "targets must have the shape of logits without axis 1"),
            ((logits, targets), {"reduction": "avg"}, ValueError, "reduction must be one of"),
            ((logits, targets), {"label_smoothing": 2.0}, ValueError, "label_smoothing must lie in"),
            ((logits, targets), {"weight": torch.ones(3)}, ValueError, r"weight must have shape \(9,\)"),
            ((logits, torch.rand(6, 9)), {"ignore_index": 1}, ValueError, "ignore_index must be negative"),
            ((logits, torch.rand(6, 9).requires_grad_()), {"ignore_index": 1}, ValueError, "ignore_index must be"),
            ((logits, torch.rand(6, 8).requires_grad_()), {}, ValueError, "targets must have the logits' shape"),
            ((logits, targets), {"weight": torch.ones(9, requires_grad=True)}, NotImplementedError, "must not require"),
            ((logits.long(), targets), {}, TypeError, "logits must have one of the dtypes"),
        ):
            with pytest.raises(error, match=message):
                ours.cross_entropy(*arguments, **options)
        with pytest.raises(TypeError, match="unknown option 'softcaps'; the options are z_loss"):
            ours.CrossEntropyLoss(softcaps=3.0)

    def test_what_takes_no_gradient(self):
        logits, targets = problem()
        sparse = targets[:, None], torch.ones(6, 1, requires_grad=True)
        with pytest.raises(NotImplementedError, match="probabilities must not require grad"):
            ours.cross_entropy(logits, sparse)
        with pytest.raises(TypeError, match="return_lse goes with cross_entropy, not with class_parallel"):
            ours.class_parallel_cross_entropy(logits, targets, return_lse=True)

    def test_what_is_no_tensor(self):
        logits, targets = problem()
        array = logits.detach().numpy()
        for call in (
            lambda: ours.cross_entropy(array, targets),
            lambda: ours.binary_cross_entropy_with_logits(array, logits),
            lambda: ours.log_softmax(array, 1),
            lambda: ours.linear_cross_entropy(array, logits, targets),
            lambda: ours.class_parallel_cross_entropy(array, targets),
            lambda: ours.score(array, targets),
        ):
            with pytest.raises(TypeError, match="must be a tensor, not ndarray; fastxent itself takes arrays"):
                call()
        with pytest.raises(TypeError, match="target must be a tensor, not list"):
            ours.cross_entropy(logits, [0] * 6)
        for sparse in ((targets,), (targets, array)):
            with pytest.raises(TypeError, match=r"target must be a tensor, or a tuple of two, \(ids, probabilities\)"):
                ours.cross_entropy(logits, sparse)

    def test_torchs_legacy_arguments(self):
        logits, targets = problem()
        with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
            loss = ours.cross_entropy(logits, targets, None, False)
        assert loss == ours.cross_entropy(logits, targets, reduction="sum")


def test_language_model_logits_are_read_where_they_lie():
    logits = torch.randn(2, 5, 9, requires_grad=True)
    targets = torch.randint(0, 9, (2, 5))
    along = ours.cross_entropy(logits, targets, axis=-1)
    moved = ours.cross_entropy(logits.transpose(1, 2), targets)
    assert along == moved
    (gradient,) = torch.autograd.grad(moved, logits)
    assert gradient.stride() == logits.stride()


def test_module_carries_options():
    logits, targets = problem()
    weight = torch.rand(9)
    module = ours.CrossEntropyLoss(weight, ignore_index=2, label_smoothing=0.1, softcap=5.0, z_loss=0.1)
    got = module(logits, targets, sample_weight=torch.ones(6), denominator=4.0)
    options = {"ignore_index": 2, "label_smoothing": 0.1, "softcap": 5.0, "z_loss": 0.1, "denominator": 4.0}
    assert got == ours.cross_entropy(logits, targets, weight, **options)


def test_signatures_are_torchs():
    import inspect

    for mine, theirs in (
        (ours.cross_entropy, functional.cross_entropy),
        (ours.binary_cross_entropy_with_logits, functional.binary_cross_entropy_with_logits),
        (ours.CrossEntropyLoss, torch.nn.CrossEntropyLoss),
        (ours.log_softmax, functional.log_softmax),
        (ours.linear_cross_entropy, functional.linear_cross_entropy),
    ):
        wanted = {name: p.default for name, p in inspect.signature(theirs).parameters.items()}
        got = {name: p.default for name, p in inspect.signature(mine).parameters.items()}
        if mine is ours.linear_cross_entropy:
            del wanted["options"]  # of its own chunks
            assert (wanted.pop("ignore_index"), got.pop("ignore_index")) == (None, -100)  # where it stands for -100
        assert list(got.items())[: len(wanted)] == list(wanted.items())


def test_log_softmax_without_an_axis_is_torchs():
    for shape in ((), (3,), (2, 3), (2, 3, 4)):
        logits, found = torch.randn(shape, dtype=torch.float64), []
        for function in (ours.log_softmax, functional.log_softmax):
            with pytest.warns(UserWarning, match="Implicit dimension choice for log_softmax") as told:
                found.append(function(logits))
            assert {one.filename for one in told} == {__file__}
        torch.testing.assert_close(*found)


def test_options_are_those_of_the_loss():
    import inspect

    public = set(inspect.signature(fastxent.cross_entropy).parameters) - {"check"}
    assert set(operators.OPTIONS) - {"probabilities"} == public - {"logits", "targets", "return_lse"}
    for function, without in ((ours.cross_entropy, set()), (ours.linear_cross_entropy, {"axis"})):
        assert public - {"logits", "targets"} - without <= set(inspect.signature(function).parameters)


def test_the_reference_lists_every_function():
    for line in reference.lines(ours):
        assert line in reference.PAGE


class TestLinear:
    SHAPES = ((6, 5), (9, 5), (9,))

    def layer(self, dtype=torch.float64):
        generator = torch.Generator().manual_seed(1)
        return [
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(True)
            for shape in self.SHAPES
        ]

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_numbers_of_the_function_on_arrays(self, dtype, reduction):
        (hidden, weight, bias), targets = self.layer(dtype), torch.arange(6)
        options = {"reduction": reduction, "label_smoothing": 0.1}
        for upstream in (1.0, 2.0):
            loss, lse = ours.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, return_lse=True, **options)
            gradients = torch.autograd.grad(loss.sum() * upstream, (hidden, weight, bias))
            arguments = arrays.as_array(hidden), arrays.as_array(weight), targets.numpy()
            options_ = options | {"linear_bias": arrays.as_array(bias), "grad_output": upstream, "return_lse": True}
            if reduction == "none":
                options_["grad_output"] = np.full(6, upstream)
            want = fastxent.linear_cross_entropy_with_grad(*arguments, **options_)
            for got, exactly in zip((loss, lse, *gradients), want, strict=True):
                np.testing.assert_allclose(
                    arrays.as_array(got).astype(float), np.asarray(exactly, float), rtol=1e-6, atol=1e-9
                )
                assert arrays.as_array(got).dtype == np.asarray(exactly).dtype

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_torchs(self, reduction):
        (hidden, weight, bias), targets = self.layer(), torch.tensor([0, 1, -100, 8, 4, 4])
        found = []
        for function in (ours.linear_cross_entropy, functional.linear_cross_entropy):
            loss = function(hidden, weight, targets, linear_bias=bias, reduction=reduction, label_smoothing=0.1)
            found.append((loss, *torch.autograd.grad(3 * loss.sum(), (hidden, weight, bias))))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)

    def test_what_torch_asks_of_an_operator(self):
        (hidden, weight, bias), targets = self.layer(), torch.arange(6)
        options = (None, None, None, -100, 0.1, 0.0, None, 1.0, "mean", None, -1, None)
        for kept in ([True] * 3, [False] * 3, [True, False, True]):
            torch.library.opcheck(linear._forward, (hidden, weight, bias, targets, None, *kept, True, *options))
        for dtype in (torch.float64, torch.bfloat16):  # without a bias
            leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight)]
            upstream, asked = torch.tensor(1.0, dtype=arrays.loss_dtype(dtype)), [True, True, False]
            torch.library.opcheck(linear._forward, (*leaves, None, targets, None, *asked, False, *options))
            leaves = [tensor.detach() for tensor in leaves]
            torch.library.opcheck(linear._gradients, (*leaves, None, targets, None, *asked, upstream, *options))
        for reduction in ("mean", "none"):
            assert torch.autograd.gradcheck(
                lambda *layer: ours.linear_cross_entropy(
                    layer[0],
                    layer[1],
                    targets,
                    linear_bias=layer[2],
                    reduction=reduction,  # noqa: B023
                ),
                (hidden, weight, bias),
            )

    def test_one_graph(self):
        torch._dynamo.reset()
        (hidden, weight, _), targets = self.layer(), torch.arange(6)
        compiled = torch.compile(ours.linear_cross_entropy, fullgraph=True, backend="aot_eager")
        got, want = (
            torch.autograd.grad(function(hidden, weight, targets), weight)[0]
            for function in (compiled, ours.linear_cross_entropy)
        )
        assert torch.equal(got, want)

    @pytest.mark.parametrize("reduction", ["mean", "none"])  # with the loss, and in the backward pass
    @pytest.mark.parametrize("frozen", [(1,), (0,), (0, 1), (1, 2)])
    def test_only_the_gradients_asked_for_are_computed(self, frozen, reduction, monkeypatch):
        layer, targets, asked = self.layer(), torch.arange(6), []
        original = fastxent.linear_cross_entropy_with_grad
        monkeypatch.setattr(
            fastxent,
            "linear_cross_entropy_with_grad",
            lambda *given, wanted, **options: asked.append(wanted) or original(*given, wanted=wanted, **options),
        )
        found = []
        for some in (True, False):
            leaves = [tensor.detach().requires_grad_(some or i not in frozen) for i, tensor in enumerate(layer)]
            hidden, weight, bias = leaves
            loss = ours.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, reduction=reduction)
            (0.5 * loss.sum()).backward()
            found.append([leaf.grad for leaf in leaves])
        assert asked == [(True,) * 3, tuple(i not in frozen for i in range(3))]
        for i, (want, got) in enumerate(zip(*found, strict=True)):
            assert (got is None) if i in frozen else torch.equal(got, want)

    def test_a_scaled_loss_scales_what_is_there(self):
        (hidden, weight, bias), targets = self.layer(), torch.arange(6)
        ours_ = (
            ours.linear_cross_entropy(hidden, weight, targets, linear_bias=bias) * scale for scale in (1.0, 0.5, 0.5)
        )
        whole, half, again = (torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True) for loss in ours_)
        for one, other, third in zip(whole, half, again, strict=True):
            assert torch.equal(other, 0.5 * one)
            assert torch.equal(third, other)

    def test_a_second_derivative_is_refused(self):
        (hidden, weight, _), targets = self.layer(), torch.arange(6)
        with pytest.raises(NotImplementedError, match="no second derivative: take cross_entropy of"):
            torch.autograd.grad(ours.linear_cross_entropy(hidden, weight, targets), weight, create_graph=True)


MEMBER = """
import sys, torch, torch.distributed as distributed, fastxent.torch as ours
rank, size, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
distributed.init_process_group("gloo", store=distributed.FileStore(store, size), rank=rank, world_size=size)
whole, targets = torch.load(out + "/problem.pt")
bounds = [0, 2, 5000, 7000, 9001] if size == 4 else [0, 4096, 9001]
mine = whole[..., bounds[rank] : bounds[rank + 1]].clone().requires_grad_(True)
results = []
for options in (
    {},
    {"reduction": "none", "z_loss": 0.01, "softcap": 30.0},
    {"label_smoothing": 0.1, "weight": torch.linspace(0, 2, 9001), "temperature": 0.7},
):
    loss = ours.class_parallel_cross_entropy(mine, targets, **options)
    (gradient,) = torch.autograd.grad(loss.sum() * 2, mine)
    results.append((loss.detach(), gradient))
mine = mine.detach()
for logits, given, options in (
    (mine, targets + 9000, {}),
    (mine, targets if rank else targets.float(), {}),  # the first process alone is wrong
    (mine, targets, {"temperature": float(rank)}),
    (mine[: 2 if rank else 1], targets[: 2 if rank else 1], {}),
):
    try:
        ours.class_parallel_cross_entropy(logits, given, **options)
        results.append(None)
    except Exception as error:
        results.append(f"{type(error).__name__}: {error}")
results.append(ours.class_parallel_cross_entropy(mine, targets))  # nobody is left waiting
torch.save(results, f"{out}/{rank}.pt")
distributed.destroy_process_group()
"""


@pytest.mark.parametrize("size", [2, 4])
def test_classes_spread_over_processes(size, tmp_path):
    """Processes of unequal shares: one loss to the last bit, and the gradient of the whole row."""
    torch.manual_seed(0)
    whole, targets = 4 * torch.randn(2, 6, 9001), torch.randint(0, 9001, (2, 6))
    whole[0, 0, 7], targets[0, 0], targets[1, 1] = 60.0, 7, -100
    torch.save((whole, targets), tmp_path / "problem.pt")
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "NUMBA_NUM_THREADS": "1"}
    members = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(rank), str(size), str(tmp_path / "store"), str(tmp_path)],
            env=environment,
        )
        for rank in range(size)
    ]
    assert [member.wait(timeout=180) for member in members] == [0] * size
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    for number, options in enumerate(
        (
            {},
            {"reduction": "none", "z_loss": 0.01, "softcap": 30.0},
            {"label_smoothing": 0.1, "weight": torch.linspace(0, 2, 9001), "temperature": 0.7},
        )
    ):
        losses, gradients = zip(*(member[number] for member in found), strict=True)
        assert all(torch.equal(losses[0], other) for other in losses[1:])
        leaf = whole.double().requires_grad_(True)
        loss = ours.cross_entropy(leaf, targets, axis=-1, **options)
        (want,) = torch.autograd.grad(loss.sum() * 2, leaf)
        bend = 30.0 * 2**-22 if "softcap" in options else 0.0
        torch.testing.assert_close(losses[0], loss.detach(), rtol=5e-7 + 2 * bend, atol=bend)
        got, scale = torch.cat(gradients, dim=-1).double(), want.abs().amax(-1, keepdim=True)
        assert ((got - want).abs() <= (1e-6 + 4 * bend) * scale).all()
        if number == 0:  # the confident row keeps its digits
            assert got[0, 0, 7] == pytest.approx(want[0, 0, 7].item(), rel=1e-6)
    first, others = found[0][3:], [member[3:] for member in found[1:]]
    assert all("IndexError: targets must lie in [0, 9000]" in member[0] for member in (first, *others))
    told = "RuntimeError: another process of the group raised an error, which says why: rank 0"
    assert first[1].startswith("TypeError: targets of shards must be class indices")
    assert first[2].startswith("ValueError: temperature must be positive")
    assert all(member[1:3] == [told, told] for member in others)
    uneven = "ValueError: every process must have the same rows; they have 6, 12"
    assert all(member[3].startswith(uneven) for member in (first, *others))
    assert all(member[4] == found[0][0][0] for member in (first, *others))


def test_the_benchmark_of_the_smallest_call_runs(monkeypatch):
    import importlib
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    benchmark = importlib.import_module("benchmarks.bridges").TorchCall()
    benchmark.setup()
    benchmark.time_loss_and_gradient_through_torch()
    benchmark.time_loss_and_gradient_on_arrays()
    monkeypatch.setattr(ours, "cross_entropy", lambda logits, targets: logits.sum())
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        benchmark.setup()
