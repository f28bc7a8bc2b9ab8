"""Real logits through the command line: a classifier of file types that travels in a wheel, on files of this machine.

Needs the ``peers`` extra: magika brings the model, onnxruntime runs it, torch is asked for the same numbers.
"""

import importlib.util
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

import fastxent

onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")

LABELS = {".py": "python", ".pyc": "pythonbytecode", ".so": "elf", ".html": "html", ".csv": "csv"}


@pytest.fixture(scope="module")
def model():
    """A session that gives logits and probabilities, and the model's configuration."""
    found = importlib.util.find_spec("magika")
    if found is None:
        pytest.skip("needs magika: pip install fastxent[peers]")
    folder = Path(found.submodule_search_locations[0]) / "models" / "standard_v3_3"
    graph = onnx.load(folder / "model.onnx")
    softmax = [node for node in graph.graph.node if node.op_type == "Sub"][-1]  # logits minus their maximum
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(softmax.input[0]))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return session, softmax.input[0], json.loads((folder / "config.min.json").read_text())


def features(content, config):
    """What the model reads of a file: its first and last bytes without white space, padded."""
    first, last = content[: config["block_size"]].lstrip(), content[-config["block_size"] :].rstrip()
    padded = np.full((2, config["beg_size"]), config["padding_token"], np.int32)
    first, last = first[: config["beg_size"]], last[-config["end_size"] :]
    padded[0, : len(first)] = list(first)
    padded[1, padded.shape[1] - len(last) :] = list(last)
    return padded.reshape(-1)


@pytest.fixture(scope="module")
def problem(model, tmp_path_factory):
    """Logits, targets and probabilities of some hundred files, and the folder they are saved in."""
    session, name, config = model
    names, contents, targets = config["target_labels_space"], [], []
    for suffix, label in LABELS.items():
        files = sorted(Path(sysconfig.get_path("stdlib")).rglob(f"*{suffix}"))
        for path in [path for path in files if path.stat().st_size >= 256][:120]:
            contents.append(features(path.read_bytes(), config))
            targets.append(names.index(label))
    logits, probabilities = session.run([name, "target_label"], {"bytes": np.stack(contents)})
    folder = tmp_path_factory.mktemp("real")
    np.save(folder / "logits.npy", logits)
    np.save(folder / "targets.npy", targets)
    return folder, logits, np.array(targets), probabilities


def test_scored_against_its_own_labels(problem):
    folder, logits, targets, probabilities = problem
    files = [str(folder / name) for name in ("logits.npy", "targets.npy", "scores.npy")]
    command = [sys.executable, "-m", "fastxent", "score", *files[:2], "-o", files[2], "--top-k", "3", "--json"]
    figures = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    scores, each = fastxent.Scores.load(files[2]), np.arange(len(targets))
    assert logits.shape[1] == 214
    assert len(targets) > 200
    assert figures["accuracy"] > 0.9
    np.testing.assert_array_equal(scores.argmax, probabilities.argmax(axis=1))
    own = probabilities[each, targets].astype(np.float64)
    unsure = own < 0.999  # above, the model's float32 probabilities have lost the digits that the scores keep
    np.testing.assert_allclose(np.exp(scores.log_prob[unsure].astype(np.float64)), own[unsure], 1e-5)
    exact = torch.nn.functional.cross_entropy(torch.tensor(logits).double(), torch.tensor(targets), reduction="none")
    np.testing.assert_allclose(-scores.log_prob, exact.numpy(), 5e-7)
    assert figures["mean_nll_nats"] == pytest.approx(exact.mean().item(), rel=5e-7)
    top = torch.tensor(logits).double().log_softmax(1).topk(3)
    np.testing.assert_array_equal(scores.top_ids, top.indices.numpy())
    np.testing.assert_allclose(scores.top_log_probs[:, 1:], top.values.numpy()[:, 1:], 5e-7)


def test_sure_rows_keep_digits_that_the_models_own_probabilities_lose(problem):
    _, logits, targets, probabilities = problem
    exact = torch.nn.functional.cross_entropy(torch.tensor(logits).double(), torch.tensor(targets), reduction="none")
    sure, exact = exact.numpy() < 1e-2, exact.numpy()
    theirs, ours = -np.log(probabilities[np.arange(len(targets)), targets]), -fastxent.score(logits, targets).log_prob
    assert np.abs(theirs / exact - 1)[sure].max() > 1e-5
    assert np.abs(ours / exact - 1)[sure].max() < 5e-7
