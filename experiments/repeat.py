#!/usr/bin/env python
"""Repeat the experiment: under several seeds, or with one thing changed and all else equal.

    python -m experiments.repeat seeds --seeds 42,43                 # train_fastai.py as it is
    python -m experiments.repeat finder --seeds 42,43                # its learning-rate finder alone
    python -m experiments.repeat finder-length --seeds 42,43         # the finder with other batches
    python -m experiments.repeat schedule --seeds 42,43 --epochs 8   # three ends of the one cycle, on the test set
    python -m experiments.repeat ingredients --seeds 42,43           # recipes, on a held-out tenth of the training set
    python -m experiments.repeat test --seeds 42 --arms plain        # the same, trained on all of it, on the test set

Every finished run adds its rows to `results.csv` in the folder `--out`: one for the weights of the last step (`ema` 0)
and one for each moving average that was kept. A run that is in the file is not repeated, an interrupted run continues
from its last whole epoch, and several processes may work on the same table. `page.py` makes the tables and figures.

No decision is based on the test set: `ingredients` does not see it, `schedule` compares readings of the assignment, and
`test` only reports.
"""
import lab.errors  # isort: skip  # noqa: F401, before fastai, whose import warning it silences

import contextlib
import functools
import io
import json
import shutil
from typing import Annotated

import fastai
from fastai.vision.all import *
from fastcore.script import call_parse
from filelock import FileLock, Timeout

from callbacks import MovingAverage, SeedEpochs
from lab import finder
from lab.evaluate import get_log_probs
from lab.learner import fused_adam, replaced
from lab.runs import Checkpoint, is_finished, load_state, write_whole
from lab.sources import get_data
from lab.speed import device_name, resolve_precision
from predict import load_run
from train_fastai import MEAN_COLOUR, PCT_START, Cutout, FlipLR, Options, PadCrop, find_lrs, get_dls, get_learner
from train_fastai import main as train_fastai

# What an arm can change. `div_final` is fastai's; without one the cycle ends at LRMIN.
RECIPE = dict(wd=Options.wd, label_smoothing=Options.label_smoothing, padding='reflect', flips='independent',
              eps=1e-5, lr_max_factor=1., div_final=None)
HALF, QUARTER = dict(lr_max_factor=1/2), dict(lr_max_factor=1/4)
HALF_WD, ALTERNATING = HALF | dict(wd=0.2), dict(flips='alternating')
PLAIN = dict(wd=0.01, label_smoothing=0., padding='mean-colour')
ARMS = dict(
    seeds={'experiment': {}, 'lr-max-quarter': QUARTER | dict(ema=0.995)},
    finder={'lr-find': {}},
    ingredients={
        'default': {}, 'wd-0.05': dict(wd=0.05), 'wd-0.2': dict(wd=0.2), 'wd-0.4': dict(wd=0.4),
        'smoothing-0': dict(label_smoothing=0.), 'smoothing-0.2': dict(label_smoothing=0.2),
        'pad-mean-colour': dict(padding='mean-colour'), 'eps-1e-8': dict(eps=1e-8),
        'lr-max-double': dict(lr_max_factor=2.),
        'alternating-flips': ALTERNATING, 'alternating-flips-smoothing-0.2': ALTERNATING | dict(label_smoothing=0.2),
        'lr-max-half': HALF, 'lr-max-half-wd-0.2': HALF_WD, 'lr-max-half-wd-0.4': HALF | dict(wd=0.4),
        'lr-max-half-wd-0.2-smoothing-0.2': HALF_WD | dict(label_smoothing=0.2),
        'lr-max-half-wd-0.2-alternating-flips': HALF_WD | ALTERNATING,
        'lr-max-half-wd-0.2-alternating-flips-smoothing-0.2': HALF_WD | ALTERNATING | dict(label_smoothing=0.2),
        'lr-max-quarter': QUARTER, 'lr-max-quarter-wd-0.2': QUARTER | dict(wd=0.2),
        'lr-max-quarter-eps-1e-8': QUARTER | dict(eps=1e-8),
        'lr-max-quarter-smoothing-0': QUARTER | dict(label_smoothing=0.),
        'lr-max-quarter-smoothing-0.2': QUARTER | dict(label_smoothing=0.2),
        'lr-max-quarter-pad-mean-colour': QUARTER | dict(padding='mean-colour'),
        'lr-max-quarter-plain': QUARTER | PLAIN, 'plain': PLAIN},
    schedule={'ends-at-lrmin': {}, 'div-final-1-holds-lrmax': dict(div_final=1.),
              'div-final-1e5-annihilates': dict(div_final=1e5)})
