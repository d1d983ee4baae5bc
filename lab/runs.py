"""The folder of a run: its options, its lock, atomic writes, the checkpoint, and how it is resumed."""
import argparse
import contextlib
import dataclasses
import io
import pickle
import shlex
import sys
import tempfile
import warnings
import zipfile
from datetime import datetime
from typing import Any

from fastai.vision.all import *
from fastcore.script import anno_parser, is_cli
from filelock import FileLock, Timeout

from lab.errors import InputError, RunError, WriteError, one_line
from lab.learner import LAST
from lab.loader import fingerprint
from lab.processes import COMMAND, RANK, RANKS, gather, lost_a_process, on_first
from lab.sources import NetworkError, get_data, get_sample
from lab.speed import resolve_precision

QUICK = dict(epochs=4, bs=64)  # the most that a quick look has of each


def write_whole(file: Path, content: bytes):
    """Replace `file` by `content` atomically: whatever happens meanwhile, the old or the new file is there, whole.

    Raises `WriteError`.
    """
    part = file.with_name(file.name + '.part')
    try:
        with part.open('wb') as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        for wait in (0.1, 0.3, 1., None):
            try: part.replace(file)
            except PermissionError:  # on Windows, while a virus scanner or a spreadsheet has it open
                if wait is None: raise
                time.sleep(wait)
            else: return
    except BaseException as e:
        with contextlib.suppress(OSError): part.unlink(missing_ok=True)
        if not isinstance(e, OSError): raise
        raise WriteError(f'{file}: {e.strerror}') from e


def save_csv(file: Path, table: pd.DataFrame):
    """Write the `table` as CSV by `write_whole`."""
    write_whole(file, table.to_csv(index=False).encode())


@functools.cache
def report_once(message: str): print(message, file=sys.stderr)


def save_figure(file: Path, draw: Callable, *args, quick: bool = False):
    """Write the figure that `draw(*args)` makes, at 120 dots per inch; if that fails, report it on stderr.

    Titles say so if it is of a `quick` look.
    """
    if RANK: return
    with carry_on(file), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        try:
            fig = draw(*args)
            if quick: title_quick_look(fig)
            fig.savefig(content := io.BytesIO(), dpi=120)
        finally: plt.close('all')
        write_whole(file, content.getvalue())
    if any('missing from font' in str(w.message) for w in caught):
        report_once('No installed font has all letters of the class names; figures show boxes for the others.')


def title_quick_look(fig: plt.Figure):
    """Add to the titles of `fig` that they are of a quick look."""
    if title := fig.get_suptitle(): fig.suptitle(f'{title} (quick look)')
    else:
        for ax in fig.axes: ax.set_title(f'{ax.get_title()} (quick look)' if ax.get_title() else '')


@contextlib.contextmanager
def carry_on(file: Path):
    """Context manager that reports a failed table or figure on stderr and carries on."""
    try: yield
    except Exception as e: print(f'{file} was not written: {one_line(e)}', file=sys.stderr)


def save_state(file: Path, state: dict):
    """`torch.save` by `write_whole`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with buffer.getbuffer() as content: write_whole(file, content)


def load_state(file: Path) -> dict:
    """Load what `torch.save` wrote to `file`, tensors and plain values only: no code from the file is run.

    Raises `InputError` for a file that is missing, damaged or holds anything else.
    """
    try:
        with zipfile.ZipFile(file) as z:  # torch writes checksums but does not verify them
            if broken := z.testzip(): raise InputError(f'{file} is damaged (at {broken})')
        return torch.load(file, map_location='cpu', weights_only=True)
    except FileNotFoundError as e: raise InputError(f'{file} does not exist') from e
    except OSError as e: raise InputError(f'{file} cannot be read ({e.strerror})') from e
    except pickle.UnpicklingError as e:
        raise InputError(f'{file} holds more than weights and plain values; it was not opened') from e
    except InputError: raise
    except Exception as e: raise InputError(f'{file} is damaged ({one_line(e)[:100]})') from e


def plain(x: Any) -> Any:
    """`x` with lists in place of fastai's `L`, which `ranger` has in its state and `load_state` refuses."""
    if isinstance(x, dict): return {k: plain(v) for k, v in x.items()}
    return [plain(o) for o in x] if isinstance(x, list | L) else x


