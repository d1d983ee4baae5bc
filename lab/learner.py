"""The `Learner`: it survives Ctrl-C and errors, wraps a torch optimizer, and trains in several processes."""
import contextlib
import threading
from typing import Any

from fastai.vision.all import *
from fastprogress.fastprogress import MasterBar, ProgressBar

from lab.loader import SHOW_PROGRESS
from lab.processes import RANK, RANKS, let_rank_0_report, lost_a_process
from lab.speed import CUDAGraph, Precision, in_fast_layout, keep_random_state, match_layout, train_fast

FIRST, AFTER_RECORDER, LAST = -20, Recorder.order + 1, Recorder.order + 2  # orders of callbacks
replaced = contextlib.contextmanager(replacing_yield)  # an attribute of an object, for a while


class TrainingCallback(Callback):
    """Base class for callbacks that must ignore `lr_find`, `get_preds` and `validate`, which fire the same events."""

    def __call__(self, event_name: str):
        if not hasattr(type(self), event_name): return
        aside = any(hasattr(self.learn, cb) for cb in ('lr_finder', 'gather_preds')) or getattr(self.learn, 'aside', 0)
        if getattr(self.learn, 'fitting', True) and not aside: super().__call__(event_name)


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
        start = self.val.to(learn.loss.device, non_blocking=learn.loss.is_cuda)
        self.val = torch.lerp(learn.loss.detach().mean(), start, self.beta)


class Progress(ProgressCallback):
    """fastai's progress with the table of `History`; without a terminal, plain lines and silent bars."""
    name = 'progress'  # where fastai looks for it

    def before_fit(self):
        silent = contextlib.nullcontext() if SHOW_PROGRESS else self.learn.no_mbar()
        if self.create_mbar and not SHOW_PROGRESS: self.mbar = MasterBar(range(self.n_epoch), ProgressBar)
        with silent: super().before_fit()
        if self.create_mbar and self.first_epoch: self.mbar.update(0)  # its clock starts at epoch 0

    def _launch_pbar(self):
        if SHOW_PROGRESS: super()._launch_pbar()
        else: self.pbar = ProgressBar(self.dl, display=False)

    def after_batch(self):
        if SHOW_PROGRESS: super().after_batch()

    def _write_stats(self, log: list):
        if hasattr(self.learn, 'history'): log = self.history.printed_row(log)
        if SHOW_PROGRESS: super()._write_stats(log)
        else: print('  '.join((f'{o:.6f}' if isinstance(o, float) else str(o)).ljust(14) for o in log).rstrip(),
                    flush=True)


class TorchOptimizer(OptimWrapper):
    """A torch optimizer with the manners of a fastai one.

    fastai sees one parameter group per list of the splitter; each is up to two of torch's: what decays, and what does
    not, as `Learner.create_opt` decides (`wd_bn_bias`). A new `wd` reaches the former alone. What is written to
    `hypers` is written through, where fastai's `OptimWrapper` hands out copies.
    """

    def __init__(self, params, opt: Callable, **kwargs):
        super().__init__(params, opt, **kwargs)
        self.groups = [(i, True) for i in range_of(self.opt.param_groups)]  # each torch group's list, and if it decays
        self.lists = [pg['params'] for pg in self.opt.param_groups]

    def spare_undecayed(self):
        """Splits the groups in two by the `do_wd` that fastai has put into `state`."""
        groups, self.groups = [], []
        for i, pg in enumerate(self.opt.param_groups):
            for decays in (True, False):
                params = [p for p in pg['params'] if self.state[p].get('do_wd', True) == decays]
                if not params: continue
                groups.append(pg | dict(params=params) | ({} if decays else dict(weight_decay=0.)))
                self.groups.append((i, decays))
        self.opt.param_groups = groups

    @property
    def param_lists(self) -> list: return self.lists

    @property
    def hypers(self) -> list[dict]:
        shown = {i: pg for (i, _), pg in reversed([*zip(self.groups, self.opt.param_groups, strict=True)])}
        return [WrittenThrough({self.fwd_map.get(k, k): v for k, v in detuplify_pg(shown[i]).items()},
                               partial(self._set_in_list, i)) for i in range_of(self.lists)]

    def _set_hyper(self, k: str, values: list):
        for i, v in enumerate(values): self._set_in_list(i, k, v)

    def _set_in_list(self, i: int, k: str, v: Any):
        for (of_list, decays), pg in zip(self.groups, self.opt.param_groups, strict=True):
            if of_list == i and (decays or k != 'wd'): set_item_pg(pg, self.bwd_map[k], v)

    def state_dict(self) -> dict:
        """As torch's; the tensors are contiguous, also within a fit."""
        state = self.opt.state_dict()
        return state | dict(state=apply(lambda o: o.contiguous() if isinstance(o, Tensor) else o, state['state']))

    def load_state_dict(self, state: dict):
        self.opt.load_state_dict(state)
        match_layout(self)


