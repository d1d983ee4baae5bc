"""The peak learning rate that `lr_find` suggests here, and its median over several finders."""
import contextlib
import tempfile

from fastai.vision.all import *

from lab.errors import InputError, RunError, one_line
from lab.learner import replaced
from lab.speed import keep_random_state

# Measured in experiments/README.md: on held-out images a quarter of this share was 0.4 to 0.5 points worse and half of
# it made no difference. The middle of the basin spreads half as much as the rate of least loss.
PEAK_SHARE = 0.4  # of the middle of the basin
CLOSE = 0.1  # a loss is close to the least within this share of the whole descent
# With batches of 8 single finders differed by factors of 10 to 19, their median of seven by 2.8; with 32 by 4.1.
SMALL_BATCH, FINDERS = 32, 7
MIN_BATCHES = 25  # an epoch of fewer batches trains so little that seven finders would take longer than the run


def basin(lrs: Tensor, losses: Tensor, num_it: int) -> tuple[float, tuple[float, float]]:
    """A suggestion for `lr_find`: `PEAK_SHARE` of the middle, on the log scale, of the rates with a loss close to the
    least."""
    low = losses.min()
    middle = lrs[losses <= low + CLOSE * (losses[0] - low)].log().mean().exp()
    return PEAK_SHARE * middle.item(), (middle.item(), losses[(lrs - middle).abs().argmin()])


@contextlib.contextmanager
def reinitialised(learn: Learner, seed: int):
    """Context manager that gives the network the initial weights of `seed`, and the loader its batches."""
    weights = {k: v.clone() for k, v in learn.model.state_dict().items()}
    try:
        with keep_random_state(learn.device), replaced(learn.seed_epochs, 'seed', seed):
            set_seed(seed)
            learn.model.apply(lambda module: getattr(module, 'reset_parameters', noop)())
            yield
    finally: learn.model.load_state_dict(weights)


def median_lrs(learn: Learner, find: Callable) -> tuple[float, float]:
    """(LRMIN, LRMAX) of the `find()` with the median LRMAX of several, which run `learn.lr_find`; it stays recorded.

    One finder is enough unless batches are smaller than `SMALL_BATCH`; then all but the first start from other initial
    weights and see other batches. LRMIN is at most a tenth of LRMAX. Raises `RunError` if none has a usable answer.
    """
    found, seed, bs = [], learn.seed_epochs.seed, getattr(learn.dls, 'bs', None)  # torch's own loaders have none
    several = bs and bs < SMALL_BATCH and len(learn.dls.train) >= MIN_BATCHES
    for i in range(FINDERS if several else 1):
        other = reinitialised(learn, (seed + 1000 * i) % 2**32) if i else contextlib.nullcontext()
        try:
            with tempfile.TemporaryDirectory() as tmp, replaced(learn, 'model_dir', tmp), other:
                lr_min, lr_max = find()
            if not (0 < lr_min < float('inf') and 0 < lr_max < float('inf')): raise ValueError('no usable rates')
            found.append((lr_max, lr_min, learn.recorder.lrs, learn.recorder.losses))
        except InputError: raise
        except (IndexError, ValueError) as e:  # too few finite losses
            finite = [bool(torch.isfinite(o)) for o in learn.recorder.losses]
            trouble = one_line(e) if all(finite) else f'the loss was not finite from batch {finite.index(False) + 1} on'
    if not found: raise RunError(f'the LR finder failed ({trouble}); set --lr-min and --lr-max')
    lr_max, lr_min, lrs, learn.recorder.losses = sorted(found)[len(found) // 2]
    learn.recorder.lrs = lrs
    return min(lr_min, lr_max / 10), lr_max


def plot_lrs(recorder: Recorder, lr_min: float, lr_max: float):
    """Draws the last finder's curve with the two rates marked on it."""
    marks = [(lr, np.interp(lr, recorder.lrs, recorder.losses)) for lr in (lr_min, lr_max)]
    recorder.plot_lr_find(suggestions=marks, nms=('LRMIN', 'LRMAX'))
