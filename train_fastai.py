#!/usr/bin/env python
"""Trains the ResNet of `arch.py` on CIFAR-10 with a one-cycle policy whose learning rates the LR finder picks.

    python train_fastai.py             # everything: download, find the LRs, train 24 epochs, draw, report
    python train_fastai.py --help      # the options

Its one published run (docs/cifar10: seed 42, --ema 0, bfloat16 on two cores of an AMD EPYC) ended at
92.73 % test accuracy.
"""
import errors

if __name__ == '__main__': errors.end_quietly_while_importing('train_fastai.py')

import contextlib
import ctypes
import json
import platform
import shlex
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

from fastai.callback.schedule import valley
from fastai.vision.all import *
from fastcore.script import anno_parser, is_cli

import figures
from arch import ResNet
from callbacks import (
    Checkpoint,
    CrossEntropy,
    CUDAGraph,
    FinalPredictions,
    History,
    Mean,
    MeanLoss,
    PlainLog,
    Precision,
    ResumableLearner,
    SeedEpochs,
    SmoothLoss,
    StopOnNaN,
    WeightAverage,
    best_precision,
    load_state,
    save_csv,
    save_state,
    write_whole,
)
from data import SHOW_PROGRESS, fingerprint, get_data, get_dls
from errors import InputError, RunError, one_line, one_line_errors
from report import confusion_matrix, run_report

try: import fcntl  # isort: skip
except ImportError: fcntl = None  # Windows has no such locks

PCT_START = 5 / 24  # LRMAX is reached at epoch 5 of 24


def weight_decay_groups(model: nn.Module, wd: float) -> list[dict]:
    """fastai's weight decay for a torch optimizer: none on batch norm and biases, which are the 1-d parameters."""
    decayed, plain = [], []
    for p in model.parameters(): (decayed if p.ndim > 1 else plain).append(p)
    return [dict(params=decayed, weight_decay=wd), dict(params=plain, weight_decay=0.)]


def keep_freed_memory():
    """Lets the process keep what tensors free: returning it and asking again costs a CPU a fifth of the step."""
    if sys.platform != 'linux': return
    with contextlib.suppress(AttributeError):  # glibc only
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def get_learner(dls: DataLoaders, precision: str = 'auto', seed: int = 42, path: str | Path = '.',
                ema: float = 0.995, wd: float = 0.1, label_smoothing: float = 0.1, eps: float = 1e-5) -> Learner:
    """A fastai `Learner` of the assignment's network for `dls`; whatever it saves goes to `path`.

    The optimizer is torch's fused AdamW with the hyper-parameters of fastai's `Adam`, whose steps it takes (to
    rounding) in a fraction of the time. `precision` is 'auto', 'fp32', 'bf16' or 'fp16'. `seed` determines the initial
    weights and all randomness of every epoch; on a CPU the same seed gives the same run. `ema` is the decay of the
    moving average of the weights that is tested and kept; with 0 it is the last step's weights. `wd` is the decoupled
    weight decay. `label_smoothing` applies to the training loss alone. Raises `InputError`.
    """
    if precision not in (modes := ('auto', 'fp32', 'bf16', 'fp16')):
        raise InputError(f'--precision {precision} is not one of {", ".join(modes)}')
    if precision == 'fp16' and dls.device.type != 'cuda':
        raise InputError(f'--precision fp16 needs a CUDA GPU, not "{dls.device.type}"; use bf16 or fp32')
    if precision == 'auto': precision = best_precision(dls.device)
    set_seed(seed)
    dls.train.rng = random.Random(seed)  # a look at a batch before the first epoch follows from the seed, too
    torch.backends.cudnn.benchmark = True
    if dls.device.type == 'cpu': keep_freed_memory()
    model = ResNet(3, len(dls.vocab)).to(dls.device, memory_format=torch.channels_last)
    adam = partial(OptimWrapper, opt=torch.optim.AdamW, betas=(0.95, 0.99), eps=eps, fused=True)
    cbs = [SeedEpochs(seed), History(), FinalPredictions(), StopOnNaN()]
    if precision != 'fp32': cbs.append(Precision(precision))
    if dls.device.type == 'cuda': cbs.append(CUDAGraph())
    if ema: cbs.append(WeightAverage(ema))
    learn = ResumableLearner(dls, model, loss_func=CrossEntropy(label_smoothing), opt_func=adam,
                             splitter=partial(weight_decay_groups, wd=wd), metrics=Mean(accuracy), cbs=cbs, path=path)
    recorder = learn.recorder
    recorder.train_metrics, recorder.loss, recorder.smooth_loss = True, MeanLoss(), SmoothLoss()
    if not SHOW_PROGRESS: learn.remove_cb(ProgressCallback).add_cb(PlainLog())
    return learn


