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


def command(*args, script: Path = ROOT/'tests/narrow.py') -> list[str]:
    """What starts a run, with a narrow network if not said otherwise."""
    return [sys.executable, str(script), *map(str, args)]


def run_options(data: Path, out: Path, epochs: int = 6) -> list:
    return ['--data', data, '--out', out, '--epochs', epochs, '--bs', 8, '--lr-min', 1e-4, '--lr-max', 1e-3]


def kill_and_resume(data: Path, out: Path, kills: int, rng: random.Random) -> tuple[int, int]:
    """Starts a run in `out`, kills it `kills` times at random moments of its training and lets it end.

    Returns how often it was killed, and how many epochs were found done after the kills, together.
    """
    args, done = run_options(data, out), 0
    for killed in range(kills):
        process = subprocess.Popen(command(*args), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for line in process.stdout:
            if line.startswith('epoch'): break  # the table's head: training begins
        time.sleep(rng.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (out/'model.pth').exists(): return killed, done  # it was faster
        if (out/'checkpoint.pth').exists(): args = ['--resume', out]
        done += len(pd.read_csv(out/'history.csv'))
    subprocess.run(command(*args), check=True, stdout=subprocess.DEVNULL)
    return kills, done


def differences(one: Path, other: Path) -> list[str]:
    """The names of the results that differ between two finished runs."""
    files = [name for name in SAME if (one/name).read_bytes() != (other/name).read_bytes()]
    histories = [pd.read_csv(out/'history.csv').drop(columns='seconds') for out in (one, other)]
    return files + ([] if histories[0].equals(histories[1]) else ['history.csv'])


def kill_runs(data: Path, whole: Path, folder: Path, kills: int, rng: random.Random) -> list[str]:
    """Kills runs in `folder`, up to three times each and `kills` times in all; returns what differs from `whole`."""
    left, runs, bad = kills, 0, []
    while left > 0 and not bad:
        n, found = kill_and_resume(data, folder/f'{runs}', min(left, 3), rng)
        bad = differences(whole, folder/f'{runs}')
        print(f'run {runs}: {n} kills, {found} epochs found done, differs in {bad or "nothing"}', flush=True)
        left, runs = left - n, runs + 1
    return bad


@call_parse
def main(
    kills: int = 20,  # how many kills, over as many runs as they take
    seed: int = 0,  # of the moments
):
    "Kill and resume runs, three kills each, and compare them with an uninterrupted one."
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        data = make_folder(tmp/'data')
        subprocess.run(command(*run_options(data, tmp/'whole')), check=True, stdout=subprocess.DEVNULL)
        if kill_runs(data, tmp/'whole', tmp, kills, random.Random(seed)): sys.exit(1)
    print(f'{kills} kills, and every run ended like the uninterrupted one')
