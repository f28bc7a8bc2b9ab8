"""Twelve gigabytes of logits really on disk, scored in bounded memory, killed and resumed; `pytest -m slow` runs it."""

import signal

import numpy as np
import pytest

import fastxent
from fastxent.summary import Summary
from tests import processes

ROWS, CLASSES, BLOCK = 23_500, 128_256, 100


@pytest.mark.slow
def test_twelve_gigabytes(tmp_path):
    rng = np.random.default_rng(2026)
    targets = rng.integers(0, CLASSES, ROWS)
    header = {"descr": "<f4", "fortran_order": False, "shape": (ROWS, CLASSES)}
    with (tmp_path / "logits.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, ROWS, BLOCK):
            block = 4 * rng.standard_normal((BLOCK, CLASSES), dtype=np.float32)
            margin = rng.uniform(0, 40, BLOCK).astype(np.float32)
            block[np.arange(BLOCK), targets[start : start + BLOCK]] += margin
            block.tofile(file)
    np.save(tmp_path / "targets.npy", targets)

    _, highest = processes.memory_of(processes.start(tmp_path, "--top-k", "5"))
    assert 0 < highest < 500
    whole = (tmp_path / "scores.npy").read_bytes()

    (tmp_path / "scores.npy").unlink()
    for number in range(5):
        process = processes.start(tmp_path, "--top-k", "5", "--resume")
        processes.wait_until_done(tmp_path, process, ROWS * (number + 1) // 6)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert 0 < processes.journalled(tmp_path) < ROWS
    _, highest = processes.memory_of(processes.start(tmp_path, "--top-k", "5", "--resume"))
    assert 0 < highest < 500
    assert (tmp_path / "scores.npy").read_bytes() == whole

    sample = np.sort(rng.choice(ROWS, 200, replace=False))
    logits = np.load(tmp_path / "logits.npy", mmap_mode="r")[sample].astype(np.float64)
    want = fastxent.score(logits, targets[sample], top_k=5, backend="reference")
    found = fastxent.Scores.load(tmp_path / "scores.npy")[sample]
    for name, values in want.as_dict().items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(getattr(found, name), values, 1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(getattr(found, name), values, name)
    summary = Summary.of(np.load(tmp_path / "scores.npy")[sample])
    assert summary.mean_nll == pytest.approx(-want.log_prob.mean(), rel=1e-7)
