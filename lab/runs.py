"""The folder of a run: its options, its lock, atomic writes, the checkpoint, and how it is resumed."""
import contextlib
import dataclasses
import errno
import shlex

from fastai.vision.all import *
from filelock import FileLock, Timeout

from lab.errors import InputError, RunError, one_line
from lab.loader import fingerprint
from lab.processes import on_first
from lab.sources import get_data, get_sample
from lab.speed import FastFit, resolve_precision, unwrap

PRESETS = dict(quick=dict(epochs=3, bs=64), plain=dict(wd=0.01, label_smoothing=0., ema=0.))  # plain: as fastai
CHECKPOINT = 'checkpoint.pth'


def atomic_write(file: Path, content: bytes):
    """Replace `file` by `content`, whole or not at all; only rank 0 writes. Raises `OSError`, for a full disk, say."""
    if rank_distrib(): return
    part = file.with_name(f'{file.name}.part')
    try:
        part.write_bytes(content)
        part.replace(file)
    finally: part.unlink(missing_ok=True)


def save_csv(file: Path, table: pd.DataFrame):
    """Write the `table` as CSV, atomically; if that fails, one line on stderr says so."""
    with nonfatal(file):
        atomic_write(file, table.to_csv(index=False, lineterminator='\n').encode(errors='backslashreplace'))


def save_state(file: Path, state: dict):
    """`torch.save`, atomically."""
    torch.save(state, buffer := io.BytesIO())
    atomic_write(file, buffer.getbuffer())


def load_state(file: Path) -> dict:
    """What `torch.save` wrote to `file`; no code from the file is run. Raises `InputError`, also for other contents."""
    try: return torch.load(file, map_location='cpu', weights_only=True)
    except OSError as e: raise InputError(f'{file} cannot be read ({e.strerror})') from e
    except Exception as e:
        raise InputError(f'{file} is damaged, or holds more than weights and plain values; it was not opened') from e


@contextlib.contextmanager
def nonfatal(file: Path):
    """Context manager that reports a failed table or figure on stderr and carries on."""
    try: yield
    except Exception as e: print(f'{file} was not written: {one_line(e)}', file=sys.stderr)


def plain(x: Any) -> Any:
    """`x` as `load_state` accepts it: plain values, tensors, and containers of them. Raises `TypeError`."""
    if isinstance(x, np.generic): x = x.item()
    if isinstance(x, L): x = list(x)  # of optimizers
    if isinstance(x, Tensor): return x.detach().as_subclass(Tensor)
    if isinstance(x, dict): return {plain(k): plain(v) for k, v in x.items()}
    if type(x) in (list, tuple, set): return type(x)(plain(o) for o in x)
    if x is None or type(x) in (bool, int, float, str): return x
    raise TypeError(type(x).__name__)


def get_state(o: Any) -> dict:
    """What is `plain` in the state of a callback: its `state_dict`, or its attributes, as fastai's trackers have it."""
    state = {}
    for k, v in (o.state_dict() if hasattr(type(o), 'state_dict') else vars(o)).items():
        with contextlib.suppress(TypeError): state[k] = plain(v)
    return state


def checksum(model: nn.Module) -> int:
    """Tells other weights and statistics of `model` from these, in any memory layout."""
    return sum(t.reshape(-1).view(torch.uint8).sum().item() for t in unwrap(model).state_dict().values())


def forecast(epochs: int, seconds: float):
    """Say what `epochs` will take."""
    hours, minutes = divmod(max(1, round(seconds / 60)), 60)
    about = f'{hours} h {minutes} min' if hours else f'{minutes} min'
    print(f'{epochs} epoch{"s" * (epochs > 1)} will take about {about} at this pace.', flush=True)


class TrainingCallback(Callback):
    """Base class for callbacks that must ignore `lr_find` and `get_preds`, which fire the same events."""
    order = Recorder.order + 1

    def __call__(self, event_name: str):
        if not any(hasattr(self.learn, cb) for cb in ('lr_finder', 'gather_preds')): super().__call__(event_name)


