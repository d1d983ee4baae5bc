import ctypes
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

os.environ['MPLBACKEND'] = 'Agg'  # also for the programs that tests start

import numpy as np
import pytest
import torch
from fastai.vision.all import Callback, MixedPrecision
from narrow import ROOT  # noqa: F401, for all; importing it gives networks an eighth of their width
from PIL import Image

from callbacks import SeedEpochs
from lab import results
from lab.sources import get_sample
from train_fastai import get_dls, main

COLOURS = dict(blue=(40, 60, 200), green=(40, 180, 60), red=(200, 50, 40))


def make_folder(path: Path, train: int = 8, test: int = 4, seed: int = 0) -> Path:
    """A data folder of noisy 32×32 images, a class a colour, with `train` and `test` images a class."""
    rng = np.random.default_rng(seed)
    for split, n in (('train', train), ('test', test)):
        for name, colour in COLOURS.items():
            (path/split/name).mkdir(parents=True)
            for i in range(n):
                pixels = np.clip(colour + rng.normal(0, 60, (32, 32, 3)), 0, 255).astype('uint8')
                Image.fromarray(pixels).save(path/split/name/f'{i}.png')
    return path


def one_cycle(i: int, n: int, lr_min: float, lr_max: float, lr_end: float | None = None) -> float:
    """The LR of batch `i` of `n` as the assignment words it, with cosine ramps."""
    t, peak = i / n, 5 / 24
    if t < peak: return lr_min + (lr_max - lr_min) * (1 - math.cos(math.pi * t / peak)) / 2
    last = lr_end or lr_min
    return last + (lr_max - last) * (1 + math.cos(math.pi * (t - peak) / (1 - peak))) / 2


LR_MIN, LR_MAX = 1e-4, 1e-3


def fit(learn, epochs: int = 2, lr_end: float = LR_MIN, **kwargs):
    """Train as train_fastai.py does, from `LR_MIN` to `LR_MAX` to `lr_end`; returns `learn`."""
    learn.fit_one_cycle(epochs, LR_MAX, div=LR_MAX / LR_MIN, div_final=LR_MAX / lr_end, pct_start=5/24, **kwargs)
    return learn


def weights(learn) -> dict:
    """A copy of the weights and statistics of its model."""
    return {k: v.clone() for k, v in learn.model.state_dict().items()}


def equal(one: dict, other: dict) -> bool: return all(torch.equal(one[k], other[k]) for k in one)


def read_metrics(out: Path) -> dict: return json.loads((out/'metrics.json').read_text())


def args(*given, **options) -> list[str]:
    """The arguments of a `main`: those given, then options, as `bs=8, quick=True` for `--bs 8 --quick`."""
    for name, value in options.items(): given += f'--{name.replace("_", "-")}', *(() if value is True else (value,))
    return [*map(str, given)]


SIX_EPOCHS = dict(epochs=6, bs=8, lr_min=LR_MIN, lr_max=LR_MAX)


@contextmanager
def disturbed(act: Callable, epoch: int = 3, batch: int = 1):
    """Context manager in which every fit calls `act` before this training batch; both count from 0, over all fits."""
    def before_batch(self):
        done = self.earlier + self.epoch, self.iter
        if self.training and not hasattr(self.learn, 'lr_finder') and done == (epoch, batch): act()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(SeedEpochs, 'before_batch', before_batch, raising=False)
        yield


def interrupt(): signal.raise_signal(signal.SIGINT)


class Interrupt(Callback):
    """Interrupts in the third training batch, between forward pass and loss."""
    order = MixedPrecision.order - 1

    def after_pred(self):
        if self.training and self.train_iter == 2: raise KeyboardInterrupt


class Spoil(Callback):
    """Makes the images of batch `i` of an epoch's training, or of its test, no numbers."""
    def __init__(self, training: bool, epoch: int, i: int): self.at = training, epoch, i
    def before_batch(self):
        if (self.training, self.epoch, self.iter) == self.at: self.learn.xb = (self.xb[0] * math.nan,)


class Malicious:
    """Whoever unpickles it makes a folder."""
    def __reduce__(self): return os.mkdir, (os.environ['MALICIOUS_DIR'],)


@pytest.fixture(scope='session')
def folder(tmp_path_factory) -> Path:
    """A small data folder of three classes: 24 training and 12 test images. Not to be changed."""
    return make_folder(tmp_path_factory.mktemp('data')/'small')


@pytest.fixture
def dls(folder): return get_dls(folder, bs=8)


@pytest.fixture(scope='session')
def run(folder, tmp_path_factory) -> Path:
    """The folder of a finished run of `SIX_EPOCHS` on the images of `folder`. Not to be changed."""
    out = tmp_path_factory.mktemp('runs')/'whole'
    main(args(data=folder, out=out, **SIX_EPOCHS))
    return out


@pytest.fixture
def no_pictures(monkeypatch):
    """In this test runs draw no figures, which takes longer than to train them."""
    monkeypatch.setattr(results, 'save_figure', lambda *_: None)


@pytest.fixture
def permissions_bind():
    """In this test permissions bind Linux's superuser, too."""
    def toggle():
        if sys.platform != 'linux' or os.geteuid(): return
        libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert libc.capget(header, sets) == 0
        sets[0] ^= 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, of the effective ones
        assert libc.capset(header, sets) == 0

    toggle()
    yield
    toggle()


@pytest.fixture(scope='session')
def sample() -> Path:
    """5,000 training and 1,000 test images of the genuine CIFAR-10. Not to be changed."""
    return get_sample()


def ends(capsys, code: int, main, *given, **options) -> str:
    """The one line on stderr with which `main` ends, after the program's name, with this exit code and these `args`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: main(args(*given, **options))
    err = capsys.readouterr().err
    assert (e.value.code, err.count('\n')) == (code, 1), err
    return err.partition('.py: ')[2]