ARMS['test'] = ARMS['ingredients']
ARMS['finder-length'] = {f'{num_it}-of-{size}': dict(num_it=num_it, size=size)
                         for size, num_it in itertools.product((512, 256), (100, 50))}
FINDER_TABLES = 'finder', 'finder-length'
DECAYS = 0.99, 0.995, 0.998  # per step, of the moving averages that every run keeps
KEY = ['table', 'arm', 'seed', 'epochs', 'batch_size', 'every']  # a finder has 0 epochs
COLUMNS = [*KEY, 'train_images', 'test_images', 'lr_min', 'lr_max', 'div_final', 'minimum', 'wd', 'label_smoothing',
           'padding', 'flips', 'eps', 'ema', 'accuracy', 'accuracy_flip', 'test_loss', 'train_accuracy',
           'first_epoch_over_90', 'seconds_training', 'seconds_total', 'precision', 'device', 'torch', 'fastai']
DRAWN = 512  # only finders with batches of this size from all images keep their curves, in finder.csv


def load_results(folder: Path) -> pd.DataFrame:
    """The rows of `results.csv` in `folder`, exactly as they were measured."""
    file = folder/'results.csv'
    if not file.exists(): return pd.DataFrame(columns=COLUMNS)
    return pd.read_csv(file, dtype=dict(torch=str, fastai=str))


def is_done(folder: Path, job: dict) -> bool:
    """Whether the run with the values `job` of `KEY` is in `results.csv` in `folder`."""
    return bool((load_results(folder)[KEY] == list(job.values())).all(axis=1).any())


def add_rows(file: Path, rows: list[dict], columns: list[str]):
    """Append the `columns` of `rows` to a CSV file that other processes may be writing to."""
    with FileLock(f'{file}.lock'):
        old = file.read_bytes() if file.exists() else b''
        if old and old.splitlines()[0] != ','.join(columns).encode():  # an earlier version had other columns
            old = pd.read_csv(io.BytesIO(old), dtype=str).reindex(columns=columns).to_csv(index=False).encode()
        new = pd.DataFrame(rows, columns=columns, dtype=object).to_csv(index=False, header=not old)
        write_whole(file, old + new.encode())


def make_tfms(padding: str, flips: str = 'independent') -> list[Transform]:
    """The experiment's augmentations with `padding`, 'reflect' or 'mean-colour', and `flips`, 'independent' or none."""
    pad = PadCrop(4) if padding == 'reflect' else PadCrop(4, padding_mode='constant', fill=MEAN_COLOUR)
    return [pad, *([FlipLR()] if flips == 'independent' else []), Cutout(8)]


def hold_out(path: Path, to: Path, every: int = 10) -> Path:
    """Make the data folder `to` of links to the training images in `path`, one in `every` of a class for testing."""
    for folder in (path/'train').ls():
        for split in ('train', 'test'): (to/split/folder.name).mkdir(parents=True)
        for i, file in enumerate(folder.ls().sorted()):
            (to/('train' if i % every else 'test')/folder.name/file.name).symlink_to(file.resolve())
    return to


class AlternateFlips(Callback):
    """Mirrors every training image in every other epoch (arXiv:2404.00498); `seed` decides which start mirrored.

    It replaces the data set's images, for the caller to put back.
    """
    order = SeedEpochs.order + 1  # before the loader makes a batch

    def __init__(self, seed: int): self.seed = seed

    def before_fit(self):
        self.images = self.dls.train_ds.images
        odd = torch.rand(len(self.images), generator=torch.Generator().manual_seed(self.seed)) < 0.5
        self.odd = odd.to(self.images.device)[:, None, None, None]

    def before_train(self):
        self.dls.train_ds.images = torch.where(self.odd ^ bool(self.epoch % 2), self.images.flip(-1), self.images)


