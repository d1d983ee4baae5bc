#!/usr/bin/env bash
# Guess: after `learn.fit(...)` the recorder holds the losses, learning rates and rows of that training until the next
#   one. Looking at a prediction or at the validation loss in between changes nothing.
# What happens: `validate`, `get_preds`, `predict`, `show_results` and whatever builds on them (interpretation, TTA,
#   `summary`) empty `recorder.losses` and `recorder.lrs` and leave one row of validation values in `recorder.values`.
#   The history of an hour's training is gone; a plot of the loss afterwards is empty.
# Why: validation_context in fastai/learner.py enters the learner itself, which fires `before_fit`, and
#   Recorder.before_fit starts new lists.
# Seen (fastai 2.8.12, torch 2.14.1, Python 3.11, 2026-11), (losses, rates, rows) after training two epochs:
#   after fit: (8, 8, 2)
#   after validate: (0, 0, 1)
#   after get_preds: (0, 0, 1)
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

warnings.filterwarnings('ignore')
print('fastai', fastai.__version__, 'torch', torch.__version__)
x = torch.randn(32, 4)
data = list(zip(x, x.sum(1, keepdim=True)))
learn = Learner(DataLoaders.from_dsets(data, data, bs=8, device='cpu'), nn.Linear(4, 1), loss_func=MSELossFlat())
left = {}
for look in ('fit', 'validate', 'get_preds'):
    with learn.no_logging(): learn.fit(2)
    if look != 'fit': getattr(learn, look)()
    left[look] = tuple(len(o) for o in (learn.recorder.losses, learn.recorder.lrs, learn.recorder.values))
    print(f'after {look}: {left[look]}')
assert left['fit'] == (8, 8, 2), 'changed: what a fit records'
assert left['validate'] == left['get_preds'] == (0, 0, 1), 'changed: the record of the training survives a look'
EOF
