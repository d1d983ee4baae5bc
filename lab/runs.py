"""The folder of a run: its options, its lock, atomic writes, the checkpoint, and how it is resumed."""
import argparse
import contextlib
import dataclasses
import errno
import io
import pickle
import shlex
import sys
from datetime import datetime
from typing import Any

from fastai.vision.all import *
from fastcore.script import anno_parser
from filelock import FileLock, Timeout

from lab.errors import InputError, RunError, one_line
from lab.loader import fingerprint
from lab.sources import NetworkError, get_data, get_sample
from lab.speed import resolve_precision, unwrap

QUICK = dict(epochs=4, bs=64)  # the most that a quick look has of each
CHECKPOINT = 'checkpoint.pth'
NO_LOCKS = errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS  # of NFS and FUSE


def atomic_write(file: Path, content: bytes):
    """Replace `file` by `content`: whatever happens meanwhile, the old or the new file is there, whole.

    Only rank 0 writes. Raises `RunError`, for a full disk, say.
    """
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
    """Write the `table` as CSV."""
    atomic_write(file, table.to_csv(index=False, lineterminator='\n').encode(errors='backslashreplace'))


@contextlib.contextmanager
def nonfatal(file: Path):
    """Context manager that reports a failed table or figure on stderr and carries on."""
    try: yield
    except Exception as e: print(f'{file} was not written: {one_line(e)}', file=sys.stderr)


def save_state(file: Path, state: dict):
    """`torch.save`, atomically."""
    torch.save(state, buffer := io.BytesIO())
    atomic_write(file, buffer.getbuffer())


def load_state(file: Path) -> dict:
    """Load what `torch.save` wrote to `file`, tensors and plain values only: no code from the file is run.

    Raises `InputError` for a file that is missing, damaged or holds anything else.
    """
    try: return torch.load(file, map_location='cpu', weights_only=True)
    except FileNotFoundError as e: raise InputError(f'{file} does not exist') from e
    except OSError as e: raise InputError(f'{file} cannot be read ({e.strerror})') from e
    except pickle.UnpicklingError as e:
        raise InputError(f'{file} holds more than weights and plain values; it was not opened') from e
    except Exception as e: raise InputError(f'{file} is damaged ({one_line(e)[:100]})') from e


def plain(x: Any) -> Any:
    """`x` as `load_state` accepts it: plain values, tensors, and lists and dicts of them. Raises `TypeError`."""
    if x is None or type(x) in (bool, int, float, str, Tensor): return x
    if isinstance(x, np.generic): return x.item()
    if isinstance(x, Tensor): return x.detach().as_subclass(Tensor)
    if isinstance(x, tuple): return tuple(plain(o) for o in x)
    if isinstance(x, list | L): return [plain(o) for o in x]
    if isinstance(x, dict): return {plain(k): plain(v) for k, v in x.items()}
    raise TypeError(type(x).__name__)


def get_state(cb: Callback) -> dict:
    """The state of a callback: its `state_dict`, or all its plain attributes, as fastai's trackers have them."""
    if hasattr(type(cb), 'state_dict'): return plain(cb.state_dict())
    state = {}
    for k, v in vars(cb).items():
        with contextlib.suppress(TypeError): state[k] = plain(v)
    return {k: v for k, v in state.items() if k != 'learn'}


def set_state(cb: Callback, state: dict):
    """Put back what `get_state` has returned."""
    if hasattr(type(cb), 'state_dict'): cb.load_state_dict(state)
    else: vars(cb).update({k: L(v) if isinstance(vars(cb).get(k), L) else v for k, v in state.items()})