class KeepAverages(Callback):
    """Keeps a `MovingAverage` of the weights for each of `DECAYS`, in `averages`; checkpoints include them."""
    order = Checkpoint.order - 1  # they must exist when a checkpoint is restored

    def before_fit(self): self.averages = {decay: MovingAverage(self.model, decay) for decay in DECAYS}

    def after_step(self):
        for average in self.averages.values(): average.update()

    def state_dict(self) -> dict: return {decay: average.state_dict() for decay, average in self.averages.items()}

    def load_state_dict(self, state: dict):
        for decay, average in self.averages.items(): average.load_state_dict(state[decay])


def evaluate(learn: Learner, model: nn.Module) -> dict[str, float]:
    """Accuracy, plain and by flip averaging, and loss of `model` on the test images of `learn`."""
    images, targets = learn.dls.valid_ds.images, learn.dls.valid_ds.labels.cpu()
    with replaced(learn, 'model', model):
        plain, flipped = get_log_probs(learn, images), get_log_probs(learn, images.flip(-1))
    return dict(accuracy=accuracy(plain, targets).item(), accuracy_flip=accuracy(plain + flipped, targets).item(),
                test_loss=F.nll_loss(plain, targets).item())


def describe(dls: DataLoaders) -> dict:
    """The columns that tell what a run was made with."""
    return dict(train_images=len(dls.train_ds), test_images=len(dls.valid_ds), device=device_name(dls.device),
                precision=resolve_precision('auto', dls.device), torch=torch.__version__, fastai=fastai.__version__)


def run_experiment(arm: dict, data: str | None, path: Path, bs: int, seed: int, epochs: int, folder: Path) -> dict:
    """Run train_fastai.py in `folder`, or resume it there, and return its row; `path` is where its images are."""
    if not is_finished(folder):
        if (folder/Checkpoint.file).exists(): train_fastai(resume=folder)
        else:
            options = {k: v for k, v in arm.items() if k != 'lr_max_factor'}
            if 'lr_max_factor' in arm:
                lr_min, lr_max = find_lrs(get_learner(get_dls(path, bs), seed=seed))
                options |= dict(lr_min=lr_min, lr_max=arm['lr_max_factor'] * lr_max)
            train_fastai(data=data, bs=bs, seed=seed, epochs=epochs, out=folder, **options)
    m, learn = json.loads((folder/'metrics.json').read_bytes()), load_run(folder, data=path)
    return RECIPE | m['options'] | m['versions'] | m | dict(
        div_final=m['lr_max'] / (m['options']['lr_end'] or m['lr_min']), accuracy=m['test_accuracy'],
        accuracy_flip=evaluate(learn, learn.model)['accuracy_flip'])


