"""Where a network looked: Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391)."""
import torch
from fastai.callback.hook import Hooks
from torch import Tensor, nn


def grad_cam(model: nn.Module, images: Tensor, targets: Tensor, bs: int = 64) -> Tensor | None:
    """Maps of what spoke for the classes `targets`, (N, k) int64, in normalised `images`, (N, C, H, W) float.

    They are (N, k, h, w) float32 on the CPU, from 0, where nothing spoke for the class, to 1, the largest value of an
    image's k maps, which so can be compared. They come from the last module whose output has more than one place
    (`layer3` of `ResNet`, 4 × 4); the scores are the output of the last `Linear` after it. A network without the two
    gives None. Weights and gradients stay as they are; `model` is in evaluation mode afterwards.
    """
    kept, cams = [], []

    def keep(module, inputs, output):  # the maps and, after them, the scores
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1: kept[:] = [output]
        elif kept and isinstance(module, nn.Linear): kept[1:] = [output]

    with torch.enable_grad(), Hooks([*model.eval().modules()], keep, detach=False):
        for x, classes in zip(images.split(bs), targets.split(bs), strict=True):
            model(x.detach().requires_grad_())  # which gives frozen networks gradients, too
            if len(kept) < 2: return None
            # The scores are logits, as in the paper. The network ends in log-probabilities, whose gradient is the
            # logit's less the mean over all classes, weighted by probability: almost nothing where it is sure.
            maps, scores = kept
            grads = [torch.autograd.grad(s, maps, retain_graph=True)[0] for s in scores.gather(1, classes).sum(0)]
            weights = torch.stack(grads, 1).mean((3, 4), keepdim=True)
            cams.append((weights * maps[:, None]).sum(2).relu().detach().float().cpu())
    cams = torch.cat(cams)
    return cams / cams.amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
