#!/usr/bin/env python
"""How long one training batch takes, in a process of its own.

    python benchmarks/batch.py plain DATA      # an eager float32 step of a network written without ours, with Adam
    python benchmarks/batch.py learner DATA    # through the `Learner`, with everything that it does in a fit
    python benchmarks/batch.py learner DATA --root ../earlier    # the same of the earlier version in that folder

Prints the median seconds of a batch and the peak memory of the process in MiB as JSON. `speed.py` runs them in turn.
"""
import argparse
import json
import re
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

WARM_UP = 3  # batches that are not counted: the first ones ask for memory and make oneDNN choose its kernels


class Plain(nn.Module):
    """The assignment's network as one would write it first, for comparison: (N, 3, 32, 32) → logits (N, 10)."""

    def __init__(self):
        super().__init__()
        widths = [(3, 64), (64, 128), (128, 128), (128, 128), (128, 256), (256, 512), (512, 512), (512, 512)]
        self.convs = nn.ModuleList(nn.Conv2d(*c, 3, padding=1, bias=False) for c in widths)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for _, c in widths)
        self.fc = nn.Linear(512, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def stage(i, x, pool=True):
            x = self.convs[i](x)
            return F.relu(self.norms[i](F.max_pool2d(x, 2) if pool else x))

        x = stage(1, stage(0, x, pool=False))
        x = x + stage(3, stage(2, x, pool=False), pool=False)
        x = stage(5, stage(4, x))
        x = x + stage(7, stage(6, x, pool=False), pool=False)
        return self.fc(F.max_pool2d(x, 4).flatten(1))


def read_clock(x: torch.Tensor) -> float:
    """The time in seconds, after all work on the device of `x`."""
    if x.is_cuda: torch.cuda.synchronize(x.device)
    return time.perf_counter()


def time_plain(batch: tuple, n: int) -> list[float]:
    """The times at which each of `n` eager float32 steps on the same `batch` began."""
    x, y = (o.as_subclass(torch.Tensor) for o in batch)
    model = Plain().to(x.device)
    opt, times = torch.optim.Adam(model.parameters(), lr=1e-3), []
    for _ in range(n):
        times.append(read_clock(x))
        F.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    return times


def time_learner(learn, n: int) -> list[float]:
    """The times at which each of `n` or more batches of a fit of `learn` began; nothing is tested."""
    from fastai.callback.core import Callback, CancelValidException

    class Clock(Callback):
        order = -100  # before all others
        def before_batch(self): times.append(read_clock(self.x))
        def before_validate(self): raise CancelValidException

    times = []
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(-(-n // len(learn.dls.train)), 1e-3, cbs=Clock())
    return times


def peak_memory() -> int | None:
    """The most memory in MiB that this process has held; None where Linux does not say it."""
    status = Path('/proc/self/status')  # `getrusage` would include the parent's, up to the start of this program
    return int(re.search(r'VmHWM:\s+(\d+) kB', status.read_text())[1]) // 1024 if status.exists() else None


def main(args: list[str] | None = None):
    """Measure what the command line, or `args`, names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['plain', 'learner'])
    parser.add_argument('data', help='folder of images')
    parser.add_argument('--root', default=Path(__file__).parents[1], help='folder of the version to measure')
    parser.add_argument('--bs', type=int, default=512, help='batch size')
    parser.add_argument('--batches', type=int, default=8, help=f'that count; {WARM_UP} more come first')
    o = parser.parse_args(args)
    sys.path.insert(0, str(o.root))
    from train_fastai import get_dls, get_learner
    dls = get_dls(o.data, o.bs)
    n = WARM_UP + o.batches + 1
    if o.what == 'plain': times = time_plain(dls.one_batch(), n)
    else:
        with tempfile.TemporaryDirectory() as folder: times = time_learner(get_learner(dls, path=folder), n)
    seconds = [after - before for before, after in pairwise(times[WARM_UP:])]
    print(json.dumps(dict(seconds=median(seconds), peak_mib=peak_memory())))


if __name__ == '__main__': main()
