"""The folder of a run: claimed, written atomically, checkpointed, resumed, loaded again."""
import contextlib
import io
import json
import pickle
import shlex
import sys
import warnings
import zipfile
from datetime import datetime
from types import SimpleNamespace

from fastai.vision.all import *

from callbacks import History
from data import fingerprint, get_dls, get_empty_dls
from distributed import COMMAND, RANK, RANKS, by_first, gathered, lost
from errors import InputError, RunError, one_line
from learner import checked_precision, get_learner

try: import fcntl  # isort: skip
except ImportError: fcntl = None  # Windows has no such locks


def write_whole(file: Path, content: bytes):
    """Puts `content` in place of `file` at once: whatever happens meanwhile, the old or the new one is there, whole.

    Raises `OSError` with the name of the file.
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
        raise OSError(e.errno, e.strerror, str(file)) from e  # a full disk does not say where


def save_csv(file: Path, table: pd.DataFrame):
    """The `table` as CSV, by way of `write_whole`."""
    write_whole(file, table.to_csv(index=False).encode())


@functools.cache
def tell_once(message: str): print(message, file=sys.stderr)


def save_figure(file: Path, draw: Callable, *args):
    """Writes the figure that `draw(*args)` makes, 120 dots per inch; if that fails, a line on stderr says so."""
    if RANK: return
    with optional(file), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        try: draw(*args).savefig(content := io.BytesIO(), dpi=120)
        finally: plt.close('all')
        write_whole(file, content.getvalue())
    if any('missing from font' in str(w.message) for w in caught):
        tell_once('No installed font has all letters of the class names; figures show boxes for the others.')


@contextlib.contextmanager
def optional(file: Path):
    """A table or picture that cannot be made costs a line on stderr, not the run."""
    try: yield
    except Exception as e: print(f'{file} was not written: {one_line(e)}', file=sys.stderr)


def save_state(file: Path, state: dict):
    """`torch.save` by way of `write_whole`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with buffer.getbuffer() as content: write_whole(file, content)


