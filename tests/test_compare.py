"""The comparison checks before it times, says what is absent, and the published table is the published run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastxent
from fastxent.bench import candidates, compare, gpu, linear, report
from tests.test_cli import run

DOCS = Path(__file__).parent.parent / "docs"


def test_a_wrong_candidate_gets_no_time(monkeypatch):
    def wrong(logits, targets):
        return lambda: fastxent.cross_entropy(logits, targets, reduction="none") * 1.001

    monkeypatch.setattr(compare, "OPERATIONS", {"loss": {"fastxent": candidates.LOSS["fastxent"], "wrong": wrong}})
    ours, theirs = next(compare.compare([(300, 40)], rounds=1))
    assert (theirs.note, theirs.seconds) == ("wrong", None)
    assert theirs.worst_error == pytest.approx(1e-3, rel=1e-2)
    assert ours.seconds > 0
    assert ours.worst_error < 1e-6


def test_an_absent_one_is_named(monkeypatch):
    def absent(logits, targets):
        raise ImportError(name="abacus")

    monkeypatch.setattr(compare, "OPERATIONS", {"loss": {"fastxent": candidates.LOSS["fastxent"], "abacus": absent}})
    _, theirs = next(compare.compare([(300, 40)], rounds=1))
    assert theirs.note == "absent: needs abacus: pip install fastxent[peers]"


def test_a_wrong_gradient_is_seen(monkeypatch):
    def off_by_sign(logits, targets):
        return lambda: -fastxent.cross_entropy_grad(logits, targets, reduction="sum")

    table = {"fastxent": candidates.LOSS_AND_GRADIENT["fastxent"], "sign": off_by_sign}
    monkeypatch.setattr(compare, "OPERATIONS", {"loss": {}, "loss and gradient": table})
    _, gradient = compare.compare([(100, 7)], rounds=1)
    assert [cell.note for cell in gradient] == ["", "wrong"]


def test_every_dtype_and_number_of_threads_has_its_cell(monkeypatch):
    table = {"fastxent": candidates.LOSS["fastxent"], "scipy": candidates.LOSS["scipy"]}
    monkeypatch.setattr(compare, "OPERATIONS", {"loss": table, "loss and gradient": {}})
    parts = list(compare.compare([(70, 30)], dtypes=("float64", "bfloat16"), threads=(1, None), rounds=1))
    cells = [cell for part in parts for cell in part if cell.candidate == "fastxent"]
    most = fastxent.get_num_threads()
    assert [(cell.dtype, cell.threads) for cell in cells] == [
        ("float64", 1), ("float64", most), ("bfloat16", 1), ("bfloat16", most),
    ]  # fmt: skip
    assert all(cell.worst_ulps < 4 and cell.gigabytes_per_second > 0 for cell in cells)
    assert {cell.note for part in parts for cell in part if cell.candidate == "scipy"} >= {
        "absent: scipy has no LogSoftmax of bfloat16"
    }


def test_command(tmp_path):
    done = run("compare", "--shape", "200x30", "--json", tmp_path / "cells.json")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "cells.json").read_text())
    assert {cell["candidate"] for cell in record["cells"]} >= {"fastxent", "numpy", "torch"}
    assert record["machine"]["cores"] >= 1
    assert "fastxent" in report.markdown(record)
    assert run("compare", "--shape", "200").returncode == 2


def test_published_table_is_the_published_run():
    record = json.loads((DOCS / "results" / "compare.json").read_text("utf-8"))
    assert report.markdown(record) in (DOCS / "performance.md").read_text("utf-8")
    assert all(np.isfinite(cell["seconds"]) for cell in record["cells"] if cell["note"] == "")


class TestOnAGpu:
    """The suite as it would run on a device, on one that is simulated and with problems that are tiny."""

    def test_checks_then_times(self, monkeypatch):
        monkeypatch.setenv("FASTXENT_CUDA_SIMULATED", "1")
        monkeypatch.setattr(gpu, "_ROUNDS", 1)
        monkeypatch.setattr(gpu, "_WARM", 0)
        shapes = {"shapes": ((3, 70),), "option_shape": (2, 300), "dtypes": ("bfloat16",)}
        found = list(gpu.run(checked=gpu.check_all(("float32",), (40,)), **shapes))
        record = gpu.record(found)
        assert len(record["checks"]) == len(gpu.OPTIONS)
        assert all(check["right"] for check in record["checks"])
        timed = {(time["candidate"], time["operation"]) for time in record["times"] if time["seconds"]}
        assert {("fastxent", "loss"), ("softcap", "loss and gradient"), ("90% ignored", "loss")} <= timed
        assert {time["candidate"] for time in record["times"]} >= {"torch", "Liger", "quack", "cupy"}
        assert json.loads(json.dumps(record))["checks"] == record["checks"]

    def test_a_wrong_kernel_is_seen(self, monkeypatch):
        monkeypatch.setenv("FASTXENT_CUDA_SIMULATED", "1")
        right = gpu.cuda_with_grad

        def wrong(*arguments, **options):
            loss, gradient = right(*arguments, **options)
            return loss * np.float32(1 + 1e-5), gradient

        monkeypatch.setattr(gpu, "cuda_with_grad", wrong)
        assert not all(check.right for check in gpu.check_all(("float32",), (40,)))

    def test_without_a_gpu_it_ends_with_a_sentence(self, tmp_path):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTXENT")}
        done = subprocess.run(
            [sys.executable, "-m", "fastxent", "compare", "--suite", "gpu", "--json", str(tmp_path / "gpu.json")],
            env=environment | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.startswith("error: the suite needs a GPU, and ")
        assert len(done.stderr.splitlines()) == 1
        assert not list(tmp_path.iterdir())


class TestHiddenStates:
    """The fused linear loss beside its peers: by the same rules, against the products as limits."""

    def test_checks_then_times(self):
        loss, gradients = compare.compare_linear([(70, 16, 300)], rounds=1)
        for cells in (loss, gradients):
            by_name = {cell.candidate: cell for cell in cells}
            assert by_name["fastxent"].of_limit > 0
            assert by_name["fastxent"].worst_error < 1e-5
            assert by_name["numpy"].seconds > 0
            assert (cells[0].shape, cells[0].gigabytes_per_second) == ((70, 16, 300), None)

    def test_a_wrong_candidate_gets_no_time(self, monkeypatch):
        def off_by_sign(*problem):
            gradients = linear.LOSS_AND_GRADIENTS["fastxent"](*problem)
            return lambda: -gradients()

        def scaled(*problem):
            losses = linear.LOSS["fastxent"](*problem)
            return lambda: losses() * 1.001

        table = {"linear loss": {"scaled": scaled}, "linear loss and gradients": {"sign": off_by_sign}}
        monkeypatch.setattr(compare, "LINEAR", table)
        for (cell,) in compare.compare_linear([(70, 16, 300)], rounds=1):
            assert (cell.note, cell.seconds) == ("wrong", None)

    def test_command(self, tmp_path):
        done = run("compare", "--shape", "40x8x50", "--json", tmp_path / "cells.json")
        assert done.returncode == 0, done.stderr
        record = json.loads((tmp_path / "cells.json").read_text())
        assert [cell["shape"] for cell in record["cells"]] == [[40, 8, 50]] * len(record["cells"])
        assert "| 40 x 8 x 50 | float32 |" in report.markdown(record)
