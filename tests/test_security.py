"""Files that lie: no pickle is loaded, no header is believed, no name becomes markup."""

import ast
import html.parser
import itertools
import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import fastxent
from fastxent import page
from fastxent.digest import Digest
from fastxent.io import SourceError, open_source

PACKAGE = Path(fastxent.__file__).parent
LOADERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"}
OF_LIBRARIES = {"numpy": "load", "torch": "load", "builtins": "exec"}  # names not to be taken out of their modules
MEASURES = {"bench/scale.py": {"pickle.dumps"}}  # how large a graph is, never read back


def unsafe(source):
    """What of a source can run code out of a file: the names, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            names = [alias.name for alias in node.names]
            for name in [module] if module else names:
                if name.partition(".")[0] in LOADERS:
                    yield node.lineno, name
            if OF_LIBRARIES.get(module) in names:
                yield node.lineno, f"{module}.{OF_LIBRARIES[module]}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            allowed = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}.get("allow_pickle")
            given = {str(word.value).partition(".")[0] for word in node.args if isinstance(word, ast.Constant)}
            if called.endswith("import_module") and given & LOADERS:
                yield node.lineno, f"{called} of a loader"
            if called in ("eval", "exec", "compile", "__import__", "torch.load") or called.partition(".")[0] in LOADERS:
                yield node.lineno, called
            if allowed not in (None, "False") or (called in ("np.load", "numpy.load") and allowed is None):
                yield node.lineno, f"{called} without allow_pickle=False"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_loads_code(path):
    found = list(unsafe(path.read_text("utf-8")))
    known = MEASURES.get(str(path.relative_to(PACKAGE)), set())
    assert {name for _, name in found} <= known | ({"pickle"} if known else set()), found


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from dill import loads", "np.load(f)", "np.load(f, allow_pickle=True)", "eval(x)",
     "torch.load(f)", "from numpy import load", "importlib.import_module('pickle')", "import_module('dill._dill')",
     "__import__('pickle')"],
)  # fmt: skip
def test_what_loads_code_is_found(source):
    assert list(unsafe(source))


class Payload:
    """What a pickle of it does when it is loaded: leave a folder behind."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def npy(descr, shape, data=bytes(64), version=1):
    """The bytes of a .npy file that says this of itself."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


def zarr_v2(folder, raw, **changes):
    metadata = {
        "zarr_format": 2, "shape": [4], "chunks": [4], "dtype": "<f4", "fill_value": 0, "order": "C", "filters": None,
        "compressor": None,
    }  # fmt: skip
    return store(folder, ".zarray", "0", metadata | changes, raw)


def zarr_v3(folder, raw=None, **changes):
    metadata = {
        "zarr_format": 3, "node_type": "array", "shape": [4], "data_type": "float32", "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}], "attributes": {},
    }  # fmt: skip
    return store(folder, "zarr.json", "c/0", metadata | changes, raw)


def store(folder, name, chunk, metadata, raw):
    (folder / chunk).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(metadata))
    if raw is not None:
        (folder / chunk).write_bytes(raw)
    return folder


def extension(path, payload):
    """A column whose type says that it is made by loading a pickle, as pyarrow once did."""
    pyarrow = pytest.importorskip("pyarrow")
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": payload}
    field = pyarrow.field("x", pyarrow.float32(), metadata=metadata)
    table = pyarrow.table([pyarrow.array([1.0, 2.0], pyarrow.float32())], schema=pyarrow.schema([field]))
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
    else:
        pytest.importorskip("pyarrow.feather").write_feather(table, path)


PICKLES = {
    "objects.npy": lambda path, payload: path.write_bytes(npy("'|O'", (4,), payload)),
    "objects2.npy": lambda path, payload: path.write_bytes(npy("'|O'", (4,), payload, version=2)),
    "field.npy": lambda path, payload: path.write_bytes(npy("[('a', '<f4'), ('b', '|O')]", (4,), payload)),
    "inner.npy": lambda path, payload: path.write_bytes(npy("('|O', (2,))", (4,), payload)),
    "raw.npy": lambda path, payload: path.write_bytes(payload),
    "raw.safetensors": lambda path, payload: path.write_bytes(payload),
    "raw.parquet": lambda path, payload: path.write_bytes(payload),
    "raw.arrow": lambda path, payload: path.write_bytes(payload),
    "objects.zarr": lambda path, payload: zarr_v2(path, payload, dtype="|O", filters=[{"id": "pickle", "protocol": 5}]),
    "filter.zarr": lambda path, payload: zarr_v2(path, payload, filters=[{"id": "pickle", "protocol": 5}]),
    "compressor.zarr": lambda path, payload: zarr_v2(path, payload, compressor={"id": "pickle", "protocol": 5}),
    "codec.zarr": lambda path, payload: zarr_v3(path, payload, codecs=[{"name": "numcodecs.pickle"}]),
    "extension.parquet": extension,
    "extension.feather": extension,
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_are_never_loaded(tmp_path, name):
    mark, path = tmp_path / "a-pickle-was-loaded", tmp_path / name
    payload = pickle.dumps(Payload(mark))
    PICKLES[name](path, payload)
    if name.startswith("extension"):  # numbers with a foreign name
        with open_source(path) as source:
            np.testing.assert_array_equal(source.block(0, 2), [1, 2])
    else:
        with pytest.raises(SourceError) as said, open_source(path) as source:
            source.block(0, 4)
        assert "\n" not in str(said.value)
    if path.is_file():
        with pytest.raises(ValueError, match=r"pickle|magic|header"):
            fastxent.Scores.load(path)
    assert not mark.exists()
    pickle.loads(payload)  # noqa: S301, our own
    assert mark.exists(), "the payload would not have shown"


CLAIMS = {
    "10^18 elements": npy("'<f4'", (10**18,)),
    "an overflow": npy("'<f4'", (2**40, 2**40)),
    "an overflow to 4": npy("'<f4'", (2**62 + 1, 4)),
    "a negative size": npy("'<f4'", (-4,)),
    "two negative sizes": npy("'<f4'", (-1, -4)),
    "a truth value": npy("'<f4'", (True, 4)),
    "more axes than arrays have": npy("'<f4'", (1,) * 65),
    "none of 10^18 classes": npy("'<f4'", (0, 10**18)),
    "elements of no bytes": npy("'|V0'", (10**18,)),
    "letters of no bytes": npy("'<U0'", (10**18,)),
    "arrays as elements": npy("('<f4', (2,))", (4,)),
    "half a header": npy("'<f4'", (4,))[:40],
    "a header longer than the file": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}",
    "a size that is no number": npy("'<f4'", "('4',)"),
    "a header of code": npy("__import__('os').mkdir('x')", (4,)),
}


def refuse(path, why="claims|truncated|not a readable|cannot be read"):
    """Opening it, or reading its first elements, is one clear line that names it."""
    with pytest.raises(SourceError, match=why) as said, open_source(path) as source:
        source.block(0, min(1 << 20, math.prod(source.shape)))
    assert str(said.value).startswith(str(path))
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_an_npy_header_claims(tmp_path, claim):
    (tmp_path / "a.npy").write_bytes(CLAIMS[claim])
    refuse(tmp_path / "a.npy")


def _grid(*shape):
    return {"name": "regular", "configuration": {"chunk_shape": shape}}


@pytest.mark.parametrize(
    "metadata",
    [
        {"shape": [10**18]},
        {"shape": [2**70]},
        {"shape": [10**9, 10**9], "chunk_grid": _grid(4, 4)},
        {"shape": [-4]},
        {"shape": [4.5]},
        {"shape": ["4"]},
        {"shape": [1] * 65, "chunk_grid": _grid(*[1] * 65)},
        {"chunk_grid": _grid(0)},
        {"chunk_grid": _grid(-1)},
        {"chunk_grid": _grid(10**15)},
        {"chunk_grid": _grid(2**62)},
        {"data_type": "string"},
        {"storage_transformers": [{"name": "unknown"}]},
    ],
    ids=str,
)
def test_what_zarr_metadata_claims(tmp_path, metadata):
    pytest.importorskip("zarr")
    refuse(zarr_v3(tmp_path / "a.zarr", **metadata))


def test_a_zarr_group_names_nothing_outside_of_it(tmp_path):
    pytest.importorskip("zarr")
    zarr_v3(tmp_path / "outside.zarr", np.ones(4, "<f4").tobytes())
    inner = json.loads((tmp_path / "outside.zarr/zarr.json").read_text())
    for name in ("../outside.zarr", str(tmp_path / "outside.zarr"), "a/../../outside.zarr"):
        consolidated = {"kind": "inline", "must_understand": False, "metadata": {name: inner}}
        group = {"zarr_format": 3, "node_type": "group", "attributes": {}, "consolidated_metadata": consolidated}
        store(tmp_path / "group.zarr", "zarr.json", "c/0", group, None)
        refuse(tmp_path / "group.zarr", ".")
        with pytest.raises(SourceError):
            open_source(f"{tmp_path}/group.zarr::{name}")


def test_what_a_safetensors_header_claims(tmp_path):
    pytest.importorskip("safetensors")
    for shape, offsets in (
        ([10**18], [0, 16]),
        ([2**32, 2**32], [0, 16]),
        ([2**62 + 1, 4], [0, 16]),
        ([-4], [0, 16]),
        ([4], [0, 4 * 10**18]),
        ([4], [-16, 0]),
        ([1] * 65 + [4], [0, 16]),
    ):
        header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
        refuse(tmp_path / "a.safetensors")
    for length in (0, 10**18, 2**64 - 1):
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
        refuse(tmp_path / "a.safetensors", ".")


def zigzag(number):
    """As parquet's metadata has its numbers."""
    number, found = 2 * number, b""
    while number > 127:
        found, number = found + bytes([number & 127 | 128]), number >> 7
    return found + bytes([number])