class Checkpoint(Callback):
    """Saves the run to the learner's folder, before the first epoch and after every epoch, or resumes it from `state`.

    Stored are `header`, the weights, the optimizer, and every callback whose class has a `state_dict`. Randomness needs
    no saving: `SeedEpochs` derives it from the seed and the epoch. `seconds` returns how long the run has taken so far.
    """
    order = LAST
    file = 'checkpoint.pth'

    def __init__(self, header: dict, state: dict | None = None, seconds: Callable = lambda: 0.):
        self.header, self.state, self.seconds = header, state, seconds

    def before_fit(self):
        if self.state is None: self.save(epochs_done=0)
        else: self.restore(self.state)

    def after_epoch(self): self.save(self.epoch + 1)

    @property
    def stateful(self) -> dict: return {cb.name: cb for cb in self.learn.cbs if hasattr(type(cb), 'state_dict')}

    def save(self, epochs_done: int):
        if RANK: return
        state = self.opt.state_dict().items()
        opt = {k: plain(v) for k, v in state if k not in ('hypers', 'param_groups')}  # the schedule's
        save_state(self.path/self.file, dict(
            self.header, epochs_done=epochs_done, model=get_model(self.model).state_dict(), opt=opt,
            callbacks={name: cb.state_dict() for name, cb in self.stateful.items()}, seconds_total=self.seconds()))
        for name, rows, columns in (('history.csv', self.history.rows, list(self.history.columns)),
                                    ('schedule.csv', self.history.schedule, ['batch', 'lr', 'momentum'])):
            with carry_on(self.path/name): save_csv(self.path/name, pd.DataFrame(rows, columns=columns))

    def restore(self, state: dict):
        self.learn.first_epoch = state['epochs_done']
        get_model(self.model).load_state_dict(state['model'])
        self.opt.load_state_dict(dict(self.opt.state_dict(), **state['opt']))
        for name, cb in self.stateful.items(): cb.load_state_dict(state['callbacks'][name])


@contextlib.contextmanager
def locked(out: Path):
    """Context manager that locks the folder `out`: a second run in it is refused. Raises `InputError`."""
    lock = FileLock(out/'.lock')
    try:
        tempfile.TemporaryFile(dir=out).close()  # can it be written to?
        lock.acquire(timeout=0)
    except Timeout: raise InputError(f'{out} is in use by another run') from None
    except OSError as e: raise InputError(f'{out} cannot be used for a run ({e.strerror})') from e
    try: yield
    finally:
        with contextlib.suppress(OSError): Path(lock.lock_file).unlink()  # while it is held: nobody else is in
        lock.release()


def takes_options(options: type) -> Callable:
    """Decorator that makes the fields of the dataclass `options` the keyword arguments of a function."""
    def decorate(f: Callable) -> Callable:
        f = delegates(options)(f)
        del f.__delwrap__  # fastcore would look for comments in the source of a dataclass's __init__, which has none
        return f
    return decorate


def is_finished(out: Path) -> bool:
    """Whether the run in the folder `out` has its weights, which are written last."""
    return os.path.exists(out/'model.pth')


def given_options(main: Callable, options: dict) -> set[str]:
    """The names of the options that the user gave to `main`, a default that was given included."""
    if not is_cli(main): return {*options}  # another program may call it
    not_given = object()  # argparse puts no default where there is a value
    parsed = anno_parser(main).parse_args(namespace=argparse.Namespace(**dict.fromkeys(options, not_given)))
    return {name for name in options if getattr(parsed, name) is not not_given}


def check_lr_end(lr_end: float, lr_max: float):
    """Raise `InputError` if the cycle would end above its peak."""
    if lr_end > lr_max: raise InputError(f'--lr-end {lr_end:g} is larger than LRMAX, {lr_max:.2e}')


