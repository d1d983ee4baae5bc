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
from conftest import ROOT, SIX_EPOCHS, args, make_folder
from fastcore.script import call_parse

SAME = 'model.pth', 'schedule.csv', 'misclassified.csv'  # and history.csv, but for the column of seconds


def command(**options) -> list[str]:
    """What starts a run with a narrow network."""
    return [sys.executable, str(ROOT/'tests/narrow.py'), *args(**options)]


def kill_and_resume(data: Path, out: Path, kills: int, rng: random.Random) -> int:
    """Starts a run in `out`, kills it `kills` times at random moments of its training and lets it end.

    Returns how often it was killed: less if it was faster.
    """
    options = dict(data=data, out=out, **SIX_EPOCHS)
    for killed in range(kills):
        process = subprocess.Popen(command(**options), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for line in process.stdout:
            if line.startswith('LRMIN'): break  # training begins
        time.sleep(rng.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (out/'model.pth').exists(): return killed
        if (out/'checkpoint.pth').exists(): options = dict(resume=out)
    subprocess.run(command(**options), check=True, stdout=subprocess.DEVNULL)
    return kills


def differences(one: Path, other: Path) -> list[str]:
    """The names of the results that differ between two finished runs."""
    files = [name for name in SAME if (one/name).read_bytes() != (other/name).read_bytes()]
    histories = [pd.read_csv(out/'history.csv').drop(columns='seconds') for out in (one, other)]
    return files + ([] if histories[0].equals(histories[1]) else ['history.csv'])


def kill_runs(data: Path, whole: Path, folder: Path, kills: int, rng: random.Random) -> list[str]:
    """Kills runs in `folder`, up to three times each and `kills` times in all; returns what differs from `whole`."""
    left, runs, bad = kills, 0, []
    while left > 0 and not bad:
        left -= (n := kill_and_resume(data, folder/f'{runs}', min(left, 3), rng))
        bad = differences(whole, folder/f'{runs}')
        print(f'run {runs}: {n} kills, differs in {bad or "nothing"}', flush=True)
        runs += 1
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
        subprocess.run(command(data=data, out=tmp/'whole', **SIX_EPOCHS), check=True, stdout=subprocess.DEVNULL)
        if kill_runs(data, tmp/'whole', tmp, kills, random.Random(seed)): sys.exit(1)
    print(f'{kills} kills, and every run ended like the uninterrupted one')
