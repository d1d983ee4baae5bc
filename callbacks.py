"""What watches or steers training: seeds, history, schedule, final predictions, precision, and an end at a NaN."""
from fastai.vision.all import *


def is_training_run(learn: Learner) -> bool:
    """Is this `fit` training proper? `lr_find` and `get_preds` fire `before_fit` too."""
    return not (hasattr(learn, 'lr_finder') or hasattr(learn, 'gather_preds'))


class SeedEpochs(Callback):
    """All randomness of an epoch, shuffling and augmentation, follows from `seed` and the epoch's number alone."""
    order = -20  # before anything draws

    def __init__(self, seed: int): self.seed = seed

    def before_train(self):
        set_seed(random.Random(f'{self.seed} {self.epoch}').getrandbits(32))
        self.dls.train.rng = random.Random(random.getrandbits(32))  # a loader shuffles with a generator of its own


class History(Callback):
    """Records the training run: `rows`, a dict an epoch, and `schedule`, the LR and momentum of every training batch.

    It also mends the recorder's log, and with it the printed table: epochs count from 1 and `train_loss` is the mean over
    the epoch's batches, not a smoothed value. `seconds_training` counts training alone, a row's `seconds` the test too.
    """
    order = Recorder.order + 1
    columns = 'epoch', 'train_loss', 'train_accuracy', 'test_loss', 'test_accuracy', 'seconds'

    def __init__(self): self.rows, self.schedule, self.seconds_training, self.train_loss = [], [], 0., AvgLoss()

    def before_fit(self):
        self.run = is_training_run(self.learn)
        self.recorder.metric_names = L(*self.columns[:-1], 'time')

    def before_epoch(self): self.start = time.perf_counter()

    def before_train(self): self.train_loss.reset()

    def after_batch(self):
        if not self.training: return
        self.train_loss.accumulate(self.learn)
        hypers = self.opt.hypers[-1]  # behind the scheduler's before_batch: what this batch's step used
        self.schedule.append(dict(batch=len(self.schedule) + 1, lr=float(hypers['lr']), momentum=float(hypers['mom'])))

    def after_train(self):
        self.seconds_training += time.perf_counter() - self.start
        self.recorder.log[:2] = [self.epoch + 1, self.train_loss.value.item()]

    def after_validate(self):
        if len(self.recorder.log) == len(self.columns) - 1:  # a bare `learn.validate()` has no training half
            self.rows.append(dict(zip(self.columns, [*self.recorder.log, time.perf_counter() - self.start])))


class FinalPredictions(Callback):
    """Keeps what the network said of each test image in the latest validation: the final model's, once training is over.

    `log_probs` (N, classes), `targets` (N,) and `losses` (N,) are on the CPU, in the order of `dls.valid_ds.items`.
    """
    def before_fit(self): self.run = is_training_run(self.learn)

    def before_validate(self): self._preds, self._targets = [], []

    def after_batch(self):
        if self.training: return
        self._preds.append(self.pred.detach().as_subclass(Tensor))
        self._targets.append(self.y.as_subclass(Tensor))

    def after_validate(self):
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

    def confusion_matrix(self) -> Tensor:
        """Counts of test images, (classes, classes) int64: rows are actual classes, columns predictions."""
        n = self.log_probs.shape[1]
        return (self.targets * n + self.log_probs.argmax(1)).bincount(minlength=n * n).view(n, n)


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


class StopOnNaN(TerminateOnNaNCallback):
    """Ends the training run at a loss that is not finite; `where` then says at which batch, and else is None."""
    where = None

    def before_fit(self): self.run = is_training_run(self.learn)  # the finder's loss may and should diverge

    def after_batch(self):
        if not torch.isfinite(self.loss):
            batch = f'batch {self.iter + 1} of {self.n_iter}'
            self.where = f'{batch} of epoch {self.epoch + 1}' if self.training else f'the test after epoch {self.epoch + 1}'
        super().after_batch()


class RunFolder(Callback):
    """Writes the history so far into the learner's folder after every epoch."""
    order = History.order + 1

    def after_epoch(self):
        for name, rows in (('history', self.history.rows), ('schedule', self.history.schedule)):
            pd.DataFrame(rows).to_csv(self.path/f'{name}.csv', index=False)


class PlainLog(Callback):
    """In place of fastai's progress bars where there is no terminal: the same table as aligned plain lines."""
    order = ProgressCallback.order

    def before_fit(self):
        if self.learn.logger == noop: return  # lr_find and get_preds are silent
        self.learn.logger = self.write
        self.write(self.recorder.metric_names)

    def write(self, row):
        print('  '.join((f'{o:.6f}' if isinstance(o, float) else str(o)).ljust(14) for o in row).rstrip(), flush=True)