def check_options(o):
    """Raise `InputError` for the first option of `o`, an `Options`, that is out of its range."""
    if o.data == '': raise InputError('--data is empty; give a folder, or leave it out')
    if o.epochs < 1: raise InputError(f'--epochs {o.epochs} is less than 1')
    if o.bs < 1: raise InputError(f'--bs {o.bs} is less than 1')
    if not 0 <= o.seed < 2**32: raise InputError(f'--seed {o.seed} is not in 0 … 2³²-1')
    if (o.lr_min is None) != (o.lr_max is None):
        raise InputError('--lr-min and --lr-max go together: give both or none')
    if o.lr_min is not None and not 0 < o.lr_min < o.lr_max < float('inf'):
        raise InputError(f'--lr-min {o.lr_min:g} --lr-max {o.lr_max:g}: must be 0 < LRMIN < LRMAX')
    if o.lr_end is not None and not 0 < o.lr_end < float('inf'):
        raise InputError(f'--lr-end {o.lr_end:g} is not a positive number')
    if o.lr_end and o.lr_max: check_lr_end(o.lr_end, o.lr_max)
    if not 0 <= o.wd < float('inf'): raise InputError(f'--wd {o.wd:g} is negative or not finite')
    for name, share in (('label-smoothing', o.label_smoothing), ('ema', o.ema)):
        if not 0 <= share < 1: raise InputError(f'--{name} {share:g} is not at least 0 and less than 1')
    resolve_precision(o.precision, default_device())


def limit_to_quick_look(o):
    """The options `o` of a quick look, which takes minutes; prints what it lowers."""
    print('A quick look: one image in ten, a few epochs, small batches. Its numbers say nothing about the recipe.')
    limits = {k: limit for k, limit in QUICK.items() if getattr(o, k) > limit}
    for k, limit in limits.items(): print(f'--{k} {getattr(o, k)} is lowered to {limit}')
    return dataclasses.replace(o, **limits)


