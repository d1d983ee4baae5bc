#!/usr/bin/env python
"""Trains the ResNet of `arch.py` on CIFAR-10 with a one-cycle policy whose learning rates the LR finder picks.

    python train_fastai.py             # everything: download, find the LRs, train 24 epochs, draw, report
    python train_fastai.py --help      # the options
"""
import platform
import warnings

warnings.filterwarnings('ignore', r'`torch\.jit\.script` is deprecated', FutureWarning)  # fastai's own import

from importlib.metadata import version  # noqa: E402

from fastai.callback.schedule import minimum, valley  # noqa: E402
from fastai.vision.all import *  # noqa: E402

import figures  # noqa: E402
from arch import ResNet  # noqa: E402
from callbacks import (  # noqa: E402
    FinalPredictions, History, PlainLog, Precision, RunFolder, SeedEpochs, StopOnNaN, best_precision)
from data import SHOW_PROGRESS, DataError, get_data, get_dls  # noqa: E402

PCT_START = 5 / 24  # LRMAX is reached at epoch 5 of 24
REFERENCE = dict(parameters=6_573_130, train_accuracy=.9860, test_accuracy=.9307, first_epoch_over_90=19)


class OptionError(ValueError):
    """An option, or a combination, that cannot work; the message is one line."""


class RunFailed(RuntimeError):
    """The run cannot go on; the message is one line."""


def weight_decay_groups(model: nn.Module, wd: float = 0.01) -> list[dict]:
    """fastai's default decay for a torch optimizer: none on batch norm and biases, which are the 1-d parameters."""
    decayed, plain = [], []
    for p in model.parameters(): (decayed if p.ndim > 1 else plain).append(p)
    return [dict(params=decayed, weight_decay=wd), dict(params=plain, weight_decay=0.)]


def get_learner(dls: DataLoaders, precision: str = 'auto', seed: int = 42, path: str | Path = '.') -> Learner:
    """A fastai `Learner` of the assignment's network for `dls`; whatever it saves goes to `path`.

    The optimizer is torch's fused AdamW with the hyper-parameters of fastai's `Adam`, whose steps it takes (to rounding) in
    a fraction of the time. `precision` is 'auto', 'fp32', 'bf16' or 'fp16'. `seed` determines the initial weights and all
    randomness of every epoch; on a CPU the same seed gives the same run. Raises `OptionError`.
    """
    if precision not in (modes := ('auto', 'fp32', 'bf16', 'fp16')):
        raise OptionError(f'--precision {precision} is not one of {", ".join(modes)}')
    if precision == 'fp16' and dls.device.type != 'cuda':
        raise OptionError(f'--precision fp16 needs a CUDA GPU, not "{dls.device.type}"; use bf16 or fp32')
    if precision == 'auto': precision = best_precision(dls.device)
    set_seed(seed)
    torch.backends.cudnn.benchmark = True
    model = ResNet(3, len(dls.vocab)).to(dls.device, memory_format=torch.channels_last)
    adam = partial(OptimWrapper, opt=torch.optim.AdamW, betas=(0.95, 0.99), eps=1e-5, fused=True)
    cbs = [SeedEpochs(seed), History(), FinalPredictions(), StopOnNaN()]
    if precision != 'fp32': cbs.append(Precision(precision))
    learn = Learner(dls, model, opt_func=adam, splitter=weight_decay_groups, metrics=accuracy, cbs=cbs, path=path)
    learn.recorder.train_metrics = True
    if not SHOW_PROGRESS: learn.remove_cb(ProgressCallback).add_cb(PlainLog())
    return learn


def find_lrs(learn: Learner) -> tuple[float, float]:
    """(LRMIN, LRMAX) by `learn.lr_find()`: its `valley` suggestion and its `minimum` (a tenth of the LR of least loss).

    Raises `RunFailed` where the finder's answer is of no use.
    """
    try: lr_min, lr_max = learn.lr_find(suggest_funcs=(valley, minimum), show_plot=False)
    except (IndexError, RuntimeError, ValueError) as e:
        raise RunFailed(f'the LR finder found nothing ({e}); set --lr-min and --lr-max') from e
    if not 0 < lr_min < lr_max < float('inf'):
        raise RunFailed(f'the LR finder gave no usable range, LRMIN {lr_min:.2e} and LRMAX {lr_max:.2e}; '
                        'set --lr-min and --lr-max')
    return lr_min, lr_max


