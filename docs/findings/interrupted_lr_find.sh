#!/usr/bin/env bash
# Guess: `learn.lr_find()` puts weights and optimizer back when it is done, and so it does when Ctrl-C
#   ends it early because the curve has already turned up.
# What happens: after an interrupt the model keeps the finder's weights, trained at ever higher rates, and the optimizer
#   the last rate and its moments. The next `fit` trains on from there, without a word. An exception of a callback or of
#   a data loader does the same. The copy that the finder saved goes with it.
# Why: LRFinder in fastai/callback/schedule.py restores in `after_fit`, which Learner._with_events (fastai/learner.py)
#   calls after fastai's own Cancel exceptions only, not in a `finally`.
# Seen (fastai 2.8.12, torch 2.14.1, Python 3.11, 2026-11):
#   completed: weights as before True, rate 0.001
#   interrupted: weights as before False, rate 2.754
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
x = torch.randn(800, 4, generator=torch.Generator().manual_seed(0))
data = list(zip(x, x.sum(1, keepdim=True)))


class Interrupt(Callback):
    def after_batch(self):
        if self.train_iter == 94: raise KeyboardInterrupt


state = {}
for how, cbs in dict(completed=[], interrupted=[Interrupt()]).items():
    set_seed(0)
    dls = DataLoaders.from_dsets(data, data, bs=8, device='cpu')
    learn = Learner(dls, nn.Linear(4, 1), loss_func=MSELossFlat(), path=Path(how), cbs=cbs, opt_func=Adam)
    learn.create_opt()
    before = learn.model.weight.detach().clone()
    try:
        with learn.no_logging(): learn.lr_find(stop_div=False, show_plot=False)
    except KeyboardInterrupt: pass
    state[how] = torch.equal(before, learn.model.weight), learn.opt.hypers[0]['lr']
    print(f'{how}: weights as before {state[how][0]}, rate {state[how][1]:.4g}')
assert state['completed'] == (True, 0.001), 'changed: what a completed finder leaves'
same, rate = state['interrupted']
assert not same and rate > 1, 'changed: an interrupted finder cleans up now'
EOF