@pytest.mark.parametrize("rows", [42, 10**6, 10**18])
@pytest.mark.parametrize("where", ["file", "group", "both"])
def test_what_a_parquet_footer_claims(tmp_path, rows, where):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"x": np.arange(41.0)}), path)
    content = path.read_bytes()
    size = int.from_bytes(content[-8:-4], "little")
    before, *parts = content[-8 - size : -8].split(b"\x16" + zigzag(41))  # the third field, of 64 bits
    assert len(parts) == 3  # of the file, of the values in the column, of the group
    given = [rows if where != "group" else 41, 41, rows if where != "file" else 41]
    for number, part in zip(given, parts, strict=True):
        before += b"\x16" + zigzag(number) + part
    path.write_bytes(content[: -8 - size] + before + len(before).to_bytes(4, "little") + b"PAR1")
    refuse(path)


LENGTHS = list(itertools.product([-5, 42, 4100, 10**6, 10**18], [-5, 42, 4100, 3 * 10**6, 3 * 10**18]))


def claim_lengths(path, content, rows, inner):
    """An Arrow file of 41 rows and 123 numbers, or of 41 numbers, with other lengths in it."""
    content = content.replace(struct.pack("<q", 41), struct.pack("<q", rows))
    path.write_bytes(content.replace(struct.pack("<q", 123), struct.pack("<q", inner)))


