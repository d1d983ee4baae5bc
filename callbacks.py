"""What watches or steers training: seeds, history, final predictions, precision, averages, checkpoints."""
import contextlib
import io
import pickle
import zipfile

from fastai.vision.all import *
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from errors import InputError


def is_training_run(learn: Learner) -> bool:
    """Is this `fit` training proper? `lr_find` and `get_preds` fire `before_fit` too."""
    return not (hasattr(learn, 'lr_finder') or hasattr(learn, 'gather_preds'))


class TrainingCallback(Callback):
    """A callback that sees training runs only."""

    def __call__(self, event_name: str):
        if is_training_run(self.learn): super().__call__(event_name)


class SeedEpochs(Callback):
    """All randomness of an epoch, shuffling and augmentation, follows from `seed` and the epoch's number alone.

    Epochs are numbered on through several fits of a learner.
    """
    order = -20  # before anything draws

    def __init__(self, seed: int): self.seed, self.earlier, self.done = seed, 0, 0

    def before_fit(self): self.earlier = self.done

    def before_train(self):
        set_seed(random.Random(f'{self.seed} {self.earlier + self.epoch}').getrandbits(32))
        self.dls.train.rng = random.Random(random.getrandbits(32))  # a loader shuffles with a generator of its own

    def after_train(self):
        if is_training_run(self.learn): self.done = self.earlier + self.epoch + 1


class History(TrainingCallback):
    """Records the training run: `rows`, a dict an epoch, and `schedule`, the LR and momentum of every training batch.

    It also mends the recorder's log, and with it the printed table: epochs count from 1, and on through several fits,
    and the training loss is the mean over the epoch's batches, not a smoothed value. `seconds_training` is training
    alone, a row's `seconds` an epoch with its test.
    """
    order = Recorder.order + 1
    columns = 'epoch', 'train_loss', 'train_accuracy', 'test_loss', 'test_accuracy', 'seconds'

    def __init__(self): self.rows, self.schedule, self.seconds_training, self.train_loss = [], [], 0., AvgLoss()

    def before_epoch(self): self.start = time.perf_counter()

    def before_train(self): self.train_loss.reset()

    def after_batch(self):
        if not self.training: return
        self.train_loss.accumulate(self.learn)
        hypers = self.opt.hypers[-1]  # behind the scheduler's before_batch: what this batch's step used
        self.schedule.append(dict(batch=len(self.schedule) + 1, lr=float(hypers['lr']), momentum=float(hypers['mom'])))

    def after_train(self):
        self.seconds_training += time.perf_counter() - self.start
        self.recorder.log[:2] = [len(self.rows) + 1, self.train_loss.value.item()]

    def after_validate(self):
        names, log = self.recorder.metric_names, self.recorder.log
        if len(log) < len(names) - 1: return  # a bare `learn.validate()` has no training half
        named = dict(zip(names, log, strict=False), seconds=time.perf_counter() - self.start)
        self.rows.append({c: named.get(c.replace('test', 'valid'), float('nan')) for c in self.columns})


class FinalPredictions(TrainingCallback):
    """Keeps what the network said of each test image in the latest validation: after training, the final model's.

    `log_probs` (N, classes), `targets` (N,) and `losses` (N,) are on the CPU, in the order of `dls.valid_ds.items`.
    """
    _keep = False  # `learn.summary()` fires `after_batch` alone

    def before_validate(self):
        self._keep = self.dl is self.dls.valid
        self._preds, self._targets = [], []

    def after_batch(self):
        if self.training or not self._keep: return
        self._preds.append(self.pred.detach().as_subclass(Tensor))
        self._targets.append(self.y.as_subclass(Tensor))

    def after_validate(self):
        if not self._keep or not self._preds: return
        self.log_probs, self.targets = torch.cat(self._preds).float().cpu(), torch.cat(self._targets).cpu()
        self.losses = F.nll_loss(self.log_probs, self.targets, reduction='none')

    def misclassified(self) -> list[dict]:
        """Every wrong test image as `file, actual, predicted, probability, loss`, the largest loss first."""
        vocab, files, folder = self.dls.vocab, self.dls.valid_ds.items, self.dls.path
        log_prob, predicted = self.log_probs.max(dim=1)
        wrong = (predicted != self.targets).nonzero()[:, 0]
        return [dict(file=files[i].relative_to(folder).as_posix(), actual=vocab[self.targets[i]],
                     predicted=vocab[predicted[i]], probability=log_prob[i].exp().item(), loss=self.losses[i].item())
                for i in wrong[self.losses[wrong].argsort(descending=True, stable=True)].tolist()]


class Precision(MixedPrecision):
    """fastai's mixed precision on any device: 'bf16', or 'fp16' with a gradient scaler, which needs a CUDA GPU."""

    def before_fit(self):
        bf16 = self.amp_mode == AMPMode.BF16
        device = self.dls.device.type  # fastai hard-codes 'cuda', so that to_bf16() on a CPU would train in float32
        self.autocast = torch.autocast(device, dtype=torch.bfloat16 if bf16 else torch.float16)
        self.learn.scaler, self.scales = torch.amp.GradScaler(device, enabled=not bf16), L()


def best_precision(device: torch.device) -> str:
    """'bf16' where the hardware is made for it, 'fp16' on older CUDA GPUs, else 'fp32'."""
    if device.type == 'cuda': return 'bf16' if torch.cuda.get_device_capability(device) >= (8, 0) else 'fp16'
    if device.type == 'cpu':
        has = torch.cpu.get_capabilities()
        return 'bf16' if has.get('amx_bf16') or has.get('avx512_bf16') else 'fp32'
    return 'fp32'


