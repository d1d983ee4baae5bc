"""The folder of a run: its options, its lock, atomic writes, the checkpoint, and how it is resumed."""
import argparse
import contextlib
import dataclasses
import io
import pickle
import shlex
import sys
from collections import deque
from datetime import datetime
from typing import Any

from fastai.vision.all import *
from fastcore.script import anno_parser
from filelock import FileLock, Timeout

from lab.errors import InputError, RunError, one_line
from lab.loader import fingerprint
from lab.sources import NO_LOCKS, NetworkError, get_data, get_sample
from lab.speed import resolve_precision, unwrap

QUICK = dict(epochs=4, bs=64)  # the most that a quick look has of each
PLAIN = dict(wd=0.01, label_smoothing=0., ema=0.)  # fastai's defaults
CHECKPOINT = 'checkpoint.pth'


def atomic_write(file: Path, content: bytes):
    """Replace `file` by `content`, whole or not at all; only rank 0 writes. Raises `RunError`, for a full disk, say."""
    if rank_distrib(): return
    part = file.with_name(f'{file.name}.part')
    try:
        with part.open('wb') as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        part.replace(file)
    except OSError as e: raise RunError(f'{file}: {e.strerror}') from e
    finally:
        with contextlib.suppress(OSError): part.unlink(missing_ok=True)


def save_csv(file: Path, table: pd.DataFrame):
    """Write the `table` as CSV, atomically."""
    atomic_write(file, table.to_csv(index=False, lineterminator='\n').encode(errors='backslashreplace'))


def save_state(file: Path, state: dict):
    """`torch.save`, atomically."""
    torch.save(state, buffer := io.BytesIO())
    atomic_write(file, buffer.getbuffer())


def load_state(file: Path) -> dict:
    """What `torch.save` wrote to `file`; no code from the file is run. Raises `InputError`, also for other contents."""
    try: return torch.load(file, map_location='cpu', weights_only=True)
    except OSError as e: raise InputError(f'{file} cannot be read ({e.strerror})') from e
    except pickle.UnpicklingError as e:
        raise InputError(f'{file} holds more than weights and plain values; it was not opened') from e
    except Exception as e: raise InputError(f'{file} is damaged ({one_line(e)[:100]})') from e


@contextlib.contextmanager
def nonfatal(file: Path):
    """Context manager that reports a failed table or figure on stderr and carries on."""
    try: yield
    except Exception as e: print(f'{file} was not written: {one_line(e)}', file=sys.stderr)


def plain(x: Any) -> Any:
    """`x` as `load_state` accepts it: plain values, tensors, and lists and dicts of them. Raises `TypeError`."""
    if x is None or type(x) in (bool, int, float, str): return x
    if isinstance(x, np.generic): return x.item()
    if isinstance(x, Tensor): return x.detach().as_subclass(Tensor)
    if isinstance(x, dict): return {plain(k): plain(v) for k, v in x.items()}
    if isinstance(x, ndarray): return torch.from_numpy(x.copy())
    if isinstance(x, tuple): return tuple(plain(o) for o in x)
    if isinstance(x, list | set | deque | L): return [plain(o) for o in x]
    raise TypeError(type(x).__name__)


def get_state(cb: Callback) -> dict:
    """The state of a callback: its `state_dict`, or all its plain attributes, as fastai's trackers have them."""
    if hasattr(type(cb), 'state_dict'): return plain(cb.state_dict())
    state = {}
    for k, v in vars(cb).items():
        with contextlib.suppress(TypeError): state[k] = plain(v)
    return state


def set_state(cb: Callback, state: dict):
    """Put back what `get_state` has returned."""
    if hasattr(type(cb), 'state_dict'): cb.load_state_dict(state)
    else: vars(cb).update({k: as_type_of(vars(cb).get(k), v) for k, v in state.items()})


def as_type_of(old: Any, v: Any) -> Any:
    """`v`, which `plain` has made, as the type of `old`."""
    if isinstance(old, deque): return deque(v, old.maxlen)
    return v.numpy() if isinstance(old, ndarray) else type(old)(v) if isinstance(old, L | set) else v


def forecast(epochs: int, seconds: float):
    """Say what `epochs` will take."""
    minutes = round(seconds / 60)
    about = f'{seconds:.0f} s' if seconds < 100 else f'{minutes} min' if minutes < 100 else f'{minutes / 60:.1f} h'
    print(f'{epochs} epoch{"s" * (epochs > 1)} will take about {about} at this pace.', flush=True)


class TrainingCallback(Callback):
    """Base class for callbacks that must ignore `lr_find` and `get_preds`, which fire the same events."""

    def __call__(self, event_name: str):
        if not any(hasattr(self.learn, cb) for cb in ('lr_finder', 'gather_preds')): super().__call__(event_name)


