"""How the `Learner` is put together: optimizer, loss, precision, averages, and the search for its learning rates."""
import contextlib
import ctypes
import platform
import sys
import tempfile
from typing import Any

from fastai.callback.schedule import valley
from fastai.vision.all import *

from arch import ResNet
from callbacks import CUDAGraph, History, MeanOfRanks, PlainLog, Precision, SeedEpochs, StopOnNaN, WeightAverage
from data import SHOW_PROGRESS
from distributed import RANK, RANKS, leave_the_word, lost
from errors import InputError, RunError, one_line

PRECISIONS = 'auto', 'fp32', 'bf16', 'fp16'
replaced = contextlib.contextmanager(replacing_yield)  # an object's attribute, for a while


class CrossEntropy(CrossEntropyLossFlat):
    """Cross-entropy with smoothed labels (arXiv:1512.00567) in training, and plain without gradients: in every test."""

    def __init__(self, label_smoothing: float = 0.):
        super().__init__()
        self.label_smoothing = label_smoothing

    def __call__(self, inp: Tensor, targ: Tensor, **kwargs) -> Tensor:
        self.func.label_smoothing = self.label_smoothing if torch.is_grad_enabled() else 0.
        return super().__call__(inp, targ, **kwargs)


class SmoothLoss(AvgSmoothLoss):
    """fastai's smoothed loss, which does not wait for the GPU at every batch."""

    def accumulate(self, learn: Learner):
        self.count += 1
        start = self.val.to(learn.loss.device, non_blocking=True)
        self.val = torch.lerp(learn.loss.detach().mean(), start, self.beta)