def run_finder(dls: DataLoaders, seed: int, folder: str, num_it: int = 100,
               size: int = finder.LARGE_BATCH) -> tuple[dict, list[dict]]:
    """Run the LR finder alone, for `num_it` batches of `size` images at most; return its row and its curve.

    The row has fastai's `minimum` suggestion for the peak, too.
    """
    learn = get_learner(dls, seed=seed, path=folder)
    with replaced(finder, 'LARGE_BATCH', size), replaced(learn, 'lr_find', partial(learn.lr_find, num_it=num_it)):
        lr_min, lr_max = find_lrs(learn)
    curve = [dict(seed=seed, lr=lr, loss=float(loss))
             for lr, loss in zip(learn.recorder.lrs, learn.recorder.losses, strict=True)]
    lowest = min(curve[num_it // 10:-5], key=lambda o: o['loss'])['lr']  # fastai leaves out both ends
    return RECIPE | describe(dls) | dict(lr_min=lr_min, lr_max=lr_max, div_final=None, minimum=lowest / 10), curve


def train(dls: DataLoaders, arm: dict, seed: int, epochs: int, folder: Path, lrs: tuple[float, float],
          checkpoints: bool = True) -> list[dict]:
    """Train with the changes of `arm`, or resume in `folder`; return a row for every kind of weights.

    `lrs` are LRMIN and LRMAX before `lr_max_factor` is applied. A resumed run keeps those that it started with.
    """
    recipe, file = RECIPE | arm, folder/Checkpoint.file
    state = load_state(file) if file.exists() else None
    lr_min, lr_max = state['lrs'] if state else (lrs[0], recipe['lr_max_factor'] * lrs[1])
    div_final = recipe['div_final'] or lr_max / lr_min
    learn = get_learner(dls, opt_func=partial(fused_adam, eps=recipe['eps']), wd=recipe['wd'],
                        label_smoothing=recipe['label_smoothing'], ema=0, seed=seed, path=folder)
    cbs = [keeper := KeepAverages()]
    if recipe['flips'] == 'alternating': cbs.append(AlternateFlips(seed))
    if checkpoints: cbs.append(Checkpoint(dict(lrs=(lr_min, lr_max)), state))
    with replaced(dls.train_ds, 'images', dls.train_ds.images):  # also after an interruption
        learn.fit_one_cycle(epochs, lr_max, div=lr_max / lr_min, div_final=div_final, pct_start=PCT_START, cbs=cbs)
    h = learn.history
    row = recipe | describe(dls) | dict(
        lr_min=lr_min, lr_max=lr_max, div_final=div_final, train_accuracy=h.rows[-1]['train_accuracy'],
        seconds_training=h.seconds_training)
    over = first(o['epoch'] for o in h.rows if o['test_accuracy'] > 0.9)  # the last step's weights were tested
    return [row | dict(ema=0, first_epoch_over_90=over) | evaluate(learn, learn.model),
            *(row | dict(ema=decay) | evaluate(learn, o.module) for decay, o in keeper.averages.items())]


@call_parse
def main(
    table: Annotated[str, dict(choices=[*ARMS])],  # what to repeat
    arms: str = None,  # which recipes, separated by commas; default: all of the table
    seeds: str = '42',  # separated by commas
    epochs: int = 24,  # passes over the training images
    bs: int = 512,  # batch size
    every: int = 1,  # use one image in this many of each class; not for `seeds`
    data: str = None,  # folder of images, as for train_fastai.py; default: fastai's CIFAR-10
    out: str = 'runs/experiments',  # folder for results.csv and finder.csv
    no_checkpoint: bool = False,  # for runs of seconds: if interrupted, they start again
    minutes: float = float('inf'),  # start no run after this many minutes
):
    "Train the arms of a table with every seed and add the results to results.csv."
    start, out, names = time.perf_counter(), Path(out), arms.split(',') if arms else [*ARMS[table]]
    if table == 'seeds' and every > 1: raise SystemExit('--every: `seeds` runs train_fastai.py, on all images')
    if unknown := set(names) - ARMS[table].keys(): raise SystemExit(f'--arms: no {", ".join(unknown)} in {table}')
    with tempfile.TemporaryDirectory() as tmp:
        path = get_data(data)
        if table == 'ingredients': path = hold_out(path, Path(tmp))

        @functools.cache
        def load(padding: str = 'reflect', flips: str = 'independent') -> DataLoaders:
            return get_dls(path, bs, every, make_tfms(padding, flips))

        @functools.cache
        def find_rates(seed: int): return find_lrs(get_learner(load(), seed=seed, path=tmp))

        def run(arm: dict, seed: int, folder: Path) -> list[dict]:
            if table == 'seeds': return [run_experiment(arm, data, path, bs, seed, epochs, folder)]
            if table not in FINDER_TABLES:
                dls = load(**{k: v for k, v in arm.items() if k in ('padding', 'flips')})
                return train(dls, arm, seed, epochs, folder, find_rates(seed), not no_checkpoint)
            row, curve = run_finder(load(), seed, tmp, **arm)
            drawn = table == 'finder' and (bs, every) == (DRAWN, 1)
            if drawn: add_rows(out/'finder.csv', curve, ['seed', 'lr', 'loss'])
            return [row]

        for seed, name in itertools.product(map(int, seeds.split(',')), names):
            job = dict(zip(KEY, (table, name, seed, 0 if table in FINDER_TABLES else epochs, bs, every), strict=True))
            if is_done(out, job) or time.perf_counter() - start > 60 * minutes: continue
            folder = out/'-'.join(map(str, job.values()))
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(Timeout), FileLock(folder/'repeat.lock', timeout=0):  # else a process is at it
                if is_done(out, job): continue
                print(folder.name, flush=True)
                add_rows(out/'results.csv', [row | job for row in run(ARMS[table][name], seed, folder)], COLUMNS)
                if table != 'seeds': shutil.rmtree(folder, ignore_errors=True)  # a run of train_fastai.py is kept