def load_state(file: Path) -> dict:
    """What `torch.save` put into `file`: tensors and plain values only, no code of the file is run.

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


class Checkpoint(Callback):
    """Saves the run before its first and after every epoch to the learner's folder, or resumes from `state`.

    Randomness needs no saving: `SeedEpochs` derives it from the seed and the epoch. `header` is stored with the rest;
    `seconds` tells how long the run has taken so far.
    """
    order = History.order + 1
    file = 'checkpoint.pth'

    def __init__(self, header: dict, state: dict | None = None, seconds: Callable = lambda: 0.):
        self.header, self.state, self.seconds = header, state, seconds

    def before_fit(self):
        if self.state is None: self.save(epochs_done=0)
        else: self.restore(self.state)

    def after_epoch(self): self.save(self.epoch + 1)

    def save(self, epochs_done: int):
        if RANK: return
        h = self.history
        save_state(self.path/self.file, dict(
            self.header, epochs_done=epochs_done, model=get_model(self.model).state_dict(),
            opt=self.opt.state_dict()['state'],  # its LR and momentum are the schedule's to set
            scaler=self.scaler.state_dict() if hasattr(self.learn, 'precision') else {},
            average=self.weight_average.average.state_dict() if hasattr(self.learn, 'weight_average') else {},
            rows=h.rows, schedule=h.schedule, seconds_training=h.seconds_training, seconds_total=self.seconds()))
        for name, rows, columns in (('history.csv', h.rows, list(History.columns)),
                                    ('schedule.csv', h.schedule, ['batch', 'lr', 'momentum'])):
            with optional(self.path/name): save_csv(self.path/name, pd.DataFrame(rows, columns=columns))

    def restore(self, s: dict):
        self.learn.first_epoch = s['epochs_done']
        get_model(self.model).load_state_dict(s['model'])
        self.opt.load_state_dict(dict(self.opt.state_dict(), state=s['opt']))
        if s['scaler']: self.scaler.load_state_dict(s['scaler'])
        if s['average']:
            self.weight_average.average.load_state_dict(s['average'])
            self.weight_average.swapped = s['epochs_done'] > 0  # as it was when it was saved
        h = self.history
        h.rows, h.schedule, h.seconds_training = s['rows'], s['schedule'], s['seconds_training']


@contextlib.contextmanager
def locked(out: Path):
    """Locks the folder `out`: of two runs at once, one is refused. Raises `InputError`."""
    with contextlib.ExitStack() as stack:
        try:
            tempfile.TemporaryFile(dir=out).close()  # can it be written to?
            if fcntl:
                lock = os.open(out, os.O_RDONLY)
                stack.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError: raise InputError(f'{out} is in use by another run') from None
        except OSError as e: raise InputError(f'{out} cannot be used for a run ({e.strerror})') from e
        yield


def check_options(epochs: int, bs: int, seed: int, lr_min: float | None, lr_max: float | None, final_div: float,
                  wd: float, label_smoothing: float, ema: float, precision: str, **_):
    """Raises `InputError` for the first option out of its range."""
    if epochs < 1: raise InputError(f'--epochs {epochs} is less than 1')
    if bs < 1: raise InputError(f'--bs {bs} is less than 1')
    if not 0 <= seed < 2**32: raise InputError(f'--seed {seed} is not in 0 … 2³²-1')
    if (lr_min is None) != (lr_max is None): raise InputError('--lr-min and --lr-max go together: give both or none')
    if lr_min is not None and not 0 < lr_min < lr_max < float('inf'):
        raise InputError(f'--lr-min {lr_min:g} --lr-max {lr_max:g}: must be 0 < LRMIN < LRMAX')
    if not 0 < final_div < float('inf'): raise InputError(f'--final-div {final_div:g} is not a positive number')
    if not 0 <= wd < float('inf'): raise InputError(f'--wd {wd:g} is negative or not finite')
    for name, share in (('label-smoothing', label_smoothing), ('ema', ema)):
        if not 0 <= share < 1: raise InputError(f'--{name} {share:g} is not at least 0 and less than 1')
    checked_precision(precision, default_device())


def tasted(options: dict) -> dict:
    """`options` for a first look in minutes, and says what it lowers."""
    print('A taste: one image in ten, few epochs, small batches. Its numbers say nothing of the recipe.')
    limits = {k: limit for k, limit in dict(epochs=4, bs=64).items() if options[k] > limit}
    for k, limit in limits.items(): print(f'--{k} {options[k]} is lowered to {limit}')
    return options | limits


class Run:
    """A run in its folder, as a context: at its end the folder is free, and an interruption says how to resume.

    A new run has the `options` given; with `resume`, the folder of an interrupted run, they are that run's own, but for
    a data folder, which may have moved. `given` names those options that were given. Raises `InputError`.
    """

    def __init__(self, options: dict, given: set[str], resume: str | None):
        self.start, self.state, self.stack = time.perf_counter(), None, contextlib.ExitStack()
        if resume is None:
            check_options(**options)
            if options['taste']: options = tasted(options)
            self.folder = Path(options['out'] or f'{datetime.now():runs/%Y-%m-%d-%H%M%S-%f}')  # unlike any other
            by_first(self.check_free)
        else:
            if more := given - {'data'}:
                raise InputError(f'--{min(more).replace("_", "-")}: --resume takes --data and no other option')
            self.folder = Path(resume)
            by_first(self.lock)  # first, else the checkpoint could soon be an old one
            try: self.state = by_first(self.load, options)
            except InputError:
                self.stack.close()
                raise
            options = self.state['options'] | (dict(data=options['data']) if options['data'] else {})
            self.start -= self.state['seconds_total']
        self.options = o = SimpleNamespace(**options)
        if o.bs % RANKS: raise InputError(f'--bs {o.bs} is not a multiple of {RANKS}, the number of processes')
        s = self.state or {}
        self.precision = s.get('precision') or checked_precision(o.precision, default_device())
        self.lrs = (s['lr_min'], s['lr_max']) if s else (o.lr_min, o.lr_max) if o.lr_min else None

    def lock(self): self.stack.enter_context(locked(self.folder))

    def check_free(self):
        """Raises `InputError` if the folder is no place for a new run."""
        out = self.folder
        if os.path.isfile(out): raise InputError(f'--out {out} is a file, not a folder')
        if any(os.path.exists(out/name) for name in (Checkpoint.file, 'metrics.json', 'model.pth')):
            raise InputError(f'--out {out} already holds a run; choose another folder, or {self.resume_command}')

    @property
    def resume_command(self) -> str:
        return f'resume it with: {COMMAND} train_fastai.py --resume {shlex.quote(str(self.folder))}'

    def load(self, options: dict) -> dict:
        """The run's checkpoint. Raises `InputError`."""
        out = self.folder
        if all((out/name).exists() for name in ('model.pth', 'top_losses.png')):  # the last number and the last picture
            raise InputError(f'--resume {out}: this run is finished, nothing is left to do')
        try: state = load_state(out/Checkpoint.file)
        except InputError as e: raise InputError(f'--resume {out}: {e}; start a run without --resume') from e
        if not isinstance(state, dict) or not {'epochs_done', 'options'} <= state.keys():
            raise InputError(f'--resume {out}: {Checkpoint.file} is not of this program')
        if state['options'].keys() != options.keys():
            raise InputError(f'--resume {out}: the run is of another version of this program, which has to finish it')
        return state

    def claim(self, fingerprint: str) -> Path:
        """Takes the folder for a run on the images of this `fingerprint`, and returns it. Raises `InputError`."""
        if len({*gathered(fingerprint)}) > 1: raise InputError('the data folders of the machines hold different images')
        if self.state and self.state['fingerprint'] != fingerprint:
            raise InputError(f'the images are not those that the run in {self.folder} was trained on')
        self.fingerprint, o = fingerprint, self.options
        if o.data: o.data = str(Path(o.data).absolute())  # a run can be resumed from anywhere
        if not self.state: self.folder = by_first(self.made_folder)
        return self.folder

    def made_folder(self) -> Path:
        """The run's folder, made and locked. Raises `InputError`."""
        try: self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e: raise InputError(f'{self.folder} cannot be used for a run ({e.strerror})') from e
        self.lock()
        self.check_free()  # another run may have come first
        return self.folder

    def checkpoint(self, **header) -> Checkpoint:
        """The callback that saves the run; `header` is stored with it."""
        header = dict(header, options=vars(self.options), fingerprint=self.fingerprint)
        return Checkpoint(header, self.state, self.seconds)

    def seconds(self) -> float:
        """How long the run has taken, interruptions left out."""
        return time.perf_counter() - self.start

    def __enter__(self): return self

    def __exit__(self, kind, e: BaseException | None, traceback):
        self.stack.close()
        gone = isinstance(e, RuntimeError) and lost(e)
        if not (gone or isinstance(e, KeyboardInterrupt | OSError)): return
        resumable = os.path.exists(self.folder/Checkpoint.file)
        again = self.resume_command if resumable else 'nothing was trained yet'
        if isinstance(e, KeyboardInterrupt): raise KeyboardInterrupt(e.args[0] if e.args else 130, again) from e
        if gone: raise RunError(f'another process of the run has ended, or cannot be reached; {again}') from e
        if isinstance(e, BrokenPipeError): raise RunError(f'nobody reads the output any more; {again}') from e
        culprit = f'{e.filename}: {e.strerror}' if e.filename else one_line(e)
        raise RunError(f'{culprit}; {"once that is fixed, " * resumable}{again}') from e


