"""Both ends of what is supported: ``nox`` runs a telling part of the tests on each, ``nox -s mutation`` the mutants."""

from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "uv|venv"
nox.options.sessions = ["lowest", "highest", "free_threaded"]

TELLING = ["tests/test_reduction.py", "tests/test_losses.py", "tests/test_scoring.py", "tests/test_threads.py"]
FILES = ["tests/test_io.py", "tests/test_npy.py", "tests/test_runs.py", "tests/test_cli.py"]
FLOAT32 = "not float64 and not float16 and not float8"  # the kernels are compiled anew for each version


def _check(session, *tests):
    session.run("python", "-c", "import numba, numpy, sys; print(sys.version, numba.__version__, numpy.__version__)")
    kernels = str(Path(session.create_tmp()) / "kernels")
    session.run("pytest", "-q", "-k", FLOAT32, *tests, *session.posargs, env={"FASTXENT_CACHE_DIR": kernels})


@nox.session(python="3.11")
def lowest(session):
    """The oldest Python, Numba and NumPy."""
    session.install("-e", ".[test]", "numba==0.61.2", "numpy==2.0.0")
    _check(session, *TELLING, *FILES)


@nox.session(python="3.13")
def highest(session):
    """The newest of all."""
    session.install("--upgrade", "-e", ".[test]")
    _check(session, *TELLING, *FILES)


@nox.session(python="3.14t")
def free_threaded(session):
    """Without a global interpreter lock: it stays off, and threads calling at once get the right numbers."""
    session.install("-e", ".", "pytest", "hypothesis", "mpmath", "scipy")
    _check(session, *TELLING)
    session.run("pytest", "-q", "tests/test_cpu.py", "-k", "threads", *session.posargs)


@nox.session(python="3.11")
def mutation(session):
    """Sixty mutants against the battery, for an hour or so."""
    session.install("-e", ".[test,mutation]")
    session.run("python", "-m", "tests.mutation", *session.posargs)
