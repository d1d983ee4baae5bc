#!/usr/bin/env python
"""Run everything that needs a GPU within a given number of minutes.

    python -m experiments.gpu runs/gpu --minutes 9

First `ALONE`, whose times count, one command at a time; then several processes share the GPU and work through `PLAN`.
Every result is written as soon as it is known: if time runs out, only what was running is lost, and the same command
continues with the rest. An H100 manages about three runs a minute, however many processes share it.
"""
import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from fastcore.script import call_parse
from filelock import FileLock

ALONE = dict(  # arguments of Python, and the seconds after which the command is stopped
    tests=('-m pytest tests/test_cuda.py', 120),
    train=('-m experiments.repeat seeds --arms experiment --out {out}', float('inf')),
    speed=('benchmarks/speed.py --rounds 3 --out {out}/speed.json', 60))
PLAN = [  # a table, the share of the time after which none of its runs starts, and options of repeat.py
    ('seeds', 1, dict(arms='experiment')),
    ('ingredients', 0.6, {}),
    ('test', 0.85, dict(arms='best')),
    ('test', 1, dict(arms='plain', seeds='42,43')),
    ('schedule', 1, dict(seeds='42,43')),
    ('peak', 1, dict(seeds='42')),
    *(('finder', 1, dict(seeds='0,1,2,3,4,5,6,7,8,9', every=every, bs=bs))
      for every, bs in ((1, 512), (50, 8), (50, 32), (50, 64), (50, 512), (1, 8), (1, 32), (1, 64)))]
SEEDS = '42,43,44,45,46'  # where `PLAN` names no others


def run_alone(name: str, command: list[str], out: Path, seconds: float):
    """Run Python with the arguments `command`, for `seconds` at most and with its output in `out/name.log`."""
    start = time.perf_counter()
    with (out/f'{name}.log').open('w') as log:
        try: rc = subprocess.run([sys.executable, *command], stdout=log, stderr=log, timeout=max(seconds, 1)).returncode
        except subprocess.TimeoutExpired: rc = 'time is up'
    print(f'{name}: {rc}, {time.perf_counter() - start:.0f} s', flush=True)


def choose_best(out: Path) -> str:
    """The arm of `ingredients` whose averaged weights are best on held-out images, plain and by flip averaging.

    It is chosen once, among the arms with the most seeds, and kept in `best.txt`, so that all processes use the same.
    """
    from experiments.repeat import load_results
    file = out/'best.txt'
    with FileLock(out/'best.lock'):
        if not file.exists():
            runs = load_results(out)
            runs = runs[(runs.table == 'ingredients') & (runs.ema == 0.995)]  # the middle one of the decays
            arms = (runs.accuracy + runs.accuracy_flip).groupby(runs.arm).agg(['size', 'mean'])
            file.write_text(arms[arms['size'] == arms['size'].max()]['mean'].idxmax())
        return file.read_text()


def work(number: int, out: Path, data: str | None, deadline: float):
    """Work through `PLAN` as one of several processes, until `deadline` by `time.time()`."""
    from experiments import repeat
    start, log = time.time(), (out/f'worker-{number}.log').open('w')
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        for table, share, options in PLAN:
            minutes = (start + share * (deadline - start) - time.time()) / 60
            if minutes < 0: continue
            print(f'{table} {options}, {minutes:.1f} minutes left', flush=True)
            try:
                options = dict(seeds=SEEDS) | options
                if options.get('arms') == 'best': options['arms'] = choose_best(out)
                repeat.main(table, data=data, out=out, no_checkpoint=True, minutes=minutes, **options)
            except (Exception, SystemExit) as e: print(f'{table}: {e!r}', flush=True)  # the rest is still wanted


@call_parse
def main(
    out: str,  # folder for the results
    data: str = None,  # folder of images, as for train_fastai.py; default: fastai's CIFAR-10
    minutes: float = 9,  # start nothing after this many minutes
    workers: int = 5,  # processes that share the GPU
):
    "Run everything that needs a GPU and write the results to a folder."
    out, deadline = Path(out), time.time() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    for name, (command, seconds) in ALONE.items():
        command = [o.format(out=out) for o in command.split()]
        if data and name != 'tests': command += ['--data', data]
        run_alone(name, command, out, min(seconds, deadline - time.time()))
    os.environ.setdefault('OMP_NUM_THREADS', '2')
    with ProcessPoolExecutor(workers, multiprocessing.get_context('spawn')) as pool:
        for done in [pool.submit(work, i, out, data, deadline) for i in range(workers)]: done.result()