class Checkpoint(Callback):
    """Saves a run to `folder` before the first epoch of a fit and after every epoch, or resumes it from `state`.

    Stored are `header`, weights, gradients that an accumulation left, the optimizer, and every callback's state.
    Randomness needs no saving: `SeedEpochs` derives it from the seed and the epoch. `seconds` returns how long the run
    has taken. A resumed run skips what was done, a fit or epochs of it, and no other callback hears of that.
    """
    order = 1000  # last: trackers have their new state

    def __init__(self, folder: Path, header: dict, state: dict | None, seconds: Callable):
        self.folder, self.header, self.state, self.seconds, self.fits, self.skip = folder, header, state, seconds, 0, 0

    def __call__(self, event_name: str):
        if not hasattr(self.learn, 'gather_preds'): super().__call__(event_name)

    @property
    def others(self) -> L: return self.learn.cbs.filter(lambda cb: not isinstance(cb, Checkpoint | Recorder))

    def before_fit(self):
        self.fits, self.skip = self.fits + 1, 0
        if self.state and self.fits <= self.state['fits']:
            self.skip = self.n_epoch
            if self.fits == self.state['fits']: self.restore(self.state)
            self.running = [(cb, cb.run) for cb in self.learn.cbs if cb is not self]
            for cb, _ in self.running if self.skip else (): vars(cb)['run'] = False
        else: self.save(epochs_done=0)

    def before_epoch(self):
        if self.epoch < self.skip: raise CancelEpochException

    def after_epoch(self):
        if self.epoch + 1 > self.skip: self.save(self.epoch + 1)
        elif self.epoch + 1 == self.skip:
            for cb, run in self.running: vars(cb)['run'] = run

    def save(self, epochs_done: int):
        if rank_distrib(): return
        model = unwrap(self.model)
        grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        save_state(self.folder/CHECKPOINT, dict(
            self.header, fits=self.fits, epochs_done=epochs_done, model=model.state_dict(), grads=plain(grads),
            opt=plain(self.opt.state_dict()), callbacks=[(cb.name, get_state(cb)) for cb in self.others],
            seconds_total=self.seconds()))
        for name, rows, columns in (('history.csv', self.history.rows, list(self.history.columns)),
                                    ('schedule.csv', self.history.schedule, ['batch', 'lr', 'momentum'])):
            with nonfatal(self.folder/name): save_csv(self.folder/name, pd.DataFrame(rows, columns=columns))

    def restore(self, state: dict):
        if [name for name, _ in state['callbacks']] != [cb.name for cb in self.others]:
            raise RunError('the run was started with other callbacks; it cannot be resumed with these')
        self.skip, model = state['epochs_done'], unwrap(self.model)
        model.load_state_dict(state['model'])
        for k, grad in state['grads'].items(): model.get_parameter(k).grad = grad.to(model.get_parameter(k).device)
        self.opt.load_state_dict(state['opt'])
        for cb, (_, values) in zip(self.others, state['callbacks'], strict=True): set_state(cb, values)


def parse_options(cls: type, args: list[str] | None = None) -> tuple[Any, set[str]]:
    """The options on the command line, or in `args`, as the dataclass `cls`, and the names of those that were given."""
    names, not_given = [f.name for f in dataclasses.fields(cls)], object()  # argparse puts no default over a value
    parsed = anno_parser(cls).parse_args(args, argparse.Namespace(**dict.fromkeys(names, not_given)))
    given = {name: getattr(parsed, name) for name in names if getattr(parsed, name) is not not_given}
    return cls(**given), {*given}


def check_lr_end(lr_end: float | None, lr_max: float):
    """Raise `InputError` if the cycle would end above its peak."""
    if lr_end and lr_end > lr_max: raise InputError(f'--lr-end {lr_end:g} is larger than LRMAX, {lr_max:.2e}')


