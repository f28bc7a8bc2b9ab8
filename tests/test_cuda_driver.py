"""What the CUDA backend asks of the driver and of numba-cuda, as far as it can be seen without a GPU.

Needs the packages of ``fastxent[cuda-check]``.
"""

import ast
import importlib
import inspect

import ml_dtypes
import numpy as np
import pytest

from fastxent.backends.cuda import compiler, layout, machine, places, run, turns
from fastxent.backends.cuda.arrays import DeviceArray
from tests import machine_code

pytestmark = pytest.mark.skipif(machine_code.why_missing() is not None, reason=str(machine_code.why_missing()))


def test_every_name_of_the_driver_is_there():
    driver, tree = importlib.import_module("cuda.bindings.driver"), ast.parse(inspect.getsource(machine))
    chains = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    drivers = "driver", "self._driver"
    asked = {node.attr for node in chains if ast.unparse(node.value) in drivers}
    assert {"cuMemHostAlloc", "cuMemAllocFromPoolAsync", "cuCtxPushCurrent"} <= asked
    assert [name for name in sorted(asked) if not hasattr(driver, name)] == []
    members = [
        (node.value.attr, node.attr) for node in chains
        if isinstance(node.value, ast.Attribute) and ast.unparse(node.value.value) in drivers
    ]  # fmt: skip
    assert members
    assert [member for member in members if not hasattr(getattr(driver, member[0]), member[1])] == []


def test_every_name_of_cuda_core_is_there():
    tree = ast.parse(inspect.getsource(machine))
    asked = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "cuda.core"]
    core = importlib.import_module("cuda.core")
    assert [alias.name for node in asked for alias in node.names if not hasattr(core, alias.name)] == []
    for name in ("LEGACY_DEFAULT_STREAM", "PER_THREAD_DEFAULT_STREAM"):
        assert hasattr(core, name)
    assert list(inspect.signature(core.Stream.from_handle).parameters)[:1] == ["handle"]


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"cuInit": 100}, "the NVIDIA driver finds no GPU it can use (CUDA_ERROR_NO_DEVICE)"),
        (
            {"cuDriverGetVersion": 11_080},
            "the NVIDIA driver knows CUDA 11, the packages are of 13: a newer driver is needed",
        ),
        (
            {"cuDriverGetVersion": 12_090},
            "the NVIDIA driver knows CUDA 12, the packages are of 13: pip install fastxent[cuda12]",
        ),
        ({"cuDeviceGetCount": 0}, "the NVIDIA driver finds no GPU"),
        ({"cuDeviceGetAttribute": 7}, "the first GPU has compute capability 7.7; kernels need 8.0"),
        ({"pools": 0}, "the first GPU, as this driver or a hypervisor has it, has no memory pools"),
        ({}, None),
    ],
)
def test_what_a_driver_may_say(monkeypatch, found, reason):
    driver = importlib.import_module("cuda.bindings.driver")
    success, attributes = driver.CUresult.CUDA_SUCCESS, driver.CUdevice_attribute
    of_attributes = {attributes.CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: found.get("pools", 1)}
    said = {"cuDeviceGetCount": 1, "cuDeviceGet": 0, "cuDeviceGetAttribute": 9, "cuDriverGetVersion": 13_000}
    for name, otherwise in said.items():
        value = found.get(name, otherwise)
        monkeypatch.setattr(
            driver, name, lambda *about, value=value: (success, of_attributes.get(about and about[0], value))
        )
    monkeypatch.setattr(driver, "cuInit", lambda flags: (driver.CUresult(found.get("cuInit", 0)),))
    assert machine.why_unavailable.__wrapped__() == reason


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_rows_are_addressed_with_64_bits(form):
    """A simulator knows no types: an address of 32 would be another row's from 2^31 bytes on."""
    compiler.repair_numpy()
    from numba import cuda
    from numba.cuda import types

    from fastxent.backends.cuda.primitives import OPS

    kind = layout.GPU.kind(form, 1000, False, "none", False)
    rows = types.NamedTuple([types.int64] * len(places.Rows._fields), places.Rows)

    def type_of(function, *arguments):
        with compiler._without_device((9, 0)):
            _, result = cuda.compile(function, arguments, device=True, abi="numba", cc=(9, 0), output="ltoir")
        return list(result)

    place_of = places.build_places(OPS, kind).place_of
    assert type_of(lambda rows, i: place_of(rows, i), rows, types.int32) == [types.int64] * 2
    first_row = turns.build_turns(OPS, kind, "loss").first_row
    assert type_of(lambda each: first_row(each), types.int64) == [types.int32, types.int64]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_cuda_core_reads_capsules_of_ours(monkeypatch, dtype):
    """As the verbs read anybody's."""
    monkeypatch.setenv("FASTXENT_CUDA_SIMULATED", "1")
    utils = importlib.import_module("cuda.core.utils")
    array = DeviceArray(run.runner().machine, 0, (3, 5), np.dtype(getattr(ml_dtypes, dtype, dtype)))
    view = utils.StridedMemoryView.from_dlpack(array, stream_ptr=-1)
    assert (view.ptr, tuple(view.shape), view.dtype) == (array.address, (3, 5), array.dtype)
    assert (view.is_device_accessible, view.device_id, view.strides in (None, (5, 1))) == (True, 0, True)