class StopOnNaN(TrainingCallback):
    """Ends the training run at a loss that is not finite; `where` then says at which batch, and else is None."""
    order = Recorder.order - 1
    where = None

    def before_fit(self): self.where = None

    def after_batch(self):
        if torch.isfinite(self.loss): return
        if not (self.training or self.recorder.losses): return  # a bare `learn.validate()` has nothing to end
        if self.training: self.where = f'batch {self.iter + 1} of {self.n_iter} of epoch {self.epoch + 1}'
        else: self.where = f'the test after epoch {self.epoch + 1}'
        raise CancelFitException


class WeightAverage(TrainingCallback):
    """Tests, and at the end keeps, an exponential moving average of the weights instead of those of the last step.

    An LR that is not annihilated leaves the weights wandering about a better place, their mean. `decay` is that of a
    step, and smaller at first, lest the average remember the initial weights. Batch norm's statistics are averaged too.
    What was tested stays in the model until the next epoch: callbacks that save the best model look for it there.
    """
    order = History.order

    def __init__(self, decay: float): self.decay = decay

    def before_fit(self): self.average, self.swapped = AveragedModel(self.model, use_buffers=True), False

    def after_step(self):
        n = self.average.n_averaged.item()
        self.average.multi_avg_fn = get_ema_multi_avg_fn(min(self.decay, (1 + n) / (10 + n)))
        self.average.update_parameters(self.model)

    def swap(self):
        ours, others = ([*m.parameters(), *m.buffers()] for m in (self.model, self.average.module))
        for a, b in zip(ours, others, strict=True): a.data, b.data = b.data, a.data
        self.swapped = not self.swapped

    def before_epoch(self):
        if self.swapped: self.swap()

    def before_validate(self): self.swap()

    def after_fit(self):
        if not self.swapped: self.swap()  # where something ended an epoch before its test
        del self.average


class PlainLog(TrainingCallback):
    """In place of fastai's progress bars where there is no terminal: the same table as aligned plain lines."""
    order = ProgressCallback.order

    def before_fit(self):
        if self.learn.logger == noop: return  # no_logging
        self.learn.logger = self.write
        self.write(name.replace('valid', 'test') for name in self.recorder.metric_names)

    def write(self, row: Iterable):
        print('  '.join((f'{o:.6f}' if isinstance(o, float) else str(o)).ljust(14) for o in row).rstrip(), flush=True)


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
        part.replace(file)
    except BaseException as e:
        with contextlib.suppress(OSError): part.unlink(missing_ok=True)
        if not isinstance(e, OSError): raise
        raise OSError(e.errno, e.strerror, str(file)) from e  # a full disk does not say where


def save_csv(file: Path, rows: list[dict], columns: list[str] | None = None):
    """The `rows` as CSV, by way of `write_whole`."""
    write_whole(file, pd.DataFrame(rows, columns=columns).to_csv(index=False).encode())


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
    except Exception as e: raise InputError(f'{file} is damaged ({" ".join(str(e).split())[:100]})') from e


class ResumableLearner(Learner):
    """A `Learner` whose `fit` begins at `first_epoch`; fastai's own argument fires events for the skipped epochs."""
    first_epoch = 0

    def _do_fit(self):
        for epoch in range(self.first_epoch, self.n_epoch):
            self.epoch = epoch
            self._with_events(self._do_epoch, 'epoch', CancelEpochException)


class Checkpoint(Callback):
    """Saves the run before its first and after every epoch to the learner's folder, or goes on from `state`.

    Randomness needs no saving: `SeedEpochs` derives it from the seed and the epoch. `header` is stored as is; `start`
    is when the program began its work, by `time.perf_counter()`.
    """
    order = History.order + 1
    file = 'checkpoint.pth'

    def __init__(self, header: dict, start: float, state: dict | None = None):
        self.header, self.state = header, state
        self.start = start - (state['seconds_total'] if state else 0)

    def seconds_total(self) -> float: return time.perf_counter() - self.start

    def before_fit(self):
        if self.state is None: self.save(epochs_done=0)
        else: self.restore(self.state)

    def after_epoch(self): self.save(self.epoch + 1)

    def save(self, epochs_done: int):
        h, smooth = self.history, self.recorder.smooth_loss
        save_csv(self.path/'history.csv', h.rows, list(History.columns))
        save_csv(self.path/'schedule.csv', h.schedule, ['batch', 'lr', 'momentum'])
        save_state(self.path/self.file, dict(
            self.header, epochs_done=epochs_done, model=self.model.state_dict(),
            opt=self.opt.state_dict()['state'],  # its LR and momentum are the schedule's to set
            scaler=self.scaler.state_dict() if hasattr(self.learn, 'precision') else {},
            average=self.weight_average.average.state_dict() if hasattr(self.learn, 'weight_average') else {},
            smooth_loss=[float(smooth.val), smooth.count], rows=h.rows, schedule=h.schedule,
            seconds_training=h.seconds_training, seconds_total=self.seconds_total()))

    def restore(self, s: dict):
        self.learn.first_epoch = s['epochs_done']
        self.model.load_state_dict(s['model'])
        self.opt.load_state_dict(dict(self.opt.state_dict(), state=s['opt']))
        if s['scaler']: self.scaler.load_state_dict(s['scaler'])
        if s['average']:
            self.weight_average.average.load_state_dict(s['average'])
            self.weight_average.swapped = s['epochs_done'] > 0  # as it was when it was saved
        smooth = self.recorder.smooth_loss
        smooth.val, smooth.count = tensor(s['smooth_loss'][0]), s['smooth_loss'][1]
        h = self.history
        h.rows, h.schedule, h.seconds_training = s['rows'], s['schedule'], s['seconds_training']