class Checkpoint(TrainingCallback):
    """Saves a `run` before the first epoch of a fit and after every epoch, or resumes it from `run.state`.

    Stored are `header`, weights, gradients that an accumulation left, the optimizer, and every callback's state.
    Randomness needs no saving: `SeedEpochs` derives it from the seed and the epoch. A resumed run skips what was done,
    a fit or epochs of it, and no other callback hears of that. After one epoch it says how long the rest will take.
    """
    order = 1000  # last: trackers have their new state

    def __init__(self, run: 'Run', header: dict):
        self.of, self.header, self.tell, self.fits = run, header, True, 0

    @property
    def others(self) -> L:
        return self.learn.cbs.filter(lambda cb: not isinstance(cb, Checkpoint | Recorder | ProgressCallback))

    @property
    def plan(self) -> list:
        """The number of epochs of the fit, and its schedules at ten moments."""
        scheds = [f for cb in self.learn.cbs if isinstance(cb, ParamScheduler) for f in cb.scheds.values()]
        return [self.n_epoch, *(float(v) for f in scheds for i in range(10) for v in np.ravel(f(i / 10)))]

    @property
    def smooth_loss(self) -> tuple | None:
        """The state of the recorder's `train_loss`, which a tracker may watch."""
        smooth = getattr(getattr(self.learn, 'recorder', None), 'smooth_loss', None)
        return smooth and plain((smooth.count, smooth.val))

    def before_fit(self):
        self.fits, self.skip, fits = self.fits + 1, 0, self.of.state.get('fits', 0)
        if self.fits > fits: self.save(epochs_done=0)
        else:
            self.skip = self.restore(self.of.state) if self.fits == fits else self.n_epoch
            self.running = [(cb, cb.run) for cb in self.learn.cbs if not isinstance(cb, Checkpoint | ProgressCallback)]
            for cb, _ in self.running if self.skip else (): vars(cb)['run'] = False

    def before_epoch(self):
        if self.epoch < self.skip: raise CancelEpochException

    def after_epoch(self):
        done, left = self.epoch + 1, self.n_epoch - self.epoch - 1
        for cb, run in self.running if done == self.skip else (): vars(cb)['run'] = run
        if done <= self.skip: return
        self.save(done)
        if self.tell and left and self.history.rows: forecast(left, left * self.history.rows[-1]['seconds'])
        self.tell = False

    def after_cancel_fit(self): self.save_tables()

    def save(self, epochs_done: int):
        """Write the checkpoint, and the tables so far."""
        if rank_distrib(): return
        model, out = unwrap(self.model), self.of.folder
        grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        save_state(out/CHECKPOINT, dict(
            self.header, fits=self.fits, plan=self.plan, epochs_done=epochs_done, model=model.state_dict(),
            grads=plain(grads), opt=plain(self.opt.state_dict()), seconds_total=self.of.seconds(),
            smooth=self.smooth_loss, train_iter=self.learn.train_iter,
            callbacks=[(cb.name, get_state(cb)) for cb in self.others]))
        self.save_tables()

    def save_tables(self):
        out = self.of.folder
        for name, rows, columns in (('history.csv', self.history.rows, list(self.history.columns)),
                                    ('schedule.csv', self.history.schedule, ['batch', 'lr', 'momentum'])):
            with nonfatal(out/name): save_csv(out/name, pd.DataFrame(rows, columns=columns))

    def restore(self, state: dict) -> int:
        """Put back everything that `save` has stored; return how many epochs of the fit were done."""
        if [name for name, _ in state['callbacks']] != [cb.name for cb in self.others]:
            raise RunError('the run was started with other callbacks; it cannot be resumed with these')
        if state['plan'] != self.plan:
            raise RunError('this fit has other epochs or rates than when it was started; it cannot be resumed')
        model = unwrap(self.model)
        model.load_state_dict(state['model'])
        for k, grad in state['grads'].items(): model.get_parameter(k).grad = grad.to(model.get_parameter(k).device)
        self.opt.load_state_dict(state['opt'])
        self.learn.train_iter = state['train_iter']
        if state['smooth'] and hasattr(self.learn, 'recorder'):
            self.recorder.smooth_loss.count, self.recorder.smooth_loss.val = state['smooth']
        for cb, (_, values) in zip(self.others, state['callbacks'], strict=True): set_state(cb, values)
        return state['epochs_done']


