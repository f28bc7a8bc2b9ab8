"""Scoring in blocks gives the bits of the whole, however the blocks fall."""

import numpy as np
import pytest

import fastxent
from fastxent import io, runs
from fastxent.bench.cases import Case


@pytest.fixture
def files(tmp_path):
    logits, targets, _ = Case(9, 20_000, "confident", ignored=0.3).build()
    logits[4] = -np.inf
    targets[3] = 5
    np.save(tmp_path / "logits.npy", logits)
    np.save(tmp_path / "targets.npy", targets)
    with io.NpySource(tmp_path / "logits.npy") as logits_source, io.NpySource(tmp_path / "targets.npy") as source:
        yield logits, targets, logits_source, source


@pytest.mark.parametrize("backend", fastxent.backends.available())
@pytest.mark.parametrize(
    "block_bytes", [1, 32_768, 70_000, 80_000, 200_000, 1 << 30], ids=lambda size: f"{size}-byte-blocks"
)
def test_any_blocks_give_the_bits_of_the_whole(files, backend, block_bytes):
    logits, targets, *sources = files
    parts = list(runs.score_blocks(*sources, backend=backend, block_bytes=block_bytes))
    records = np.concatenate([part[0] for part in parts])
    losses = fastxent.cross_entropy(logits, targets, reduction="none", backend=backend)
    want = np.where(targets == -100, np.nan, -losses)
    if backend == "cpu":
        np.testing.assert_array_equal(records["log_prob"], want)
    np.testing.assert_allclose(records["log_prob"], want, rtol=5e-7)
    scored = (targets != -100) & np.isfinite(losses)
    assert scored.sum() > 3
    np.testing.assert_array_equal(records["is_greedy"][scored], (logits.argmax(axis=1) == targets)[scored])
    assert sum(part[1] for part in parts) == logits[targets != -100].nbytes


def test_bad_targets_are_found_before_a_logit_is_read(files, tmp_path):
    _, targets, logits, _ = files
    targets[8] = 20_000
    np.save(tmp_path / "bad.npy", targets)
    with io.NpySource(tmp_path / "bad.npy") as bad, pytest.raises(IndexError, match="row 8 with value 20000"):
        runs.score_blocks(logits, bad)


def test_summary_of_nothing():
    figures = runs.Summary().as_dict()
    assert figures["rows"] == 0
    assert np.isnan(figures["mean_nll_nats"])
