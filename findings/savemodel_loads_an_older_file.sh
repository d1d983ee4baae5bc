#!/usr/bin/env bash
# Guess: SaveModelCallback keeps the best model of this fit and loads it at the end. If no epoch was better than
#   infinity (every validation loss was NaN), nothing is saved and the model stays as it was trained.
# What happens: at the end it loads `models/model.pth`, whoever wrote it. If nothing was saved in this fit, that is the
#   model of an earlier run in the same folder: the learner silently ends with the weights of another training.
#   (Without an earlier file the fit ends in FileNotFoundError.)
# Why: SaveModelCallback.after_fit in fastai/callback/tracker.py loads the name it was given and does not ask whether
#   it has saved anything itself.
# Seen (fastai 2.8.12, torch 2.14.1, Python 3.11, 2026-11):
#   validation losses of the second run: nan nan
#   the second learner ends with the weights of the first run: True
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet fastai==2.8.12 fastcore==2.2.39 fasttransform==0.0.5 \
    torch==2.14.1 torchvision==0.29.1 numpy==2.4.6
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
import warnings

import fastai
from fastai.basics import *
from fastai.callback.tracker import SaveModelCallback

warnings.filterwarnings('ignore')
defaults.callbacks = [o for o in defaults.callbacks if o.__name__ != 'ProgressCallback']  # no bars
print('fastai', fastai.__version__, 'torch', torch.__version__)
x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
training = list(zip(x, x.sum(1, keepdim=True)))
unknown = list(zip(x, x.sum(1, keepdim=True) * float('nan')))


def fitted(validation, epochs):
    dls = DataLoaders.from_dsets(training, validation, bs=8, device='cpu')
    learn = Learner(dls, nn.Linear(4, 1), loss_func=MSELossFlat(), path=Path('run'))
    with learn.no_logging(): learn.fit(epochs, 0.01, cbs=SaveModelCallback())
    return learn


first = fitted(training, 1)
second = fitted(unknown, 2)
print('validation losses of the second run:', *(f'{row[1]}' for row in second.recorder.values))
same = torch.equal(first.model.weight, second.model.weight)
print('the second learner ends with the weights of the first run:', same)
assert all(math.isnan(row[1]) for row in second.recorder.values), 'changed: the second validation is finite'
assert same, 'changed: an older file is no longer loaded'
EOF