def parse_options(cls: type, args: list[str] | None = None) -> tuple[Any, set[str]]:
    """The options on the command line, or in `args`, as the dataclass `cls`, and the names of those that were given."""
    names, not_given = [f.name for f in dataclasses.fields(cls)], object()  # argparse puts no default over a value
    parsed = vars(anno_parser(cls).parse_args(args, argparse.Namespace(**dict.fromkeys(names, not_given))))
    given = {name: parsed[name] for name in names if parsed[name] is not not_given}
    return cls(**given), {*given}


def check_options(o):
    """Raise `InputError` for the first option of `o`, an `Options`, that is out of its range."""
    inf, lrs = float('inf'), (o.lr_min, o.lr_max)
    if lrs.count(None) == 1: raise InputError('--lr-min and --lr-max go together: give both or none')
    for name, ok, rule in (
            ('data', o.data != '', 'a folder'), ('epochs', o.epochs >= 1, 'at least 1'),
            ('bs', o.bs >= 1, 'at least 1'), ('seed', 0 <= o.seed < 2**32, 'in 0 … 2³²-1'),
            ('bs', o.bs % max(num_distrib(), 1) == 0, f'a multiple of {num_distrib()}, the number of processes'),
            ('lr_min', None in lrs or 0 < o.lr_min < o.lr_max < inf, f'in 0 < LRMIN < LRMAX = {o.lr_max}'),
            ('lr_end', o.lr_end is None or 0 < o.lr_end < inf, 'a positive number'),
            ('lr_end', not (o.lr_end and o.lr_max and o.lr_end > o.lr_max), f'at most LRMAX, {o.lr_max}'),
            ('wd', 0 <= o.wd < inf, 'at least 0 and finite'),
            ('label_smoothing', 0 <= o.label_smoothing < 1, 'at least 0 and less than 1'),
            ('ema', 0 <= o.ema < 1, 'at least 0 and less than 1')):
        if not ok: raise InputError(f'--{name.replace("_", "-")} {getattr(o, name)} is not {rule}')
    resolve_precision(o.precision, default_device())


def limit_to_quick_look(o):
    """The options `o` of a quick look, which takes minutes."""
    print('A quick look: one image in ten, at most 4 epochs, batches of at most 64. Its numbers say nothing about the '
          'recipe.')
    return dataclasses.replace(o, quick=True, **{k: min(getattr(o, k), limit) for k, limit in QUICK.items()})


