"""A real Dask cluster for tests: `dask scheduler` and `dask worker` as processes on the loopback address."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path


@contextlib.contextmanager
def scheduler(folder):
    """``process, address`` of a scheduler."""
    file = Path(folder) / "scheduler.json"
    command = [sys.executable, "-m", "dask", "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    process = _start([*command, "--scheduler-file", str(file)], Path(folder) / "scheduler.log")
    try:
        address = None
        while address is None:
            assert process.poll() is None, (Path(folder) / "scheduler.log").read_text()
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
                address = json.loads(file.read_text())["address"]
            time.sleep(0.05)
        yield process, address
    finally:
        end(process)


@contextlib.contextmanager
def worker(folder, address, name, *options, **environment):
    """The process of a worker with one thread; without a nanny, so that a kill is a death."""
    command = [sys.executable, "-m", "dask", "worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    command += ["--name", name, "--local-directory", str(Path(folder) / name), *options]
    process = _start(command, Path(folder) / f"{name}.log", environment)
    try:
        yield process
    finally:
        end(process)


def _start(command, log, environment=None):
    with Path(log).open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | (environment or {}))


def end(process):
    if process.poll() is None:
        process.kill()
    process.wait()
