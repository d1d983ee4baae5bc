"""What a run writes beside its checkpoint: tables, figures, the report, the weights."""
import contextlib
import io
import json
import platform
import subprocess
import sys
from importlib.metadata import version

from fastai.vision.all import *

from lab import figures
from lab.errors import RunError
from lab.evaluate import get_log_probs, list_confusions, list_misclassified, per_class_scores
from lab.gradcam import grad_cam
from lab.loader import SIZE, get_images, show_progress
from lab.page import write_page
from lab.report import percent, write_report
from lab.runs import CHECKPOINT, Run, atomic_write, forecast, nonfatal, save_csv, save_state
from lab.speed import device_name, unwrap

TARGET = 0.9  # test accuracy, the assignment's


def save_figure(run: Run, name: str, draw: Callable, *args):
    """Write the figure that `draw(*args)` makes to the run's folder; if that fails, one line on stderr says so."""
    if rank_distrib(): return
    with nonfatal(run.folder/name):
        fig = draw(*args)
        if run.options.quick: fig.text(0.995, 0.005, 'a quick look', ha='right', color='gray')
        fig.savefig(content := io.BytesIO(), dpi=120, bbox_inches='tight')
        atomic_write(run.folder/name, content.getvalue())
    plt.close('all')


def list_augmentations(dls: DataLoaders) -> list[str]:
    """The transforms of training images in words, as `Cutout(size=8)`."""
    def describe(tfm: Transform) -> str:
        names = inspect.signature(type(tfm).__init__).parameters.keys() - inspect.signature(Transform).parameters.keys()
        return f'{type(tfm).__name__}({", ".join(f"{k}={v}" for k, v in vars(tfm).items() if k in names and v)})'
    return [describe(tfm) for tfm in (*dls.train.after_item.fs, *dls.train.after_batch.fs)
            if tfm.split_idx == 0 or isinstance(tfm, RandTransform)]


def describe_layers(model: nn.Module) -> list[tuple]:
    """The name, kind, output shape of one image, and number of parameters of every layer of `model`."""
    layers = {name: m for name, m in model.named_modules() if not [*m.children()]}
    blank = torch.zeros(1, 3, SIZE, SIZE, device=next(model.parameters()).device)
    with torch.no_grad(), hook_outputs(layers.values(), cpu=True) as hooks: model.eval()(blank)
    return [(f'{name}: {type(m).__name__}', ' × '.join(map(str, hook.stored.shape[1:])), total_params(m)[0])
            for (name, m), hook in zip(layers.items(), hooks, strict=True) if hook.stored is not None]


def describe_recipe(learn: Learner) -> dict:
    """What the report says of the recipe, read from what `learn` really has."""
    opt = learn.opt_func.func if isinstance(learn.opt_func, partial) else learn.opt_func
    if isinstance(learn.opt, OptimWrapper): opt = type(learn.opt.opt)
    model = unwrap(learn.model)
    return dict(network=type(model).__name__, last_stage=type(last(model.modules())).__name__,
                loss=getattr(learn.loss_func, '__name__', type(learn.loss_func).__name__),
                label_smoothing=getattr(learn.loss_func, 'label_smoothing', 0.),
                optimizer=getattr(opt, '__name__', type(opt).__name__), wd=learn.opt.hypers[-1].get('wd', 0.),
                ema=learn.weight_average.decay if hasattr(learn, 'weight_average') else 0.,
                augmentation=list_augmentations(learn.dls), layers=describe_layers(model))


def find_commit() -> str | None:
    """The commit of the program, with a + if files of it were changed, or None where that is not known."""
    def git(*args): return subprocess.run(['git', *args], cwd=Path(__file__).parent, capture_output=True, text=True,
                                          check=True).stdout.strip()
    try: return git('rev-parse', '--short', 'HEAD') + ('+' if git('status', '--porcelain', '-uno') else '')
    except (OSError, subprocess.CalledProcessError): return None


def log_plainly(learn: Learner):
    """Where nobody watches, as in a log file, a line per epoch takes the place of bars."""
    def log(values): print('  '.join(f'{name} {o:.4f}' if isinstance(o, float) else f'{name} {o}' for name, o in
                                     zip(learn.recorder.metric_names, values, strict=False)), flush=True)
    if not show_progress(): learn.remove_cb(ProgressCallback).logger = log


def describe(run: Run, learn: Learner):
    """Print what is about to be trained, and draw a training batch as the network sees it."""
    dls = learn.dls
    print(f'{len(dls.train_ds):,} training and {len(dls.valid_ds):,} test images of {len(dls.vocab)} classes\n'
          f'{total_params(learn.model)[0]:,} parameters, {run.precision} on '
          f'{device_name(next(learn.model.parameters()).device)}', flush=True)
    save_figure(run, 'augmented.png', figures.draw_augmented, dls, list_augmentations(dls))
    log_plainly(learn)


