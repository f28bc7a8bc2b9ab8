"""Dask arrays in any chunks give what whole arrays give; graphs hold paths; threads fit the workers."""

import pickle

import numpy as np
import pytest

import fastxent
from fastxent.bench.cases import KINDS, Case
from tests import exact

dask = pytest.importorskip("dask", reason="needs dask")
da = pytest.importorskip("dask.array", reason="needs dask")
from fastxent import dask as fd  # noqa: E402

CHUNKS = [(7, 300), (3, 100), ((1, 4, 2), (1, 255, 40, 4)), (2, 17)]
OPTIONS = [
    {},
    {"reduction": "sum", "z_loss": 1e-3, "temperature": 0.7},
    {"reduction": "none", "label_smoothing": 0.1},
    {"weight": np.linspace(0, 2, 300), "sample_weight": np.linspace(0, 1, 7), "label_smoothing": 0.2, "softcap": 5.0},
    {"denominator": 3.5},
]


def problem(kind="typical", dtype="float32", ignored=0.3):
    logits, targets, _ = Case(7, 300, kind, dtype, ignored).build()
    return logits, targets


def close(got, want, dtype, factor=4.0):
    rtol = factor * exact.LOSS[exact.computed(dtype)]
    scale = np.abs(want[np.isfinite(want)]).max(initial=0.0) if np.ndim(want) > 1 else 0.0
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * scale * 1e-3)


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "plain")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_loss_and_gradient(chunks, options, dtype):
    logits, targets = problem(dtype=dtype)
    want, want_lse, dwant = fastxent.cross_entropy_with_grad(logits, targets, return_lse=True, **options)
    lazy = da.from_array(logits, chunks=chunks)
    for split_every in (2, 16):
        loss, lse, dlogits = dask.compute(
            *fd.cross_entropy_with_grad(lazy, targets, split_every=split_every, return_lse=True, **options),
            scheduler="threads",
        )
        assert loss.dtype == want.dtype
        assert dlogits.dtype == dwant.dtype
        np.testing.assert_allclose(loss, want, rtol=1e-6 if dtype == "float32" else 1e-14)
        np.testing.assert_allclose(lse, want_lse, rtol=1e-6 if dtype == "float32" else 1e-14)
        close(dlogits, dwant, dtype)
    assert fd.cross_entropy_with_grad(lazy, targets, **options)[1].chunks == lazy.chunks
    np.testing.assert_allclose(fd.cross_entropy(lazy, da.from_array(targets, 3), **options).compute(), loss, rtol=1e-12)


def test_any_split_gives_the_same_loss():
    logits, targets = problem("wide", "float64")
    lazy = da.from_array(logits, chunks=(2, 5))
    losses = [fd.cross_entropy(lazy, targets, reduction="none", split_every=n).compute() for n in (2, 3, 16, None)]
    for loss in losses[1:]:
        np.testing.assert_allclose(loss, losses[0], rtol=2e-15)


@pytest.mark.parametrize("kind", [*KINDS, "infinities"])
@pytest.mark.parametrize("chunks", CHUNKS[:3], ids=str)
def test_log_softmax_and_logsumexp(kind, chunks):
    logits, _ = problem("typical" if kind == "infinities" else kind)
    if kind == "infinities":
        logits[0], logits[1, 290], logits[2, :200], logits[3, 5], logits[3, 6] = (
            -np.inf,
            np.inf,
            -np.inf,
            np.inf,
            np.nan,
        )
        logits[4, [2, 250]] = np.inf
    lazy = da.from_array(logits, chunks=chunks)
    close(fd.log_softmax(lazy, scale=0.5).compute(), fastxent.log_softmax(logits, scale=0.5), "float32", 2)
    np.testing.assert_allclose(fd.logsumexp(lazy).compute(), fastxent.logsumexp(logits), rtol=1e-6)