class SideBySideConv2d(nn.Conv2d):
    """A 3×3 convolution that lays the images of a batch side by side: (N, C, H, W) → (N, C', H, W), as `nn.Conv2d`.

    oneDNN's AMX convolutions fill their tiles along the width of a map, and small maps leave most of a tile empty. A
    column of zeros keeps neighbours apart, as padding does.
    """

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        wide = F.pad(x.permute(2, 0, 3, 1), (0, 0, 0, 1)).reshape(1, h, n * (w + 1), c)
        out = super().forward(wide.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return out.reshape(h, n, w + 1, -1)[:, :, :w].permute(1, 3, 0, 2)


class RobustLearner(Learner):
    """A `Learner` that an interruption or an error leaves as usable as it was, and whose `fit` begins at `first_epoch`.

    fastai skips `after_fit` after an error, so that an interrupted finder's weights would stay in the model; and its
    own `start_epoch` fires events for the epochs that it skips. A callback that ends a fit can set its `error`.
    """
    first_epoch, fitting, error = 0, False, None

    def fit(self, *args, **kwargs):
        self.fitting = True
        try: super().fit(*args, **kwargs)
        finally: error, self.error, self.fitting, self.first_epoch = self.error, None, False, 0
        if error: raise error

    def _do_fit(self):
        try:
            for epoch in range(self.first_epoch, self.n_epoch):
                self.epoch = epoch
                self._with_events(self._do_epoch, 'epoch', CancelEpochException)
        except CancelFitException: raise
        except BaseException:
            for cb in self.cbs:
                if isinstance(cb, LRFinder | CUDAGraph): cb('after_fit')
            raise

    def _do_epoch_train(self):
        try: super()._do_epoch_train()
        finally: self.recorder.losses = [o.cpu() for o in self.recorder.losses]  # no batch waited for them

    def one_batch(self, *args, **kwargs):
        with contextlib.ExitStack() as self.during_batch: super().one_batch(*args, **kwargs)

    def to_detach(self, b: Any, *args, **kwargs) -> Any:
        """As fastai's, but a metric is summed up where it is: to move it would wait for the GPU at every batch."""
        return b.detach() if isinstance(b, Tensor) and b.ndim == 0 else super().to_detach(b, *args, **kwargs)

    def to_fp16(self, **kwargs) -> Learner:
        """As fastai's, but in place of a precision that is there already: two of them would scale the loss twice."""
        return self.remove_cb(MixedPrecision).add_cb(Precision('fp16', **kwargs))

    def to_bf16(self) -> Learner:
        """As fastai's, but on any device, and in place of a precision that is there already."""
        return self.remove_cb(MixedPrecision).add_cb(Precision('bf16'))


def best_precision(device: torch.device) -> str:
    """'bf16' where the hardware is made for it, 'fp16' on older CUDA GPUs, else 'fp32'."""
    if device.type == 'cuda': return 'bf16' if torch.cuda.get_device_capability(device) >= (8, 0) else 'fp16'
    if device.type != 'cpu' or not torch.backends.mkldnn.is_available(): return 'fp32'
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported(): return 'fp32'  # ONEDNN_MAX_CPU_ISA may forbid it
    has = torch.cpu.get_capabilities()
    return 'bf16' if has.get('amx_bf16') or has.get('avx512_bf16') else 'fp32'


def checked_precision(precision: str, device: torch.device) -> str:
    """`precision`, 'auto' resolved for `device`. Raises `InputError` for one that does not exist there."""
    if precision not in PRECISIONS: raise InputError(f'--precision {precision} is not one of {", ".join(PRECISIONS)}')
    if precision == 'fp16' and device.type != 'cuda':
        raise InputError(f'--precision fp16 needs a CUDA GPU, not "{device.type}"; use bf16 or fp32')
    return best_precision(device) if precision == 'auto' else precision


def device_name(device: torch.device) -> str:
    """The processor in words."""
    several = f'{RANKS} × ' if RANKS > 1 else ''
    if device.type == 'cuda': return several + torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get('cpu_name') or platform.machine()
    return f'{several}{device.type}, {name}, {torch.get_num_threads()} threads'


def keep_freed_memory():
    """Lets the process keep what tensors free: returning it and asking again costs a CPU an eighth of a step."""
    if sys.platform != 'linux': return
    with contextlib.suppress(AttributeError):  # glibc only
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def weight_decay_groups(model: nn.Module, wd: float) -> list[dict]:
    """fastai's weight decay for a torch optimizer: none on batch norm and biases, which are the 1-d parameters."""
    decayed, plain = [], []
    for p in model.parameters(): (decayed if p.ndim > 1 else plain).append(p)
    return [dict(params=decayed, weight_decay=wd), dict(params=plain, weight_decay=0.)]


def get_learner(dls: DataLoaders, precision: str = 'auto', seed: int = 42, path: str | Path = '.', ema: float = 0.99,
                wd: float = 0.1, label_smoothing: float = 0.1, width: int = 64) -> Learner:
    """A fastai `Learner` of the assignment's network for `dls`; whatever it saves goes to `path`.

    The optimizer is torch's fused AdamW with the hyper-parameters of fastai's `Adam`, whose steps it takes (to
    rounding) in a fraction of the time; `wd` is its decoupled weight decay. `label_smoothing` applies to the training
    loss alone. `ema` is the decay of the moving average of the weights that is tested and kept; with 0 it is the last
    step's weights. `precision` is 'auto', 'fp32', 'bf16' or 'fp16'. `seed` determines the initial weights and all
    randomness of every epoch; on a CPU the same seed gives the same run. `width` is that of `ResNet`. Raises
    `InputError`.
    """
    device = dls.device
    precision = checked_precision(precision, device)
    set_seed(seed)
    dls.train.rng = random.Random(seed)  # a look at a batch before the first epoch follows from the seed, too
    torch.backends.cudnn.benchmark = True
    model = ResNet(3, len(dls.vocab), width).to(device, memory_format=torch.channels_last)
    if device.type == 'cpu':
        keep_freed_memory()
        if precision == 'bf16' and torch.cpu.get_capabilities().get('amx_bf16'):
            for conv in model.layer3.modules():  # its maps are 8×8 and 4×4
                if isinstance(conv, nn.Conv2d): conv.__class__ = SideBySideConv2d
    cbs = [SeedEpochs(seed), History(), StopOnNaN()]
    if precision != 'fp32': cbs.append(Precision(precision))
    if device.type == 'cuda' and RANKS == 1: cbs.append(CUDAGraph())  # the processes' exchange cannot be recorded
    if ema: cbs.append(WeightAverage(ema))
    learn = RobustLearner(
        dls, model, loss_func=CrossEntropy(label_smoothing=label_smoothing), metrics=accuracy, cbs=cbs, path=path,
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW, betas=(0.95, 0.99), eps=1e-5, fused=True),
        splitter=partial(weight_decay_groups, wd=wd))
    learn.recorder.train_metrics, learn.recorder.smooth_loss = True, SmoothLoss()
    if not SHOW_PROGRESS: learn.remove_cb(ProgressCallback).add_cb(PlainLog())
    return learn