def refuse_lengths(path):
    content = path.read_bytes()
    for lengths in LENGTHS:
        claim_lengths(path, content, *lengths)
        refuse(path)


@pytest.mark.parametrize("name", ["numbers", "lists"])
def test_what_an_arrow_batch_claims(tmp_path, name):
    """Lengths beyond the buffers: of such pyarrow itself reads behind the end, or ends the process."""
    pyarrow, feather = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.feather")
    path = tmp_path / "a.arrow"
    numbers = pyarrow.array(np.arange(123.0))
    column = pyarrow.FixedSizeListArray.from_arrays(numbers, 3) if name == "lists" else numbers[:41]
    feather.write_feather(pyarrow.table({name: column}), path, compression="uncompressed")
    assert path.read_bytes().count(struct.pack("<q", 41)) == 2  # of the batch, and of the column
    code = "import pathlib, sys; from tests.test_security import refuse_lengths as f; f(pathlib.Path(sys.argv[1]))"
    folder = ROOT
    done = subprocess.run([sys.executable, "-c", code, path], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".safetensors"])
def test_names_from_a_file_do_not_speak_to_the_terminal(tmp_path, suffix):
    pyarrow, feather = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.feather")
    parquet, safetensors = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("safetensors.numpy")
    path, hostile = tmp_path / f"a{suffix}", "\x1b[31mtwo\nlines"
    if suffix == ".safetensors":
        safetensors.save_file({hostile: np.zeros(2), "b": np.zeros(2)}, path)
    else:
        write = parquet.write_table if suffix == ".parquet" else feather.write_feather
        write(pyarrow.table({hostile: [1.0], "b": [1.0]}), path)
    with pytest.raises(SourceError, match=r"one of (b, )?\\x1b\[31mtwo\\nlines"):
        open_source(path)
    with open_source(f"{path}::{hostile}") as source:
        assert source.name == f"{path}::\\x1b[31mtwo\\nlines"