def test_axes():
    logits = np.random.default_rng(0).standard_normal((4, 30, 5))
    targets = np.random.default_rng(1).integers(0, 30, (4, 5))
    lazy = da.from_array(logits, chunks=(2, 7, 3))
    want, dwant = fastxent.cross_entropy_with_grad(logits, targets, axis=1)
    loss, dlogits = dask.compute(*fd.cross_entropy_with_grad(lazy, targets, axis=1))
    np.testing.assert_allclose(loss, want, rtol=1e-14)
    np.testing.assert_allclose(dlogits, dwant, rtol=1e-12)
    np.testing.assert_allclose(fd.log_softmax(lazy, axis=1).compute(), fastxent.log_softmax(logits, axis=1), rtol=1e-13)
    lse = fd.logsumexp(lazy, axis=1, keepdims=True)
    assert lse.shape == (4, 1, 5)
    np.testing.assert_allclose(lse.compute(), fastxent.logsumexp(logits, axis=1, keepdims=True), rtol=1e-13)


def test_confident_rows_keep_their_digits():
    lazy = da.from_array(np.float32([[60, 0, 0]]), chunks=1)
    want, dwant = fastxent.cross_entropy_with_grad(np.float32([[60, 0, 0]]), [0])
    loss, dlogits = dask.compute(*fd.cross_entropy_with_grad(lazy, [0]))
    assert loss == want > 0
    np.testing.assert_allclose(dlogits, dwant, rtol=1e-6)


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("options", [{}, {"top_k": 4, "temperature": 0.7, "softcap": 9.0}], ids=str)
def test_score(chunks, options):
    logits, targets = problem("ties")
    records = fd.score(da.from_array(logits, chunks=chunks), targets, **options).compute()
    whole = fastxent.score(logits, targets, **options)
    if len(np.atleast_1d(chunks[1])) == 1 and chunks[1] == 300:
        assert fastxent.Scores.from_records(records) == whole
    assert records.dtype == whole.to_records().dtype
    for name, want in whole.as_dict().items():
        if name in records.dtype.names:
            np.testing.assert_allclose(records[name], want, rtol=2e-6, err_msg=name)


def test_nothing_is_read_before_it_is_computed_and_errors_name_their_rule():
    def fail(block):
        raise AssertionError("computed")

    lazy = da.map_blocks(fail, da.zeros((4, 6), chunks=3), dtype=float, meta=np.empty((0, 0)))
    fd.cross_entropy_with_grad(lazy, np.zeros(4, int))
    fd.score(lazy, np.zeros(4, int), top_k=2)
    fd.log_softmax(lazy)
    for function in (fd.logsumexp, fd.log_softmax):
        with pytest.raises(ValueError, match=r"scale must be less than 1e\+38; got 1e\+39"):
            function(lazy, scale=1e39)
    with pytest.raises(ValueError, match=r"logits_dtype must be one of float16, .*; got 'half'"):
        fd.from_files(["logits.npy"], logits_dtype="half")
    with pytest.raises(TypeError, match="logits must be a dask array, not ndarray"):
        fd.cross_entropy(np.zeros((2, 3)), [0, 1])
    with pytest.raises(TypeError, match=r"logits must be in memory.*fastxent\.dask"):
        fastxent.cross_entropy(lazy, [0])
    with pytest.raises(ValueError, match="targets must have the logits' shape without the classes"):
        fd.cross_entropy(lazy, [0])
    with pytest.raises(TypeError, match="targets must be class indices"):
        fd.cross_entropy(lazy, np.zeros(4))
    with pytest.raises(TypeError, match="unknown option 'smoothing'"):
        fd.cross_entropy(lazy, np.zeros(4, int), smoothing=0.1)
    with pytest.raises(IndexError, match="in row 1 with value 6"):
        fd.cross_entropy(da.zeros((2, 6), chunks=3), [1, 6]).compute()


def test_a_graph_over_files_holds_paths(tmp_path):
    rows, classes = 200_000, 131_072
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, classes)}
    with (tmp_path / "logits.npy").open("wb") as file:  # 100 GB, of which the disk holds nothing
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + rows * classes * 4)
    lazy = fd.from_files(tmp_path / "logits.npy", chunks=(500, classes))
    assert lazy.shape == (rows, classes)
    loss = fd.cross_entropy(lazy, da.zeros(rows, dtype=int, chunks=500))
    assert len(pickle.dumps(lazy.__dask_graph__())) < 100_000
    assert len(pickle.dumps(loss.__dask_graph__())) < 100_000
    first = fd.cross_entropy(lazy[:1000], da.zeros(1000, dtype=int, chunks=500))
    np.testing.assert_allclose(first.compute(), np.log(classes), rtol=1e-6)


