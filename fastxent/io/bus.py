"""The end of a process whose memory-mapped input shrinks under it.

Linux answers a look behind the end of a mapped file with SIGBUS, to the very instruction that looks. A handler in
Python would run after that instruction, that is never; so this one is machine code.
"""

import ctypes
import signal

import numba

_libc = ctypes.CDLL(None)
_write, _exit = _libc.write, _libc._exit
_write.argtypes, _write.restype = [ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t], ctypes.c_ssize_t
_exit.argtypes, _exit.restype = [ctypes.c_int], None
_libc.signal.argtypes, _libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
_kept: list[object] = []  # the message and the handler live as long as the process


def end_with(message, code):
    """Let SIGBUS write ``message``, bytes, to stderr and end the process with ``code``."""
    text = ctypes.create_string_buffer(message)
    address, size = ctypes.addressof(text), len(message)

    @numba.cfunc("void(int32)")
    def handler(number):
        _write(2, address, size)
        _exit(code)

    _kept.append((text, handler))
    _libc.signal(signal.SIGBUS, handler.address)
