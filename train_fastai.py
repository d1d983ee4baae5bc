#!/usr/bin/env python
"""CIFAR-10 in 24 epochs with fastai: 93.95 ± 0.28 % test accuracy (mean ± sd, 5 seeds); 19 s of training on an H100.

    python train_fastai.py             # everything: download, find the LRs, train 24 epochs, draw, report
    python train_fastai.py --help      # the options

The network is the assignment's ResNet (arch.py). The recipe: Adam under one cycle whose learning rates `learn.lr_find`
picks, cross-entropy; images padded by 4 and cropped, flipped, with a cutout of 8×8 (data.py). To that it adds
  - decoupled weight decay of 0.1, ten times fastai's: at fastai's own it does next to nothing in so few steps;
  - label smoothing of 0.1: training stops pushing the probabilities of images it names correctly towards 1;
  - reflected padding: a cropped image has no border that real images lack;
  - a moving average of the weights, which is tested and kept: the weights fluctuate around a better point.
"""
import errors

if __name__ == '__main__': errors.end_quietly_while_importing('train_fastai.py')

import contextlib
import inspect
import io
import json
import platform
import shlex
import sys
from importlib.metadata import version

from fastai.vision.all import *
from fastcore.script import is_cli

import figures
from data import fingerprint, get_data, get_dls
from distributed import COMMAND, RANK, by_first, by_machine, joined
from errors import one_line_errors
from learner import device_name, find_lrs, get_learner, shared_out
from predict import class_scores, confusion_matrix, get_log_probs, misclassified, most_confused
from report import run_report
from run import Run, save_csv, save_figure, save_state, write_whole

PCT_START = 5 / 24  # LRMAX is reached at epoch 5 of 24


def experiment(run: Run):
    """The whole of it: images → learner → learning rates → one cycle → results, all of them in the run's folder."""
    o = run.options
    print('Reading the images …', flush=True)
    dls = by_machine(lambda: get_dls(get_data(o.data), bs=o.bs, every=10 if o.taste else 1))
    out = run.claim(fingerprint(dls))
    learn = get_learner(dls, run.precision, o.seed, out, o.ema, o.wd, o.label_smoothing)
    parameters = sum(p.numel() for p in learn.model.parameters())
    print(f'{len(dls.train_ds):,} training and {len(dls.valid_ds):,} test images of {len(dls.vocab)} classes\n'
          f'{parameters:,} parameters, {run.precision} on {device_name(dls.device)}', flush=True)
    save_figure(out/'augmented.png', figures.augmented, dls)

    if run.lrs: lr_min, lr_max = run.lrs  # given, or found before an interruption
    else:
        print('Finding the learning rates …', flush=True)
        lr_min, lr_max = by_first(saved_lrs, learn)
    print(f'LRMIN {lr_min:.2e}, LRMAX {lr_max:.2e}', flush=True)

    div = lr_max / lr_min  # fastai's div_final divides LRMAX: the end is LRMIN only with the start's divisor
    found = dict(parameters=parameters, lr_min=lr_min, lr_max=lr_max, precision=run.precision)
    try:
        with shared_out(learn):
            learn.fit_one_cycle(o.epochs, lr_max, div=div, div_final=div * o.final_div, pct_start=PCT_START,
                                cbs=run.checkpoint(**found))
    finally: draw_training(learn)
    if RANK: return
    m = save_results(run, learn, **found)
    print(f'{"taste" if o.taste else "run"} finished: training accuracy {m["train_accuracy"]:.2%}, '
          f'test accuracy {m["test_accuracy"]:.2%}, first epoch over 90 %: {m["first_epoch_over_90"] or "none"}\n'
          f'Everything is in {out}')


def draw_training(learn: Learner):
    """Draws what was recorded. After an error that counts for more than what drawing complains of."""
    h, silent = learn.history, io.StringIO() if sys.exc_info()[0] else sys.stderr
    with contextlib.redirect_stderr(silent):
        if h.schedule: save_figure(learn.path/'schedule.png', figures.schedule, h.schedule, len(learn.dls.train))
        if h.rows: save_figure(learn.path/'history.png', figures.history, h.rows, learn.loss_func.label_smoothing)


def saved_lrs(learn: Learner) -> tuple[float, float]:
    """(LRMIN, LRMAX) by `find_lrs`, whose curve is left in the run's folder. Raises `RunError`."""
    lrs = find_lrs(learn)
    curve = learn.recorder.lrs, [float(loss) for loss in learn.recorder.losses]
    save_csv(learn.path/'lr_find.csv', pd.DataFrame(dict(zip(('lr', 'loss'), curve, strict=True))))
    save_figure(learn.path/'lr_find.png', figures.lr_finder, *curve, *lrs)
    return lrs