def basin(lrs: Tensor, losses: Tensor, num_it: int) -> tuple[float, tuple[float, float]]:
    """A suggestion for `lr_find`: a tenth of the middle, on the log scale, of the rates with about the least loss.

    These are the rates whose loss is within a tenth of the whole descent. The single rate of least loss, of which
    fastai's `minimum` is a tenth, varies twice as much from seed to seed.
    """
    low = losses.min()
    middle = lrs[losses <= low + 0.1 * (losses[0] - low)].log().mean().exp()
    return middle.item() / 10, (middle.item(), losses[(lrs - middle).abs().argmin()])


def find_lrs(learn: Learner) -> tuple[float, float]:
    """(LRMIN, LRMAX) by `learn.lr_find()`: its `valley` suggestion, but a tenth of LRMAX at most, and our `basin`.

    Raises `RunError` where the finder's answer is of no use.
    """
    try:
        with tempfile.TemporaryDirectory() as tmp, contextlib.contextmanager(replacing_yield)(learn, 'model_dir', tmp):
            lr_min, lr_max = learn.lr_find(suggest_funcs=(valley, basin), show_plot=False)
    except torch.OutOfMemoryError: raise
    except (IndexError, RuntimeError, ValueError) as e:
        raise RunError(f'the LR finder failed ({one_line(e)}); set --lr-min and --lr-max') from e
    if not 0 < lr_min < float('inf') or not 0 < lr_max < float('inf'):
        raise RunError('the LR finder gave no usable rates; set --lr-min and --lr-max')
    return min(lr_min, lr_max / 10), lr_max


def check_options(epochs: int, bs: int, seed: int, lr_min: float | None, lr_max: float | None, final_div: float,
                  ema: float, wd: float, label_smoothing: float, **_):
    """Raises `InputError` for the first option out of its range."""
    if epochs < 1: raise InputError(f'--epochs {epochs} is less than 1')
    if bs < 1: raise InputError(f'--bs {bs} is less than 1')
    if not 0 <= seed < 2**32: raise InputError(f'--seed {seed} is not in 0 … 2³²-1')
    if (lr_min is None) != (lr_max is None): raise InputError('--lr-min and --lr-max go together: give both or none')
    if lr_min is not None and not 0 < lr_min < lr_max < float('inf'):
        raise InputError(f'--lr-min {lr_min:g} --lr-max {lr_max:g}: must be 0 < LRMIN < LRMAX')
    if not 0 < final_div < float('inf'): raise InputError(f'--final-div {final_div:g} is not a positive number')
    if not 0 <= wd < float('inf'): raise InputError(f'--wd {wd:g} is negative or not finite')
    if not 0 <= label_smoothing < 1:
        raise InputError(f'--label-smoothing {label_smoothing:g} is not at least 0 and less than 1')
    if not 0 <= ema < 1: raise InputError(f'--ema {ema:g} is not at least 0 and less than 1')


def other_than_default(options: dict) -> dict:
    """Those of `options` that differ from their defaults."""
    parser = anno_parser(main)
    return {k: v for k, v in options.items() if v != parser.get_default(k)}


