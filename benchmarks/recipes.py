#!/usr/bin/env python
"""Repeated runs: the experiment under several seeds, and recipes side by side, one thing changed and all else equal.

    python benchmarks/recipes.py seeds --seeds 42,43                 # train_fastai.py as it is
    python benchmarks/recipes.py finder --seeds 42,43                # its learning-rate finder alone
    python benchmarks/recipes.py schedule --seeds 42,43 --epochs 8   # three ends of the one cycle, by the test set
    python benchmarks/recipes.py peak --seeds 42,43                  # LRMAX as found, a third and three times of it
    python benchmarks/recipes.py ingredients --seeds 42,43           # by a tenth of the training images, held out
    python benchmarks/recipes.py test --seeds 42 --arms plain        # such a recipe on all images, with the test set

Each run is written to `runs/recipes/<table>/<epochs>/<arm>-<seed>.json` when it ends, where `<epochs>`, which `finder`
lacks, has `-every-4` and `-bs-128` added with such options; what is there is not done again, and an interrupted run
goes on from its last whole epoch. Several processes may work at one table. `results.py` makes tables and figures of
these files. The test set chooses nothing: `peak` and `ingredients` do not see it, `schedule` compares readings of the
assignment, and `test` reports.
"""
import contextlib
import functools
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parents[1]))
import errors  # isort: skip  # noqa: F401, before fastai, whose import it silences

from fastai.vision.all import *
from fastcore.script import call_parse
from torchvision.transforms.v2 import functional as TF

from callbacks import MovingAverage
from data import MEAN_COLOUR, PadCrop, get_data, get_dls
from errors import InputError
from learner import device_name, find_lrs, get_learner, replaced
from predict import get_log_probs
from run import Checkpoint, load_run, load_state, locked, write_whole
from train_fastai import PCT_START
from train_fastai import main as train_fastai

PLAIN = dict(wd=0.01, label_smoothing=0., pad='mean-colour')
ARMS = dict(
    seeds={'experiment': {}, 'lr-max-quarter': dict(times=1/4, ema=0.995)},
    finder={'lr-find': {}},
    ingredients={
        'default': {}, 'wd-0.05': dict(wd=0.05), 'wd-0.2': dict(wd=0.2), 'wd-0.4': dict(wd=0.4),
        'smoothing-0': dict(label_smoothing=0.), 'smoothing-0.2': dict(label_smoothing=0.2),
        'pad-mean-colour': dict(pad='mean-colour'), 'eps-1e-8': dict(eps=1e-8), 'lr-max-double': dict(times=2.),
        'lr-max-half': dict(times=1/2), 'lr-max-half-wd-0.2': dict(times=1/2, wd=0.2),
        'lr-max-half-wd-0.4': dict(times=1/2, wd=0.4), 'lr-max-quarter': dict(times=1/4),
        'lr-max-quarter-wd-0.2': dict(times=1/4, wd=0.2), 'lr-max-quarter-eps-1e-8': dict(times=1/4, eps=1e-8),
        'lr-max-quarter-smoothing-0': dict(times=1/4, label_smoothing=0.),
        'lr-max-quarter-smoothing-0.2': dict(times=1/4, label_smoothing=0.2),
        'lr-max-quarter-pad-mean-colour': dict(times=1/4, pad='mean-colour'),
        'lr-max-quarter-plain': dict(times=1/4) | PLAIN, 'plain': PLAIN},
    schedule={
        'ends-at-lrmin': {}, 'div-final-1-holds-lrmax': dict(div_final=1.),
        'div-final-1e5-annihilates': dict(div_final=1e5)},
    peak={'lr-max': {}, 'lr-max-third': dict(times=1/3), 'lr-max-threefold': dict(times=3.)})
ARMS['test'] = ARMS['ingredients']
AVERAGES = 0.99, 0.995, 0.998  # decay a step of the exponential moving averages, which every run keeps