class Checkpoint(TrainingCallback):
    """Saves a `run` before the first epoch of a fit and after every epoch, or resumes it from `run.state`.

    Stored are weights, gradients that an accumulation left, the optimizer, and every callback's state. Randomness
    needs no saving: `SeedEpochs` derives it from the seed and the epoch. A resumed run skips what was done, a fit or
    epochs of it, and no other callback hears of these epochs. After one epoch it says how long the rest will take.
    """
    order = 1000  # last: trackers have their new state

    def __init__(self, run: 'Run'): self.of, self.fits = run, 0
    def after_cancel_fit(self): self.save_tables()

    def others(self) -> L:
        """What has a state of its own: the other callbacks, and the smoothed loss, which a tracker may watch."""
        cbs = self.learn.cbs.filter(lambda cb: not isinstance(cb, Checkpoint | Recorder | ProgressCallback | FastFit))
        return cbs + L(nested_attr(self, 'recorder.smooth_loss'))

    def plan(self) -> list:
        """What a fit does: its callbacks, the number of epochs, and its schedules at ten moments."""
        scheds = [f for cb in self.learn.cbs if isinstance(cb, ParamScheduler) for f in cb.scheds.values()]
        return [*(o.name for o in self.others()), self.n_epoch,
                *(float(v) for f in scheds for i in range(10) for v in np.ravel(f(i / 10)))]

    def before_fit(self):
        self.fits, self.skip, begun = self.fits + 1, 0, self.of.state.get('fits', 0)
        if self.fits > begun: self.save(epochs_done=0)
        if self.fits < begun: self.skip = self.n_epoch
        if self.fits == begun: self.skip = self.restore(**self.of.state)
        self.cbs_then = self.learn.cbs
        if self.skip: self.learn.cbs = self.learn.cbs.filter(risinstance((Checkpoint, ProgressCallback)))

    def before_epoch(self):
        if self.epoch < self.skip: raise CancelEpochException

    def after_epoch(self):
        done, left = self.epoch + 1, self.n_epoch - self.epoch - 1
        if done == self.skip: self.learn.cbs = self.cbs_then
        if done > self.skip: self.save(done)
        if done == self.skip + 1 and left and self.history.rows: forecast(left, left * self.history.rows[-1]['seconds'])

    def save(self, epochs_done: int):
        model, run = unwrap(self.model), self.of
        save_state(run.folder/CHECKPOINT, plain(dict(
            lrs=run.lrs, precision=run.precision, fingerprint=run.fingerprint, options=vars(run.options),
            seconds_total=time.perf_counter() - run.start, fits=self.fits, plan=self.plan(), epochs_done=epochs_done,
            model=model.state_dict(), opt=self.opt.state_dict(), train_iter=self.learn.train_iter,
            grads={k: p.grad for k, p in model.named_parameters() if p.grad is not None and p.grad.any()},
            states=[get_state(o) for o in self.others()])))
        self.save_tables()

    def save_tables(self):
        h, folder = self.history, self.of.folder
        save_csv(folder/'history.csv', pd.DataFrame(h.rows, columns=h.columns))
        save_csv(folder/'schedule.csv', pd.DataFrame(h.schedule, columns=['batch', 'lr', 'momentum']))

    def restore(self, model, opt, grads, states, plan, train_iter, epochs_done, **_) -> int:
        """Put back everything that `save` has stored; return how many epochs of the fit were done."""
        if plan != self.plan():
            raise RunError('this fit has other callbacks, epochs or rates than when it started; it cannot be resumed')
        inside = unwrap(self.model)
        inside.load_state_dict(model)
        self.opt.load_state_dict(opt)
        for k, grad in grads.items(): inside.get_parameter(k).grad = grad.to(inside.get_parameter(k).device)
        for o, state in zip(self.others(), states, strict=True):
            if hasattr(type(o), 'load_state_dict'): o.load_state_dict(state)
            else: vars(o).update(state)
        self.learn.train_iter = train_iter
        print(f'Going on after epoch {epochs_done} of {self.n_epoch}.', flush=True)
        return epochs_done


def parse_options(cls: type, args: list[str] | None = None) -> Any:
    """The command line, or `args`, as a `cls`; what a preset gives can still be chosen. Raises `InputError`."""
    parser, names = anno_parser(cls), vars(cls()).keys()
    parser.set_defaults(**dict.fromkeys(names))  # None is what was not given
    given = {k: v for k, v in vars(parser.parse_args(args)).items() if k in names and v is not None}
    if 'resume' in given and (refused := given.keys() - {'data', 'resume'}):
        raise InputError(f'--{min(refused).replace("_", "-")} does not go with --resume; a run keeps its own options')
    return cls(**merge(*(PRESETS[k] for k in given.keys() & PRESETS.keys()), given))


def check_options(o):
    """Raise `InputError` for the first option of `o`, an `Options`, that is out of its range."""
    lr_max = o.lr_max or 1e3
    for name, low, high in (
            ('epochs', 1, 10**6), ('bs', 1, 10**6), ('seed', 0, 2**32 - 1), ('lr_max', 1e-12, 1e3),
            ('lr_min', 1e-12, lr_max), ('lr_end', 1e-12, lr_max), ('wd', 0, 1e3), ('label_smoothing', 0, 0.99),
            ('ema', 0, 0.9999)):
        if (value := getattr(o, name)) is not None and not low <= value <= high:
            raise InputError(f'--{name.replace("_", "-")} {value} is not in {low} … {high}')
    if (o.lr_min is None) != (o.lr_max is None):
        raise InputError('--lr-min and --lr-max go together: give both or none')
    if o.bs % max(num_distrib(), 1): raise InputError(f'--bs {o.bs} is not a multiple of the {num_distrib()} processes')