def check_options(o):
    """Raise `InputError` for the first option of `o`, an `Options`, that is out of its range."""
    inf = float('inf')
    if o.data == '': raise InputError('--data is empty; give a folder, or leave it out')
    if (o.lr_min is None) != (o.lr_max is None):
        raise InputError('--lr-min and --lr-max go together: give both or none')
    if o.lr_min is not None and not 0 < o.lr_min < o.lr_max < inf:
        raise InputError(f'--lr-min {o.lr_min:g} --lr-max {o.lr_max:g}: must be 0 < LRMIN < LRMAX')
    for name, ok, rule in (
            ('epochs', o.epochs >= 1, 'at least 1'), ('bs', o.bs >= 1, 'at least 1'),
            ('seed', 0 <= o.seed < 2**32, 'in 0 … 2³²-1'),
            ('lr_end', o.lr_end is None or 0 < o.lr_end < inf, 'a positive number'),
            ('wd', 0 <= o.wd < inf, 'at least 0 and finite'),
            ('label_smoothing', 0 <= o.label_smoothing < 1, 'at least 0 and less than 1'),
            ('ema', 0 <= o.ema < 1, 'at least 0 and less than 1')):
        if not ok: raise InputError(f'--{name.replace("_", "-")} {getattr(o, name)} is not {rule}')
    if o.lr_max: check_lr_end(o.lr_end, o.lr_max)
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

    def __init__(self, options, given: set[str] | None = None):
        self.start, self.state, self.stack = time.perf_counter(), None, contextlib.ExitStack()
        self.bare = given is not None and given <= {'out'} and num_distrib() < 2
        options = dataclasses.replace(options, **{k: str(v) for k, v in vars(options).items() if isinstance(v, Path)})
        self.folder = Path(options.resume or options.out or f'{datetime.now():runs/%Y-%m-%d-%H%M%S-%f}')
        if options.resume is None:
            check_options(options)
            self.options = limit_to_quick_look(options) if options.quick else options
            self.check_free()
        else:
            if more := (given or set()) - {'data', 'resume'}:
                raise InputError(f'--{min(more).replace("_", "-")}: --resume takes --data and no other option')
            self.lock()  # first, since another run might still replace the checkpoint
            try: self.load(options)
            except InputError:
                self.stack.close()
                raise
        s = self.state or {}
        if self.options.bs % max(num_distrib(), 1):
            raise InputError(f'--bs {self.options.bs} is not a multiple of {num_distrib()}, the number of processes')
        self.precision = s.get('precision') or resolve_precision(self.options.precision, default_device())
        self.lrs = (s['lr_min'], s['lr_max']) if s else (options.lr_min, options.lr_max) if options.lr_min else None

    def load(self, options):
        """Take the options and the state from the run's checkpoint. Raises `InputError`."""
        out, name = self.folder, f'--resume {self.folder}'
        if (out/'model.pth').exists(): raise InputError(f'{name}: this run is finished, nothing is left to do')
        try: self.state = load_state(out/CHECKPOINT)
        except InputError as e: raise InputError(f'{name}: {e}; start a run without --resume') from e
        names = {f.name for f in dataclasses.fields(options)}
        if not isinstance(self.state, dict) or self.state.get('options', {}).keys() != names or 'fits' not in self.state:
            raise InputError(f'{name}: {CHECKPOINT} was not written by this version of the program')
        self.options = type(options)(**self.state['options'] | (dict(data=options.data) if options.data else {}))
        self.start -= self.state['seconds_total']

    def lock(self):
        """Lock the run's folder: a second run in it is refused. Raises `InputError`."""
        if rank_distrib(): return
        try:
            (self.folder/'.write').touch()
            (self.folder/'.write').unlink()
            self.stack.enter_context(FileLock(self.folder/'.lock', timeout=0))
            self.stack.callback((self.folder/'.lock').unlink, missing_ok=True)  # while it is held: nobody else is in
        except Timeout: raise InputError(f'{self.folder} is in use by another run') from None
        except OSError as e:
            if e.errno not in NO_LOCKS:
                raise InputError(f'{self.folder} cannot be used for a run ({e.strerror})') from e
            print(f'{self.folder} cannot be locked ({e.strerror}): start no other run in it', file=sys.stderr)

    def check_free(self):
        """Raise `InputError` if the folder cannot take a new run."""
        out = self.folder
        if rank_distrib(): return
        if out.is_file(): raise InputError(f'--out {out} is a file, not a folder')
        if any((out/name).exists() for name in (CHECKPOINT, 'metrics.json', 'model.pth')):
            resume = '' if (out/'model.pth').exists() else f', or {self.resume_command}'
            raise InputError(f'--out {out} already holds a run; choose another folder{resume}')

    @property
    def program(self) -> list[str]:
        launch = f'accelerate launch --multi_gpu --num_processes {num_distrib()}' if num_distrib() > 1 else 'python'
        return [*launch.split(), 'train_fastai.py']

    @property
    def resume_command(self) -> str:
        return f'resume it with: {shlex.join([*self.program, "--resume", str(self.folder)])}'

    @property
    def command(self) -> str:
        """The command that starts a run with the same options, in a new folder."""
        command = self.program
        for field in dataclasses.fields(self.options):
            value = getattr(self.options, field.name)
            if field.name in ('out', 'resume') or value == field.default: continue
            command += [f'--{field.name.replace("_", "-")}', *([] if value is True else [str(value)])]
        return shlex.join(command)

    def find_images(self) -> dict:
        """The arguments of `get_dls`: the data folder, the batch size, and of how many images one is taken.

        A quick look takes the sample, or a tenth of a given folder. The bare command, which has no option but --out,
        turns into a quick look where there is no network. Raises `InputError`.
        """
        o = self.options
        try: path = get_sample() if o.quick and o.data is None else get_data(o.data)
        except NetworkError as e:
            if not self.bare: raise InputError(f'{e}, or --quick, which needs none') from e
            print(f'{e}. Until then, this is a quick look at the sample that comes with the program.')
            self.options = o = limit_to_quick_look(o)
            path = get_sample()
        return dict(path=path, bs=o.bs, every=10 if o.quick and o.data else 1, resize=o.resize)

    def claim_folder(self, dls: DataLoaders):
        """Make and lock the folder for a run on the images of `dls`. Raises `InputError`."""
        self.fingerprint = fingerprint(dls)
        if self.options.data:  # so that the run can be resumed from anywhere
            self.options = dataclasses.replace(self.options, data=str(Path(self.options.data).absolute()))
        if self.state:
            if self.state['fingerprint'] == self.fingerprint: return
            raise InputError(f'these are not the images that the run in {self.folder} was trained on')
        try: self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e: raise InputError(f'{self.folder} cannot be used for a run ({e.strerror})') from e
        self.lock()
        self.check_free()  # another run may have come first

    def checkpoint(self, lr_min: float, lr_max: float) -> Checkpoint:
        """The callback that saves the run, which uses these learning rates. Raises `InputError`."""
        self.lrs = lr_min, lr_max
        check_lr_end(self.options.lr_end, lr_max)
        header = dict(lr_min=lr_min, lr_max=lr_max, precision=self.precision, fingerprint=self.fingerprint,
                      options=vars(self.options) | dict(resume=None))
        return Checkpoint(self.folder, header, self.state, self.seconds)

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
