"""`fastxent score` as a process of its own: starting it, watching it, and what it has in memory."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMAND = [sys.executable, "-m", "fastxent"]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in what a shell starts in the background; it is inherited
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run(*arguments, **options):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, **options)


def paths(folder):
    return folder / "logits.npy", folder / "targets.npy", "-o", folder / "scores.npy"


def anonymous_megabytes(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def start(folder, *options, logits=None):
    return start_on([paths(folder)[0] if logits is None else logits], folder, *options)


def start_on(logits, folder, *options):
    """A run over several files of logits, once it writes or has ended."""
    files = (*logits, *paths(folder)[1:])
    process = subprocess.Popen(
        [*COMMAND, "score", *map(str, files), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (folder / "scores.npy.part").exists() and process.poll() is None:
        time.sleep(0.001)
    return process


def journalled(folder):
    """Rows done by the last whole line of the journal; 0 without one."""
    try:
        lines = (folder / "scores.npy.journal").read_bytes().split(b"\n")[1:-1]
    except FileNotFoundError:
        return 0
    return json.loads(lines[-1])["done"] if lines else 0


def wait_until_done(folder, process, rows):
    """Wait for so many rows in the journal."""
    while journalled(folder) < rows:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


def memory_of(process):
    """Megabytes of anonymous memory of a run when it begins to write, and at its highest; it must end well."""
    first = highest = anonymous_megabytes(process.pid)
    while process.poll() is None:
        try:
            highest = max(highest, anonymous_megabytes(process.pid))
        except (StopIteration, FileNotFoundError, ProcessLookupError):
            break
        time.sleep(0.005)
    process.communicate()
    assert process.returncode == 0
    return first, highest
