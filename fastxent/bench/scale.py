"""What a cluster costs: seconds a task of a real scheduler, bytes a graph, and runs on 1, 2 and 4 workers.

``python -m fastxent.bench.scale`` prints a line for each measurement; docs/scale.md says what follows from them.
"""

import pickle
import tempfile
import time
from pathlib import Path

import click
import numpy as np


def generate(folder, gigabytes, classes=32_000):
    """``logits, targets``: files of so many gigabytes of float32 logits."""
    rows = int(gigabytes * 1e9) // (4 * classes)
    rng = np.random.default_rng(0)
    noise = 4 * rng.standard_normal((min(rows, 500), classes), dtype=np.float32)
    logits, targets = Path(folder) / "logits.npy", Path(folder) / "targets.npy"
    with logits.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, classes)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, rows, len(noise)):
            np.roll(noise, start, axis=1)[: rows - start].tofile(file)
    np.save(targets, rng.integers(0, classes, rows))
    return logits, targets


def time_runs(logits, targets, workers, rounds=3):
    """Median seconds of a scoring run in this process, None, and on each number of ``workers``; starting them apart."""
    import contextlib

    from fastxent import distributed, runs

    seconds = {}
    for number in (None, *workers):
        how = contextlib.nullcontext() if number is None else distributed.local(number)
        with how as cluster:
            times = []
            for _ in range(rounds + 1):
                start = time.perf_counter()
                runs.score_file(
                    logits, targets, logits.with_name("scores.npy"), cluster=cluster, chunk_rows=250, replace=True
                )
                times.append(time.perf_counter() - start)
        seconds[number] = float(np.median(times[1:]))
    return seconds


def time_tasks(tasks, workers=2):
    """``tasks, seconds, graph bytes`` of a loss over tiny blocks on a real scheduler and worker processes."""
    import dask
    import dask.array as da
    import distributed

    from fastxent import dask as arrays

    rows = tasks // 4  # two blocks of classes each, their merge, and the loss of the row
    with (
        distributed.LocalCluster(
            n_workers=workers, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=50
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        arrays.cross_entropy(da.zeros((4, 8), chunks=(1, 4)), np.zeros(4, int)).compute(scheduler=client)
        logits, targets = da.zeros((rows, 8), chunks=(1, 4)), da.zeros(rows, dtype=int, chunks=1)
        (loss,) = dask.optimize(arrays.cross_entropy(logits, targets, reduction="sum"))
        count, size = len(dict(loss.__dask_graph__())), len(pickle.dumps(loss.__dask_graph__()))
        start = time.perf_counter()
        total = client.compute(loss).result()
        seconds = time.perf_counter() - start
    if not np.isclose(total, rows * np.log(8)):
        raise AssertionError(f"the loss of {rows} rows is wrong: {total}")
    return count, seconds, size


@click.command()
@click.option("--gigabytes", type=float, default=1.0, show_default=True)
@click.option("--tasks", type=int, default=100_000, show_default=True)
def main(gigabytes, tasks):
    """Measure runs on 1, 2 and 4 workers, then tasks."""
    with tempfile.TemporaryDirectory() as folder:
        logits, targets = generate(folder, gigabytes)
        for number, seconds in time_runs(logits, targets, (1, 2, 4)).items():
            name = "one process" if number is None else f"{number} workers"
            click.echo(f"{name}: {seconds:.2f} s, {gigabytes / seconds:.2f} GB/s")
    count, seconds, size = time_tasks(tasks)
    click.echo(f"{count} tasks: {seconds:.1f} s, {1e6 * seconds / count:.0f} us a task, graph {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