def test_files_are_arrays(tmp_path):
    logits, targets = problem()
    np.save(tmp_path / "a.npy", logits[:3])
    np.save(tmp_path / "b.npy", logits[3:])
    lazy = fd.from_files([tmp_path / "a.npy", tmp_path / "b.npy"], chunks=(2, 128))
    np.testing.assert_array_equal(lazy.compute(), logits)
    np.testing.assert_allclose(fd.cross_entropy(lazy, targets), fastxent.cross_entropy(logits, targets), rtol=1e-6)
    zarr = pytest.importorskip("zarr")
    zarr.create_array(tmp_path / "c.zarr", data=logits, chunks=(2, 100))
    stored = da.from_zarr(str(tmp_path / "c.zarr"))
    np.testing.assert_allclose(fd.cross_entropy(stored, targets), fastxent.cross_entropy(logits, targets), rtol=1e-6)


INDICES = [
    np.s_[::2], np.s_[1:9:3], np.s_[3], np.s_[-1], np.s_[::-1], np.s_[8:1:-3], np.s_[4:4], np.s_[2, 1:], np.s_[:, 2],
    np.s_[5, 3], np.s_[::-2, ::-1], np.s_[1:7, ::2], np.s_[None, 2:5], np.s_[..., None], np.s_[[6, 1, 1]],
    np.s_[:, [3, 0]], np.s_[:, -1:0:-2],
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("shape", [(10, 4), (10, 4, 3)], ids=str)
def test_indexed_files_are_indexed_arrays(tmp_path, shape, index):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    np.save(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(
        array[index], taken := fd.from_files(tmp_path / "a.npy", (5, 2, 3)[: len(shape)])[index]
    )
    assert taken.compute().shape == taken.shape
    assert taken.compute().dtype == taken.dtype


def test_rows_of_no_weight_may_hold_anything():
    logits, targets = problem()
    logits[1], logits[4, 7], logits[5] = np.nan, np.inf, -np.inf
    options = {"sample_weight": np.float64([1, 0, 1, 2, 0, 0, 1]), "label_smoothing": 0.1, "z_loss": 0.1}
    want, dwant = fastxent.cross_entropy_with_grad(logits, targets, **options)
    loss, dlogits = dask.compute(
        *fd.cross_entropy_with_grad(da.from_array(logits, chunks=(3, 100)), targets, **options)
    )
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    close(dlogits, dwant, "float32")


@pytest.mark.parametrize("chunks", [(2, 5), (2, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_what_is_declared_is_computed(tmp_path, dtype, chunks):
    """Dtype and shape of what every public function returns."""
    logits, targets = np.linspace(-2, 2, 20).astype(dtype).reshape(4, 5), np.array([0, 4, -100, 1])
    np.save(tmp_path / "logits.npy", logits)
    lazy = fd.from_files(tmp_path / "logits.npy", chunks)
    declared = {"from_files": [lazy]}
    for reduction in ("none", "mean", "sum"):
        how = {"reduction": reduction, "return_lse": True}
        declared[f"cross_entropy {reduction}"] = fd.cross_entropy(lazy, targets, **how)
        declared[f"cross_entropy_with_grad {reduction}"] = fd.cross_entropy_with_grad(lazy, targets, **how)
    declared["logsumexp"] = [fd.logsumexp(lazy), fd.logsumexp(lazy, keepdims=True), fd.logsumexp(lazy.T, axis=0)]
    declared["log_softmax"] = [fd.log_softmax(lazy), fd.log_softmax(lazy.T, axis=0)]
    declared["score"] = [fd.score(lazy, targets), fd.score(lazy, targets, top_k=2)]
    public = {name for name, value in vars(fd).items() if getattr(value, "__module__", "") == fd.__name__}
    assert {name.split()[0] for name in declared} == {name for name in public if not name.startswith("_")}
    for name, arrays in declared.items():
        for array, computed in zip(arrays, dask.compute(*arrays), strict=True):
            assert (computed.dtype, computed.shape) == (array.dtype, array.shape), name


@pytest.mark.parametrize("chunks", [(2, 100), (2, 300)], ids=str)
@pytest.mark.parametrize("function", [fd.cross_entropy_with_grad, fd.score, lambda logits, _: fd.log_softmax(logits)])
def test_a_block_is_loaded_once(tmp_path, monkeypatch, chunks, function):
    logits, targets = problem()
    np.save(tmp_path / "logits.npy", logits)
    lazy, loaded, load = fd.from_files(tmp_path / "logits.npy", chunks), [], fd._Files.__getitem__
    monkeypatch.setattr(fd._Files, "__getitem__", lambda files, index: loaded.append(index) or load(files, index))
    dask.compute(function(lazy, targets), scheduler="threads")
    assert len(loaded) == lazy.npartitions


@pytest.mark.parametrize("chunked", [np.asarray, lambda each: da.from_array(each, chunks=3)], ids=["numpy", "dask"])
def test_an_upstream_gradient_of_each_row(chunked):
    logits, targets = problem()
    lazy, each = da.from_array(logits, chunks=(2, 100)), np.linspace(-1, 2, 7)
    _, dwant = fastxent.cross_entropy_with_grad(logits, targets, grad_output=each, reduction="none")
    dlogits = fd.cross_entropy_with_grad(lazy, targets, grad_output=chunked(each), reduction="none")[1]
    close(dlogits.compute(), dwant, "float32")
    with pytest.raises(ValueError, match=r"grad_output must have the targets' shape \(7,\), not \(1,\)"):
        fd.cross_entropy_with_grad(lazy, targets, grad_output=chunked(each[:1]), reduction="none")
    with pytest.raises(ValueError, match='grad_output must be a scalar unless reduction is "none"'):
        fd.cross_entropy_with_grad(lazy, targets, grad_output=chunked(each))
    with pytest.raises(TypeError, match="grad_output must hold real numbers"):
        fd.cross_entropy_with_grad(lazy, targets, grad_output=chunked(each + 1j), reduction="none")


def test_a_pool_of_threads_starts_no_others(monkeypatch):
    """Every kernel of a pool's thread runs in that thread; the number of threads stays what it was."""
    from fastxent.backends.cpu import twins

    seen = []
    monkeypatch.setattr(twins.Twins, "__call__", _counted(twins.Twins.__call__, seen))
    logits, targets = np.zeros((600, 1000), np.float32), np.zeros(600, int)
    before = fastxent.get_num_threads()
    with dask.config.set(scheduler="threads", num_workers=2):
        fd.cross_entropy_with_grad(da.from_array(logits, chunks=(300, 1000)), targets)[1].compute()
        fd.score(da.from_array(logits, chunks=(300, 500)), targets).compute()
    assert set(seen) == {1}
    assert fastxent.get_num_threads() == before


def _counted(call, seen):
    from fastxent.backends.cpu import twins

    def counted(self, work, *arguments):
        seen.append(twins.threads_for(work))
        return call(self, work, *arguments)

    return counted


@pytest.mark.parametrize("processes", [True, False])
def test_a_cluster_of_processes_or_threads(processes):
    distributed = pytest.importorskip("distributed", reason="needs dask[distributed]")
    logits, targets = problem()
    want = fastxent.cross_entropy(logits, targets)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=2, processes=processes, dashboard_address="127.0.0.1:0", silence_logs=50
        ) as cluster,
        distributed.Client(cluster),
    ):
        lazy = da.from_array(logits, chunks=(3, 64))
        np.testing.assert_allclose(fd.cross_entropy(lazy, targets).compute(), want, rtol=1e-6)
        assert (fd.score(lazy, targets).compute()["rank"] == fastxent.score(logits, targets).rank).all()
