"""The GPU of this process, through cuda.core and the driver: memory, copies, launches.

The simulated machine in `simulated` has the same methods. Kernels are launched with whole numbers and float64 alone,
which the driver takes as they are: an address is a number like any other.
"""

import functools
import importlib.util

import numpy as np

from fastxent.backends.cuda import compiler
from fastxent.backends.cuda.layout import GPU
from fastxent.backends.cuda.plans import flat
from fastxent.backends.cuda.scheduler import NONSENSE

_GRANULE = 1 << 16  # bytes: small pieces are seldom allocated anew
_BLOCKS_EACH = 3  # that a multiprocessor holds, of most kernels
_LEAST_CUDA = 12  # that packages are made for
_KEPT = 16  # a pool of no more than such a part of the device's memory keeps what has been given back
_STREAMS_AT_ONCE = 8  # that may run kernels whose blocks wait for each other


@functools.cache
def why_unavailable():
    """Why there is no GPU to be used, in a sentence; None when there is one."""
    for package, name in (("numba_cuda", "numba-cuda"), ("cuda.core", "cuda-core"), ("cuda.bindings", "cuda-bindings")):
        if not _is_installed(package):
            return f"the package {name} is not installed: pip install fastxent[cuda13], or [cuda12] for older drivers"
    import cuda.bindings
    from cuda.bindings import driver

    try:
        (error,) = driver.cuInit(0)
    except RuntimeError:  # the library itself is not there
        return "there is no NVIDIA driver on this machine"
    if error != driver.CUresult.CUDA_SUCCESS:
        return f"the NVIDIA driver finds no GPU it can use ({error.name})"
    known, of_packages = _checked(driver.cuDriverGetVersion()) // 1000, int(cuda.bindings.__version__.partition(".")[0])
    if known < of_packages:
        mended = "pip install fastxent[cuda12]" if known == _LEAST_CUDA else "a newer driver is needed"
        return f"the NVIDIA driver knows CUDA {known}, the packages are of {of_packages}: {mended}"
    if not _checked(driver.cuDeviceGetCount()):
        return "the NVIDIA driver finds no GPU"
    named = driver.CUdevice_attribute
    *found, has_pools = (
        _checked(driver.cuDeviceGetAttribute(attribute, _checked(driver.cuDeviceGet(0))))
        for attribute in (
            named.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            named.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            named.CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED,
        )
    )
    if tuple(found) < compiler.LEAST:
        return "the first GPU has compute capability {}.{}; kernels need {}.{}".format(*found, *compiler.LEAST)
    return None if has_pools else "the first GPU, as this driver or a hypervisor has it, has no memory pools"


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


class _Current:
    """The GPU's context, on this thread's stack of them within a ``with``; what was there before is there after."""

    def __init__(self, context):
        from cuda.bindings import driver

        self._context, self._success = context, driver.CUresult.CUDA_SUCCESS
        self._push, self._pop = driver.cuCtxPushCurrent, driver.cuCtxPopCurrent

    def __enter__(self):
        answer = self._push(self._context)
        if answer[0] != self._success:
            _checked(answer)

    def __exit__(self, *error):
        answer = self._pop()
        if answer[0] != self._success:
            _checked(answer)


