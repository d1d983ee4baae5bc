"""What a run writes beside its checkpoint: tables, figures, the report, the weights."""
import contextlib
import io
import json
import platform
import sys
from importlib.metadata import version

from fastai.vision.all import *

from lab import figures
from lab.evaluate import count_confusions, get_log_probs, list_confusions, score_classes
from lab.loader import fingerprint, list_augmentations
from lab.page import write_page
from lab.processes import RANK
from lab.report import percent, write_report
from lab.runs import Run, carry_on, save_csv, save_state, write_whole
from lab.speed import device_name

TARGET = 0.9  # test accuracy, the assignment's


def describe(run: Run, learn: Learner):
    """Print what is about to be trained, and draw a training batch as the network sees it."""
    dls = learn.dls
    print(f'{len(dls.train_ds):,} training and {len(dls.valid_ds):,} test images of {len(dls.vocab)} classes\n'
          f'{total_params(learn.model)[0]:,} parameters, {run.precision} on {device_name(learn.device)}', flush=True)
    run.save_figure('augmented.png', figures.draw_augmented, dls)


def save_finder(run: Run, learn: Learner, lr_min: float, lr_max: float):
    """Write the last finder's curve, as a table and as a figure that marks the two rates used."""
    if RANK: return
    curve = pd.DataFrame(dict(lr=learn.recorder.lrs, loss=[float(loss) for loss in learn.recorder.losses]))
    save_csv(run.folder/'lr_find.csv', curve)
    run.save_figure('lr_find.png', figures.draw_lr_finder, curve.lr, curve.loss, lr_min, lr_max)


def draw_training(run: Run, learn: Learner):
    """Draw the schedule and the history so far. After an error nothing but the error is reported."""
    h, silent = learn.history, io.StringIO() if sys.exc_info()[0] else sys.stderr
    with contextlib.redirect_stderr(silent):
        if h.schedule: run.save_figure('schedule.png', figures.draw_schedule, h.schedule, len(learn.dls.train))
        smoothing = getattr(learn.loss_func, 'label_smoothing', 0.)
        if h.rows: run.save_figure('history.png', figures.draw_history, h.rows, smoothing, TARGET)


def describe_recipe(learn: Learner) -> dict:
    """What the report says of the recipe, read from what `learn` really has."""
    opt = learn.opt_func.func if isinstance(learn.opt_func, partial) else learn.opt_func
    if isinstance(learn.opt, OptimWrapper): opt = type(learn.opt.opt)
    model = get_model(learn.model)
    return dict(network=type(model).__name__, last_stage=type(last(model.modules())).__name__,
                loss=getattr(learn.loss_func, '__name__', type(learn.loss_func).__name__),
                label_smoothing=getattr(learn.loss_func, 'label_smoothing', 0.),
                optimizer=getattr(opt, '__name__', type(opt).__name__), wd=learn.wd,
                ema=learn.weight_average.decay if hasattr(learn, 'weight_average') else 0.,
                augmentation=list_augmentations(learn.dls))


def save_results(run: Run, learn: Learner):
    """Write numbers, report and figures, then the weights, and print the outcome."""
    dls, h, o, out = learn.dls, learn.history, run.options, run.folder
    answers = learn.misclassified
    if answers.log_probs is None:  # the checkpoint that the run was resumed from has none
        answers.log_probs, answers.targets = get_log_probs(learn, dls.valid_ds.images), dls.valid_ds.labels.cpu()
    log_probs, targets, wrong = answers.log_probs, answers.targets, answers.table()
    counts, classes = count_confusions(log_probs, targets), score_classes(log_probs, targets, dls.vocab)
    lr_min, lr_max = run.lrs
    metrics = dict(
        quick_look=o.quick, parameters=total_params(learn.model)[0], lr_min=lr_min, lr_max=lr_max,
        precision=run.precision, epochs=o.epochs, batch_size=o.bs, seed=o.seed, device=device_name(learn.device),
        **{k: h.rows[-1][k] for k in ('train_accuracy', 'test_accuracy', 'test_loss')},
        first_epoch_over_90=first(row['epoch'] for row in h.rows if row['test_accuracy'] > TARGET),
        seconds_training=h.seconds_training, seconds_total=run.seconds(), train_images=len(dls.train_ds),
        test_images=len(dls.valid_ds), classes=list(dls.vocab), fingerprint=fingerprint(dls, names=False),
        versions={'python': platform.python_version()} | {p: version(p) for p in ('torch', 'torchvision', 'fastai')},
        recipe=describe_recipe(learn), options=vars(o))
    save_csv(out/'misclassified.csv', wrong)
    save_csv(out/'classes.csv', classes)
    write_whole(out/'metrics.json', json.dumps(metrics, indent=2).encode() + b'\n')
    report = write_report(metrics, run.command, h.rows, h.schedule, len(wrong), classes,
                          list_confusions(counts, dls.vocab, 3))
    write_whole(out/'report.md', report.encode())
    run.save_figure('misclassified.png', figures.draw_misclassified, dls.valid_ds.images[wrong.index[:10]], wrong)
    charts = {'Learning-rate finder': 'lr_find.png', 'Loss and accuracy': 'history.png', 'Schedule': 'schedule.png'}
    with carry_on(out/'errors.html'):
        page = write_page(metrics, wrong, classes, dls.valid_ds.images[wrong.index], {
            title: (out/file).read_bytes() for title, file in charts.items() if (out/file).exists()})
        write_whole(out/'errors.html', page.encode())
    run.save_figure('confusion_matrix.png', figures.draw_confusions, counts, dls.vocab)
    losses = F.nll_loss(log_probs, targets, reduction='none')
    run.save_figure('top_losses.png', figures.draw_top_losses, learn, losses)
    save_state(out/'model.pth', learn.model.state_dict())  # last: a folder that has it is a finished run
    print(f'{"quick look" if o.quick else "run"} finished: training accuracy {percent(metrics["train_accuracy"], 2)}, '
          f'test accuracy {percent(metrics["test_accuracy"], 2)}, '
          f'first epoch over 90 %: {metrics["first_epoch_over_90"] or "none"}\n'
          f'Everything {"of this quick look " if o.quick else ""}is in {out}')
