import ctypes
import math
import os
import sys
from functools import partialmethod
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fastai.vision.all import Callback, MixedPrecision
from PIL import Image

from arch import ResNet
from train_fastai import get_dls

matplotlib.use('Agg')
os.environ['MPLBACKEND'] = 'Agg'  # for the programs that tests start

ROOT = Path(__file__).parents[1]
COLOURS = dict(blue=(40, 60, 200), green=(40, 180, 60), red=(200, 50, 40))


def make_folder(path: Path, train: int = 8, test: int = 4, seed: int = 0) -> Path:
    """A data folder of noisy 32×32 images, a class a colour, with `train` and `test` images a class."""
    rng = np.random.default_rng(seed)
    for split, n in (('train', train), ('test', test)):
        for name, colour in COLOURS.items():
            folder = path/split/name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = np.clip(np.array(colour) + rng.normal(0, 60, (32, 32, 3)), 0, 255).astype('uint8')
                Image.fromarray(pixels).save(folder/f'{i}.png')
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


@pytest.fixture(scope='session', autouse=True)
def _narrow():
    """Networks have an eighth of their width in all tests that do not ask for another; see narrow.py for programs."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(ResNet, '__init__', partialmethod(ResNet.__init__, width=8))
        yield


class Interrupt(Callback):
    """Interrupts in the third training batch, between forward pass and loss."""
    order = MixedPrecision.order - 1

    def after_pred(self):
        if self.training and self.train_iter == 2: raise KeyboardInterrupt


class Malicious:
    """Whoever unpickles it makes a folder."""
    def __reduce__(self): return os.mkdir, (os.environ['MALICIOUS_DIR'],)


@pytest.fixture(scope='session')
def folder(tmp_path_factory) -> Path:
    """A small data folder of three classes: 24 training and 12 test images. Not to be changed."""
    return make_folder(tmp_path_factory.mktemp('data')/'small')


@pytest.fixture
def dls(folder): return get_dls(folder, bs=8)


@pytest.fixture
def permissions_bind():
    """In this test permissions bind the superuser, too."""
    if sys.platform != 'linux' or os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # Linux's capabilities, version 3
    assert libc.capget(header, sets) == 0
    effective = sets[0]
    sets[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0
    yield
    sets[0] = effective
    assert libc.capset(header, sets) == 0


@pytest.fixture(scope='session')
def cifar10() -> Path:
    """The genuine CIFAR-10, where fastai keeps a downloaded copy."""
    path = Path(os.environ.get('FASTAI_HOME', '~/.fastai')).expanduser()/'data/cifar10'
    if not (path/'test').is_dir(): pytest.skip('CIFAR-10 is not on this machine')
    return path


def end(capsys, code, call, *args, **options) -> str:
    """What `call`, which ends the program with the exit code `code`, writes to stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: call(*args, **options)
    err = capsys.readouterr().err
    assert e.value.code == code, err
    return err


def ends(capsys, code, call, *args, **options) -> str:
    """The one line on stderr with which `call` ends the program, after its name."""
    err = end(capsys, code, call, *args, **options)
    assert err.count('\n') == 1, err
    return err.partition('.py: ')[2]


def ends_unforeseen(capsys, error, call, *args, **options) -> str:
    """The last line on stderr with which an unforeseen `error` ends the program; its traceback precedes it."""
    *traceback, line = end(capsys, 1, call, *args, **options).splitlines()
    assert traceback[0] == 'Traceback (most recent call last):'
    shown = f'{type(error).__name__}: {error}'
    assert '\n'.join(traceback).endswith(f'\n{shown}')
    assert line.startswith(f'train_fastai.py: error: {" ".join(shown.split())}')
    return line.partition('.py: ')[2]
