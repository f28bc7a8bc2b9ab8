"""Every Python recipe of the README runs as it stands, and every shell command after it in one folder."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastxent

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text("utf-8")
RECIPES = re.findall(r"## ([^\n]+)\n(?:(?!\n## ).)*?```python\n(.*?)```", TEXT, re.DOTALL)


def test_recipes_in_python():
    assert [title for title, _ in RECIPES] == [
        "Loss",
        "Score",
        "Gradient",
        "Hidden states and an output matrix",
        "Targets and options",
        "Other losses",
        "Stream a memory map",
        "Shards of classes",
        "Dask",
        "Torch and JAX",
        "Choose a backend",
    ]


@pytest.mark.parametrize(("title", "code"), RECIPES, ids=[title for title, _ in RECIPES])
def test_recipe(title, code, tmp_path):
    if "import torch" in code:
        pytest.importorskip("torch", reason="needs torch: pip install fastxent[peers]")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_values_the_recipes_name():
    assert f"[0])  # {fastxent.cross_entropy(np.float32([[20, 0]]), [0])!s}, not 0" in TEXT
    binary = fastxent.binary_cross_entropy_with_logits(np.float32([20, -20]), [1, 0])
    assert f"[1, 0])  # {binary!s}, not 0" in TEXT
    assert f"fastxent.backends.available()  # {fastxent.backends.available()}" in TEXT


def test_shell_commands(tmp_path):
    np.save(tmp_path / "logits.npy", np.zeros((6, 4), np.float32))
    np.save(tmp_path / "targets.npy", np.arange(6) % 4)
    safetensors, zarr = pytest.importorskip("safetensors.numpy"), pytest.importorskip("zarr")
    for number in range(2):
        logits = {"logits": np.zeros((3, 4), np.float32), "other": np.zeros(1)}
        safetensors.save_file(logits, tmp_path / f"shard-{number}.safetensors")
    group = zarr.open_group(tmp_path / "lm.zarr", mode="w")
    group.create_array("logits", data=np.zeros((2, 3, 4), np.float32))
    group.create_array("tokens", data=np.arange(6).reshape(2, 3) % 4)
    commands = re.findall(r"^\$ fastxent (.*)$", TEXT, re.MULTILINE)
    pytest.importorskip("jinja2"), pytest.importorskip("matplotlib")
    assert len(commands) == 9
    for command in commands:
        subprocess.run([sys.executable, "-m", "fastxent", *shlex.split(command)], cwd=tmp_path, check=True)
    assert (tmp_path / "scores.parquet").exists()
    assert "Hardest rows" in (tmp_path / "report.html").read_text("utf-8")
    assert "kl" in np.load(tmp_path / "both.npy").dtype.names
    assert zarr.open_group(tmp_path / "tokens.zarr", mode="r")["valid"][:].tolist() == [[True, True, False]] * 2
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy")["log_prob"], -np.log(4), rtol=1e-6)


def test_linked_files_exist():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links
    for link in links:
        assert (README.parent / link).exists(), link
