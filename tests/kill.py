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


def start_and_kill(data: Path, out: Path, rng: random.Random, **resume) -> dict | None:
    """Starts or resumes a run in `out`, kills it in training, and returns what resumes it; None if it was faster."""
    options = resume or dict(data=data, out=out, **SIX_EPOCHS)
    process = subprocess.Popen(command(**options), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if line.startswith('LRMIN'): break  # training begins
    time.sleep(rng.uniform(0, 1))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if (out/'model.pth').exists(): return None
    return dict(resume=out) if (out/'checkpoint.pth').exists() else options


def differences(one: Path, other: Path) -> list[str]:
    """The names of the results that differ between two finished runs."""
    files = [name for name in SAME if (one/name).read_bytes() != (other/name).read_bytes()]
    histories = [pd.read_csv(out/'history.csv').drop(columns='seconds') for out in (one, other)]
    return files + ([] if histories[0].equals(histories[1]) else ['history.csv'])


@call_parse
def main(
    kills: int = 20,  # how many kills, three a run
):
    "Kill and resume runs, and compare them with an uninterrupted one."
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        data = make_folder(tmp/'data')
        subprocess.run(command(data=data, out=tmp/'whole', **SIX_EPOCHS), check=True, stdout=subprocess.DEVNULL)
        for run in range(-(-kills // 3)):
            out, options = tmp/f'{run}', {}
            for _ in range(min(3, kills - 3 * run)):
                if options is not None: options = start_and_kill(data, out, rng, **options)
            if options: subprocess.run(command(**options), check=True, stdout=subprocess.DEVNULL)
            print(f'run {run}: differs in {(bad := differences(tmp/"whole", out)) or "nothing"}', flush=True)
            if bad: sys.exit(1)
    print(f'{kills} kills, and every run ended like the uninterrupted one')
