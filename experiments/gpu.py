#!/usr/bin/env python
"""Run everything that needs a GPU within a given number of minutes.

    python -m experiments.gpu runs/gpu --minutes 9

First `ALONE`, whose times count, one command at a time. Then several processes share the GPU: they compare recipes on
held-out images, and run the best of them and the default on all images, under new seeds, with the test set.
Every result is written as soon as it is known: if time runs out, only what was running is lost, and the same command
continues with the rest. An H100 manages about three runs a minute, however many processes share it, so all 28 take ten
minutes after the first five.
"""
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from fastcore.script import call_parse
from filelock import FileLock

ALONE = dict(  # arguments of Python, and the seconds after which the command is stopped
    tests=('-m pytest tests/test_cuda.py', 120),
    train=('-m experiments.repeat seeds --arms experiment --out {out}', float('inf')),
    speed=('benchmarks/speed.py --rounds 3 --out {out}/speed.json', 90))
BASES = 'default', 'lr-max-half-wd-0.2'
CHANGES = {  # of the better base: more smoothing, alternating flips, both, twice its weight decay
    'default': ('smoothing-0.2', 'alternating-flips', 'alternating-flips-smoothing-0.2', 'wd-0.2'),
    'lr-max-half-wd-0.2': ('lr-max-half-wd-0.2-smoothing-0.2', 'lr-max-half-wd-0.2-alternating-flips',
                           'lr-max-half-wd-0.2-alternating-flips-smoothing-0.2', 'lr-max-half-wd-0.4')}
HELD_OUT, TESTED = (42, 43, 44), (47, 48, 49, 50, 51)  # seeds; those of the published test figures are 42 to 46
SHARE = 0.65  # of the time that is left for both: then no run on held-out images starts any more


def run_alone(name: str, command: list[str], out: Path, seconds: float):
    """Run Python with the arguments `command`, for `seconds` at most and with its output in `out/name.log`."""
    start = time.perf_counter()
    with (out/f'{name}.log').open('w') as log:
        process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, start_new_session=True)
        try: rc = process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            process.wait()
            rc = 'time is up'
    print(f'{name}: {rc}, {time.perf_counter() - start:.0f} s', flush=True)


def choose_best(out: Path, name: str, arms: tuple[str, ...], seeds: tuple[int, ...], deadline: float) -> str:
    """The best of `arms` by the mean accuracy on held-out images of the weights that the program keeps (decay 0.99).

    Waits until all `arms` have all `seeds`, or for `deadline`; then it chooses among those with the most seeds. All
    processes with this `deadline` make the same choice. Raises `ValueError` if there is nothing to choose from.
    """
    from experiments.repeat import load_results
    file = out/f'{name}-{deadline:.0f}.txt'
    while True:
        with FileLock(out/f'{name}.lock'):
            if file.exists(): return file.read_text()
            runs = load_results(out)
            runs = runs[(runs.table == 'ingredients') & (runs.ema == 0.99)]
            runs = runs[runs.arm.isin(arms) & runs.seed.isin(seeds)]
            if len(runs) == len(arms) * len(seeds) or time.time() > deadline:
                found = runs.groupby('arm').accuracy.agg(['size', 'mean'])
                file.write_text(found[found['size'] == found['size'].max()]['mean'].idxmax())
        time.sleep(1)


def work(number: int, out: Path, data: str | None, compare_until: float, deadline: float):
    """Compare recipes on held-out images, then test the best, as one of several processes; times as of `time.time`."""
    from experiments import repeat

    def run(table: str, arms: tuple[str, ...], seeds: tuple[int, ...], until: float):
        minutes = (until - time.time()) / 60
        if minutes < 0: return
        print(f'{table} {arms} {seeds}, {minutes:.1f} minutes left', flush=True)
        try: repeat.main(table, arms=','.join(arms), seeds=','.join(map(str, seeds)), data=data, out=out,
                         no_checkpoint=True, minutes=minutes)
        except (Exception, SystemExit): traceback.print_exc(file=log)  # the rest is still wanted

    log = (out/f'worker-{number}.log').open('w')
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            run('ingredients', BASES, HELD_OUT[:1], compare_until)
            arms = BASES + CHANGES[choose_best(out, 'base', BASES, HELD_OUT[:1], compare_until)]
            run('ingredients', arms, HELD_OUT, compare_until)
            best = choose_best(out, 'best', arms, HELD_OUT, compare_until)
            run('test', tuple(dict.fromkeys(('default', best))), TESTED, deadline)
        except ValueError: traceback.print_exc(file=log)


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
    until = time.time() + SHARE * (deadline - time.time()), deadline
    with ProcessPoolExecutor(workers, multiprocessing.get_context('spawn')) as pool:
        for done in [pool.submit(work, i, out, data, *until) for i in range(workers)]: done.result()
