#!/usr/bin/env python
"""What the parts of a run cost, as ratios of things measured side by side: in turn.

    python benchmarks/speed.py                                   # all four tables, in about a quarter of an hour
    python benchmarks/speed.py --only loader                     # one of loader, step, batch, epoch
    python benchmarks/speed.py --only batch --before ../earlier  # beside an earlier version, in that folder
    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/speed.py    # on one thread

Every round measures every row once; a figure is the median over the rounds.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parents[1]))
from lab import errors  # isort: skip  # noqa: F401, before fastai, whose import it silences

from fastai.vision.all import *
from fastcore.script import call_parse
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from arch import ResNet
from lab.learner import replaced
from lab.runs import Checkpoint
from lab.sources import get_data
from lab.speed import SideBySideConv2d, best_precision, device_name, keep_freed_memory, train_fast
from train_fastai import get_dls, get_learner

DTYPES = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)


def subset(path: Path, to: Path, train: int, test: int) -> Path:
    """A data folder `to` of links to the first images of each class in `path`: `train` and `test` a class."""
    for split, n in (('train', train), ('test', test)):
        for folder in (path/split).ls():
            (to/split/folder.name).mkdir(parents=True)
            for file in folder.ls().sorted()[:n]: (to/split/folder.name/file.name).symlink_to(file.resolve())
    return to


def in_turn(parts: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, float]:
    """The median seconds of each of `parts`, its work on the device included, over `rounds` after one to warm up."""
    times = {name: [] for name in parts}
    for _ in range(rounds + 1):
        for name, f in parts.items():
            start = time.perf_counter()
            f()
            if device.type == 'cuda': torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(t[1:])) for name, t in times.items()}


def repeat(n: int, f: Callable):
    for _ in range(n): f()


def loader(data: Path, bs: int, rounds: int, device: torch.device) -> dict:
    """A pass over the training images: decoded or taken from memory, augmented, normalised, on the device."""
    stock = {f'fastai, item by item, {n} workers':
             get_dls(data, bs, num_workers=n, device=device).train for n in (0, 2)}
    tfms = T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(*cifar_stats)])
    images = ImageFolder(data/'train', tfms)
    plain = {f'torchvision without cutout, {n} workers':
             torch.utils.data.DataLoader(images, bs, shuffle=True, drop_last=True, num_workers=n) for n in (0, 2)}
    ours = get_dls(data, bs, device=device).train
    passes = 10  # a single one is over too soon to time
    parts = {name: lambda dl=dl: [None for _ in dl] for name, dl in (stock | plain).items()}
    seconds = in_turn(parts | {'ours': lambda: repeat(passes, lambda: [None for _ in ours])}, rounds, device)
    seconds['ours'] /= passes
    best = min(seconds[name] for name in stock)
    return {name: dict(images_per_second=len(ours) * bs / s, ratio=best / s) for name, s in seconds.items()}


def step(data: Path, bs: int, rounds: int, device: torch.device) -> dict:
    """Training steps on a batch already in memory: plain float32, what each change adds, and the limit."""
    torch.backends.cudnn.benchmark = True
    precision = best_precision(device)
    x, y = (o.as_subclass(Tensor) for o in get_dls(data, bs, device=device).train.one_batch())

    def network(precision='fp32', memory_format=torch.contiguous_format, fused=None, side_by_side=False):
        model = ResNet().to(device, memory_format=memory_format)
        for conv in model.layer3.modules() if side_by_side else ():
            if isinstance(conv, nn.Conv2d): conv.__class__ = SideBySideConv2d
        images = x.contiguous(memory_format=memory_format)  # channels-last images would make any network channels-last
        opt = torch.optim.AdamW(model.parameters(), fused=fused)
        scaler = torch.amp.GradScaler(device.type, enabled=precision == 'fp16')

        def one_step():
            with torch.autocast(device.type, DTYPES[precision], enabled=precision != 'fp32'):
                loss = F.cross_entropy(model(images), y)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        return one_step

    steps = {'plain float32': network(), '+ channels-last': network(memory_format=torch.channels_last)}
    if precision != 'fp32': steps[f'+ {precision}'] = network(precision, torch.channels_last)
    steps['+ fused AdamW'] = network(precision, torch.channels_last, True)
    if device.type == 'cpu' and precision == 'bf16' and torch.cpu.get_capabilities().get('amx_bf16'):
        steps['+ small maps side by side'] = network(precision, torch.channels_last, True, True)
    *_, last = steps
    n = 2 if device.type == 'cpu' else 20
    parts = {name: partial(repeat, n, f) for name, f in steps.items()}
    if device.type == 'cpu' and sys.platform == 'linux':
        def with_memory_kept():
            with keep_freed_memory(): parts[last]()
        parts['+ freed memory kept'] = with_memory_kept
    a = torch.randn(4096, 4096, device=device, dtype=DTYPES[precision])
    seconds = in_turn(parts | {'matmul': lambda: repeat(n, lambda: a @ a)}, rounds, device)
    with FlopCounterMode(display=False) as flops: steps['plain float32']()
    flops_per_second = n * 2 * len(a)**3 / seconds.pop('matmul')
    seconds[f'limit: {precision} matrix products'] = n * flops.get_total_flops() / flops_per_second
    return {name: dict(images_per_second=n * bs / s, ratio=seconds['plain float32'] / s)
            for name, s in seconds.items()}


def run_batch(*args: str | Path) -> dict:
    """What `batch.py` measures in a process of its own."""
    command = [sys.executable, Path(__file__).with_name('batch.py'), *args]
    printed = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(printed.splitlines()[-1])


def batch(data: Path, bs: int, rounds: int, device: torch.device, before: str | None = None) -> dict:
    """A training batch in a process of its own: a float32 step written without our code, and all that a fit does."""
    calls = {'plain float32 step': ['plain'], 'through the Learner': ['learner']}
    if before: calls['through the Learner, before'] = ['learner', '--root', before]
    found = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (what, *options) in calls.items(): found[name].append(run_batch(what, data, '--bs', bs, *options))
    seconds = {name: float(np.median([o['seconds'] for o in runs])) for name, runs in found.items()}
    return {name: dict(images_per_second=bs / s, ratio=seconds['plain float32 step'] / s,
                       peak_mib=found[name][-1]['peak_mib']) for name, s in seconds.items()}


def epoch(data: Path, bs: int, rounds: int, device: torch.device) -> dict:
    """An epoch of a run with its test and checkpoint, against the same steps on batches that lie ready."""
    with tempfile.TemporaryDirectory() as folder:
        learn = get_learner(get_dls(data, bs, device=device), path=folder)
        learn.create_opt()
        train, test = ([(x.as_subclass(Tensor), y.as_subclass(Tensor)) for x, y in dl] for dl in learn.dls)
        precision = best_precision(device)
        autocast = partial(torch.autocast, device.type, DTYPES[precision], enabled=precision != 'fp32')

        def bare():
            with replaced(learn, 'fitting', True), train_fast(learn): steps()

        def steps():
            learn.model.train()
            for x, y in train:
                with autocast(): loss = F.cross_entropy(learn.model(x), y)
                loss.backward()
                learn.opt.step()
                learn.opt.zero_grad()
            learn.model.eval()
            with torch.no_grad(), autocast():
                for x, _ in test: learn.model(x)

        def whole():
            with learn.no_bar(), learn.no_logging():
                learn.fit_one_cycle(1, 1e-3, cbs=Checkpoint({}))

        seconds = in_turn({'bare steps': bare, 'through the Learner': whole}, rounds, device)
    return {name: dict(images_per_second=len(train) * bs / s, ratio=s / seconds['bare steps'])
            for name, s in seconds.items()}


TABLES = {f.__name__: f for f in (loader, step, batch, epoch)}


@call_parse
def main(
    data: str = None,  # folder of images, as for train_fastai.py; fastai's CIFAR-10 if left out
    only: Annotated[str, dict(choices=[*TABLES])] = None,  # one table; all four if left out
    images: int = 10_240,  # training images that loader and epoch pass over; the test takes a fifth as many
    bs: int = 512,  # batch size
    rounds: int = 5,  # rounds of measurement
    before: str = None,  # folder of an earlier version, for `batch`
    out: str = 'runs/speed.json',  # JSON file for the figures
):
    "Measure the parts of a run side by side, print tables of ratios and write them as JSON."
    device, tables = default_device(), {}
    note = dict(device=device_name(device), torch=torch.__version__, batch_size=bs, images=images, rounds=rounds)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = get_data(data)
        classes = len((path/'train').ls())
        path = subset(path, Path(folder)/'images', images // classes, images // 5 // classes)
        for name in [only] if only else TABLES:
            options = dict(before=before) if name == 'batch' else {}
            table = tables[name] = TABLES[name](path, bs, rounds, device, **options)
            print(f'\n{TABLES[name].__doc__}\n\n| {name} | ratio |\n|---|--:|', flush=True)
            for row, o in table.items(): print(f'| {row} | {o["ratio"]:.3g} |')
            Path(out).write_text(json.dumps(note | tables, indent=2) + '\n')
    print(f'\n{note}')
