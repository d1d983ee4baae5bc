#!/usr/bin/env bash
# Guess: `learn.fit(4, start_epoch=2, cbs=SaveModelCallback(every_epoch=True))` goes on with the third epoch, writes
#   `model_2` and `model_3` and leaves the files of the first two epochs alone.
# What happens: the skipped epochs fire `after_epoch`, too. The callback writes the weights that were just loaded over
#   `model_0`, so that the earlier checkpoint is lost, and writes `model_1` once more. The recorder gets a row without
#   values for every skipped epoch, and a callback that watches the best value dies of it with IndexError.
# Why: SkipToEpoch in fastai/learner.py cancels in `before_epoch`, and Learner._with_events calls `after_epoch` after a
#   cancelled epoch as after any other.
# Seen (fastai 2.8.12, torch 2.14.1, Python 3.11, 2026-11):
#   weight in the checkpoint of the first epoch: 0.1, after resuming: 0.2
#   rows of the recorder: [0, 0, 2, 2] values; watching the best value: IndexError
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
from fastai.callback.tracker import SaveModelCallback

warnings.filterwarnings('ignore')
defaults.callbacks = [o for o in defaults.callbacks if o.__name__ != 'ProgressCallback']  # no bars
print('fastai', fastai.__version__, 'torch', torch.__version__)


def learner():
    "Its weight starts at zero and grows by the learning rate, 0.1, in each epoch's only step."
    data = [(torch.ones(1), torch.ones(1))] * 4
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    dls = DataLoaders.from_dsets(data, data, bs=4, device='cpu')
    return Learner(dls, net, loss_func=lambda pred, _: -pred.mean(), opt_func=SGD, lr=0.1, path=Path('run'))


def saved(epoch): return round(torch.load(f'run/models/model_{epoch}.pth')['weight'].item(), 3)


learn = learner()
with learn.no_logging(): learn.fit(2, cbs=SaveModelCallback(every_epoch=True))
before = saved(0), saved(1)
resumed = learner()
resumed.load('model_1')
with resumed.no_logging(): resumed.fit(4, start_epoch=2, cbs=SaveModelCallback(every_epoch=True))
rows = [len(row) for row in resumed.recorder.values]
try:
    with resumed.no_logging(): resumed.fit(4, start_epoch=2, cbs=SaveModelCallback())
    watching = 'nothing'
except IndexError as e: watching = type(e).__name__
print(f'weight in the checkpoint of the first epoch: {before[0]}, after resuming: {saved(0)}')
print(f'rows of the recorder: {rows} values; watching the best value: {watching}')
assert before == (0.1, 0.2) and saved(3) == 0.4, 'changed: training itself'
assert saved(0) == 0.2, 'changed: the earlier checkpoint is left alone now'
assert rows == [0, 0, 2, 2] and watching == 'IndexError', 'changed: skipped epochs are recorded otherwise'
EOF