@pytest.mark.parametrize("name", ["abcdefgh", "twins"])
def test_columns_without_a_readable_name_and_twins(tmp_path, name):
    """Found by fuzzing: a name that is not UTF-8 raised in the midst of a constructor."""
    pyarrow, feather = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.feather")
    path = tmp_path / "a.arrow"
    names = ["x", "x"] if name == "twins" else [name]
    feather.write_feather(pyarrow.table([pyarrow.array([1.0])] * len(names), names=names), path, "uncompressed")
    path.write_bytes(path.read_bytes().replace(b"abcdefgh", b"\x84" * 8))
    refuse(path, ".")


ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements" / "development.txt"
AUDIT = ROOT / ".ci" / "audit"
# what is compared with, or needs a GPU: CI installs the newest of those
UNLOCKED = {"torch", "jax", "cuda12", "cuda13", "cuda-check", "peers", "minilm"}


def test_the_lock_pins_what_development_needs():
    """Every requirement of the extras that development takes, in a version it allows, by hash and from anywhere."""
    packaging = pytest.importorskip("packaging.requirements")
    if not LOCK.exists():
        pytest.skip("this is no checkout")
    text = LOCK.read_text("utf-8")
    pins = dict(re.findall(r"^([\w.-]+)==([\w.!+-]+)", text, re.MULTILINE))
    entries = re.split(r"\n(?=\S)", text.replace("\\\n", ""))
    assert all("--hash=sha256:" in entry for entry in entries if not entry.startswith("#"))
    assert "://" not in text
    assert "@" not in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in project["optional-dependencies"].keys() - UNLOCKED:
        wanted += project["optional-dependencies"][extra]
    for line in wanted:
        requirement = packaging.Requirement(line)
        name = requirement.name.lower().replace("_", "-")
        assert name == "fastxent" or requirement.specifier.contains(pins[name]), line


SOUND = {"name": "a", "version": "1", "vulns": []}
VULNERABLE = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1"}]}
SKIPPED = {"name": "c", "skip_reason": "nobody answers"}
NOTHING = "NOT AUDITED: an answer for 0 of 0 packages;"


@pytest.mark.parametrize(
    ("found", "error", "said", "failed"),
    [
        ([SOUND, SOUND], "", "2 packages, no known vulnerability", ()),
        ([SOUND, VULNERABLE], "", "b 2: PYSEC-1", ("", "--strict")),
        ([SOUND, SKIPPED], "", "NOT AUDITED: an answer for 1 of 2 packages; nobody answers", ("--strict",)),
        (None, "first\nlast\n", f"{NOTHING} last", ("--strict",)),
        (None, "", f"{NOTHING} pip-audit ended with 3 and said nothing", ("--strict",)),
    ],
)
@pytest.mark.parametrize("strict", ["", "--strict"])
def test_what_the_audit_says(tmp_path, found, error, said, failed, strict):
    if not AUDIT.exists():
        pytest.skip("this is no checkout")
    answer = "" if found is None else json.dumps({"dependencies": found})
    code = f"import sys; print({answer!r}, end=''); sys.stderr.write({error!r}); sys.exit(3)"
    (tmp_path / "pip_audit.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, AUDIT, *filter(None, [strict])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == said + "\n"
    assert bool(done.returncode) == (strict in failed)


class _Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</td></table><iframe>",
    "{{ 7*7 }}",
    "$x^{2}$",
]


def test_a_page_escapes_names():
    pytest.importorskip("jinja2"), pytest.importorskip("matplotlib")
    records = fastxent.score(np.eye(5, dtype=np.float32), np.arange(5), top_k=2).to_records()
    for title in HOSTILE:
        text = page.render(Digest.of(records, np.array(HOSTILE)), title, f"{title} -> {title}")
        tags = _Tags(text)
        assert not tags.tags & {"script", "img", "iframe"}
        assert not {name for name in tags.attributes if name.startswith("on")}
        assert "49" not in text.partition("<title>")[2].partition("</title>")[0]
        assert text.count("<table") == text.count("</table")


def test_a_report_of_files_with_hostile_names(tmp_path):
    pytest.importorskip("jinja2"), pytest.importorskip("matplotlib")
    logits, groups = tmp_path / '"><img src=x onerror=alert(1)>.npy', tmp_path / "<iframe>[bold].npy"
    np.save(logits, np.eye(5, dtype=np.float32))
    np.save(tmp_path / "targets.npy", np.arange(5))
    np.save(groups, np.array(HOSTILE))
    files = logits, tmp_path / "targets.npy", "-o", tmp_path / "<object>.npy", "--group-by", groups
    files += "--html", tmp_path / "report.html", "--compare", logits
    done = subprocess.run(
        [sys.executable, "-m", "fastxent", "score", *map(str, files)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    tags = _Tags((tmp_path / "report.html").read_text("utf-8"))
    assert not tags.tags & {"script", "img", "iframe", "object"}
    assert not {name for name in tags.attributes if name.startswith("on")}
