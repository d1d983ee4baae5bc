#!/usr/bin/env python
"""How long a training batch takes: plain PyTorch, what each change gains, and the learner inside `fast`, side by side.

    python experiments/speed.py                               # every row
    python experiments/speed.py --only batch                  # a plain step, and all that a fit does
    python experiments/speed.py --only batch --before ../old  # and what a fit does in another checkout of this project
    OMP_NUM_THREADS=1 python experiments/speed.py             # on one thread; and, as if there were AVX2 alone:
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python experiments/speed.py

In every round each row is measured once, in a process of its own. A ratio is the time of the plain step over that of
the row in the same round: the median over the rounds, with the lowest and the highest.
"""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # last: PYTHONPATH may name another checkout
import lab  # isort: skip  # noqa: F401, silences a warning of fastai's import

import contextlib
import pkgutil
import subprocess
from typing import Annotated

from fastai.vision.all import *

from arch import ResNet
from lab import speed
from lab.sources import get_data
from train_fastai import get_dls, get_learner

WARM_UP = 3  # batches that are not counted: the first ones ask for memory and make oneDNN choose its kernels
FIT, FIT_BEFORE = 'a batch of a fit in `fast`', 'the same, before'


def read_clock(x: Tensor) -> float:
    """The time in seconds, after all work on the device of `x`."""
    if x.is_cuda: torch.cuda.synchronize(x.device)
    return time.perf_counter()


def time_steps(dls: DataLoaders, n: int, precision: str = 'fp32', memory_format=torch.contiguous_format, fused=None,
               conv: str | None = None, memory: Callable = contextlib.nullcontext) -> list[float]:
    """When each of `n` plain steps on one batch began; `conv` names a class for all convolutions but the first."""
    x, y = (o.as_subclass(Tensor) for o in dls.one_batch())
    model, x = ResNet().to(x.device, memory_format=memory_format), x.contiguous(memory_format=memory_format)
    _, *convs = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    for m in convs if conv else (): m.__class__ = pkgutil.resolve_name(conv)
    opt, times = torch.optim.AdamW(model.parameters(), fused=fused), []
    with memory():
        for _ in range(n):
            times.append(read_clock(x))
            dtype = torch.float16 if precision == 'fp16' else torch.bfloat16
            with torch.autocast(x.device.type, dtype, enabled=precision != 'fp32'):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()
    return times


def time_fit(dls: DataLoaders, n: int, precision: str) -> list[float]:
    """When each of `n` batches of a fit in `fast` began."""
    class Clock(Callback):
        order = -100  # before all others
        def before_batch(self):
            times.append(read_clock(self.x))
            if len(times) == n: raise CancelFitException

    times, fast = [], getattr(speed, 'fast', contextlib.nullcontext)  # earlier learners were fast by themselves
    with tempfile.TemporaryDirectory() as folder:
        learn = get_learner(dls, precision=precision, path=folder)
        with fast(learn), learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(-(-n // len(dls.train)), 1e-3, cbs=Clock())
    return times


def list_rows(precision: str) -> dict[str, Callable]:
    """What measures each row, a function of loaders and the number of batches. A step has all changes above it."""
    cpu, amx, rows, done = default_device().type == 'cpu', torch.cpu.get_capabilities().get('amx_bf16'), {}, {}
    for name, applies, change in (
            ('plain float32', True, {}),
            ('+ channels-last', True, dict(memory_format=torch.channels_last)),
            (f'+ {precision}', precision != 'fp32', dict(precision=precision)),
            ('+ fused AdamW', True, dict(fused=True)),
            ('+ Winograd', cpu and precision == 'fp32', dict(conv='lab.winograd:WinogradConv2d')),
            ('+ small maps side by side', cpu and amx and precision == 'bf16', dict(conv='lab.speed:SideBySideConv2d')),
            ('+ freed memory kept', cpu, dict(memory=speed.keep_freed_memory))):
        if applies: rows[name] = partial(time_steps, **(done := done | change))
    return rows | dict.fromkeys((FIT, FIT_BEFORE), partial(time_fit, precision=precision))


def peak_memory() -> int | None:
    """The most memory in MiB that this process has held; None where Linux does not say it."""
    status = Path('/proc/self/status')  # `getrusage` would include the parent's, up to the start of this program
    return int(re.search(r'VmHWM:\s+(\d+) kB', status.read_text())[1]) // 1024 if status.exists() else None


@call_parse
def main(
    only: Annotated[str, dict(choices=['step', 'batch'])] = None,  # the steps, or a plain step beside a fit
    before: str = None,  # folder of another checkout, for one more row
    precision: Annotated[str, dict(choices=speed.PRECISIONS)] = 'auto',  # of the rows that are not float32
    rounds: int = 7,  # rounds of measurement
    batches: int = 8,  # that count, in each
    bs: int = 512,  # batch size
    data: str = None,  # folder of images, as for train_fastai.py; default: CIFAR-10
    out: str = 'runs/speed.csv',  # file for the table
    row: str = None,  # measure this one alone, in this process, and print it as JSON
):
    "Measure how long a training batch takes, print a table of ratios and write it as CSV."
    precision = speed.resolve_precision(precision, default_device())
    if row:
        dls = get_dls(get_data(data), bs, every=5)  # enough for the batches
        times = list_rows(precision)[row](dls, WARM_UP + batches + 1)
        seconds = float(np.median([after - start for start, after in itertools.pairwise(times[WARM_UP:])]))
        print(json.dumps(dict(seconds=seconds, peak_mib=peak_memory())))
        return
    from lab.results import find_commit  # not there in earlier versions
    *steps, _, _ = list_rows(precision)
    names, found = steps[:1] if only == 'batch' else steps, []
    if only != 'step': names += [FIT, FIT_BEFORE] if before else [FIT]
    for i, name in itertools.product(range(rounds), names):
        command = [sys.executable, __file__, f'--row={name}', f'--precision={precision}', f'--batches={batches}',
                   f'--bs={bs}', *([f'--data={data}'] if data else [])]
        env = os.environ | dict(PYTHONPATH=str(before if name == FIT_BEFORE else ROOT))
        printed = subprocess.check_output(command, env=env, text=True)
        found.append(dict(round=i, row=name) | json.loads(printed.splitlines()[-1]))
    found = pd.DataFrame(found).pivot(index='round', columns='row')
    ratios = found.seconds[names].rdiv(found.seconds[names[0]], axis=0)
    if before: ratios['seconds before / in `fast`'] = found.seconds[FIT_BEFORE] / found.seconds[FIT]
    table = pd.DataFrame(dict(ratio=ratios.median(), lowest=ratios.min(), highest=ratios.max())).rename_axis('row')
    table = table.assign(
        peak_mib=found.peak_mib.median(), precision=precision, batch_size=bs, rounds=rounds,
        device=speed.device_name(default_device()), torch=torch.__version__, commit=find_commit())
    print('| row | ratio | lowest to highest |\n|---|--:|--:|')
    for o in table.itertuples(): print(f'| {o.Index} | {o.ratio:.2f} | {o.lowest:.2f} to {o.highest:.2f} |')
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(out, float_format='%.4g')