def hold_out(path: Path, to: Path, every: int = 10) -> Path:
    """A data folder `to` of links to the training images in `path`, one in `every` of each class as its test images."""
    for folder in (path/'train').ls():
        for split in ('train', 'test'): (to/split/folder.name).mkdir(parents=True)
        for i, file in enumerate(folder.ls().sorted()):
            (to/('train' if i % every else 'test')/folder.name/file.name).symlink_to(file.resolve())
    return to


class WeightAverages(Callback):
    """Keeps a `MovingAverage` for each of several decays: `models`, by their decay.

    After each epoch they are put into `header`, which a checkpoint stores; they begin as the checkpoint `state` has it.
    """
    order = Checkpoint.order - 1

    def __init__(self, header: dict, state: dict | None): self.header, self.state = header, state

    def before_fit(self):
        self.models = {d: MovingAverage(self.model, d) for d in AVERAGES}
        if self.state and self.state['epochs_done']:
            for d, model in self.models.items(): model.load_state_dict(self.state['averages'][d])

    def after_step(self):
        for model in self.models.values(): model.update()

    def after_epoch(self): self.header['averages'] = {d: model.state_dict() for d, model in self.models.items()}


class MeanColourPadCrop(PadCrop):
    """Pads with the data set's mean colour instead of a reflection."""

    def padded(self, x: Tensor) -> Tensor: return TF.pad(x, self.pad, fill=MEAN_COLOUR)


def accuracies(learn: Learner, model: nn.Module) -> dict[str, float]:
    """The accuracy of `model` on the test images of `learn`, plain and by flip averaging."""
    images, targets = learn.dls.valid_ds.images, learn.dls.valid_ds.labels.cpu()
    with replaced(learn, 'model', model):
        plain, flipped = get_log_probs(learn, images), get_log_probs(learn, images.flip(-1))
    return dict(accuracy=accuracy(plain, targets).item(), accuracy_flip=accuracy(plain + flipped, targets).item())


def experiment(data: str | None, bs: int, seed: int, epochs: int, folder: Path, arm: dict) -> dict:
    """Runs train_fastai.py in `folder`, or resumes it there; returns its metrics and the accuracy by flip averaging."""
    if not (folder/'model.pth').exists():
        if (folder/Checkpoint.file).exists(): train_fastai(resume=folder)
        else:
            options = {k: v for k, v in arm.items() if k != 'times'}
            if 'times' in arm:
                lr_min, lr_max = find_lrs(get_learner(get_dls(get_data(data), bs), seed=seed))
                options |= dict(lr_min=lr_min, lr_max=arm['times'] * lr_max)
            train_fastai(data=data, bs=bs, seed=seed, epochs=epochs, out=folder, **options)
    learn = load_run(folder)
    return json.loads((folder/'metrics.json').read_bytes()) | dict(
        test_accuracy_flip=accuracies(learn, learn.model)['accuracy_flip'])


def find(dls: DataLoaders, seed: int, folder: str) -> dict:
    """The experiment's learning rates, the finder's curve, and fastai's `minimum`, which it suggests for the peak."""
    learn = get_learner(dls, seed=seed, path=folder)
    lr_min, lr_max = find_lrs(learn)
    lrs, losses = learn.recorder.lrs, [float(loss) for loss in learn.recorder.losses]
    _, lowest = min(zip(losses[10:-5], lrs[10:-5], strict=True))  # of the part that `lr_find` looks at
    return dict(lr_min=lr_min, lr_max=lr_max, minimum=lowest / 10, seed=seed, device=device_name(dls.device), lrs=lrs,
                losses=losses)


