"""What watches or steers training: LR of every batch, misclassified images, seeds, averaged weights, NaN."""
import math

from fastai.vision.all import *

from lab.errors import RunError
from lab.evaluate import list_misclassified
from lab.learner import AFTER_RECORDER, FIRST, TrainingCallback
from lab.processes import RANK


class SeedEpochs(Callback):
    """Derives all randomness of an epoch, shuffling and augmentation, from `seed` and the epoch's number alone.

    Epochs are counted across the fits of a learner. With several processes all shuffle alike, but each draws its own
    augmentations.
    """
    order = FIRST

    def __init__(self, seed: int): self.seed, self.earlier = seed, 0

    def before_fit(self): self.earlier = len(self.history.rows)

    def before_train(self):
        seed_and_epoch = f'{self.seed} {self.earlier + self.epoch}'
        set_seed(random.Random(seed_and_epoch).getrandbits(32))
        self.dls.train.rng = random.Random(random.getrandbits(32))  # a loader shuffles with a generator of its own
        if RANK: torch.manual_seed(random.Random(f'{seed_and_epoch} {RANK}').getrandbits(32))


class History(TrainingCallback):
    """Records training: `rows`, a dict per epoch, and `schedule`, the LR and momentum of every training batch.

    Training figures are means over the epoch's batches as trained on, not smoothed. A row's `seconds` are those of the
    epoch with its test; `seconds_training` leaves the tests out. The printed table is made from these figures.
    """
    order = AFTER_RECORDER
    columns = 'epoch', 'train_loss', 'train_accuracy', 'test_loss', 'test_accuracy', 'seconds'

    def __init__(self):
        self.rows, self.schedule, self.seconds_training = [], [], 0.
        self.train_loss, self.train_accuracy = AvgLoss(), AvgMetric(accuracy)

    def before_epoch(self): self.start = time.perf_counter()

    def before_train(self):
        for metric in (self.train_loss, self.train_accuracy): metric.reset()

    def after_batch(self):
        if not self.training: return
        for metric in (self.train_loss, self.train_accuracy): metric.accumulate(self.learn)
        hypers = self.opt.hypers[-1]  # set by the scheduler before the batch: what its step used
        self.schedule.append(dict(batch=len(self.schedule) + 1, lr=float(hypers['lr']),
                                  momentum=float(hypers.get('mom', math.nan))))

    def after_train(self): self.seconds_training += time.perf_counter() - self.start

    def after_validate(self):
        tested = dict(zip(self.recorder.metric_names, self.recorder.log, strict=False))  # the time comes later
        self.rows.append(dict(
            epoch=len(self.rows) + 1, train_loss=float(ifnone(self.train_loss.value, math.nan)),
            train_accuracy=float(ifnone(self.train_accuracy.value, math.nan)),
            test_loss=tested.get('valid_loss', math.nan), test_accuracy=tested.get('accuracy', math.nan),
            seconds=time.perf_counter() - self.start))

    def printed_row(self, log: list) -> list:
        """The recorder's `log`, or the names of its columns, as this table has it: epochs from 1, both accuracies."""
        if log[0] == 'epoch':
            return ['epoch', 'train_loss', 'train_accuracy', 'test_loss', *(
                'test_accuracy' if name == 'accuracy' else name for name in log[3:])]
        if len(log) < len(self.recorder.metric_names): return [log[0] + 1, *log[1:]]  # it was skipped or cut short
        return [*[self.rows[-1][c] for c in self.columns[:3]], *log[2:]]

    def state_dict(self) -> dict: return {k: vars(self)[k] for k in ('rows', 'schedule', 'seconds_training')}

    def load_state_dict(self, state: dict): vars(self).update(state)


class Misclassified(TrainingCallback):
    """Collects the network's predictions for the test images at every test of a fit; `table` lists the wrong ones.

    `log_probs` (N, classes) float32 and `targets` (N,) int64 are those of the last test, on the CPU.
    """
    order = AFTER_RECORDER
    log_probs = targets = batches = None

    def before_validate(self): self.batches = []

    def after_batch(self):
        if self.training or self.batches is None: return
        # Log-softmax leaves log-probabilities as they are, so a network may also end in logits.
        self.batches.append((F.log_softmax(self.pred.detach(), 1, dtype=torch.float32), *self.yb))

    def after_validate(self):
        batches, self.batches = self.batches, None
        if not batches or sum(len(o) for o, _ in batches) < len(self.dls.valid_ds): return  # skipped or cut short
        self.log_probs, self.targets = (torch.cat(o).as_subclass(Tensor).cpu() for o in zip(*batches, strict=True))

    def table(self) -> pd.DataFrame:
        """Every wrong test image as `file, actual, predicted, probability, loss`, worst first; index: its place."""
        return list_misclassified(self.log_probs, self.targets, self.dls.valid_ds.items, self.dls.vocab, self.dls.path)

    def state_dict(self) -> dict: return dict(log_probs=self.log_probs, targets=self.targets)

    def load_state_dict(self, state: dict): vars(self).update(state)


class StopOnNaN(TrainingCallback):
    """Ends a fit at a loss that is not finite: `fit` raises `RunError`.

    On a GPU it looks at the losses after each epoch: looking at every batch would keep the GPU waiting.
    """
    order = Recorder.order - 1

    def before_train(self): self.finite = []

    before_validate = before_train

    def after_batch(self):
        self.finite.append(torch.isfinite(self.loss).all())
        if self.loss.device.type == 'cpu' and not self.finite[-1]: self.stop(len(self.finite))

    def after_train(self):
        finite = torch.stack(self.finite).tolist() if self.finite else []
        if not all(finite): self.stop(finite.index(False) + 1)

    after_validate = after_train

    def stop(self, batch: int):
        at = f'batch {batch} of {self.n_iter} of' if self.training else 'the test after'
        peak = max(self.recorder.lrs + [self.opt.hypers[-1]['lr']])
        self.learn.error = RunError(f'the loss was not finite at {at} epoch {self.epoch + 1}; '
                                    f'lower --lr-max (the rate had reached {peak:.2e})')
        raise CancelFitException


class MovingAverage:
    """An exponential moving average of a model's weights, and of batch norm's statistics, in the copy `module`.

    `decay` is per step; it ramps up so that the initial weights are forgotten. (torch's AveragedModel would wait for
    the GPU at every step.)
    """
    ramp = 10  # steps, as in TensorFlow; with a constant decay a short run's average remembers its start

    def __init__(self, model: nn.Module, decay: float):
        self.module, self.decay, self.steps = deepcopy(model), decay, 0
        self.average, self.latest = ([t.data for t in (*m.parameters(), *m.buffers()) if t.is_floating_point()]
                                     for m in (self.module, model))

    def update(self):
        """Takes in the model's weights after a step."""
        decay = min(self.decay, (1 + self.steps) / (self.ramp + self.steps)) if self.steps else 0.
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
    approximates. What was tested stays in the model until the next epoch, where callbacks that save the best model
    look for it.
    """
    order = AFTER_RECORDER

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
        if not self.swapped: self.swap()  # something ended an epoch before its test
        del self.average

    def state_dict(self) -> dict: return dict(self.average.state_dict(), swapped=self.swapped)

    def load_state_dict(self, state: dict):
        self.average.load_state_dict(state)
        self.swapped = state['swapped']
