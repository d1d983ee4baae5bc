"""What a run writes beside its checkpoint: tables, figures, the report, the weights."""
import contextlib
from importlib.metadata import version

from fastai.vision.all import *

from lab import figures
from lab.errors import RunError
from lab.gradcam import grad_cam
from lab.loader import SIZE, decode_images, show_progress
from lab.processes import alone
from lab.report import per_class_scores, percent, write_page, write_report
from lab.runs import CHECKPOINT, Run, atomic_write, checksum, forecast, nonfatal, save_csv, save_state
from lab.speed import device_name, fast, unwrap

TARGET = 0.9  # test accuracy, the assignment's


def save_figure(run: Run, name: str, draw: Callable, *args):
    """Write the figure that `draw(*args)` makes to the run's folder; if that fails, one line on stderr says so."""
    if rank_distrib(): return
    with nonfatal(run.folder/name):
        fig = draw(*args)
        if run.options.quick: fig.text(0.995, 0, 'a quick look', ha='right', va='top', color='gray')
        fig.savefig(content := io.BytesIO(), dpi=120, bbox_inches='tight')
        atomic_write(run.folder/name, content.getvalue())
    plt.close('all')


def list_augmentations(dls: DataLoaders) -> list[str]:
    """The transforms of training images in words, as `Cutout(size=8)`."""
    def describe(tfm: Transform) -> str:
        own = [f'{k}={v}' for k, v in init_args(tfm).items() if v and not hasattr(Transform, k)]
        return f'{type(tfm).__name__}({", ".join(own)})'
    return [describe(tfm) for tfm in (*dls.train.after_item.fs, *dls.train.after_batch.fs)
            if tfm.split_idx == 0 or isinstance(tfm, RandTransform)]


def describe_recipe(learn: Learner) -> dict:
    """What the report says of the recipe, read from what `learn` really has."""
    def name(o) -> str: return getattr(o, '__name__', type(o).__name__)
    model, opt = unwrap(learn.model), getattr(learn.opt_func, 'func', learn.opt_func)
    if isinstance(learn.opt, OptimWrapper): opt = type(learn.opt.opt)
    layers = {f'{at}: {name(type(m))}': m for at, m in model.named_modules() if not has_children(m)}
    blank = torch.zeros(1, 3, SIZE, SIZE, device=one_param(model).device)
    with torch.no_grad(), hook_outputs(layers.values(), cpu=True) as hooks: model.eval()(blank)
    return dict(network=name(type(model)), last_stage=name(type(last(model.modules()))), loss=name(learn.loss_func),
                label_smoothing=getattr(learn.loss_func, 'label_smoothing', 0.), optimizer=name(opt),
                wd=learn.opt.hypers[-1].get('wd', 0.), ema=nested_attr(learn, 'weight_average.decay', 0.),
                augmentation=list_augmentations(learn.dls),
                layers=[(layer, ' × '.join(map(str, out.shape[1:])), total_params(m)[0])  # output of one image
                        for (layer, m), out in zip(layers.items(), hooks.stored, strict=True) if out is not None])


def find_commit() -> str | None:
    """The commit of the program, with a + if files of it were changed, or None where that is not known."""
    with contextlib.suppress(OSError):  # no git, or not its folder
        return run(['git', '-C', str(Path(__file__).parent), 'describe', '--always', '--exclude=*', '--dirty=+'],
                   stderr=False)


def describe(run: Run, learn: Learner):
    """Print what is about to be trained, and draw a training batch as the network sees it."""
    dls, device = learn.dls, device_name(one_param(learn.model).device)
    print(f'{len(dls.train_ds):,} training and {len(dls.valid_ds):,} test images of {len(dls.vocab)} classes\n'
          f'{total_params(learn.model)[0]:,} parameters, {run.precision} on {device}', flush=True)
    save_figure(run, 'augmented.png', figures.draw_augmented, dls, list_augmentations(dls))
    def log(row): print(*(f'{name} {o:.4f}' if isinstance(o, float) else f'{name} {o}' for name, o in
                          zip(learn.recorder.metric_names, row, strict=False)), sep='  ', flush=True)
    if not show_progress(): learn.remove_cb(ProgressCallback).logger = log  # a line an epoch for a log file


def save_finder(run: Run, learn: Learner, lr_min: float, lr_max: float, seconds: float):
    """Write the finder's curve, as a table and a figure that marks both rates, and say what a fit takes at its pace."""
    if rank_distrib(): return
    if show_progress(): print()  # the finder stops within an epoch, and its bar stays
    curve = pd.DataFrame(dict(lr=learn.recorder.lrs, loss=[float(loss) for loss in learn.recorder.losses]))
    batches = len(learn.dls.train) + len(learn.dls.valid) / 3  # forward passes alone take a third
    forecast(run.options.epochs, run.options.epochs * batches * seconds / len(curve))
    save_csv(run.folder/'lr_find.csv', curve)
    save_figure(run, 'lr_find.png', figures.draw_lr_finder, curve.lr, curve.loss, lr_min, lr_max)


