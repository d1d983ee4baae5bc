"""The training loss, and torch's optimizers as fastai's."""
from fastai.vision.all import *


class CrossEntropy(CrossEntropyLossFlat):
    """Cross-entropy with smoothed labels (arXiv:1512.00567) in training, and plain without gradients: in every test."""

    def __init__(self, *args, label_smoothing: float = 0., **kwargs):
        super().__init__(*args, **kwargs)
        self.label_smoothing = label_smoothing

    def __call__(self, inp: Tensor, targ: Tensor, **kwargs) -> Tensor:
        self.func.label_smoothing = self.label_smoothing if torch.is_grad_enabled() else 0.
        return super().__call__(inp, targ, **kwargs)


def match_layout(opt: OptimWrapper):
    """Give every gradient and every moment of `opt` the memory layout of its weight.

    A fused optimizer on a CPU pairs weights and moments by memory, not by index: with another layout on one side it
    would step wrongly, without an error (docs/findings/fused_adamw_mixed_layouts.sh).
    """
    if not isinstance(opt, OptimWrapper): return  # fastai's own pair by name
    for p in (p for params in opt.param_lists for p in params):
        if p.grad is not None and p.grad.stride() != p.stride(): p.grad = torch.empty_like(p).copy_(p.grad)
        state = opt.opt.state.get(p, {})
        state.update({k: torch.empty_like(p).copy_(v) for k, v in state.items()
                      if isinstance(v, Tensor) and v.shape == p.shape and v.stride() != p.stride()})


class Hypers(dict):
    """A list's hyper-parameters; what is written to them reaches torch's `groups`, where it has `names`."""

    def __init__(self, hypers: dict, groups: list[dict], names: dict):
        super().__init__(hypers)
        self.groups, self.names = groups, names

    def __setitem__(self, k, v):
        super().__setitem__(k, v)
        for pg in self.groups[:1] if k == 'wd' else self.groups: set_item_pg(pg, self.names[k], v)


class TorchOptimizer(OptimWrapper):
    """A torch optimizer that behaves like one of fastai's: `partial(TorchOptimizer, opt=torch.optim.SGD, momentum=.9)`.

    Each list of the splitter is one group to fastai and two to torch: what has several dimensions decays, biases and
    batch norm do not. fastai's `OptimWrapper` decays all, and what is written to its `hypers` is lost
    (docs/findings/optimwrapper_decays_norms.sh).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.opt.param_groups = [pg | dict(params=[p for p in pg['params'] if (p.ndim > 1) == decays]) | wd
                                 for pg in self.opt.param_groups
                                 for decays, wd in ((True, {}), (False, dict(weight_decay=0.)))]

    @property
    def param_lists(self) -> list: return [a['params'] + b['params'] for a, b in chunked(self.opt.param_groups, 2)]

    @property
    def hypers(self) -> list[Hypers]:
        return [Hypers(h, groups, self.bwd_map)
                for h, groups in zip(super().hypers[::2], chunked(self.opt.param_groups, 2), strict=True)]

    def _set_hyper(self, k: str, values: list):
        for h, v in zip(self.hypers, values, strict=True): h[k] = v

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
