#!/usr/bin/env bash
# Guess: fastai's `div_final` is torch's `final_div_factor` under another name. Recipes for "one cycle without
#   annihilation" that say `final_div_factor=1` (the rate ends where it began) become `div_final=1`.
# What happens: in torch the factor divides the initial rate, in fastai the peak. With `div_final=1` fastai climbs to
#   the peak and holds it to the end: the rate never falls. `div_final=div` is the translation.
# Why: fit_one_cycle in fastai/callback/schedule.py ends its cosine at lr_max/div_final; OneCycleLR in
#   torch/optim/lr_scheduler.py ends at initial_lr/final_div_factor, where initial_lr is max_lr/div_factor.
# Seen (fastai 2.8.12, torch 2.14.1, Python 3.11, 2026-11), rates of the first, the highest and the last step:
#   torch  final_div_factor=1: 0.0010 0.0100 0.0010
#   fastai div_final=1: 0.0010 0.0100 0.0100
#   fastai div_final=10: 0.0010 0.0100 0.0010
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
from fastai.callback.schedule import *

warnings.filterwarnings('ignore')
defaults.callbacks = [o for o in defaults.callbacks if o.__name__ != 'ProgressCallback']  # no bars
print('fastai', fastai.__version__, 'torch', torch.__version__)
data = [(torch.randn(1), torch.randn(1))] * 100


def of_fastai(div_final):
    learn = Learner(DataLoaders.from_dsets(data, data, bs=1, device='cpu'), nn.Linear(1, 1), loss_func=MSELossFlat())
    with learn.no_logging(): learn.fit_one_cycle(1, 0.01, div=10, div_final=div_final)
    return learn.recorder.lrs


def of_torch(final_div_factor):
    optimizer, lrs = torch.optim.SGD(nn.Linear(1, 1).parameters()), []
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, 100, div_factor=10, final_div_factor=final_div_factor)
    for _ in range(100):
        lrs.append(cycle.get_last_lr()[0])
        optimizer.step()
        cycle.step()
    return lrs


found = {}
for name, lrs in {'torch  final_div_factor=1': of_torch(1), 'fastai div_final=1': of_fastai(1),
                  'fastai div_final=10': of_fastai(10)}.items():
    found[name] = [round(o, 4) for o in (lrs[0], max(lrs), lrs[-1])]
    print(f'{name}:', *(f'{o:.4f}' for o in found[name]))
assert list(found.values()) == [[0.001, 0.01, 0.001], [0.001, 0.01, 0.01], [0.001, 0.01, 0.001]], 'changed'
EOF
