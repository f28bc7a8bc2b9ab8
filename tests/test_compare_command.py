"""``fastxent compare``: what it takes, what it refuses, what it writes."""

import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from fastxent import bench, cli_compare
from fastxent.bench import tasks, terminal
from tests.test_cli import run


def test_an_error_of_the_measurement_is_none_of_usage(monkeypatch):
    monkeypatch.setattr(tasks, "speed_case", lambda *asked: int("no number"))
    done = CliRunner().invoke(cli_compare.compare, ["--shape", "20x30", "--op", "loss", "--peers", ""])
    assert isinstance(done.exception, ValueError)


def test_command(tmp_path):
    pytest.importorskip("jinja2"), pytest.importorskip("matplotlib")
    files = [option for name in ("r.json", "p.html", "b.svg") for option in (f"--{OPTION[name]}", tmp_path / name)]
    done = run(
        "compare", "--shape", "200x30", "--seconds", 20, "--backends", "cpu,reference", "--peers", "numpy", *files
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = bench.Comparison.from_json((tmp_path / "r.json").read_text())
    assert {cell.candidate for cell in found.cells} == {
        "fastxent", "fastxent reference", "fastxent, new memory", "numpy"
    }  # fmt: skip
    assert {cell.problem.operation for cell in found.cells} == {"loss", "loss and gradient"}
    assert found.machine["cores"] >= 1
    assert max(map(len, done.stdout.splitlines())) <= terminal.WIDE
    assert "fastxent reference" in (tmp_path / "p.html").read_text("utf-8")
    assert (tmp_path / "b.svg").read_text("utf-8").startswith("<svg")


OPTION = {"r.json": "json", "p.html": "html", "b.svg": "plot"}


def test_command_as_markdown():
    done = run("compare", "--shape", "200x30", "--seconds", 20, "--op", "loss", "--peers", "", "--markdown")
    assert (done.returncode, done.stderr) == (0, "")
    assert "**loss, 200 x 30 float32, " in done.stdout
    assert "| fastxent | " in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("--shape", "200"),
        ("--peers", "abacus"),
        ("--backends", "abacus"),
        ("--html", "/nowhere/page.html"),
        ("--op", "x"),
        ("--suite", "gpu", "--op", "loss"),
    ],
)
def test_command_that_is_refused(arguments):
    done = run("compare", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) <= 4


def test_the_gpu_suite_refuses_what_it_would_drop():
    done = run("compare", "--suite", "gpu", "--shape", "2x3", "--seconds", 5, "--markdown", "--plot", "x.svg")
    assert done.returncode == 2
    assert "--suite gpu takes --json and --html alone, not --shape, --seconds, --markdown, --plot" in done.stderr


def test_without_a_gpu_the_suite_ends_with_a_sentence(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTXENT")}
    done = subprocess.run(
        [sys.executable, "-m", "fastxent", "compare", "--suite", "gpu",
         "--json", str(tmp_path / "gpu.json"), "--html", str(tmp_path / "gpu.html")],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: the suite needs a GPU, and ")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
