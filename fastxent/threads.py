"""How many threads the CPU kernels use: Numba's own number, so that both agree. No result depends on it."""

import contextlib
import operator
import threading


def get_num_threads() -> int:
    """The number of threads the CPU kernels use when called from this thread.

    Returns
    -------
    int

    Examples
    --------
    >>> import fastxent
    >>> fastxent.get_num_threads() >= 1
    True
    """
    import numba

    return numba.get_num_threads()


def set_num_threads(threads: int) -> None:
    """Use ``threads`` threads in CPU kernels called from this thread; the same bits come out for any number.

    Parameters
    ----------
    threads : int
        From 1 to the number Numba was started with: the cores, or NUMBA_NUM_THREADS.

    Raises
    ------
    TypeError, ValueError
        If it is not such a number.

    Examples
    --------
    >>> import fastxent
    >>> fastxent.set_num_threads(fastxent.get_num_threads())
    """
    import numba

    try:
        number = operator.index(threads)
    except TypeError:
        raise TypeError(f"threads must be an integer, not {threads!r}") from None
    most = numba.config.NUMBA_NUM_THREADS
    if not 1 <= number <= most:
        raise ValueError(f"threads must lie in [1, {most}]; got {number}")
    numba.set_num_threads(number)


@contextlib.contextmanager
def one_in_a_worker():
    """One thread for kernels called in this block, unless it runs in the main thread: a pool's workers are as many as
    the cores, and each must not start so many threads again.
    """
    if threading.current_thread() is threading.main_thread():
        yield
        return
    before = get_num_threads()
    set_num_threads(1)
    try:
        yield
    finally:
        set_num_threads(before)