def train(dls: DataLoaders, arm: dict, seed: int, epochs: int, folder: Path, lrs: tuple[float, float],
          checkpoints: bool = True) -> dict:
    """Trains once, with what `arm` changes and checkpoints in `folder`; returns the arm and what came of it.

    `lrs` are LRMIN and LRMAX, the latter before an arm multiplies it by its `times`.
    """
    lr_min, lr_max = lrs[0], lrs[1] * arm.get('times', 1)
    div = lr_max / lr_min
    padding = MeanColourPadCrop(4) if arm.get('pad') == 'mean-colour' else PadCrop(4)
    tfms = [padding if isinstance(tfm, PadCrop) else tfm for tfm in dls.train.after_item.fs]
    learn = get_learner(DataLoaders(dls.train.new(after_item=Pipeline(tfms)), dls.valid), seed=seed, path=folder,
                        ema=0, **{k: v for k, v in arm.items() if k in ('wd', 'label_smoothing')})
    if 'eps' in arm: learn.opt_func = partial(learn.opt_func, eps=arm['eps'])
    file = folder/Checkpoint.file
    state = load_state(file) if file.exists() else None
    averages = WeightAverages(header := {}, state)
    cbs = [averages] + ([Checkpoint(header, state)] if checkpoints else [])
    div_final = arm.get('div_final', div)
    learn.fit_one_cycle(epochs, lr_max, div=div, div_final=div_final, pct_start=PCT_START, cbs=cbs)
    return dict(arm, div_final=div_final, seed=seed, epochs=epochs, batch_size=dls.bs, lr_min=lr_min, lr_max=lr_max,
                train_images=len(dls.train_ds), test_images=len(dls.valid_ds), device=device_name(dls.device),
                history=learn.history.rows, **accuracies(learn, learn.model),
                averages={d: accuracies(learn, o.module) for d, o in averages.models.items()})


@call_parse
def main(
    table: Annotated[str, dict(choices=[*ARMS])],  # what is repeated
    arms: str = None,  # which recipes, separated by commas; all of the table if left out
    seeds: str = '42',  # separated by commas
    epochs: int = 24,  # passes over the training images
    bs: int = 512,  # batch size
    every: int = 1,  # of each class only one image in this many is used; not in `seeds`
    data: str = None,  # folder of images, as for train_fastai.py; fastai's CIFAR-10 if left out
    out: str = 'runs/recipes',  # folder for the results
    no_checkpoint: bool = False,  # where a run takes seconds: it begins anew if interrupted
    minutes: float = float('inf'),  # begin no run after so many minutes
):
    "Train the arms of a table with every seed and write what came of it as JSON."
    start = time.perf_counter()
    if table == 'seeds' and every > 1: raise SystemExit('--every: seeds are of train_fastai.py, which takes all images')
    size = [f'{epochs}'] if table != 'finder' else []
    size += [f'every-{every}'] if every > 1 else []
    size += [f'bs-{bs}'] if bs != 512 else []
    out = Path(out)/table/'-'.join(size)
    names = arms.split(',') if arms else [*ARMS[table]]
    if unknown := set(names) - ARMS[table].keys(): raise SystemExit(f'--arms: no {", ".join(unknown)} in {table}')
    with tempfile.TemporaryDirectory() as tmp:
        path = get_data(data)
        if table in ('ingredients', 'peak'): path = hold_out(path, Path(tmp))
        dls = None if table == 'seeds' else get_dls(path, bs, every=every)

        @functools.cache
        def rates(seed): return find_lrs(get_learner(dls, seed=seed, path=tmp))

        def run(name, seed, folder):
            if table == 'seeds': return experiment(data, bs, seed, epochs, folder, ARMS[table][name])
            if table == 'finder': return find(dls, seed, tmp)
            return train(dls, ARMS[table][name], seed, epochs, folder, rates(seed), not no_checkpoint)

        for seed, name in itertools.product(map(int, seeds.split(',')), names):
            file = out/f'{name}-{seed}.json'
            if file.exists() or time.perf_counter() - start > 60 * minutes: continue
            folder = file.with_suffix('')
            with contextlib.ExitStack() as lock:
                if table != 'seeds':  # which locks the folder itself
                    folder.mkdir(parents=True, exist_ok=True)
                    try: lock.enter_context(locked(folder))
                    except InputError: continue  # another process is at it
                if file.exists(): continue
                print(file, flush=True)
                result = run(name, seed, folder)
                write_whole(file, json.dumps(result, indent=1).encode() + b'\n')
            if table != 'seeds': shutil.rmtree(folder, ignore_errors=True)