def check_options(epochs, bs, seed, lr_min, lr_max, final_div):
    """Raises `OptionError` for the first option out of its range."""
    if epochs < 1: raise OptionError(f'--epochs {epochs} is less than 1')
    if bs < 2: raise OptionError(f'--bs {bs} is less than 2, which batch norm needs')
    if not 0 <= seed < 2**32: raise OptionError(f'--seed {seed} is not in 0 … 2³²-1')
    if (lr_min is None) != (lr_max is None): raise OptionError('--lr-min and --lr-max go together: give both or none')
    if lr_min is not None and not 0 < lr_min < lr_max < float('inf'):
        raise OptionError(f'--lr-min {lr_min:g} --lr-max {lr_max:g}: must be 0 < LRMIN < LRMAX')
    if not 0 < final_div < float('inf'): raise OptionError(f'--final-div {final_div:g} is not a positive number')


def check_out(out: str | None) -> Path:
    """The run's folder, not yet made; `runs/<date-time>` by default. Raises `OptionError` if it holds a run."""
    out = Path(out or Path('runs')/time.strftime('%Y-%m-%d-%H%M%S'))
    if out.exists() and not out.is_dir(): raise OptionError(f'--out {out} is not a folder')
    if (out/'history.csv').exists(): raise OptionError(f'--out {out} already holds a run; choose another folder')
    return out