def given_options(options: dict) -> dict:
    """Those of `options` that were given rather than left at their defaults."""
    if not is_cli(main): return other_than_default(options)
    given = anno_parser(main).parse_args(namespace=SimpleNamespace(**dict.fromkeys(options)))  # keeps defaults out
    return {k: v for k, v in vars(given).items() if k in options and v is not None}


def run_to_resume(out: Path, options: dict) -> dict:
    """The checkpoint of the run in `out`. Raises `InputError` where `options` given contradict the run's own."""
    if (out/'model.pth').exists(): raise InputError(f'--resume {out}: this run is finished, nothing is left to do')
    try: state = load_state(out/Checkpoint.file)
    except InputError as e: raise InputError(f'--resume {out}: {e}; start a run without --resume') from e
    if not isinstance(state, dict) or not {'epochs_done', 'options'} <= state.keys():
        raise InputError(f'--resume {out}: {Checkpoint.file} is not of this program')
    if state['options'].keys() != options.keys():
        raise InputError(f'--resume {out}: the run is of another version of this program, which has to finish it')
    for k in given_options(options):
        if k == 'out': raise InputError('--out and --resume name two folders; leave one of them out')
        if k != 'data' and options[k] != state['options'].get(k):  # the data may have moved, and are compared
            raise InputError(f'--{k.replace("_", "-")} {options[k]} contradicts the run in {out}, '
                              f'which has {state["options"].get(k)}; leave it out')
    return state


def check_out(out: Path):
    """Raises `InputError` if `out` is no place for a new run."""
    if os.path.isfile(out): raise InputError(f'--out {out} is a file, not a folder')
    if any(os.path.exists(out/name) for name in (Checkpoint.file, 'metrics.json', 'model.pth')):
        raise InputError(f'--out {out} already holds a run; choose another folder, or go on with --resume {out}')


@contextlib.contextmanager
def locked(out: Path, new: bool):
    """Locks the folder `out`, and makes a `new` one: of two runs at once, one is refused. Raises `InputError`."""
    with contextlib.ExitStack() as stack:
        try:
            if new: out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=out).close()  # can it be written to?
            if fcntl:
                lock = os.open(out, os.O_RDONLY)
                stack.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError: raise InputError(f'{out} is in use by another run') from None
        except OSError as e: raise InputError(f'{out} cannot be used for a run ({e.strerror})') from e
        yield


def device_name(device: torch.device) -> str:
    """The processor in words."""
    if device.type == 'cuda': return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get('cpu_name') or platform.machine()
    return f'{device.type}, {name}, {torch.get_num_threads()} threads'


def save_figure(fig: plt.Figure, file: Path):
    """Writes the figure as a picture of 120 dots an inch, and closes it."""
    fig.savefig(file, dpi=120)
    plt.close(fig)


def save_training_figures(learn: Learner):
    """The schedule and the history as far as they were recorded."""
    h = learn.history
    if h.schedule: save_figure(figures.schedule(h.schedule, len(learn.dls.train)), learn.path/'schedule.png')
    if h.rows: save_figure(figures.history(h.rows), learn.path/'history.png')


def command_line(options: dict) -> str:
    """The command that starts a run with `options`, in a new folder."""
    command = ['python', 'train_fastai.py']
    for k, v in other_than_default(options | dict(out=None)).items():
        command += [f'--{k.replace("_", "-")}', *([] if v is True else [str(v)])]
    return shlex.join(command)


def load_data(options: dict) -> DataLoaders:
    """The `DataLoaders` of a run with `options`. Raises `InputError`."""
    return get_dls(get_data(options['data']), bs=options['bs'], every=10 if options['taste'] else 1)


