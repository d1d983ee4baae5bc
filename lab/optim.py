"""The training loss, and torch's optimizers as fastai's."""
from fastai.vision.all import *


class CrossEntropy(CrossEntropyLossFlat):
    """Cross-entropy with smoothed labels (arXiv:1512.00567) in training, and plain without gradients: in every test."""

    def __call__(self, *args, **kwargs) -> Tensor:
        # `label_smoothing` is fastai's copy of what torch's loss, `func`, was made with
        self.func.label_smoothing = self.label_smoothing if torch.is_grad_enabled() else 0.
        return super().__call__(*args, **kwargs)


def match_layout(opt: OptimWrapper):
    """Give every gradient and every moment of `opt` the memory layout of its weight.

    A fused optimizer on a CPU pairs weights and moments by memory, not by index: with another layout on one side it
    would step wrongly, without an error (docs/findings/fused_adamw_mixed_layouts.sh).
    """
    if not isinstance(opt, OptimWrapper): return  # fastai's own pair by name
    for p in L(opt.param_lists).concat():
        for v in (p.grad, *opt.opt.state.get(p, {}).values()):
            if isinstance(v, Tensor) and v.shape == p.shape and v.stride() != p.stride():
                v.data = torch.empty_like(p).copy_(v)


class TorchOptimizer(OptimWrapper):
    """A torch optimizer that behaves like one of fastai's: `partial(TorchOptimizer, opt=torch.optim.SGD, momentum=.9)`.

    Each list of the splitter is one group to fastai and two to torch: what has several dimensions decays, biases and
    batch norm do not (fastai's `OptimWrapper` decays all: docs/findings/optimwrapper_decays_norms.sh). `hypers` are to
    be read: writing to them raises a `TypeError`, where `OptimWrapper` would lose it. `set_hyper` sets them.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.opt.param_groups = [pg | dict(params=[p for p in pg['params'] if (p.ndim > 1) == decays]) | wd
                                 for pg in self.opt.param_groups
                                 for decays, wd in ((True, {}), (False, dict(weight_decay=0.)))]

    @property
    def param_lists(self) -> list: return [a['params'] + b['params'] for a, b in chunked(self.opt.param_groups, 2)]
    @property
    def hypers(self) -> list: return [types.MappingProxyType(h) for h in super().hypers[::2]]
    def _set_hyper(self, k, values): super()._set_hyper(k, [o for v in values for o in (v, 0. if k == 'wd' else v)])

    def step(self, closure: Callable | None = None):
        match_layout(self)
        self.opt.step(closure)


class FusedAdam(TorchOptimizer):
    """fastai's `Adam` as torch's fused AdamW: the same steps, to rounding, in a fraction of the time.

    `mom` is what one-cycle starts from, so that the finder has it, too; fastai's own default is 0.9.
    """

    def __init__(self, params, lr: float, mom: float = .95, sqr_mom: float = .99, eps: float = 1e-5, wd: float = .01):
        super().__init__(params, torch.optim.AdamW, lr=lr, betas=(mom, sqr_mom), eps=eps, weight_decay=wd,
                         fused=True, foreach=False)  # None would break TensorBoardCallback