class WrittenThrough(dict):
    """A dict whose new items are also passed to `write(key, value)`."""

    def __init__(self, items: dict, write: Callable):
        super().__init__(items)
        self.write = write

    def __setitem__(self, k, v):
        super().__setitem__(k, v)
        self.write(k, v)


def fused_adam(params: list, lr: float, mom: float = 0.95, sqr_mom: float = 0.99, eps: float = 1e-5, wd: float = 0.01):
    """fastai's `Adam` as torch's fused AdamW: the same steps, to rounding, in a fraction of the time.

    `mom` is what one-cycle starts from, so that the finder has it, too; fastai's own default is 0.9.
    """
    device = L(params).concat()[0].device if isinstance(params[0], list | L) else params[0].device
    return TorchOptimizer(params, torch.optim.AdamW, lr=lr, betas=(mom, sqr_mom), eps=eps, weight_decay=wd,
                          fused=device.type in ('cpu', 'cuda'), foreach=False)  # None would break TensorBoardCallback


class RobustLearner(Learner):
    """A `Learner` that survives Ctrl-C and errors, and whose `fit` can begin at `first_epoch`.

    After an error fastai skips `after_fit`, so an interrupted finder's weights would stay in the model; and its own
    `start_epoch` fires events for skipped epochs. A callback may end a fit with an `error`, and may predict or validate
    during one. A fit is fast for models of the class `fast_model`, and leaves nothing of what made it so.
    """
    first_epoch, fitting, aside, error = 0, False, 0, None

    def __init__(self, *args, fast_model: type | tuple = (), **kwargs):
        super().__init__(*args, **kwargs)
        self.fast_model, self.lock = fast_model, threading.RLock()
        self.remove_cb(ProgressCallback).add_cb(Progress())
        self.recorder.smooth_loss = SmoothLoss()

    def __setstate__(self, state: dict):
        super().__setstate__(state)
        self.lock = threading.RLock()

    @property
    def device(self) -> torch.device: return getattr(self.dls, 'device', None) or next(self.model.parameters()).device

    @property
    def is_training_fast(self) -> bool: return self.fitting and isinstance(get_model(self.model), self.fast_model)

    def create_opt(self):
        super().create_opt()
        if isinstance(self.opt, TorchOptimizer): self.opt.spare_undecayed()

    def fit(self, *args, **kwargs):
        self.fitting = True
        try:
            with train_fast(self): super().fit(*args, **kwargs)
        except Exception as e:
            if self.error: raise self.error from e  # `e` is what another callback's after_fit made of it
            raise
        else:
            if self.error: raise self.error
        finally: self.error, self.fitting, self.first_epoch = None, False, 0

    def _do_fit(self):
        try:
            if self.opt is not None: match_layout(self.opt)  # a callback may have loaded a state
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

    def _do_one_batch(self):
        if not self.fitting: self.xb = tuple(in_fast_layout(self, x) for x in self.xb)  # its weights are contiguous
        super()._do_one_batch()

    def to_detach(self, b: Any, cpu: bool = True, gather: bool = True) -> Any:
        """As fastai's, but metrics are summed up on the GPU, for which every batch would wait, and a process that was
        not launched gathers from no others, whatever WORLD_SIZE says."""
        if isinstance(b, Tensor) and b.ndim == 0: return b.detach()
        return super().to_detach(b, cpu, gather and RANKS > 1)

    def validation_context(self, cbs=None, inner=False):
        """As fastai's, one thread at a time. Within a fit the training takes no notice of it and goes on as it was."""
        contexts = [self.lock, super().validation_context(cbs, inner or self.fitting)]
        return ContextManagers([self.step_aside(), *contexts] if self.fitting else contexts)

    @contextlib.contextmanager
    def step_aside(self):
        """Context manager for predictions within a fit: keeps the state of loop, recorder, metrics and generators."""
        recorder = getattr(self, 'recorder', Recorder())  # `FetchPredsCallback` takes it away
        modes = {m: m.training for m in self.model.modules()}
        loop = 'dl', 'xb', 'yb', 'pred', 'loss', 'loss_grad', 'iter', 'n_iter', 'training', 'during_batch', '_metrics'
        kept = [(vars(o), {k: vars(o)[k] for k in names if k in vars(o)})
                for o, names in ((self, loop), (recorder, ('loss', 'log')))]
        vars(recorder).update(loss=AvgLoss(), log=L())
        self._metrics, self.aside = deepcopy(self._metrics), self.aside + 1
        try:
            with keep_random_state(self.device): yield
        finally:
            self.aside, self.aside_record = self.aside - 1, recorder.log
            for variables, values in kept: variables.update(values)
            for m, mode in modes.items(): m.training = mode

    def validate(self, *args, **kwargs):
        result = super().validate(*args, **kwargs)
        return self.aside_record if self.fitting else result

    def to_fp16(self, **kwargs) -> Learner:
        """As fastai's, but in place of a precision that is there already: two of them would scale the loss twice."""
        return self.remove_cb(MixedPrecision).add_cb(Precision('fp16', **kwargs))

    def to_bf16(self) -> Learner:
        """As fastai's, but on a CPU, too, and in place of a precision that is there already."""
        return self.remove_cb(MixedPrecision).add_cb(Precision('bf16'))