def save_finder(run: Run, learn: Learner, lr_min: float, lr_max: float, seconds: float):
    """Write the finder's curve, as a table and as a figure that marks the two rates used, and what a fit will take.

    `seconds` are those that the finder took; forward passes alone, as in a test, take about a third.
    """
    if rank_distrib(): return
    if show_progress(): print()  # the finder stops within an epoch, and its bar stays
    batches = len(learn.dls.train) + len(learn.dls.valid) / 3
    forecast(run.options.epochs, run.options.epochs * batches * seconds / len(learn.recorder.lrs))
    curve = pd.DataFrame(dict(lr=learn.recorder.lrs, loss=[float(loss) for loss in learn.recorder.losses]))
    save_csv(run.folder/'lr_find.csv', curve)
    save_figure(run, 'lr_find.png', figures.draw_lr_finder, curve.lr, curve.loss, lr_min, lr_max)


def draw_training(run: Run, learn: Learner):
    """Draw the schedule and the history so far. After an error nothing but the error is reported."""
    h = learn.history
    with contextlib.redirect_stderr(io.StringIO() if sys.exc_info()[0] else sys.stderr):
        if not h.rows: return
        save_figure(run, 'schedule.png', figures.draw_schedule, h.schedule, len(h.schedule) / len(h.rows))
        smoothing = getattr(learn.loss_func, 'label_smoothing', 0.)
        save_figure(run, 'history.png', figures.draw_history, h.rows, smoothing, TARGET)


def save_results(run: Run, learn: Learner):
    """Write numbers, report and figures, then the weights, and print the outcome.

    All results are of the weights that are written: those of the last test of the fit, or, if a callback has changed
    them since, as `SaveModelCallback` does, tested here.
    """
    dls, h, o, out, answers = learn.dls, learn.history, run.options, run.folder, learn.misclassified
    if rank_distrib(): return
    if not h.rows: raise RunError('training ended before its first epoch did: there are no results')
    ds, epoch, log_probs = dls.valid_ds, answers.find_epoch(learn.model), answers.log_probs
    targets = tensor([dls.vocab.o2i[f.parent.name] for f in ds.items])
    if epoch != len(h.rows) or log_probs is None or not targets.equal(answers.targets):  # a loader may shuffle
        log_probs = get_log_probs(learn, get_images(ds, range_of(ds.items)))
    predicted, losses = log_probs.argmax(1), F.nll_loss(log_probs, targets, reduction='none')
    wrong = list_misclassified(log_probs, targets, ds.items, dls.vocab, dls.path)
    classes = per_class_scores(log_probs, targets, dls.vocab)
    images = get_images(ds, wrong.index)
    lr_min, lr_max = run.lrs
    metrics = dict(
        parameters=total_params(learn.model)[0], lr_min=lr_min, lr_max=lr_max, precision=run.precision,
        epochs=len(h.rows), batch_size=dls.train.bs, seed=o.seed,
        device=device_name(next(learn.model.parameters()).device),
        train_accuracy=h.rows[-1]['train_accuracy'], test_accuracy=(predicted == targets).float().mean().item(),
        test_loss=losses.mean().item(), weights_of_epoch=epoch,
        first_epoch_over_90=first(row['epoch'] for row in h.rows if row['test_accuracy'] > TARGET),
        seconds_training=h.seconds_training, seconds_total=run.seconds(), train_images=len(dls.train_ds),
        test_images=len(ds), classes=list(dls.vocab), fingerprint=run.fingerprint, commit=find_commit(),
        versions={'python': platform.python_version()} | {p: version(p) for p in ('torch', 'torchvision', 'fastai')},
        recipe=describe_recipe(learn), options=vars(o))
    save_csv(out/'misclassified.csv', wrong)
    save_csv(out/'classes.csv', classes)
    atomic_write(out/'metrics.json', json.dumps(metrics, indent=2, allow_nan=False).encode() + b'\n')
    report = write_report(metrics, run.command, h.rows, h.schedule, len(wrong), classes,
                          list_confusions(targets, predicted, dls.vocab, 3))
    atomic_write(out/'report.md', report.encode(errors='backslashreplace'))
    save_figure(run, 'misclassified.png', figures.draw_misclassified, images[:10], wrong)
    save_figure(run, 'confusion_matrix.png', figures.draw_confusions, targets, predicted, dls.vocab)
    save_figure(run, 'top_losses.png', figures.draw_top_losses, learn, losses)
    charts = {'Learning-rate finder': 'lr_find.png', 'Loss and accuracy': 'history.png', 'Schedule': 'schedule.png'}
    with nonfatal(out/'errors.html'):
        x, = dls.valid.after_batch((TensorImage(images.to(next(learn.model.parameters()).device)),))
        pairs = torch.stack([predicted, targets], 1)[wrong.index].to(x.device)
        page = write_page(metrics, wrong, classes, images, {
            title: (out/file).read_bytes() for title, file in charts.items() if (out/file).exists()},
            grad_cam(unwrap(learn.model), x.as_subclass(Tensor), pairs))
        atomic_write(out/'errors.html', page.encode(errors='backslashreplace'))
    save_state(out/'model.pth', unwrap(learn.model).state_dict())  # last: a folder that has it is a finished run
    (out/CHECKPOINT).unlink(missing_ok=True)
    for folder in (out/'learner'/'models', out/'learner'):  # `lr_find` makes them
        with contextlib.suppress(OSError): folder.rmdir()  # not if a callback has saved something
    print(f'Training accuracy {percent(metrics["train_accuracy"], 2)}, test accuracy '
          f'{percent(metrics["test_accuracy"], 2)}, first epoch over 90 %: {metrics["first_epoch_over_90"] or "none"}\n'
          f'Results: {out}')