def experiment(learn: Learner, o: SimpleNamespace, images: str, state: dict | None, start: float):
    """Finds the learning rates, trains and leaves everything in `learn.path`.

    `o` are the options, `images` is their fingerprint, `state` a checkpoint to go on from, and `start` when
    the program began, by `time.perf_counter()`. Raises `RunError`.
    """
    dls, out = learn.dls, learn.path
    precision = learn.precision.amp_mode.value if hasattr(learn, 'precision') else 'fp32'
    parameters = sum(p.numel() for p in learn.model.parameters())
    print(f'{len(dls.train_ds):,} training and {len(dls.valid_ds):,} test images of {len(dls.vocab)} classes\n'
          f'{parameters:,} parameters, {precision} on {device_name(dls.device)}', flush=True)
    if o.taste: print('A taste: one image in ten, few epochs, small batches. Its numbers say nothing of the recipe.')
    save_figure(figures.augmented(dls), out/'augmented.png')

    if state: lr_min, lr_max = state['lr_min'], state['lr_max']
    elif o.lr_min: lr_min, lr_max = o.lr_min, o.lr_max
    else:
        print('Finding the learning rates …', flush=True)
        lr_min, lr_max = find_lrs(learn)
        lrs, losses = learn.recorder.lrs, [float(loss) for loss in learn.recorder.losses]
        save_csv(out/'lr_find.csv', [dict(lr=lr, loss=loss) for lr, loss in zip(lrs, losses, strict=True)])
        save_figure(figures.lr_finder(lrs, losses, lr_min, lr_max), out/'lr_find.png')
    print(f'LRMIN {lr_min:.2e}, LRMAX {lr_max:.2e}', flush=True)

    checkpoint = Checkpoint(dict(options=vars(o), lr_min=lr_min, lr_max=lr_max, precision=precision,
                                 fingerprint=images), start, state)
    div = lr_max / lr_min  # fastai's div_final divides LRMAX: the end is LRMIN only with the same divisor as the start
    try:
        learn.fit_one_cycle(o.epochs, lr_max, div=div, div_final=div * o.final_div, pct_start=PCT_START, cbs=checkpoint)
    finally:
        with contextlib.suppress(OSError): save_training_figures(learn)  # what ended the training has precedence
    if at := learn.stop_on_na_n.where:
        raise RunError(f'the loss was not finite at {at}; lower --lr-max, which was {lr_max:.2e} '
                       f'(what was recorded is in {out})')

    if not hasattr(learn.final_predictions, 'losses'): learn.validate()  # resumed behind the last epoch
    final, rows = learn.final_predictions, learn.history.rows
    wrong, counts = final.misclassified(), confusion_matrix(final.log_probs, final.targets)
    save_csv(out/'misclassified.csv', wrong, ['file', 'actual', 'predicted', 'probability', 'loss'])
    save_figure(figures.misclassified(dls.path, wrong), out/'misclassified.png')
    save_figure(figures.confusion_matrix(counts, dls.vocab), out/'confusion_matrix.png')
    interp = ClassificationInterpretation(learn, dls.valid, final.losses)  # from_learner would test all over again
    save_figure(figures.top_losses(interp), out/'top_losses.png')

    metrics = dict(
        parameters=parameters, lr_min=lr_min, lr_max=lr_max, epochs=o.epochs, batch_size=o.bs, seed=o.seed,
        precision=precision, device=device_name(dls.device),
        **{k: rows[-1][k] for k in ('train_accuracy', 'test_accuracy', 'test_loss')},
        first_epoch_over_90=first(row['epoch'] for row in rows if row['test_accuracy'] > 0.9),
        seconds_training=learn.history.seconds_training, seconds_total=checkpoint.seconds_total(),
        train_images=len(dls.train_ds), test_images=len(dls.valid_ds), classes=list(dls.vocab), fingerprint=images,
        versions={'python': platform.python_version()} | {p: version(p) for p in ('torch', 'torchvision', 'fastai')},
        options=vars(o))
    write_whole(out/'metrics.json', json.dumps(metrics, indent=2).encode() + b'\n')
    text = run_report(metrics, command_line(metrics['options']), rows, learn.history.schedule, wrong, counts)
    write_whole(out/'report.md', text.encode())
    save_state(out/'model.pth', learn.model.state_dict())
    print(f'{"taste" if o.taste else "run"} finished: training accuracy {metrics["train_accuracy"]:.2%}, '
          f'test accuracy {metrics["test_accuracy"]:.2%}, '
          f'first epoch over 90 %: {metrics["first_epoch_over_90"] or "none"}\nEverything is in {out}')


