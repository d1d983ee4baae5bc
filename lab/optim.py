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


def match_layout(opt):
    """Give every gradient and every moment of `opt`, an optimizer of torch, the memory layout of its weight.

    A fused optimizer on a CPU pairs weights and moments by memory, not by index: with another layout on one side it
    would step wrongly, without an error (docs/findings/fused_adamw_mixed_layouts.sh).
    """
    for p in (p for pg in opt.param_groups for p in pg['params'] if p.grad is not None):
        if p.grad.stride() != p.stride(): p.grad = torch.empty_like(p).copy_(p.grad)
    for p, state in opt.state.items():
        for k, v in state.items():
            if isinstance(v, Tensor) and v.shape == p.shape and v.stride() != p.stride():
                state[k] = torch.empty_like(p).copy_(v)


class TorchOptimizer(OptimWrapper):
    """A torch optimizer that behaves like one of fastai's: `partial(TorchOptimizer, opt=torch.optim.SGD, momentum=.9)`.

    fastai sees one group for each list of the splitter; each is two of torch's: what decays, and what does not, as
    `Learner.create_opt` decides (`wd_bn_bias`). fastai's `OptimWrapper` decays all, and what is written to its `hypers`
    is lost (docs/findings/optimwrapper_decays_norms.sh).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for i, pg in enumerate(self.opt.param_groups):
            for k, v in dict(list=i, decays=True).items(): pg.setdefault(k, v)

    def split(self):
        """Split the groups in two by the `do_wd` that fastai has put into `state`."""
        def decays(p): return self.state[p].get('do_wd', True)
        if all(decays(p) == pg['decays'] for pg in self.opt.param_groups for p in pg['params']): return
        groups = []
        for i, params in enumerate(self.param_lists):
            options = first(pg for pg in self.opt.param_groups if pg['list'] == i)
            for which, wd in ((True, {}), (False, dict(weight_decay=0.))):
                if chosen := [p for p in params if decays(p) == which]:
                    groups.append(options | dict(params=chosen, decays=which) | wd)
        self.opt.param_groups = groups

    @property
    def param_lists(self) -> list:
        lists = groupby(self.opt.param_groups, lambda pg: pg['list'])
        return [[p for pg in lists[i] for p in pg['params']] for i in sorted(lists)]

    @property
    def hypers(self) -> list[dict]:
        lists = groupby(self.opt.param_groups, lambda pg: pg['list'])
        return [Hypers(self, i, {self.fwd_map.get(k, k): v for k, v in detuplify_pg(lists[i][0]).items()
                                 if k not in ('list', 'decays')}) for i in sorted(lists)]

    def _set_hyper(self, k: str, values: list):
        self.split()
        for i, v in enumerate(values): self.set_in_list(i, k, v)

    def set_in_list(self, i: int, k: str, v: Any):
        for pg in self.opt.param_groups:
            if pg['list'] == i and (pg['decays'] or k != 'wd'): set_item_pg(pg, self.bwd_map[k], v)

    def step(self, closure: Callable | None = None):
        self.split()
        match_layout(self.opt)
        self.opt.step(closure)

    def state_dict(self) -> dict:
        """As torch's, with contiguous tensors, whatever the layout in training."""
        self.split()
        state = self.opt.state_dict()
        return state | dict(state=apply(lambda o: o.contiguous() if isinstance(o, Tensor) else o, state['state']))

    def load_state_dict(self, state: dict):
        self.split()
        self.opt.load_state_dict(state)


class Hypers(dict):
    """The hyper-parameters of list `i` of a `TorchOptimizer`; new items are also passed on to it."""

    def __init__(self, opt: TorchOptimizer, i: int, items: dict):
        super().__init__(items)
        self.opt, self.i = opt, i

    def __setitem__(self, k, v):
        super().__setitem__(k, v)
        self.opt.set_in_list(self.i, k, v)


class FusedAdam(TorchOptimizer):
    """fastai's `Adam` as torch's fused AdamW: the same steps, to rounding, in a fraction of the time.

    `mom` is what one-cycle starts from, so that the finder has it, too; fastai's own default is 0.9.
    """

    def __init__(self, params, lr: float, mom: float = 0.95, sqr_mom: float = 0.99, eps: float = 1e-5,
                 wd: float = 0.01):
        params = L(params)
        device = (params[0][0] if isinstance(params[0], list | tuple | L) else params[0]).device
        super().__init__(params, torch.optim.AdamW, lr=lr, betas=(mom, sqr_mom), eps=eps, weight_decay=wd,
                         fused=device.type in ('cpu', 'cuda'), foreach=False)  # None would break TensorBoardCallback