@contextlib.contextmanager
def shared_out(learn: Learner):
    """Within it all processes of a run (see distributed.py) train `learn` together, each on its part of every batch.

    The batch stays that of one process, on GPUs also for batch norm. On CPUs, for which torch has no such batch norm,
    each normalises its part by itself, and the statistics kept are the first one's. Every process tests on all images.
    """
    if RANKS == 1:
        yield
        return
    import fastai.distributed  # noqa: F401, gives `Learner` its distrib_ctx
    os.environ['WORLD_SIZE'] = str(RANKS)  # where fastai looks for it
    try:
        with learn.distrib_ctx(sync_bn=learn.dls.device.type == 'cuda'), learn.added_cbs(MeanOfRanks()):
            # fastai's loader would broadcast the order, by a GPU; ours follows from the seed, and keeps the batches.
            learn.distributed_trainer._wrap_dl = noop
            learn.dls.train.share = slice(RANK, None, RANKS)
            yield
    except RuntimeError as e:
        if lost(e) and not RANK: leave_the_word(silent=False)
        raise
    finally:
        del os.environ['WORLD_SIZE']
        learn.model, learn.dls.train.share = get_model(learn.model), slice(None)


def basin(lrs: Tensor, losses: Tensor, num_it: int) -> tuple[float, tuple[float, float]]:
    """A suggestion for `lr_find`: 0.4 times the middle (on the log scale) of the rates with a loss close to the least.

    Close means within a tenth of the whole descent. Their middle varies half as much from seed to seed as the single
    rate of least loss, a tenth of which is fastai's `minimum`.
    """
    low = losses.min()
    middle = lrs[losses <= low + 0.1 * (losses[0] - low)].log().mean().exp()
    return 0.4 * middle.item(), (middle.item(), losses[(lrs - middle).abs().argmin()])


@contextlib.contextmanager
def made_anew(learn: Learner, seed: int):
    """Within it the network has the initial weights of `seed`, and the batches are those of `seed`, too."""
    weights = {k: v.clone() for k, v in learn.model.state_dict().items()}
    try:
        set_seed(seed)
        learn.model.apply(lambda module: getattr(module, 'reset_parameters', noop)())
        with replaced(learn.seed_epochs, 'seed', seed): yield
    finally: learn.model.load_state_dict(weights)


def find_lrs(learn: Learner, show_plot: bool = False) -> tuple[float, float]:
    """(LRMIN, LRMAX) by `learn.lr_find()`: its `valley` suggestion, at most a tenth of LRMAX, and our `basin`.

    With small batches two finders may differ by a factor of twenty. Where they are smaller than 32, and an epoch has 25
    or more, it runs seven finders, all but the first with other initial weights and batches, and takes the one with the
    median LRMAX; its curve stays in the recorder. `learn` is one of `get_learner`'s. Raises `RunError` if no finder has
    a useful answer.
    """
    found, seed = [], learn.seed_epochs.seed
    for i in range(7 if learn.dls.bs < 32 and len(learn.dls.train) >= 25 else 1):
        other = made_anew(learn, (seed + 1000 * i) % 2**32) if i else contextlib.nullcontext()
        try:
            with tempfile.TemporaryDirectory() as tmp, replaced(learn, 'model_dir', tmp), other:
                lr_min, lr_max = learn.lr_find(suggest_funcs=(valley, basin), show_plot=False)
            if not (0 < lr_min < float('inf') and 0 < lr_max < float('inf')): raise ValueError('no usable rates')
            found.append((lr_max, lr_min, learn.recorder.lrs, learn.recorder.losses))
        except (IndexError, ValueError) as e: trouble = one_line(e)  # of too few finite losses
    if not found: raise RunError(f'the LR finder failed ({trouble}); set --lr-min and --lr-max')
    lr_max, lr_min, lrs, losses = sorted(found)[len(found) // 2]
    learn.recorder.lrs, learn.recorder.losses = lrs, losses
    rates = min(lr_min, lr_max / 10), lr_max
    if show_plot:
        marks = [(lr, np.interp(lr, lrs, losses)) for lr in rates]
        learn.recorder.plot_lr_find(suggestions=marks, nms=('LRMIN', 'LRMAX'))
    return rates
