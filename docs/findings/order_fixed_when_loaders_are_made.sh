#!/usr/bin/env bash
# Guess: `set_seed(42)` right before `learn.fit` makes the run repeatable, or at least the order of its images, as it
#   does with torch's own DataLoader. Two runs in a notebook that seed before each fit then see the same batches.
# What happens: the order is another one each time. It follows from the moment in which the loader was made: a fastai
#   DataLoader gets a generator of its own then, seeded from Python's `random`, and hands it on from epoch to epoch.
#   The seed has to be set before the DataLoaders are made, and running a cell with `fit` again continues the sequence.
# Why: DataLoader.__init__ and `randomize` in fastai/data/load.py keep `self.rng`, a random.Random; `set_seed` does not
#   know of it. torch's loaders draw a fresh seed from the global generator at every pass.
# Seen (fastai 2.8.12, torch 2.14.1, Python 3.11, 2026-11):
#   seeded before each pass, one order: fastai False, torch True
#   seeded before the loaders are made: fastai True
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


def order(loader): return torch.cat([batch for batch in loader]).tolist()


def seeded_order(loader):
    set_seed(42)
    return order(loader)


data = [torch.tensor([i]) for i in range(32)]
fastais, torchs = DataLoader(data, bs=8, shuffle=True), torch.utils.data.DataLoader(data, 8, shuffle=True)
late = [seeded_order(loader) == seeded_order(loader) for loader in (fastais, torchs)]
print(f'seeded before each pass, one order: fastai {late[0]}, torch {late[1]}')
early = []
for _ in range(2):
    set_seed(42)
    early.append(order(DataLoader(data, bs=8, shuffle=True)))
print(f'seeded before the loaders are made: fastai {early[0] == early[1]}')
assert late == [False, True], 'changed: seeding before a pass'
assert early[0] == early[1], 'changed: seeding before making the loaders no longer helps'
EOF
