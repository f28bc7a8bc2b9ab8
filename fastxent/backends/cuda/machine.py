"""The GPU of this process, through cuda.core and the driver: memory, copies, launches.

The simulated machine in `simulated` has the same methods. Kernels are launched with whole numbers and float64 alone,
which the driver takes as they are: an address is a number like any other.
"""

import functools
import importlib.util

import numpy as np

from fastxent.backends.cuda import compiler
from fastxent.backends.cuda.layout import GPU

_GRANULE = 1 << 16  # bytes: small pieces are seldom allocated anew
_PLAIN_SHARED = 48 * 1024  # more has to be asked for


def why_unavailable():
    """Why there is no GPU to be used, in a sentence; None when there is one."""
    for package, name in (("numba_cuda", "numba-cuda"), ("cuda.core", "cuda-core"), ("cuda.bindings", "cuda-bindings")):
        if not _is_installed(package):
            return f"the package {name} is not installed: pip install fastxent[cuda13], or [cuda12] for older drivers"
    from cuda.bindings import driver

    try:
        (error,) = driver.cuInit(0)
    except RuntimeError:  # the library itself is not there
        return "there is no NVIDIA driver on this machine"
    if error != driver.CUresult.CUDA_SUCCESS:
        return f"the NVIDIA driver finds no GPU it can use ({error.name})"
    _, count = driver.cuDeviceGetCount()
    return None if count else "the NVIDIA driver finds no GPU"


def _is_installed(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _checked(answer):
    """The values of a driver's call, without its error."""
    from cuda.bindings import driver

    error, *values = answer
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the NVIDIA driver says {error.name}")
    return values[0] if len(values) == 1 else values


class Machine:
    """The first GPU the driver knows, or the one CUDA_VISIBLE_DEVICES names."""

    layout = GPU

    def __init__(self):
        from cuda.core import Device

        self._device = Device(0)
        self._device.set_current()
        self.architecture = tuple(self._device.compute_capability)
        self.name = self._device.name
        # blocks that wait for each other: a multiprocessor holds one at least, and two slots may be at it at once
        self.together = self._device.properties.multiprocessor_count // 2

    def new_stream(self):
        """A stream of its own."""
        return self._device.create_stream()

    def fits(self, array, size):
        """Whether memory once allocated can hold so many bytes."""
        return array.nbytes >= size

    def spoil(self, array, address):
        """Nothing: what a kernel is to fill may hold what it likes before."""

    def allocate(self, size):
        """So many bytes, or some more, of page-locked memory on the host and of the device's."""
        import ctypes

        from cuda.bindings import driver

        self._device.set_current()
        size = -(-max(size, 1) // _GRANULE) * _GRANULE
        host = int(_checked(driver.cuMemAllocHost(size)))
        address = int(_checked(driver.cuMemAlloc(size)))
        return np.frombuffer((ctypes.c_char * size).from_address(host), np.uint8), address

    def release(self, array, address):
        """Give both back; nothing may be on the way."""
        from cuda.bindings import driver

        _checked(driver.cuMemFreeHost(array.ctypes.data))
        _checked(driver.cuMemFree(address))

    def reserve(self, size):
        """So many bytes of the device's memory alone."""
        from cuda.bindings import driver

        return int(_checked(driver.cuMemAlloc(size)))

    def unreserve(self, address):
        """Give them back; nothing may be on the way."""
        from cuda.bindings import driver

        _checked(driver.cuMemFree(address))

    def copy_to_device(self, stream, array, address):
        """Copy a contiguous array, some time."""
        from cuda.bindings import driver

        _checked(driver.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, int(stream.handle)))

    def copy_to_host(self, stream, array, address):
        """Copy to a contiguous array, some time."""
        from cuda.bindings import driver

        _checked(driver.cuMemcpyDtoHAsync(array.ctypes.data, address, array.nbytes, int(stream.handle)))

    def clear(self, stream, array, address):
        """Zeros on the device in place of what an array there was to hold, some time."""
        from cuda.bindings import driver

        _checked(driver.cuMemsetD8Async(address, 0, array.nbytes, int(stream.handle)))

    def copy(self, stream, source, target, size):
        """Copy bytes from the device's memory to itself, some time."""
        from cuda.bindings import driver

        _checked(driver.cuMemcpyDtoDAsync(target, source, size, int(stream.handle)))

    def seconds(self, stream, body):
        """How long the stream is busy with what ``body`` asks of it."""
        from cuda.bindings import driver

        first, last = _checked(driver.cuEventCreate(0)), _checked(driver.cuEventCreate(0))
        _checked(driver.cuEventRecord(first, int(stream.handle)))
        body()
        _checked(driver.cuEventRecord(last, int(stream.handle)))
        _checked(driver.cuEventSynchronize(last))
        elapsed = _checked(driver.cuEventElapsedTime(first, last)) * 1e-3
        for event in (first, last):
            _checked(driver.cuEventDestroy(event))
        return elapsed

    def wait(self, stream):
        """Wait for all that was asked of a stream."""
        stream.sync()

    def launch(self, stream, name, kind, arguments, blocks, written=None, entries="gradient", shared=0):
        """Run a kernel of `kernels` on ``blocks`` blocks, some time."""
        from cuda.core import launch

        kernel = self._kernel(name, kind, written, entries)
        launch(stream, _configuration(blocks, kind.threads * kind.rows, shared), kernel, *_flat(arguments))

    @functools.cache  # noqa: B019  there is one machine, and it stays
    def _kernel(self, name, kind, written, entries):
        from cuda.bindings import driver
        from cuda.core import ObjectCode

        cubin = compiler.machine_code(compiler.Code(name, kind, written, entries, self.architecture))
        kernel = ObjectCode.from_cubin(cubin).get_kernel(compiler.entry_of(cubin))
        most = kernels_shared_bytes(kind)
        if most > _PLAIN_SHARED:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuKernelSetAttribute(attribute, most, kernel.handle, self._device.device_id))
        return kernel


def kernels_shared_bytes(kind):
    """The most dynamic shared memory a kernel of this kind is launched with."""
    from fastxent.backends.cuda.kernels import shared_bytes

    return shared_bytes(kind, True)


@functools.lru_cache(maxsize=4096)
def _configuration(blocks, threads, shared):
    from cuda.core import LaunchConfig

    return LaunchConfig(grid=(blocks,), block=(threads,), shmem_size=shared)


def _flat(arguments):
    """The numbers of named tuples, one after the other."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from argument
        else:
            yield argument