def save_results(run: Run, learn: Learner, **found) -> dict:
    """Writes numbers, report and weights, then what pictures can be drawn; returns the metrics.

    `found` goes into the metrics: what the run found out before it trained.
    """
    dls, h, o, out = learn.dls, learn.history, run.options, run.folder
    log_probs = get_log_probs(learn, dls.valid_ds.images)
    targets = dls.valid_ds.labels.cpu()
    counts = confusion_matrix(log_probs, targets)
    wrong, classes = misclassified(log_probs, dls), class_scores(counts, dls.vocab)
    metrics = dict(
        **found, epochs=o.epochs, batch_size=o.bs, seed=o.seed, device=device_name(dls.device),
        **{k: h.rows[-1][k] for k in ('train_accuracy', 'test_accuracy', 'test_loss')},
        first_epoch_over_90=first(row['epoch'] for row in h.rows if row['test_accuracy'] > 0.9),
        seconds_training=h.seconds_training, seconds_total=run.seconds(), train_images=len(dls.train_ds),
        test_images=len(dls.valid_ds), classes=list(dls.vocab), fingerprint=run.fingerprint,
        versions={'python': platform.python_version()} | {p: version(p) for p in ('torch', 'torchvision', 'fastai')},
        options=vars(o))
    save_csv(out/'misclassified.csv', wrong)
    save_csv(out/'classes.csv', classes)
    write_whole(out/'metrics.json', json.dumps(metrics, indent=2).encode() + b'\n')
    report = run_report(metrics, command_line(vars(o)), h.rows, h.schedule, len(wrong), classes,
                        most_confused(counts, dls.vocab, 3))
    write_whole(out/'report.md', report.encode())
    save_state(out/'model.pth', learn.model.state_dict())
    save_figure(out/'misclassified.png', figures.misclassified, dls.valid_ds.images[wrong.index[:10]], wrong)
    save_figure(out/'confusion_matrix.png', figures.confusion_matrix, counts, dls.vocab)
    losses = F.nll_loss(log_probs, targets, reduction='none')
    save_figure(out/'top_losses.png', figures.top_losses, learn, losses)
    return metrics


def other_than_default(options: dict) -> dict:
    """Those of `options` that differ from their defaults."""
    return {k: v for k, v in options.items() if v != inspect.signature(main).parameters[k].default}


def command_line(options: dict) -> str:
    """The command that starts a run with `options`, in a new folder."""
    command = [*COMMAND.split(), 'train_fastai.py']
    for k, v in other_than_default(options | dict(out=None)).items():
        command += [f'--{k.replace("_", "-")}', *([] if v is True else [str(v)])]
    return shlex.join(command)


@call_parse
@one_line_errors('train_fastai.py')
def main(
    data: str = None,  # folder with train/<class>/ and test/<class>/ images, 32×32; default: fastai's CIFAR-10
    out: str = None,  # folder for the run's results; default: runs/<date-time>
    epochs: int = 24,  # passes over the training images
    bs: int = 512,  # batch size
    seed: int = 42,  # of initial weights, shuffling and augmentation
    lr_min: float = None,  # learning rate at the start and the end; with --lr-max, instead of the LR finder
    lr_max: float = None,  # learning rate at the peak; with --lr-min, instead of the LR finder
    final_div: float = 1,  # the last learning rate is LRMIN / final_div: 1 is no annihilation
    wd: float = 0.1,  # decoupled weight decay, not on batch norm and biases
    label_smoothing: float = 0.1,  # share of the label that training spreads over all classes
    ema: float = 0.99,  # decay of the moving average of the weights, which is tested and kept; 0 for none
    precision: str = 'auto',  # auto, fp32, bf16 or fp16; auto picks the fastest the hardware supports
    taste: bool = False,  # a first look in minutes: a tenth of the images, epochs ≤ 4, bs ≤ 64
    resume: str = None,  # folder of an interrupted run to resume, under its own options
):
    "Train the assignment's ResNet on CIFAR-10 and leave metrics, figures and weights in a run folder."
    options = dict(data=data and str(data), out=out and str(out), epochs=epochs, bs=bs, seed=seed, lr_min=lr_min,
                   lr_max=lr_max, final_div=final_div, wd=wd, label_smoothing=label_smoothing, ema=ema,
                   precision=precision, taste=taste)
    words = [o[2:].partition('=')[0].replace('-', '_') for o in sys.argv if o.startswith('--')] if is_cli() else []
    given = {*other_than_default(options), *words} - {'resume'}
    with joined(), Run(options, given, resume) as run: experiment(run)