class MeanOfRanks(Callback):
    """Makes the loss and the training accuracy those of all processes, so that all of them stop at a NaN of one."""
    order = Recorder.order - 2  # before anybody looks at them

    def after_loss(self): self.learn.loss = self.mean(self.loss)

    def after_train(self): self.history.train_accuracy.total = self.mean(self.history.train_accuracy.total)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of every process's `x`, of any shape."""
        x = x.detach().as_subclass(Tensor).clone()
        torch.distributed.all_reduce(x)
        return x / RANKS


@contextlib.contextmanager
def data_parallel(learn: Learner):
    """Context manager that trains `learn` data-parallel; the global batch size is unchanged.

    On GPUs batch norm is synchronised; on CPUs, for which torch has no such batch norm, every process normalises its
    part of a batch by itself, and the statistics kept are rank 0's. Every process tests on all images.
    """
    if RANKS == 1:
        yield
        return
    import fastai.distributed  # noqa: F401, gives `Learner` its distrib_ctx
    os.environ['WORLD_SIZE'] = str(RANKS)  # where fastai looks for it
    try:
        with learn.distrib_ctx(sync_bn=learn.dls.device.type == 'cuda'), learn.added_cbs(MeanOfRanks()):
            # fastai's loader would broadcast the order by way of a GPU; ours follows from the seed, and keeps batches.
            learn.distributed_trainer._wrap_dl = noop
            learn.dls.train.share = slice(RANK, None, RANKS)
            yield
    except RuntimeError as e:
        if lost_a_process(e) and not RANK: let_rank_0_report(silent=False)
        raise
    finally:
        del os.environ['WORLD_SIZE']
        learn.model, learn.dls.train.share = get_model(learn.model), slice(None)