class Run:
    """Context manager for one run: locks its folder and, on interruption, says how to resume.

    `options` is an `Options`; `given` names those that were given on the command line. With `options.resume`, the
    folder of an interrupted run, they come from that run, except `data` if it has moved. Raises `InputError`.
    """

    def __init__(self, o, given: set[str] | None = None):
        self.start, self.state, self.saver, self.stack = time.perf_counter(), {}, None, contextlib.ExitStack()
        self.bare = given is not None and given <= {'out'} and num_distrib() < 2
        o = dataclasses.replace(o, **{k: str(v) for k, v in vars(o).items() if isinstance(v, Path)})
        self.folder = Path(o.resume or o.out or f'{datetime.now():runs/%Y-%m-%d-%H%M%S-%f}')
        refused = (given or set()) - {'data', 'resume'} if o.resume else (given or set()) & {*PLAIN} if o.plain else ()
        if refused:
            name = f'--{min(refused).replace("_", "-")}'
            raise InputError(f'{name}: --resume takes --data and no other option' if o.resume else
                             f'{name} is what --plain sets itself')
        if o.resume:
            with contextlib.ExitStack() as self.stack:
                self.lock()  # first, since another run might still replace the checkpoint
                o = self.load(o)
                self.stack = self.stack.pop_all()
        else: self.check_free()
        check_options(o)
        if o.plain: o = dataclasses.replace(o, **PLAIN)
        self.options = limit_to_quick_look(o) if o.quick and not o.resume else o
        self.precision = self.state.get('precision') or resolve_precision(o.precision, default_device())
        self.lrs = self.state.get('lrs') or ((o.lr_min, o.lr_max) if o.lr_min else None)

    def load(self, o):
        """The options of the interrupted run, whose checkpoint becomes `state`. Raises `InputError`."""
        resume = f'--resume {self.folder}'
        if (self.folder/'model.pth').exists(): raise InputError(f'{resume}: this run is finished')
        try: self.state = load_state(self.folder/CHECKPOINT)
        except InputError as e: raise InputError(f'{resume}: {e}; start a run without --resume') from e
        names = {f.name for f in dataclasses.fields(o)}
        if not isinstance(self.state, dict) or {*self.state.get('options', ())} != names or 'fits' not in self.state:
            raise InputError(f'{resume}: {CHECKPOINT} was not written by this version of the program')
        self.start -= self.state['seconds_total']
        return type(o)(**self.state['options'] | dict(resume=o.resume) | (dict(data=o.data) if o.data else {}))

    def lock(self):
        """Lock the run's folder: a second run in it is refused. Raises `InputError`."""
        if rank_distrib(): return
        lock = self.folder/'.lock'
        try:
            lock.touch()
            self.stack.enter_context(FileLock(lock, timeout=0))
            self.stack.callback(self.unlock)  # while it is held: nobody else is in
        except Timeout: raise InputError(f'{self.folder} is in use by another run') from None
        except OSError as e:
            if e.errno not in NO_LOCKS:
                raise InputError(f'{self.folder} cannot be used for a run ({e.strerror})') from e
            print(f'{self.folder} cannot be locked ({e.strerror}): start no other run in it', file=sys.stderr)

    def unlock(self):
        with contextlib.suppress(OSError): (self.folder/'.lock').unlink()

    def check_free(self):
        """Raise `InputError` if the folder cannot take a new run."""
        if self.folder.is_file(): raise InputError(f'--out {self.folder} is a file, not a folder')
        if not rank_distrib() and any((self.folder/o).exists() for o in (CHECKPOINT, 'metrics.json', 'model.pth')):
            resume = '' if (self.folder/'model.pth').exists() else f', or {self.resume_command}'
            raise InputError(f'--out {self.folder} already holds a run; choose another folder{resume}')

    @property
    def resume_command(self) -> str: return f'resume it with: {self.format_command(resume=str(self.folder))}'

    @property
    def command(self) -> str:
        """The command that starts a run with the same options, in a new folder."""
        implied = ('out', 'resume', *(PLAIN if self.options.plain else ()))
        return self.format_command(**{f.name: value for f in dataclasses.fields(self.options) if f.name not in implied
                                      and (value := getattr(self.options, f.name)) != f.default})

    def format_command(self, **options) -> str:
        """The command line with these `options`."""
        launch = f'accelerate launch --multi_gpu --num_processes {num_distrib()}' if num_distrib() > 1 else 'python'
        return shlex.join([*launch.split(), 'train_fastai.py', *(o for k, v in options.items() for o in (
            f'--{k.replace("_", "-")}', *([] if v is True else [str(v)])))])

    def find_images(self) -> dict:
        """The arguments of `get_dls`. A quick look takes the sample, or a tenth of a given folder.

        The bare command, with no option but --out, turns into a quick look without a network. Raises `InputError`.
        """
        try: path = get_sample() if self.options.quick and self.options.data is None else get_data(self.options.data)
        except NetworkError as e:
            if not self.bare: raise InputError(f'{e}, or --quick, which needs none') from e
            print(f'{e}. Until then, this is a quick look at the sample that comes with the program.')
            self.options, path = limit_to_quick_look(self.options), get_sample()
        o = self.options
        return dict(path=path, bs=o.bs, every=10 if o.quick and o.data else 1, resize=o.resize)

    def claim_folder(self, dls: DataLoaders):
        """Make and lock the folder for a run on the images of `dls`. Raises `InputError`."""
        self.fingerprint = fingerprint(dls)
        if self.options.data:  # so that the run can be resumed from anywhere
            self.options = dataclasses.replace(self.options, data=str(Path(self.options.data).absolute()))
        if self.state.get('fingerprint', self.fingerprint) != self.fingerprint:
            raise InputError(f'these are not the images that the run in {self.folder} was trained on')
        if self.state: return
        try: self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e: raise InputError(f'{self.folder} cannot be used for a run ({e.strerror})') from e
        self.lock()
        self.check_free()  # another run may have come first

    def checkpoint(self, lr_min: float, lr_max: float) -> Checkpoint:
        """The callback that saves the run, which uses these learning rates. Raises `InputError`."""
        self.lrs = lr_min, lr_max
        check_options(dataclasses.replace(self.options, lr_min=lr_min, lr_max=lr_max))
        header = dict(lrs=self.lrs, precision=self.precision, fingerprint=self.fingerprint,
                      options=vars(self.options) | dict(resume=None))
        self.saver = self.saver or Checkpoint(self, header)
        return self.saver  # one for all fits, which it counts

    def seconds(self) -> float:
        """How long the run has taken, interruptions left out."""
        return time.perf_counter() - self.start

    def __enter__(self): return self

    def __exit__(self, kind, e: BaseException | None, traceback):
        self.stack.close()
        again = isinstance(e, InputError) or isinstance(e, RunError) and not isinstance(e.__cause__, OSError)
        if e is None or again: return  # it would only happen again
        resumable = (self.folder/CHECKPOINT).exists()
        hint = self.resume_command if resumable else 'nothing was trained yet'
        e.add_note(hint if isinstance(e, KeyboardInterrupt) or not resumable else f'once that is fixed, {hint}')
