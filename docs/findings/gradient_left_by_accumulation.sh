#!/usr/bin/env bash
# Guess: `GradientAccumulation(n_acc)` leaves nothing behind. Each fit starts with empty gradients, and the images at
#   the end that do not fill a whole step are either used or forgotten.
# What happens: their gradient stays in the weights' `.grad`, and the next `fit` of the same learner adds its own to it:
#   its first step goes too far, half as far again here, with gradients of weights that are gone. In the first fit they
#   were not used at all, though the loss it shows includes them.
# Why: GradientAccumulation.before_step in fastai/callback/training.py skips `zero_grad` together with the step; its
#   before_fit sets the count of images back, but not the gradients.
# Seen (fastai 2.8.12, torch 2.14.1, Python 3.11, 2026-11), batches of 8 with n_acc=16:
#   left after three batches: -0.50
#   first step of the next fit 0.15, of a new learner 0.10
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet fastai==2.8.12 fastcore==2.2.39 fasttransform==0.0.5 plum-dispatch==2.9.0 \
    torch==2.14.1 torchvision==0.29.1 numpy==2.4.6
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
import warnings

import fastai
from fastai.basics import *
from fastai.callback.training import GradientAccumulation

warnings.filterwarnings('ignore')
defaults.callbacks = [o for o in defaults.callbacks if o.__name__ != 'ProgressCallback']  # no bars
print('fastai', fastai.__version__, 'torch', torch.__version__)


class FirstStep(Callback):
    "Notes how far the first step of a fit moved the weight."
    def before_fit(self): self.start, self.moved = self.model.weight.item(), None
    def after_step(self):
        if self.moved is None: self.moved = self.model.weight.item() - self.start


def learner(images):
    "The gradient of every batch is -1, so that a step of 16 images moves the weight by the learning rate, 0.1."
    data = [(torch.ones(1), torch.ones(1))] * images
    return Learner(DataLoaders.from_dsets(data, data, bs=8, device='cpu'), nn.Linear(1, 1, bias=False), lr=0.1,
                   loss_func=lambda pred, _: -pred.mean(), opt_func=SGD, cbs=[GradientAccumulation(16), FirstStep()])


learn, new, moved = learner(24), learner(24), {}
with learn.no_logging(): learn.fit(1)
left = learn.model.weight.grad.item()
for name, o in dict(next=learn, new=new).items():
    with o.no_logging(): o.fit(1)
    moved[name] = o.first_step.moved
print(f'left after three batches: {left:.2f}')
print(f'first step of the next fit {moved["next"]:.2f}, of a new learner {moved["new"]:.2f}')
assert abs(moved['new'] - 0.1) < 1e-5, 'changed: a first step'
assert left == -0.5 and abs(moved['next'] - 0.15) < 1e-5, 'changed: no gradient is left behind now'
EOF
