#!/usr/bin/env python
"""Every measurement that needs a GPU, in one session of ten minutes: tests, the timed run, and repeated runs.

    python benchmarks/gpu.py results --minutes 9

In this order: the CUDA tests; `train_fastai.py` alone, timed; `speed.py`; then, in several processes that share the
GPU, the default under several seeds, the ingredients on held-out images, the best of them and the plain recipe with the
test set, the ends of the cycle, the peak, and the finder. Each result is in the folder as soon as it is there, so that
a cut-off loses only what was running; `recipes.py` and `results.py` explain the files. What is there is not done again.

On an H100 the GPU has room for about three runs a minute, however many processes share it.
"""
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import errors  # isort: skip  # noqa: F401, before fastai, whose import it silences

from fastcore.script import call_parse

ROOT = Path(__file__).parents[1]


def alone(name: str, command: list, out: Path, seconds: float):
    """Runs `command` by itself, with its output in `out/name.log`, for `seconds` at most."""
    start = time.perf_counter()
    with (out/f'{name}.log').open('w') as log:
        try: rc = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                 timeout=max(seconds, 1)).returncode
        except subprocess.TimeoutExpired: rc = 'time is up'
    print(f'{name}: {rc}, {time.perf_counter() - start:.0f} s', flush=True)


def folder_name(epochs: int, bs: int, **_) -> str:
    """As `recipes.py` names the folder of such runs."""
    return f'{epochs}' if bs == 512 else f'{epochs}-bs-{bs}'


def best_arm(folder: Path) -> str | None:
    """The best arm by held-out accuracy, the mean of plain and by flips, of the averaged weights (decay 0.995).

    It is chosen among those with the most seeds, once, and kept in the file `best.txt`: all processes go by it.
    """
    runs, choice = {}, folder/'best.txt'
    for file in folder.glob('*.json'):
        arm, average = file.stem.rpartition('-')[0], json.loads(file.read_text())['averages']['0.995']
        runs.setdefault(arm, []).append(average['accuracy'] + average['accuracy_flip'])
    if not runs: return None
    most = max(map(len, runs.values()))
    with contextlib.suppress(FileExistsError), choice.open('x') as f:
        f.write(max((a for a in runs if len(runs[a]) == most), key=lambda a: mean(runs[a])))
    return choice.read_text()


def work(i: int, workers: int, out: Path, arms: str | None, seeds: list[int], deadline: float, **size):
    """One process's share of the repeated runs, until `deadline`, by `time.time()`; `size` is data, epochs and bs."""
    import recipes
    start, folder = time.time(), out/'recipes/ingredients'/folder_name(**size)

    def repeat(table: str, seeds: list[int], share: float = 1., **options):
        left = (start + share * (deadline - start) - time.time()) / 60
        if left < 0 or not seeds: return
        print(f'{table} {options}, {left:.1f} minutes left', flush=True)
        options = dict(size, seeds=','.join(map(str, seeds)), no_checkpoint=True, minutes=left) | options
        try: recipes.main(table, out=out/'recipes', **options)
        except (Exception, SystemExit) as e: print(f'{table}: {e!r}', flush=True)  # the other tables are still wanted

    with (out/f'worker-{i}.log').open('w') as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        repeat('seeds', seeds[i::workers], arms='experiment')  # each locks its folder: no two processes have one seed
        repeat('ingredients', seeds, 0.6, arms=arms)
        if best := best_arm(folder): repeat('test', seeds, 0.85, arms=best)
        repeat('test', seeds[:2], arms='plain')
        repeat('schedule', seeds[:2])
        repeat('peak', seeds[:1])
        for every, bs in ((1, size['bs']), (50, 8), (50, 32), (50, 64), (50, size['bs']), (1, 8), (1, 32), (1, 64)):
            repeat('finder', [*range(10)], every=every, bs=bs)


@call_parse
def main(
    out: str,  # folder for the results
    data: str = None,  # folder of images, as for train_fastai.py; fastai's CIFAR-10 if left out
    minutes: float = 9,  # begin nothing after so many minutes
    workers: int = 5,  # processes that share the GPU
    arms: str = None,  # of the ingredients, separated by commas, the most interesting first; all if left out
    epochs: int = 24,  # of each run
    bs: int = 512,  # batch size
    seeds: str = '42,43,44,45,46',  # separated by commas
    no_tests: bool = False,  # leave out the CUDA tests
):
    "Run everything that wants a GPU and leave its results in a folder."
    start, out, seeds = time.time(), Path(out).absolute(), [int(s) for s in seeds.split(',')]
    out.mkdir(parents=True, exist_ok=True)
    deadline = start + 60 * minutes
    given = ['--data', data] if data else []
    if not no_tests: alone('tests', ['-m', 'pytest', 'tests/test_cuda.py'], out, min(120, deadline - time.time()))
    run = out/'recipes/seeds'/folder_name(epochs, bs)/f'experiment-{seeds[0]}'
    if not (run/'model.pth').exists():
        options = ['--out', run, '--epochs', epochs, '--bs', bs, '--seed', seeds[0]]
        alone('train', ['train_fastai.py', *options, *given], out, deadline - time.time())
    alone('speed', ['benchmarks/speed.py', '--rounds', 3, '--bs', bs, '--out', out/'speed.json', *given], out,
          min(60, deadline - time.time()))
    os.environ.setdefault('OMP_NUM_THREADS', '2')
    with ProcessPoolExecutor(workers, multiprocessing.get_context('spawn')) as pool:
        done = [pool.submit(work, i, workers, out, arms, seeds, deadline, data=data, epochs=epochs, bs=bs)
                for i in range(workers)]
        for o in done: o.result()
    print(f'{(time.time() - start) / 60:.1f} minutes')