def draw_training(run: Run, learn: Learner):
    """Draw the schedule and the history so far. After an error nothing but the error is reported."""
    h, smoothing = learn.history, getattr(learn.loss_func, 'label_smoothing', 0.)
    if not h.rows: return
    with contextlib.redirect_stderr(io.StringIO() if sys.exc_info()[0] else sys.stderr):
        save_figure(run, 'schedule.png', figures.draw_schedule, h.schedule, len(h.schedule) / len(h.rows))
        save_figure(run, 'history.png', figures.draw_history, h.rows, smoothing, TARGET)


def get_log_probs(learn: Learner, dl: DataLoader | None = None) -> list[Tensor]:
    """The log-probabilities (N, classes) float32, and targets, if any, of `dl`, by default the test images, on the CPU.

    A network may end in logits or in log-probabilities, which log-softmax leaves as they are.
    """
    with alone(), fast(learn):
        answers = learn.get_preds(dl=dl, act=partial(F.log_softmax, dim=1, dtype=torch.float32))
    return [o.as_subclass(Tensor) for o in answers if o is not None]


def save_results(run: Run, learn: Learner):
    """Write numbers, report, figures and then the weights, all of the weights as they are, and print the outcome."""
    if rank_distrib(): return
    dls, h, out, answers, model = learn.dls, learn.history, run.folder, learn.misclassified, unwrap(learn.model)
    if not h.rows: raise RunError('training ended before its first epoch did: there are no results')
    with learn.no_bar(): log_probs, targets = answers.log_probs, answers.targets = get_log_probs(learn)
    if not log_probs.isfinite().all(): raise RunError('the network gives no numbers; lower --lr-max')
    predicted, losses, wrong = log_probs.argmax(1), F.nll_loss(log_probs, targets, reduction='none'), answers.table()
    classes = per_class_scores(log_probs, targets, dls.vocab)
    m = dict(
        parameters=total_params(model)[0], lr_min=run.lrs[0], lr_max=run.lrs[1], precision=run.precision,
        epochs=len(h.rows), batch_size=dls.train.bs, seed=run.options.seed, device=device_name(one_param(model).device),
        train_accuracy=h.rows[-1]['train_accuracy'], test_accuracy=accuracy(log_probs, targets).item(),
        test_loss=losses.mean().item(), train_images=len(dls.train_ds), test_images=len(targets),
        first_epoch_over_90=first(row['epoch'] for row in h.rows if row['test_accuracy'] > TARGET),
        weights_of_epoch=last(i for i, o in enumerate(h.checksums, 1) if o == checksum(model)),
        seconds_training=h.seconds_training, seconds_total=time.perf_counter() - run.start,
        classes=list(dls.vocab), fingerprint=run.fingerprint, commit=find_commit(),
        versions={'python': platform.python_version()} | {p: version(p) for p in ('torch', 'torchvision', 'fastai')},
        recipe=describe_recipe(learn), options=vars(run.options))
    save_csv(out/'misclassified.csv', wrong)
    save_csv(out/'classes.csv', classes)
    atomic_write(out/'metrics.json', json.dumps(m, indent=2, allow_nan=False).encode() + b'\n')
    report = write_report(m, run.command(), h.rows, h.schedule, wrong, classes)
    atomic_write(out/'report.md', report.encode(errors='backslashreplace'))
    save_figure(run, 'confusion_matrix.png', figures.draw_confusions, targets, predicted, dls.vocab)
    save_figure(run, 'top_losses.png', figures.draw_top_losses, learn, losses)
    with nonfatal(out/'errors.html'):
        images = decode_images([dls.valid_ds.items[i] for i in wrong.index], resize=True)
        save_figure(run, 'misclassified.png', figures.draw_misclassified, images[:10], wrong)
        x, = dls.valid.after_batch((TensorImage(images.to(one_param(model).device)),))
        pairs = torch.stack([predicted, targets], 1)[wrong.index].to(x.device)
        page = write_page(m, wrong, classes, images, out, grad_cam(model, x.as_subclass(Tensor), pairs))
        atomic_write(out/'errors.html', page.encode(errors='backslashreplace'))
    save_state(out/'model.pth', model.state_dict())  # last: a folder that has it is a finished run
    (out/CHECKPOINT).unlink(missing_ok=True)
    for folder in (out/'learner'/'models', out/'learner'):  # `lr_find` makes them
        with contextlib.suppress(OSError): folder.rmdir()  # not if a callback has saved something
    print(f'Training accuracy {percent(m["train_accuracy"], 2)}, test accuracy {percent(m["test_accuracy"], 2)}, '
          f'first epoch over 90 %: {m["first_epoch_over_90"] or "none"}\nResults: {out}')
