"""What watches or steers training: LR of every batch, misclassified images, seeds, averaged weights."""
from fastai.vision.all import *

from lab.errors import RunError
from lab.runs import TrainingCallback, checksum
from lab.speed import unwrap


class SeedEpochs(Callback):
    """Derives all randomness of an epoch, shuffling and augmentation, from `seed` and the epoch's number alone.

    Epochs are counted across the fits of a learner. Each of several processes draws its own augmentations.
    """
    order = -20  # first

    def __init__(self, seed: int): self.seed, self.earlier, self.done = seed, 0, 0
    def before_fit(self): self.earlier = self.done

    def before_train(self):
        seed_and_epoch = f'{self.seed} {self.earlier + self.epoch}' + (f' {rank_distrib()}' if rank_distrib() else '')
        set_seed(random.Random(seed_and_epoch).getrandbits(32))
        dl = getattr(self.dls.train, '__dict__', {}).get('dl', self.dls.train)  # inside fastai's `DistributedDL`
        if hasattr(dl, 'rng'): dl.rng = random.Random(random.getrandbits(32))  # fastai's loaders shuffle with their own

    def after_train(self):
        if not hasattr(self.learn, 'lr_finder'): self.done += 1


class History(TrainingCallback):
    """Records training: `rows`, a dict per epoch, and `schedule`, the LR and momentum of every training batch.

    Figures are means over an epoch's batches as trained on, and over the test's, not smoothed. A row's `seconds` are
    those of the epoch with its test; `seconds_training` leaves the tests out.
    Raises `RunError` after an epoch whose training loss was not finite.
    """
    columns = 'epoch', 'train_loss', 'train_accuracy', 'test_loss', 'test_accuracy', 'seconds'

    def __init__(self):
        self.rows, self.schedule, self.checksums, self.seconds_training = [], [], [], 0.
        self.start = self.trained = None  # outside of an epoch, and before its training has ended

    def before_fit(self):
        if self.opt: self.path.mkdir(parents=True, exist_ok=True)  # `CSVLogger` would fail without it

    def before_train(self): self.start, self.sums, self.trained = time.perf_counter(), [], None

    def after_batch(self):
        if self.start is None: return  # a test without training
        means = (loss := self.learn.loss.mean()), accuracy(self.pred, *self.yb), torch.ones_like(loss)
        self.sums.append(torch.stack([o.detach().as_subclass(Tensor).float() for o in means]) * find_bs(self.yb))
        if not self.training: return
        hypers = self.opt.hypers[-1]  # set by the scheduler before the batch: what its step used
        self.schedule.append(dict(batch=len(self.schedule) + 1, lr=float(hypers['lr']),
                                  momentum=float(hypers.get('mom', math.nan))))

    def means(self) -> list[float]:
        """Loss and accuracy of the images since the last call, in all processes. (No batch waits for a GPU.)"""
        sums, self.sums = sum(self.sums, torch.zeros(3, device=one_param(self.model).device)), []
        if num_distrib() > 1: torch.distributed.all_reduce(sums)
        return (sums[:2] / sums[2]).tolist()

    def after_train(self):
        self.seconds_training += time.perf_counter() - self.start
        self.trained = self.means()
        if not math.isfinite(self.trained[0]):
            raise RunError(f'the loss was not finite in epoch {self.epoch + 1}; lower --lr-max (the rate is '
                           f'{self.opt.hypers[-1]["lr"]:.2e})')

    def after_validate(self):
        if self.trained is None: return
        row = len(self.rows) + 1, *self.trained, *self.means(), time.perf_counter() - self.start
        self.rows.append(dict(zip(self.columns, row, strict=True)))
        self.checksums.append(checksum(self.model))
        self.start = self.trained = None

    def train_accuracy(self) -> float: return self.trained[1] if self.trained else math.nan


class Misclassified(TrainingCallback):
    """Collects the network's predictions for the test images at every test; `table` lists the wrong ones.

    `log_probs` (N, classes) float32 and `targets` (N,) int64 are the last test's.
    """
    log_probs = targets = None

    def before_validate(self): self.batches = []

    def after_batch(self):
        if self.training or self.dl is not self.dls.valid: return
        # Log-softmax leaves log-probabilities as they are, so a network may also end in logits.
        self.batches.append((F.log_softmax(self.pred.detach(), 1, dtype=torch.float32), *self.yb))

    def after_validate(self):
        if not self.batches: return
        self.log_probs, self.targets = (torch.cat(o).as_subclass(Tensor).cpu() for o in zip(*self.batches, strict=True))

    def table(self) -> pd.DataFrame:
        """Every wrong test image as `file, actual, predicted, probability, loss`, worst first; index: its place."""
        vocab, path, (log_prob, predicted) = np.array(self.dls.vocab), self.dls.path, self.log_probs.max(dim=1)
        table = pd.DataFrame(dict(
            file=[f.relative_to(path).as_posix() for f in self.dls.valid_ds.items], actual=vocab[self.targets],
            predicted=vocab[predicted], probability=log_prob.exp(),
            loss=F.nll_loss(self.log_probs, self.targets, reduction='none')))
        return table[(predicted != self.targets).numpy()].sort_values('loss', ascending=False, kind='stable')


class WeightAverage(TrainingCallback):
    """Tests, and at the end keeps, a moving average of the weights and of batch norm's statistics.

    An LR that is not annihilated leaves the weights fluctuating around a better point. What was tested stays in the
    model until the next epoch, for callbacks that save the best model. `decay`, per step, ramps up over about `ramp`
    steps, so that a short run's average forgets its start. (torch's AveragedModel waits for the GPU at every step.)
    """
    ramp = 10

    def __init__(self, decay: float): self.decay = decay
    def before_validate(self): self.swap()

    def before_fit(self):
        model = unwrap(self.model)
        self.latest = [t.data for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        self.average, self.steps, self.swapped = [t.clone() for t in self.latest], 0, False

    def after_step(self):
        decay = min(self.decay, (1 + self.steps) / (self.ramp + self.steps)) if self.steps else 0.
        torch._foreach_lerp_(self.average, self.latest, 1 - decay)
        self.steps += 1

    def swap(self):
        """Exchanges the averaged weights and the model's."""
        kept = [t.clone() for t in self.average]
        torch._foreach_copy_(self.average, self.latest)
        torch._foreach_copy_(self.latest, kept)
        self.swapped = not self.swapped

    def before_epoch(self):
        if self.swapped: self.swap()

    def after_fit(self):
        if not self.swapped: self.swap()  # something ended an epoch before its test
        del self.average, self.latest

    def state_dict(self) -> dict: return dict(steps=self.steps, swapped=self.swapped, average=self.average)

    def load_state_dict(self, state: dict):
        self.steps, self.swapped = state['steps'], state['swapped']
        torch._foreach_copy_(self.average, state['average'])
