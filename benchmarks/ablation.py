#!/usr/bin/env python
"""What single ingredients add to the recipe, chosen on training images held out for it: the test set is not looked at.

    python benchmarks/ablation.py --seeds 42,43 --epochs 8

trains the network once for each arm and seed on nine tenths of the training images, at the same learning rates, and
writes the accuracy on the remaining tenth to `runs/ablation/<arm>-<seed>.json`. Runs that are there are not repeated.
"""
import json
import sys
import tempfile
from pathlib import Path

from fastai.vision.all import *
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from callbacks import write_whole
from data import get_data, get_dls
from train_fastai import PCT_START, device_name, get_learner, weight_decay_groups

ARMS = {
    'plain': {},
    'wd-0.1': dict(wd=0.1),
    'smoothing-0.1': dict(label_smoothing=0.1),
    'wd-0.1-smoothing-0.1': dict(wd=0.1, label_smoothing=0.1),
}
AVERAGES = 0.99, 0.995, 0.998  # decay a step of exponential moving averages: horizons of 1, 2 and 5 epochs
LR_MIN, LR_MAX = 1.6e-4, 2.3e-3


def hold_out(path: Path, folder: Path, every: int = 10) -> Path:
    """A data folder of links to the training images in `path`: every tenth of each class is a test image there."""
    for c in (path/'train').ls().sorted():
        for i, file in enumerate(c.ls().sorted()):
            link = folder/('train' if i % every else 'test')/c.name/file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
    return folder


class WeightAverages(Callback):
    """Keeps exponential moving averages of the weights, batch norm's statistics included."""

    def __init__(self, decays: tuple[float, ...]): self.decays = decays

    def before_fit(self):
        if not hasattr(self, 'models'):
            self.models = {d: AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(d), use_buffers=True)
                           for d in self.decays}

    def after_step(self):
        for m in self.models.values(): m.update_parameters(self.model)


@torch.no_grad()
def accuracies(learn: Learner, model: nn.Module) -> dict:
    """Accuracy of `model` on the held-out images, plain and by flip averaging."""
    model.eval()
    right, flipped = 0, 0
    with torch.autocast(learn.dls.device.type, dtype=torch.bfloat16, enabled=hasattr(learn, 'precision')):
        for x, y in learn.dls.valid:
            a, b = model(x), model(x.flip(-1))
            right += (a.argmax(1) == y).sum().item()
            flipped += ((a + b).argmax(1) == y).sum().item()
    n = len(learn.dls.valid_ds)
    return dict(accuracy=right / n, accuracy_flip=flipped / n)


def run(dls: DataLoaders, arm: dict, seed: int, epochs: int) -> dict:
    """Trains once with the changes in `arm`; what it reached."""
    with tempfile.TemporaryDirectory() as folder:
        learn = get_learner(dls, seed=seed, path=folder)
        learn.splitter = partial(weight_decay_groups, wd=arm.get('wd', 0.01))
        learn.create_opt()
        learn.loss_func = CrossEntropyLossFlat(label_smoothing=arm.get('label_smoothing', 0.))
        averages = WeightAverages(AVERAGES)
        learn.add_cb(averages)
        div = LR_MAX / LR_MIN
        learn.fit_one_cycle(epochs, LR_MAX, div=div, div_final=div, pct_start=PCT_START)
    return dict(arm, seed=seed, epochs=epochs, lr_min=LR_MIN, lr_max=LR_MAX, train_images=len(dls.train_ds),
                held_out_images=len(dls.valid_ds), device=device_name(dls.device), history=learn.history.rows,
                weights=accuracies(learn, learn.model),
                averages={d: accuracies(learn, m) for d, m in averages.models.items()})


@call_parse
def main(
    seeds: str = '42',  # seeds, separated by commas
    epochs: int = 8,  # passes over the training images
    out: str = 'runs/ablation',  # folder for the results
    data: str = None,  # data folder; fastai's CIFAR-10 if left out
):
    "Measure each ingredient on held-out training images."
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        dls = get_dls(hold_out(get_data(data), Path(folder)))
        for seed, (name, arm) in itertools.product(map(int, seeds.split(',')), ARMS.items()):
            file = out/f'{name}-{seed}.json'
            if file.exists(): continue
            print(file, flush=True)
            write_whole(file, json.dumps(run(dls, arm, seed, epochs), indent=1).encode() + b'\n')