def claim(out: Path):
    """Makes the run's folder ours: of two runs started at once with the same one, the second is refused."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out/'history.csv').open('x').close()
    except FileExistsError: raise OptionError(f'--out {out} already holds a run; choose another folder') from None
    except OSError as e: raise OptionError(f'--out {out} cannot be written ({e.strerror})') from e


def save(fig, file: Path):
    fig.savefig(file, dpi=120)
    plt.close(fig)


def device_name(device: torch.device) -> str:
    if device.type == 'cuda': return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get('cpu_name', '') if hasattr(torch.cpu, 'get_capabilities') else ''
    return f'{device.type}, {name or "unknown"}, {torch.get_num_threads()} threads'


def report(metrics: dict, command: str, wrong: int) -> str:
    """The run on one page of Markdown, its figures included."""
    def percent(x): return f'{x:.2%}'
    m = metrics
    first = m['first_epoch_over_90'] or 'never'
    schedule = f'{m["lr_min"]:.2e} → {m["lr_max"]:.2e} → {m["lr_min"] / m["options"]["final_div"]:.2e}'
    return f'''# ResNet on CIFAR-10: report of a run

| | this run | reference solution |
|---|---|---|
| parameters | {m["parameters"]:,} | {REFERENCE["parameters"]:,} |
| training accuracy, last epoch (augmented images) | {percent(m["train_accuracy"])} | {percent(REFERENCE["train_accuracy"])} |
| test accuracy, last epoch | {percent(m["test_accuracy"])} | {percent(REFERENCE["test_accuracy"])} |
| first epoch over 90 % test accuracy | {first} | {REFERENCE["first_epoch_over_90"]} |

{m["epochs"]} epochs of {m["train_images"]:,} images in batches of {m["batch_size"]}, tested on {m["test_images"]:,} images.
Learning rate {schedule}, seed {m["seed"]}, {m["precision"]} on {m["device"]}.
Training took {m["seconds_training"]:,.0f} s, everything together {m["seconds_total"]:,.0f} s.

    {command}

{", ".join(f"{k} {v}" for k, v in m["versions"].items())}

## Learning rates

{"The finder's loss against the learning rate, and the two rates used." if m["options"]["lr_min"] is None
 else "The learning rates were given, the finder was not asked."}

{"![LR finder](lr_find.png)" if m["options"]["lr_min"] is None else ""}

The rate that each training batch was stepped with, and the optimizer's momentum.

![schedule](schedule.png)

## Training

Training figures are means over each epoch's batches as trained on, augmented and with the weights of that moment;
test figures come after the epoch. Numbers in [history.csv](history.csv).

![history](history.png)

## What it gets wrong

{wrong:,} of {m["test_images"]:,} test images; all of them in [misclassified.csv](misclassified.csv).

![misclassified](misclassified.png)

fastai's top losses:

![top losses](top_losses.png)

![confusion matrix](confusion_matrix.png)

## What it saw

![augmented](augmented.png)
'''


@contextmanager
def one_line_errors():
    """Ends the program with one line and exit code 2 for bad input, 1 for a run that failed."""
    try: yield
    except (DataError, OptionError, RunFailed) as e:
        print(f'train_fastai.py: error: {e}', file=sys.stderr)
        sys.exit(1 if isinstance(e, RunFailed) else 2)


@call_parse
@one_line_errors()
def main(
    data: str = None,  # folder with train/<class>/ and test/<class>/ images, 32×32; fastai's CIFAR-10 if left out
    out: str = None,  # folder for the run's results; runs/<date-time> if left out
    epochs: int = 24,  # passes over the training images
    bs: int = 512,  # batch size
    seed: int = 42,  # of initial weights, shuffling and augmentation
    lr_min: float = None,  # learning rate at the start and end, with --lr-max instead of the LR finder's choice
    lr_max: float = None,  # learning rate at the peak, with --lr-min instead of the LR finder's choice
    final_div: float = 1,  # the last learning rate is LRMIN / final_div: 1 is no annihilation
    precision: str = 'auto',  # auto, fp32, bf16 or fp16; auto takes what the hardware is made for
    stock_loader: bool = False,  # use fastai's own loader, item by item: the same images, slower
):
    "Train the assignment's ResNet on CIFAR-10 and leave metrics, figures and weights in a run folder."
    start, options = time.perf_counter(), dict(locals())
    options.pop('start', None)
    check_options(epochs, bs, seed, lr_min, lr_max, final_div)
    out = check_out(out)

    print('Reading the images …', flush=True)
    dls = get_dls(get_data(data), bs=bs, stock_loader=stock_loader)
    learn = get_learner(dls, precision, seed, path=out)
    precision = learn.precision.amp_mode.value if hasattr(learn, 'precision') else 'fp32'
    parameters = sum(p.numel() for p in learn.model.parameters())
    claim(out)
    print(f'{len(dls.train_ds):,} training and {len(dls.valid_ds):,} test images of {len(dls.vocab)} classes\n'
          f'{parameters:,} parameters, {precision} on {device_name(dls.device)}', flush=True)
    save(figures.augmented(dls), out/'augmented.png')

    if lr_min is None:
        print('Finding the learning rates …', flush=True)
        lr_min, lr_max = find_lrs(learn)
        lrs, losses = learn.recorder.lrs, [float(o) for o in learn.recorder.losses]
        pd.DataFrame(dict(lr=lrs, loss=losses)).to_csv(out/'lr_find.csv', index=False)
        save(figures.lr_finder(lrs, losses, lr_min, lr_max), out/'lr_find.png')
        (out/'models').rmdir()  # fastai keeps the weights there while it searches
    print(f'LRMIN {lr_min:.2e}, LRMAX {lr_max:.2e}', flush=True)

    div = lr_max / lr_min  # fastai's div_final divides LRMAX, so the end is LRMIN only with the same divisor as the start
    learn.fit_one_cycle(epochs, lr_max, div=div, div_final=div * final_div, pct_start=PCT_START, cbs=RunFolder())

    history, final = learn.history, learn.final_predictions
    if history.schedule: save(figures.schedule(history.schedule, len(dls.train)), out/'schedule.png')
    if history.rows: save(figures.history(history.rows), out/'history.png')
    if learn.stop_on_na_n.where:
        raise RunFailed(f'the loss was not finite at {learn.stop_on_na_n.where}; lower --lr-max (it was {lr_max:.2e}). '
                        f'What was recorded is in {out}')

    wrong = final.misclassified()
    pd.DataFrame(wrong, columns=['file', 'actual', 'predicted', 'probability', 'loss']
                 ).to_csv(out/'misclassified.csv', index=False)
    save(figures.misclassified(dls.path, wrong), out/'misclassified.png')
    save(figures.confusion_matrix(final.confusion_matrix(), dls.vocab), out/'confusion_matrix.png')
    interp = ClassificationInterpretation(learn, dls.valid, final.losses)
    save(figures.top_losses(interp), out/'top_losses.png')

    last = history.rows[-1]
    metrics = dict(
        parameters=parameters, lr_min=lr_min, lr_max=lr_max, epochs=epochs, batch_size=bs, seed=seed, precision=precision,
        device=device_name(dls.device), train_accuracy=last['train_accuracy'], test_accuracy=last['test_accuracy'],
        test_loss=last['test_loss'],
        first_epoch_over_90=first(row['epoch'] for row in history.rows if row['test_accuracy'] > 0.9),
        seconds_training=history.seconds_training, seconds_total=time.perf_counter() - start,
        train_images=len(dls.train_ds), test_images=len(dls.valid_ds),
        versions={'python': platform.python_version()} | {p: version(p) for p in ('torch', 'torchvision', 'fastai')},
        options=options)
    (out/'metrics.json').write_text(json.dumps(metrics, indent=2) + '\n')
    (out/'report.md').write_text(report(metrics, ' '.join(['python', *sys.argv]), len(wrong)), encoding='utf-8')
    torch.save(learn.model.state_dict(), out/'model.pth')
    print(f'training accuracy {last["train_accuracy"]:.2%}, test accuracy {last["test_accuracy"]:.2%}, '
          f'first epoch over 90 %: {metrics["first_epoch_over_90"] or "none"}\nEverything is in {out}')
