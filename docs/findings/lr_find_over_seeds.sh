#!/usr/bin/env bash
# Guess: `learn.lr_find()` measures a property of network, data and batch size. Another seed moves its suggestion by a
#   factor of two or so; the name of the method (valley, slide, ...) matters more.
# What happens: from seed to seed the default suggestion, valley, varies by a factor of twenty with batches of 8, and
#   still by one of nine with batches of 64. With batches of 8, `steep` and `slide` vary by hundreds and thousands. One
#   run of the finder says little, and two models' suggestions cannot be compared.
# Why: the functions in fastai/callback/schedule.py read single points of one noisy curve of 100 batches: valley the
#   longest increasing stretch of a smoothed loss, slide a threshold on differences of neighbouring losses.
# Seen (fastai 2.8.12, torch 2.14.1, scikit-learn 1.9.1, Python 3.11, 2026-11), 12 seeds, largest over smallest:
#   batches of 8: valley 23, minimum 11, steep 251, slide 4786
#   batches of 64: valley 9, minimum 11, steep 3, slide 1
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet fastai==2.8.12 fastcore==2.2.39 fasttransform==0.0.5 plum-dispatch==2.9.0 \
    torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 scikit-learn==1.9.1
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
import warnings

import fastai
from fastai.basics import *
from fastai.callback.schedule import *
from sklearn.datasets import load_digits

warnings.filterwarnings('ignore')
defaults.callbacks = [o for o in defaults.callbacks if o.__name__ != 'ProgressCallback']  # no bars
torch.set_num_threads(1)
print('fastai', fastai.__version__, 'torch', torch.__version__)
images, digits = load_digits(return_X_y=True)
data = list(zip(tensor(images).float().view(-1, 1, 8, 8) / 16, tensor(digits)))
functions = valley, minimum, steep, slide


def suggestions(seed, bs):
    set_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1),
                        nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    dls = DataLoaders.from_dsets(data, data, bs=bs, device='cpu')
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), path=Path('finder'))
    with learn.no_logging(): return tuple(learn.lr_find(suggest_funcs=functions, show_plot=False))


spread = {}
for bs in (8, 64):
    found = np.array([suggestions(seed, bs) for seed in range(12)])
    spread[bs] = dict(zip((f.__name__ for f in functions), found.max(0) / found.min(0)))
    print(f'batches of {bs}:', ', '.join(f'{name} {ratio:.0f}' for name, ratio in spread[bs].items()))
assert spread[8]['valley'] > 4 and spread[64]['valley'] > 3, 'changed: valley varies less from seed to seed'
assert spread[8]['slide'] > 100, 'changed: slide varies less from seed to seed'
EOF
