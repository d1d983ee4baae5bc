"""What watches or steers training: seeds, history, precision, recorded GPU steps, averages, a NaN."""
import warnings

from fastai.vision.all import *

from distributed import RANK, RANKS
from errors import RunError


class TrainingCallback(Callback):
    """A callback that sees training alone: `lr_find`, `get_preds`, `validate` and `summary` fire its events, too."""

    def __call__(self, event_name: str):
        if not hasattr(type(self), event_name): return
        if self.learn.fitting and not any(hasattr(self.learn, cb) for cb in ('lr_finder', 'gather_preds')):
            super().__call__(event_name)


class SeedEpochs(Callback):
    """All randomness of an epoch, shuffling and augmentation, follows from `seed` and the epoch's number alone.

    Epochs are numbered on through several fits of a learner. Several processes shuffle alike, but each draws its own
    augmentations.
    """
    order = -20  # before anything draws

    def __init__(self, seed: int): self.seed, self.earlier = seed, 0

    def before_fit(self): self.earlier = len(self.history.rows)

    def before_train(self):
        of_epoch = f'{self.seed} {self.earlier + self.epoch}'
        set_seed(random.Random(of_epoch).getrandbits(32))
        self.dls.train.rng = random.Random(random.getrandbits(32))  # a loader shuffles with a generator of its own
        if RANK: torch.manual_seed(random.Random(f'{of_epoch} {RANK}').getrandbits(32))


class MeanOfRanks(Callback):
    """Makes loss and training metrics those of all processes, the same in each; they all stop at a NaN of one."""
    order = Recorder.order - 2  # before anybody looks

    def after_loss(self): self.learn.loss = self.mean(self.loss)

    def after_train(self):
        for m in self.metrics: m.total = self.mean(m.total)  # of as many images in each

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the processes of their `x`, of any shape."""
        x = x.detach().as_subclass(Tensor).clone()
        torch.distributed.all_reduce(x)
        return x / RANKS


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
        named = dict(zip(self.recorder.metric_names, self.recorder.log, strict=False))  # which lacks the time, as yet
        named['seconds'] = time.perf_counter() - self.start
        self.rows.append({c: named.get(c.replace('test', 'valid'), float('nan')) for c in self.columns})


class Precision(MixedPrecision):
    """fastai's mixed precision on any device: 'bf16', or 'fp16' with a gradient scaler, which needs a CUDA GPU.

    An error in a forward pass skips `after_loss`; what the learner's `during_batch` has entered is left all the same.
    """

    def before_fit(self):
        bf16 = self.amp_mode == AMPMode.BF16
        device = self.dls.device.type  # fastai hard-codes 'cuda', so that to_bf16() on a CPU would train in float32
        self.autocast = torch.autocast(device, dtype=torch.bfloat16 if bf16 else torch.float16)
        self.learn.scaler, self.scales = torch.amp.GradScaler(device, enabled=not bf16), L()

    def before_batch(self): self.during_batch.enter_context(self.autocast)

    def after_loss(self): self.during_batch.close()


class CUDAGraph(TrainingCallback):
    """Records the network's forward and backward pass on a GPU once and replays them in every step.

    The same kernels with the same results: launching them one by one takes a fast GPU longer than computing them.
    """
    order = Precision.order + 1  # within its autocast

    def before_batch(self):
        if not self.training or 'forward' in vars(self.model): return
        statistics = [b.clone() for b in self.model.buffers()]  # which recording changes
        images = self.x.as_subclass(Tensor).clone()
        self.learn.loss_grad = None  # what is left of an earlier step would drag its stream into the recording
        enabled, dtype = torch.is_autocast_enabled('cuda'), torch.get_autocast_dtype('cuda')
        with torch.autocast('cuda', dtype, enabled=enabled, cache_enabled=False), warnings.catch_warnings():
            warnings.filterwarnings('ignore', "The AccumulateGrad node's stream does not match")
            torch.cuda.make_graphed_callables(self.model, (images,))  # in evaluation the model is as it was
        for b, kept in zip(self.model.buffers(), statistics, strict=True): b.copy_(kept)

    def after_fit(self): vars(self.model).pop('forward', None)

    before_fit = after_fit


class StopOnNaN(TrainingCallback):
    """Ends a training run at a loss that is not finite: its `fit` raises `RunError`.

    On a GPU it looks at the losses after each epoch: a look at every batch would keep the GPU waiting.
    """
    order = Recorder.order - 1

    def before_train(self): self.finite = []

    before_validate = before_train

    def after_batch(self):
        self.finite.append(torch.isfinite(self.loss))
        if self.loss.device.type == 'cpu': self.look()

    def after_train(self): self.look()

    after_validate = after_train

    def look(self):
        finite = torch.stack(self.finite).tolist() if self.finite else []
        if all(finite): return
        at = f'batch {finite.index(False) + 1} of {self.n_iter} of' if self.training else 'the test after'
        peak = max(self.recorder.lrs + [self.opt.hypers[-1]['lr']])
        self.learn.error = RunError(f'the loss was not finite at {at} epoch {self.epoch + 1}; '
                                    f'lower --lr-max (the rate had reached {peak:.2e})')
        raise CancelFitException


class MovingAverage:
    """An exponential moving average of a model's weights, and of batch norm's statistics, in the copy `module`.

    `decay` is that of a step, and smaller at first, lest the average remember the initial weights. (torch's
    AveragedModel would wait for the GPU at every step.)
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module, self.decay, self.steps = deepcopy(model), decay, 0
        self.average, self.latest = ([t.data for t in (*m.parameters(), *m.buffers()) if t.is_floating_point()]
                                     for m in (self.module, model))

    def update(self):
        """Takes in the model's weights after a step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.steps else 0.
        torch._foreach_lerp_(self.average, self.latest, 1 - decay)
        self.steps += 1

    def swap(self):
        """Exchanges the averaged weights and the model's."""
        for average, latest in zip(self.average, self.latest, strict=True):
            kept = average.clone()
            average.copy_(latest)
            latest.copy_(kept)

    def state_dict(self) -> dict: return dict(steps=self.steps, module=self.module.state_dict())

    def load_state_dict(self, state: dict):
        self.steps = state['steps']
        self.module.load_state_dict(state['module'])


class WeightAverage(TrainingCallback):
    """Tests, and at the end keeps, a `MovingAverage` of the weights instead of those of the last step.

    An LR that is not annihilated leaves the weights fluctuating around a better point, which their average
    approximates. What was tested stays in the model until the next epoch: callbacks that save the best model look for
    it there.
    """
    order = History.order

    def __init__(self, decay: float): self.decay = decay

    def before_fit(self): self.average, self.swapped = MovingAverage(get_model(self.model), self.decay), False

    def after_step(self): self.average.update()

    def swap(self):
        self.average.swap()
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