def load_run(run: str | Path, with_data: bool = True) -> Learner:
    """A fastai `Learner` with the weights of the finished run in the folder `run`; nothing is unpickled.

    Its `dls` are those that the run was trained on, if they are where they were and `with_data`; else they are empty,
    which is enough to predict. Raises `InputError`.
    """
    run = Path(run)
    if not os.path.exists(run/'model.pth'):
        raise InputError(f'{run} holds no finished run, as it has no model.pth; train_fastai.py --resume finishes one')
    try:
        m = json.loads((run/'metrics.json').read_bytes())
        classes, images, precision = list(m['classes']), m['fingerprint'], m['precision']
        data, bs, taste = (m['options'][k] for k in ('data', 'bs', 'taste'))
        if not classes or any(Path(c).name != c for c in classes): raise ValueError('classes without names')
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f'{run/"metrics.json"} is not that of a finished run ({type(e).__name__}: {e})') from e
    weights = load_state(run/'model.pth')
    if with_data and os.path.isdir(data := data or fastai_path('data')/'cifar10'):
        dls = get_dls(data, bs=bs, every=10 if taste else 1)
        if fingerprint(dls) != images:
            raise InputError(f'{data} holds other images than {run} was trained on; load_run(…, with_data=False) does '
                             'without them')
    else: dls = get_empty_dls(classes)
    try:
        learn = get_learner(dls, 'fp32' if precision == 'fp32' else 'auto', path=run,
                            width=len(weights['prep.0.weight']))
        learn.model.load_state_dict(weights)
    except (RuntimeError, KeyError, TypeError) as e:
        raise InputError(f'{run/"model.pth"} does not hold the weights of this network') from e
    return learn