class Run(contextlib.AbstractContextManager):
    """Context manager for one run: locks its folder and, on interruption, says how to resume.

    `o` is an `Options`. With `o.resume`, the folder of an interrupted run, all come from that run, except `data` if it
    has moved. With the default options, a run may turn into a quick look where CIFAR-10 cannot be had. Raises
    `InputError`.
    """

    def __init__(self, o):
        self.start, self.state = time.perf_counter(), {}
        self.saver = Checkpoint(self)  # one for all fits, which it counts
        self.folder = Path(o.resume or o.out or f'{datetime.now():runs/%Y-%m-%d-%H%M%S-%f}')
        self.lock = FileLock(self.folder/'.lock', timeout=0)
        if (self.folder/'model.pth').exists():
            raise InputError(f'{self.folder} holds a finished run; choose another folder')
        if not o.resume and any((self.folder/name).exists() for name in (CHECKPOINT, 'metrics.json')):
            raise InputError(f'{self.folder} already holds a run; choose another folder, or resume it with: '
                             f'{self.command(resume=self.folder)}')
        moved = dict(data=str(Path(o.data).absolute())) if o.data else {}  # to be resumed from anywhere
        if o.resume:
            self.state = load_state(self.folder/CHECKPOINT)
            if not isinstance(s := self.state, dict) or 'states' not in s or s['options'].keys() != vars(o).keys():
                raise InputError(f'{self.folder/CHECKPOINT} was not written by this version of the program')
            self.start -= s['seconds_total']  # interruptions are left out
            o = type(o)(**s['options'])
        check_options(o)
        self.options = dataclasses.replace(o, **moved, out=None, resume=None)
        self.precision = self.state.get('precision') or resolve_precision(o.precision, default_device())
        self.lrs = self.state.get('lrs') or ((o.lr_min, o.lr_max) if o.lr_min else None)

    def locate_images(self) -> dict:
        """The arguments of `get_dls`; a quick look takes the sample, or a tenth of `data`. Raises `InputError`."""
        o = self.options
        try: path = get_sample() if o.quick and not o.data else on_first(get_data, o.data)
        except InputError as e:
            if self.state or o != type(o)() or num_distrib() > 1: raise
            print(f'{e}. Until then, this is a quick look at the sample that comes with the program.')
            self.options, path = (o := type(o)(quick=True, **PRESETS['quick'])), get_sample()
        if o.quick: print('A quick look: one image in ten, few epochs, small batches. It tells nothing of the recipe.')
        return dict(path=path, bs=o.bs, every=10 if o.quick and o.data else 1, resize=o.resize)

    def claim_folder(self, dls: DataLoaders):
        """Make the folder for a run on the images of `dls`, and lock it against a second one. Raises `InputError`."""
        self.fingerprint = fingerprint(dls)
        if self.state.get('fingerprint', self.fingerprint) != self.fingerprint:
            raise InputError(f'these are not the images that the run in {self.folder} was trained on')
        if rank_distrib(): return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
        except Timeout: raise InputError(f'{self.folder} is in use by another run') from None
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.EOPNOTSUPP): raise  # these are of NFS and FUSE
            print(f'{self.folder} cannot be locked ({e.strerror}): start no other run in it', file=sys.stderr)

    def checkpoint(self, lr_min: float, lr_max: float) -> Checkpoint:
        """The callback that saves the run, one for all its fits, at these rates. Raises `InputError`."""
        check_options(dataclasses.replace(self.options, lr_min=lr_min, lr_max=lr_max))
        self.lrs = lr_min, lr_max
        return self.saver

    def command(self, **options) -> str:
        """The command line with these `options`, or with all of the run that are not the default."""
        options = options or {k: v for k, v in vars(self.options).items() if v != getattr(type(self.options), k)}
        launch = f'accelerate launch --multi_gpu --num_processes {num_distrib()}' if num_distrib() > 1 else 'python'
        return shlex.join([*launch.split(), 'train_fastai.py', *(o for k, v in options.items() for o in (
            f'--{k.replace("_", "-")}', *([] if v is True else [str(v)])))])

    def __exit__(self, kind, e: BaseException | None, traceback):
        self.lock.release()
        if e is None or isinstance(e, InputError | RunError): return  # it would only happen again
        resumable = (self.folder/CHECKPOINT).exists()
        e.add_note(f'resume it with: {self.command(resume=self.folder)}' if resumable else 'nothing was trained yet')