class Run:
    """Context manager for one run: locks its folder and, on interruption, says how to resume.

    `options` is an `Options`; `given` names those that the user gave. With `resume`, the folder of an interrupted run,
    they come from that run, except `data` if it has moved. `by_command`: started from the command line. Raises
    `InputError`.
    """

    def __init__(self, options, given: set[str], resume: str | Path | None = None, by_command: bool = False):
        self.start, self.state, self.stack = time.perf_counter(), None, contextlib.ExitStack()
        self.bare = by_command and resume is None and given <= {'out'} and RANKS == 1
        paths = {k: str(v) for k, v in vars(options).items() if isinstance(v, Path)}  # JSON has none
        options = dataclasses.replace(options, **paths)
        if resume is None:
            check_options(options)
            if options.quick: options = limit_to_quick_look(options)
            self.folder = Path(options.out or f'{datetime.now():runs/%Y-%m-%d-%H%M%S-%f}')  # two never share one
            on_first(self.check_free)
        else:
            if more := given - {'data'}:
                raise InputError(f'--{min(more).replace("_", "-")}: --resume takes --data and no other option')
            self.folder = Path(resume)
            on_first(self.lock)  # first, since another run might still replace the checkpoint
            try: self.state = on_first(self.load, vars(options).keys())
            except InputError:
                self.stack.close()
                raise
            options = type(options)(**self.state['options'] | (dict(data=options.data) if options.data else {}))
            self.start -= self.state['seconds_total']
        self.options = o = options
        if o.bs % RANKS: raise InputError(f'--bs {o.bs} is not a multiple of {RANKS}, the number of processes')
        s = self.state or {}
        self.precision = s.get('precision') or resolve_precision(o.precision, default_device())
        self.lrs = (s['lr_min'], s['lr_max']) if s else (o.lr_min, o.lr_max) if o.lr_min else None

    def lock(self): self.stack.enter_context(locked(self.folder))

    def check_free(self):
        """Raise `InputError` if the folder cannot take a new run."""
        out = self.folder
        if os.path.isfile(out): raise InputError(f'--out {out} is a file, not a folder')
        if any(os.path.exists(out/name) for name in (Checkpoint.file, 'metrics.json', 'model.pth')):
            resume = '' if is_finished(out) else f', or {self.resume_command}'
            raise InputError(f'--out {out} already holds a run; choose another folder{resume}')

    @property
    def resume_command(self) -> str:
        return f'resume it with: {COMMAND} train_fastai.py --resume {shlex.quote(str(self.folder))}'

    @property
    def command(self) -> str:
        """The command that starts a run with the same options, in a new folder."""
        command = [*COMMAND.split(), 'train_fastai.py']
        for field in dataclasses.fields(self.options):
            value = getattr(self.options, field.name)
            if field.name == 'out' or value == field.default: continue
            command += [f'--{field.name.replace("_", "-")}', *([] if value is True else [str(value)])]
        return shlex.join(command)

    def load(self, names: Iterable[str]) -> dict:
        """The run's checkpoint, whose options have these `names`. Raises `InputError`."""
        out = self.folder
        if is_finished(out):
            raise InputError(f'--resume {out}: this run is finished, nothing is left to do')
        try: state = load_state(out/Checkpoint.file)
        except InputError as e: raise InputError(f'--resume {out}: {e}; start a run without --resume') from e
        if not isinstance(state, dict) or not {'epochs_done', 'options'} <= state.keys():
            raise InputError(f'--resume {out}: {Checkpoint.file} was not written by this program')
        if state['options'].keys() != {*names}:
            raise InputError(f'--resume {out}: this run was started by another version of the program; resume it with '
                             'that version')
        return state

    def find_images(self) -> dict:
        """The arguments of `get_dls`: the data folder, the batch size, and of how many images one is taken.

        A quick look takes the sample, or a tenth of a given folder. The bare command, which has no option but --out,
        turns into a quick look where there is no network. Raises `InputError`.
        """
        o = self.options
        try: path = get_sample() if o.quick and o.data is None else get_data(o.data)
        except NetworkError as e:
            if not self.bare: raise
            print(f'{e}. Until then, this is a quick look at the sample that comes with the program.')
            self.options = o = limit_to_quick_look(dataclasses.replace(o, quick=True))
            path = get_sample()
        return dict(path=path, bs=o.bs, every=10 if o.quick and o.data else 1)

    def claim_folder(self, dls: DataLoaders):
        """Make and lock the folder for a run on the images of `dls`. Raises `InputError`."""
        self.fingerprint = fingerprint(dls)
        if len({*gather(self.fingerprint)}) > 1:
            raise InputError('the data folders of the machines hold different images')
        if self.state and self.state['fingerprint'] != self.fingerprint:
            raise InputError(f'these are not the images that the run in {self.folder} was trained on')
        if self.options.data:  # so that the run can be resumed from anywhere
            self.options = dataclasses.replace(self.options, data=str(Path(self.options.data).absolute()))
        if not self.state: self.folder = on_first(self.make_folder)

    def make_folder(self) -> Path:
        """Make the run's folder and lock it. Raises `InputError`."""
        try: self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e: raise InputError(f'{self.folder} cannot be used for a run ({e.strerror})') from e
        self.lock()
        self.check_free()  # another run may have come first
        return self.folder

    def save_figure(self, name: str, draw: Callable, *args):
        """`save_figure` to the file `name` of the run's folder."""
        save_figure(self.folder/name, draw, *args, quick=self.options.quick)

    def checkpoint(self, lr_min: float, lr_max: float) -> Checkpoint:
        """The callback that saves the run, which uses these learning rates. Raises `InputError`."""
        self.lrs = lr_min, lr_max
        if self.options.lr_end: check_lr_end(self.options.lr_end, lr_max)
        header = dict(lr_min=lr_min, lr_max=lr_max, precision=self.precision, options=vars(self.options),
                      fingerprint=self.fingerprint)
        return Checkpoint(header, self.state, self.seconds)

    def seconds(self) -> float:
        """How long the run has taken, interruptions left out."""
        return time.perf_counter() - self.start

    def __enter__(self): return self

    def __exit__(self, kind, e: BaseException | None, traceback):
        self.stack.close()
        if e is None or isinstance(e, InputError) or type(e) is RunError: return  # these would only happen again
        resumable = os.path.exists(self.folder/Checkpoint.file)
        hint = self.resume_command if resumable else 'nothing was trained yet'
        if lost_a_process(e): error = RunError('another process of the run has ended, or cannot be reached')
        elif isinstance(e, BrokenPipeError): error = RunError('nobody reads the output any more')
        else: error = e
        foreseen = error is not e or isinstance(e, KeyboardInterrupt)
        error.add_note(f'once that is fixed, {hint}' if resumable and not foreseen else hint)
        if error is not e: raise error from e
