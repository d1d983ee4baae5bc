"""Kills runs with SIGKILL at random moments, resumes them and compares the end with a run that was left alone.

    python tests/kill.py --kills 20
"""
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from conftest import ROOT, make_folder
from fastcore.script import call_parse

SAME = 'model.pth', 'schedule.csv', 'misclassified.csv'  # and history.csv, but for the column of seconds


def command(*args) -> list[str]: return [sys.executable, str(ROOT/'train_fastai.py'), *map(str, args)]


def run_options(data: Path, out: Path, epochs: int = 6) -> list:
    return ['--data', data, '--out', out, '--epochs', epochs, '--bs', 8, '--lr-min', 1e-4, '--lr-max', 1e-3]


def kill_and_resume(data: Path, out: Path, kills: int, rng: random.Random) -> int:
    """Starts a run in `out`, kills it `kills` times at random moments of its training and lets it end.

    Returns how many epochs it found done at its starts after a kill, together.
    """
    args, done = run_options(data, out), 0
    for _ in range(kills):
        process = subprocess.Popen(command(*args), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for line in process.stdout:
            if line.startswith('epoch'): break  # the table's head: training begins
        time.sleep(rng.uniform(0, 2.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (out/'model.pth').exists(): return done  # it was faster
        if (out/'checkpoint.pth').exists(): args = ['--resume', out]
        done += len(pd.read_csv(out/'history.csv'))
    subprocess.run(command(*args), check=True, stdout=subprocess.DEVNULL)
    return done


def differences(one: Path, other: Path) -> list[str]:
    """The names of the results that differ between two finished runs."""
    files = [name for name in SAME if (one/name).read_bytes() != (other/name).read_bytes()]
    histories = [pd.read_csv(out/'history.csv').drop(columns='seconds') for out in (one, other)]
    return files + ([] if histories[0].equals(histories[1]) else ['history.csv'])


@call_parse
def main(
    kills: int = 20,  # how many kills, over as many runs as they take
    seed: int = 0,  # of the moments
):
    "Kill and resume runs, three kills each, and compare them with an uninterrupted one."
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        data = make_folder(tmp/'data')
        subprocess.run(command(*run_options(data, tmp/'whole')), check=True, stdout=subprocess.DEVNULL)
        left, runs = kills, 0
        while left > 0:
            n = min(left, 3)
            found = kill_and_resume(data, tmp/f'{runs}', n, rng)
            bad = differences(tmp/'whole', tmp/f'{runs}')
            print(f'run {runs}: {n} kills, {found} epochs found done, differs in {bad or "nothing"}', flush=True)
            if bad: sys.exit(1)
            left, runs = left - n, runs + 1
    print(f'{kills} kills in {runs} runs, every one ended like the uninterrupted run')
