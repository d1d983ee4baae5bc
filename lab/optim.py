"""The training loss, and torch's optimizers as fastai's."""
from typing import Any

from fastai.vision.all import *


class CrossEntropy(CrossEntropyLossFlat):
    """Cross-entropy with smoothed labels (arXiv:1512.00567) in training, and plain without gradients: in every test."""

    def __init__(self, *args, label_smoothing: float = 0., **kwargs):
        super().__init__(*args, **kwargs)
        self.label_smoothing = label_smoothing

    def __call__(self, inp: Tensor, targ: Tensor, **kwargs) -> Tensor:
        self.func.label_smoothing = self.label_smoothing if torch.is_grad_enabled() else 0.
        return super().__call__(inp, targ, **kwargs)


def match_layout(opt: torch.optim.Optimizer):
    """Give every gradient and every moment of `opt` the memory layout of its weight.

    A fused optimizer on a CPU pairs weights and moments by memory, not by index: with another layout on one side it
    would step wrongly, without an error (docs/findings/fused_adamw_mixed_layouts.sh).
    """
    for p in (p for pg in opt.param_groups for p in pg['params']):
        if p.grad is not None and p.grad.stride() != p.stride(): p.grad = torch.empty_like(p).copy_(p.grad)
        for k, v in opt.state.get(p, {}).items():
            if isinstance(v, Tensor) and v.shape == p.shape and v.stride() != p.stride():
                opt.state[p][k] = torch.empty_like(p).copy_(v)


class TorchOptimizer(OptimWrapper):
    """A torch optimizer that behaves like one of fastai's: `partial(TorchOptimizer, opt=torch.optim.SGD, momentum=.9)`.

    fastai sees one group for each list of the splitter; each is two of torch's: what decays, and what does not, as
    `Learner.create_opt` decides (`wd_bn_bias`). fastai's `OptimWrapper` decays all, and what is written to its `hypers`
    is lost (docs/findings/optimwrapper_decays_norms.sh).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for i, pg in enumerate(self.opt.param_groups): pg.update(dict(list=i, decays=True) | pg)

    def split(self) -> dict[int, list]:
        """The torch groups of each list, what decays first, after splitting them by fastai's `do_wd` in `state`."""
        def decays(p): return self.state[p].get('do_wd', True)
        if any(decays(p) != pg['decays'] for pg in self.opt.param_groups for p in pg['params']):
            parts = [pg | dict(params=[p for p in pg['params'] if decays(p) == which], decays=which) | wd
                     for pg in self.opt.param_groups for which, wd in ((True, {}), (False, dict(weight_decay=0.)))]
            self.opt.param_groups = [pg for pg in parts if pg['params']]
        return groupby(self.opt.param_groups, itemgetter('list'))

    @property
    def param_lists(self) -> list: return [[p for pg in pgs for p in pg['params']] for pgs in self.split().values()]

    @property
    def hypers(self) -> list[dict]:
        return [Hypers({self.fwd_map[k]: v for k, v in detuplify_pg(groups[0]).items() if k in self.fwd_map},
                       partial(self.set_in, groups)) for groups in self.split().values()]

    def set_in(self, groups: list[dict], k: str, v: Any):
        for pg in groups:
            if pg['decays'] or k != 'wd': set_item_pg(pg, self.bwd_map[k], v)

    def _set_hyper(self, k: str, values: list):
        for groups, v in zip(self.split().values(), values, strict=True): self.set_in(groups, k, v)

    def step(self, closure: Callable | None = None):
        self.split()
        match_layout(self.opt)
        self.opt.step(closure)

    def state_dict(self) -> dict:
        """As torch's, with contiguous tensors, whatever the layout in training."""
        self.split()
        return apply(lambda o: o.contiguous() if isinstance(o, Tensor) else o, self.opt.state_dict())

    def load_state_dict(self, state: dict):
        self.split()
        self.opt.load_state_dict(state)


class Hypers(dict):
    """Hyper-parameters that pass on what is written to them by `write(key, value)`."""

    def __init__(self, items: dict, write: Callable):
        super().__init__(items)
        self.write = write

    def __setitem__(self, k, v): super().__setitem__(k, v); self.write(k, v)  # noqa: E702


class FusedAdam(TorchOptimizer):
    """fastai's `Adam` as torch's fused AdamW: the same steps, to rounding, in a fraction of the time.

    `mom` is what one-cycle starts from, so that the finder has it, too; fastai's own default is 0.9.
    """

    def __init__(self, params, lr: float, mom: float = .95, sqr_mom: float = .99, eps: float = 1e-5, wd: float = .01):
        params = L(params)  # a splitter may return a generator
        device = (params[0][0] if isinstance(params[0], list | tuple | L) else params[0]).device
        super().__init__(params, torch.optim.AdamW, lr=lr, betas=(mom, sqr_mom), eps=eps, weight_decay=wd,
                         fused=device.type in ('cpu', 'cuda'), foreach=False)  # None would break TensorBoardCallback