@contextlib.contextmanager
def told_how_to_go_on(out: Path):
    """Adds to an interruption, or to a failure to write, how the run in `out` can go on."""
    try: yield
    except (KeyboardInterrupt, OSError) as e:
        go_on = 'no epoch was finished, start anew'
        if os.path.exists(out/Checkpoint.file):
            go_on = f'go on from the last whole epoch with --resume {shlex.quote(str(out))}'
        if isinstance(e, KeyboardInterrupt): raise KeyboardInterrupt(e.args[0] if e.args else 130, go_on) from e
        if isinstance(e, BrokenPipeError): raise RunError(f'nobody reads the output any more; {go_on}') from e
        culprit = f'{e.filename}: {e.strerror}' if e.filename else one_line(e)
        raise RunError(f'{culprit}; {go_on}, once that is mended') from e
    except torch.OutOfMemoryError as e: raise RunError('the GPU is out of memory; try a smaller --bs') from e


@call_parse
@one_line_errors('train_fastai.py')
def main(
    data: str = None,  # folder with train/<class>/ and test/<class>/ images, 32×32; fastai's CIFAR-10 if left out
    out: str = None,  # folder for the run's results; runs/<date-time> if left out
    epochs: int = 24,  # passes over the training images
    bs: int = 512,  # batch size
    seed: int = 42,  # of initial weights, shuffling and augmentation
    lr_min: float = None,  # learning rate at the start and the end; with --lr-max, instead of the LR finder
    lr_max: float = None,  # learning rate at the peak; with --lr-min, instead of the LR finder
    final_div: float = 1,  # the last learning rate is LRMIN / final_div: 1 is no annihilation
    wd: float = 0.1,  # decoupled weight decay, not on batch norm and biases
    label_smoothing: float = 0.1,  # share of the label that training spreads over all classes
    ema: float = 0.995,  # decay of the moving average of the weights, which is tested and kept; 0 for none
    precision: str = 'auto',  # auto, fp32, bf16 or fp16; auto takes what the hardware is made for
    taste: bool = False,  # a first look within two minutes: a tenth of the images, epochs ≤ 4, bs ≤ 64
    resume: str = None,  # folder of an interrupted run to go on with, under its own options
):
    "Train the assignment's ResNet on CIFAR-10 and leave metrics, figures and weights in a run folder."
    start = time.perf_counter()
    data, out = data and str(data), out and str(out)
    options = dict(data=data, out=out, epochs=epochs, bs=bs, seed=seed, lr_min=lr_min, lr_max=lr_max,
                   final_div=final_div, wd=wd, label_smoothing=label_smoothing, ema=ema, precision=precision,
                   taste=taste)
    if taste: options |= dict(epochs=min(epochs, 4), bs=min(bs, 64))
    out = Path(out or Path('runs')/time.strftime('%Y-%m-%d-%H%M%S')) if resume is None else Path(resume)

    with told_how_to_go_on(out), contextlib.ExitStack() as lock:
        if resume is None:
            check_options(**options)
            check_out(out)
            state = None
        else:
            lock.enter_context(locked(out, new=False))  # else its checkpoint could be an old one when it goes on
            state = run_to_resume(out, options)
            options, precision = state['options'] | (dict(data=data) if data else {}), state['precision']
        o = SimpleNamespace(**options)

        print('Reading the images …', flush=True)
        dls = load_data(options)
        images = fingerprint(dls)
        if state and state['fingerprint'] != images:
            raise InputError(f'{dls.path} holds other images than the run in {out} was trained on')
        if o.data: o.data = str(Path(o.data).absolute())  # a run can be gone on with from anywhere
        learn = get_learner(dls, precision, o.seed, path=out, ema=o.ema, wd=o.wd, label_smoothing=o.label_smoothing)
        if not state:
            lock.enter_context(locked(out, new=True))
            check_out(out)  # another run may have come first
        experiment(learn, o, images, state, start)
