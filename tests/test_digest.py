"""What records say as a whole, and the page made of it, against the scores themselves."""

import html.parser

import numpy as np
import pytest

import fastxent
from fastxent import digest, page, runs
from fastxent.arguments import ScoreOptions
from fastxent.digest import Digest, Questions


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    logits = (2 * rng.standard_normal((20, 6, 50))).astype(np.float32)
    targets = rng.integers(0, 50, (20, 6))
    targets[2, 3] = -100
    logits[4, 1] = np.nan
    arrays = {
        "logits": logits,
        "other": (logits + 0.1 * rng.standard_normal(logits.shape)).astype(np.float16),
        "targets": targets,
        "groups": np.arange(20) % 3,
        "bytes": rng.integers(5, 50, 20),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    return tmp_path, arrays


def answer(folder, **options):
    questions = Questions(folder / "groups.npy", byte_counts=folder / "bytes.npy")
    names = folder / "logits.npy", folder / "targets.npy", folder / "scores.npy"
    runs.score_file(*names, ScoreOptions(top_k=2), questions=questions, other=folder / "other.npy", **options)
    return questions.digest


@pytest.mark.parametrize("block", [1, 50, 1 << 18])
def test_a_run_answers_as_the_arrays_do(files, monkeypatch, block):
    monkeypatch.setattr(digest, "_ROWS", block)
    folder, arrays = files
    found = answer(folder, chunk_rows=7)
    scores = fastxent.score(arrays["logits"], arrays["targets"], top_k=2)
    counts = np.bincount(arrays["groups"], arrays["bytes"])
    wanted = scores.metrics(by=arrays["groups"], byte_counts=counts)
    np.testing.assert_allclose(found.groups.bits_per_byte, wanted.bits_per_byte, 1e-12)
    np.testing.assert_allclose(found.groups.mean_nll, wanted.mean_nll, 1e-12)
    whole = scores.metrics(byte_counts=arrays["bytes"].sum())
    np.testing.assert_allclose(found.metrics.bits_per_byte, whole.bits_per_byte, 1e-12)
    assert found.calibration.expected_error == pytest.approx(scores.calibration().expected_error, rel=1e-12)
    models = fastxent.compare_models(arrays["logits"], arrays["other"], arrays["targets"]).summary()
    assert found.models.kl_percentiles == pytest.approx(models.kl_percentiles, rel=1e-6)
    for name in set(models.__slots__) - {"kl_percentiles"}:
        assert getattr(found.models, name) == pytest.approx(getattr(models, name), rel=1e-6), name
    known = scores.valid & ~np.isnan(scores.log_prob)
    assert found.histogram.sum() == known.sum()
    order = np.argsort(np.where(known, scores.log_prob, 0.0).ravel(), kind="stable")[:20]
    assert found.hardest["row"].tolist() == order.tolist()
    np.testing.assert_array_equal(found.hardest["log_prob"], scores.log_prob.ravel()[order])


def test_scores_beside_a_comparison_are_those_without(files):
    folder, arrays = files
    answer(folder)
    assert fastxent.Scores.load(folder / "scores.npy") == fastxent.score(arrays["logits"], arrays["targets"], top_k=2)


def test_one_number_is_no_count_of_groups(files):
    folder, _ = files
    questions = Questions(folder / "groups.npy", byte_counts="400")
    with pytest.raises(
        ValueError, match="byte_counts must be a file with a number for each of the groups' rows; got 400"
    ):
        questions.prepare((20, 6))


def test_of_nothing():
    found = Digest.of(fastxent.score(np.zeros((0, 3)), np.zeros(0, int), top_k=1).to_records())
    assert found.metrics.rows[0] == 0
    assert found.calibration is None
    assert "Hardest rows" in page.render(found, "Nothing", "")


def test_losses_beyond_the_edges_are_counted():
    logits = np.float64([[0.0, 1e6], [1e3, 0.0], [-np.inf, 0.0]])
    found = Digest.of(fastxent.score(logits, [0, 0, 0]).to_records())
    assert (found.histogram[0], found.histogram[-1], found.histogram.sum()) == (1, 2, 3)


class _Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attributes):
        self.open += [tag] if tag not in ("meta", "br", "path", "use", "rect", "link", "img") else []
        self.links += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag


def test_page_is_whole_and_needs_no_network(files):
    folder, _ = files
    text = page.render(answer(folder), "Scores of <b>", "a & b")
    parsed = _Page()
    parsed.feed(text)
    assert parsed.open == []
    assert [link for link in parsed.links if "://" in link or link.startswith("//")] == []
    assert "Scores of &lt;b&gt;" in text
    assert text.count("<svg") == 2
    for heading in ("Two models", "Groups", "Hardest rows", "expected calibration error"):
        assert heading in text
    assert text == page.render(answer(folder, replace=True), "Scores of <b>", "a & b")


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("groups", np.zeros(7), r"groups must have the targets' shape \(20, 6\) or its beginning; got \(7,\)"),
        ("bytes", np.zeros(3), r"byte_counts must have the groups' shape \(20,\); got \(3,\)"),
        ("other", np.zeros((20, 6, 49), np.float32), "logits of two models must have one shape"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(files, name, array, message):
    folder, _ = files
    np.save(folder / f"{name}.npy", array)
    with pytest.raises(ValueError, match=message):
        answer(folder)
    assert not list(folder.glob("scores*"))