class Machine:
    """The first GPU the driver knows, or the one CUDA_VISIBLE_DEVICES names.

    All of its methods are for a thread on which it is ``current()``: another thread has no context, or one of another
    GPU that the caller works with.
    """

    layout = GPU
    checked = False

    def __init__(self):
        from cuda.bindings import driver
        from cuda.core import Device, launch

        self._launch = launch
        self._current = _Current(_checked(driver.cuDevicePrimaryCtxRetain(_checked(driver.cuDeviceGet(0)))))
        with self.current():
            self._device = Device(0)
            self._device.set_current()
            self._pool = self._pool_of(driver)
        self.architecture = tuple(self._device.compute_capability)
        self.name = self._device.name
        # blocks that are on the way at once, and those that may wait for each other: one a multiprocessor at least is
        self.at_once = self._device.properties.multiprocessor_count * _BLOCKS_EACH
        self.together = self._device.properties.multiprocessor_count // _STREAMS_AT_ONCE

    def _pool_of(self, driver):
        """A pool of memory for `take` that keeps what is given back while it is small: else all of it goes back to the
        system whenever anybody waits for the device, and the next call waits while it is mapped again.
        """
        about = driver.CUmemPoolProps()
        about.allocType = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        about.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        pool = _checked(driver.cuMemPoolCreate(about))
        total = _checked(driver.cuDeviceTotalMem(_checked(driver.cuDeviceGet(0))))
        threshold = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
        _checked(driver.cuMemPoolSetAttribute(pool, threshold, driver.cuuint64_t(total // _KEPT)))
        return pool

    def current(self):
        """A context manager within which this thread speaks to the GPU; it may stand within itself."""
        return self._current

    def new_stream(self):
        """A stream of its own."""
        return self._device.create_stream()

    @functools.cache  # noqa: B019  there is one machine, and it stays
    def stream_of(self, handle):
        """The stream of another library, by its handle; 0 and 1 are the default one, 2 that of each thread."""
        from cuda import core

        known = {0: core.LEGACY_DEFAULT_STREAM, 1: core.LEGACY_DEFAULT_STREAM, 2: core.PER_THREAD_DEFAULT_STREAM}
        return known[handle] if handle in known else core.Stream.from_handle(handle)

    def follow(self, stream, handle):
        """Let a stream wait for what has been asked of another, by its handle; the host does not wait."""
        from cuda.bindings import driver

        event = _checked(driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        _checked(driver.cuEventRecord(event, int(self.stream_of(handle).handle)))
        _checked(driver.cuStreamWaitEvent(int(stream.handle), event, 0))
        _checked(driver.cuEventDestroy(event))

    def mark(self, stream):
        """An event behind all that has been asked of a stream."""
        from cuda.bindings import driver

        event = _checked(driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        _checked(driver.cuEventRecord(event, int(stream.handle)))
        return event

    def wait_for(self, event):
        """Wait for what is before a mark."""
        from cuda.bindings import driver

        _checked(driver.cuEventSynchronize(event))

    def has_passed(self, event):
        """Whether the device is done with what is before a mark, which then is one no more."""
        from cuda.bindings import driver

        (status,) = driver.cuEventQuery(event)
        if status == driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        _checked((status,))
        _checked(driver.cuEventDestroy(event))
        return True

    def is_capturing(self, stream):
        """Whether what is asked of a stream goes into a CUDA graph."""
        from cuda.bindings import driver

        status = _checked(driver.cuStreamIsCapturing(int(stream.handle)))
        return status != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE

    def fits(self, held, size):
        """Whether so many bytes once allocated can hold ``size``."""
        return held >= size

    def roomy(self, size):
        """What is allocated for so many bytes, or some more."""
        return -(-max(size, 1) // _GRANULE) * _GRANULE

    def generous(self, size):
        """So many bytes that what grows step by step seldom has to."""
        return 1 << (size - 1).bit_length()

    def spoil(self, stream, address, size):
        """Where kernels are ``checked``, what one is to fill holds nonsense before, as it does in the simulator."""
        from cuda.bindings import driver

        if self.checked and size:
            _checked(driver.cuMemsetD8Async(address, NONSENSE, size, int(stream.handle)))

    def allocate(self, size):
        """So many bytes, or some more, of page-locked memory on the host and of the device's."""
        import ctypes

        from cuda.bindings import driver

        size = self.roomy(size)
        host = int(_checked(driver.cuMemAllocHost(size)))
        try:
            address = int(_checked(driver.cuMemAlloc(size)))
        except RuntimeError:
            _checked(driver.cuMemFreeHost(host))
            raise
        return np.frombuffer((ctypes.c_char * size).from_address(host), np.uint8), address

    def mapped(self, size):
        """So many bytes of page-locked memory on the host, and the address at which kernels reach them there. What
        several kernels' threads add to them at once adds up, but not with what the host writes.
        """
        import ctypes

        from cuda.bindings import driver

        host = int(_checked(driver.cuMemHostAlloc(size, driver.CU_MEMHOSTALLOC_DEVICEMAP)))
        address = int(_checked(driver.cuMemHostGetDevicePointer(host, 0)))
        return np.frombuffer((ctypes.c_char * size).from_address(host), np.uint8), address

    def release(self, array, address):
        """Give both back; nothing may be on the way."""
        from cuda.bindings import driver

        _checked(driver.cuMemFreeHost(array.ctypes.data))
        _checked(driver.cuMemFree(address))

    def take(self, stream, size):
        """So many bytes, or some more, of the device's memory from a stream's turn on; nothing waits."""
        from cuda.bindings import driver

        return int(_checked(driver.cuMemAllocFromPoolAsync(self.roomy(size), self._pool, int(stream.handle))))

    def take_zeros(self, stream, size):
        """The same, of zeros."""
        address = self.take(stream, size)
        self.clear(stream, address, self.roomy(size))
        return address

    def give(self, stream, address):
        """Give them back when it is the stream's turn."""
        from cuda.bindings import driver

        _checked(driver.cuMemFreeAsync(address, int(stream.handle)))

    def copy_to_device(self, stream, array, address):
        """Copy a contiguous array, some time."""
        from cuda.bindings import driver

        _checked(driver.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, int(stream.handle)))

    def copy_to_host(self, stream, array, address):
        """Copy to a contiguous array, some time."""
        from cuda.bindings import driver

        _checked(driver.cuMemcpyDtoHAsync(array.ctypes.data, address, array.nbytes, int(stream.handle)))

    def clear(self, stream, address, size):
        """So many bytes of zeros on the device, some time."""
        from cuda.bindings import driver

        _checked(driver.cuMemsetD8Async(address, 0, size, int(stream.handle)))

    def copy(self, stream, source, target, size):
        """Copy bytes from the device's memory to itself, some time."""
        from cuda.bindings import driver

        _checked(driver.cuMemcpyDtoDAsync(target, source, size, int(stream.handle)))

    def seconds(self, stream, body, before):
        """How long the stream is busy with what ``body`` asks of it, after what ``before`` does."""
        from cuda.bindings import driver

        first, last = _checked(driver.cuEventCreate(0)), _checked(driver.cuEventCreate(0))
        before()
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

    def launch(self, stream, name, kind, arguments, blocks, shared=0, **how):
        """Run a kernel on ``blocks`` blocks, some time; ``how`` are the other fields of its `compiler.Code`."""
        prepared = self.prepared(name, kind, arguments, blocks, shared, **how)
        self.run(stream, prepared, list(flat(arguments)))

    def prepared(self, name, kind, arguments, blocks, shared=0, **how):
        """What `run` takes to run a kernel with arguments like these."""
        return _configuration(blocks, kind.threads * kind.rows, shared), self._kernel(name, kind, **how)

    def run(self, stream, prepared, numbers):
        """Run a kernel with the numbers of its arguments, some time."""
        self._launch(stream, *prepared, *numbers)

    @functools.cache  # noqa: B019  there is one machine, and it stays
    def _kernel(self, name, kind, written=None, entries="gradient", ends="verb"):
        from cuda.bindings import driver
        from cuda.core import ObjectCode

        cubin = compiler.machine_code(compiler.Code(name, kind, written, entries, ends, self.architecture))
        kernel = ObjectCode.from_cubin(cubin).get_kernel(compiler.entry_of(cubin))
        # more than 48 KB has to be asked for
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuKernelSetAttribute(attribute, self.layout.shared, kernel.handle, self._device.device_id))
        return kernel


@functools.lru_cache(maxsize=4096)
def _configuration(blocks, threads, shared):
    from cuda.core import LaunchConfig

    return LaunchConfig(grid=(blocks,), block=(threads,), shmem_size=shared)
