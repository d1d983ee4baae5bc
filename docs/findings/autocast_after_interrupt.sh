#!/usr/bin/env bash
# Guess: when Ctrl-C ends a mixed-precision fit in a notebook, the next cell starts from a clean slate.
# What happens: if the interrupt (or any error) comes in the forward pass or the loss, autocast stays entered for the
#   rest of the process. On a GPU it stays switched on. On any machine its cache of cast weights is never emptied again:
#   every later `with torch.autocast(...)`, of whatever code, computes with the weights it saw first, however they are
#   trained. Shown here on a CPU with `to_fp16`, which is switched off there but enters autocast all the same.
# Why: MixedPrecision in fastai/callback/fp16.py calls `__enter__` in `before_batch` and `__exit__` in `after_loss`,
#   which an exception skips. torch empties the cache only when its count of entered blocks comes back to zero
#   (torch/amp/autocast_mode.py).
# Seen (fastai 2.8.12, torch 2.14.1, Python 3.11, 2026-11), outputs of a layer before and after its weights are zeroed:
#   before the fit: 8.0 0.0
#   after an interrupted fit: 8.0 8.0
#   after counting back by hand: 8.0 0.0
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
from fastai.callback.fp16 import *

warnings.filterwarnings('ignore')
defaults.callbacks = [o for o in defaults.callbacks if o.__name__ != 'ProgressCallback']  # no bars
print('fastai', fastai.__version__, 'torch', torch.__version__)


class Interrupted(nn.Linear):
    def forward(self, x): raise KeyboardInterrupt


def outputs():
    "Of a new layer, in a block of its own each: with weights of one, and after setting them to zero."
    layer, found = nn.Linear(8, 1, bias=False), []
    for value in (1., 0.):
        nn.init.constant_(layer.weight, value)
        with torch.autocast('cpu', dtype=torch.bfloat16): found.append(layer(torch.ones(1, 8)).item())
    return found


data = [(torch.ones(4), torch.ones(1))] * 8
learn = Learner(DataLoaders.from_dsets(data, data, bs=8, device='cpu'), Interrupted(4, 1), loss_func=MSELossFlat())
before = outputs()
try: learn.to_fp16().fit(1)
except KeyboardInterrupt: pass
after = outputs()
torch.autocast_decrement_nesting()
torch.clear_autocast_cache()
mended = outputs()
print('before the fit:', *before)
print('after an interrupted fit:', *after)
print('after counting back by hand:', *mended)
assert before == mended == [8, 0], 'changed: autocast itself'
assert after == [8, 8], 'changed: an interrupted fit leaves autocast now'
EOF
