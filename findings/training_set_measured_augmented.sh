#!/usr/bin/env bash
# Guess: `learn.validate(0)` and `learn.get_preds(ds_idx=0)` measure the training images as `validate(1)` measures the
#   others: all of them, as they are on disk. Comparing the two accuracies shows how much a model overfits.
# What happens: they are measured with the random training augmentation, so that two calls give two results, and
#   `validate(0)` also leaves out the images of the last, smaller batch, another choice in every call. What is wanted
#   is `learn.dls.test_dl(learn.dls.train_ds.items, with_labels=True)`, given as `dl`.
# Why: get_preds in fastai/learner.py turns only shuffling and dropping off for `dls[0]`. The transforms ask for the
#   data set's `split_idx`, which stays 0, that of training. validate takes the training loader as it is.
# Seen (fastai 2.8.12, torch 2.14.1, Python 3.11, 2026-11), the same predictions in two calls:
#   get_preds(ds_idx=0): False, get_preds(ds_idx=1): True, get_preds(dl=test_dl(training items)): True
#   images measured by validate(0): 16 of 18
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet fastai==2.8.12 fastcore==2.2.39 fasttransform==0.0.5 \
    torch==2.14.1 torchvision==0.29.1 numpy==2.4.6
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
import warnings

import fastai
from fastai.vision.all import *

warnings.filterwarnings('ignore')
defaults.callbacks = [o for o in defaults.callbacks if o.__name__ != 'ProgressCallback']  # no bars
print('fastai', fastai.__version__, 'torch', torch.__version__)
noise = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
block = DataBlock((ImageBlock, CategoryBlock), get_items=lambda _: range(24), get_x=lambda i: noise[i],
                  get_y=lambda i: i % 2, splitter=IndexSplitter(range(18, 24)), item_tfms=FlipItem())
dls = block.dataloaders('.', bs=4, num_workers=0, device='cpu')


class Count(Callback):
    seen = 0
    def after_batch(self): self.seen += len(self.yb[0])


learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), loss_func=CrossEntropyLossFlat())
plain = dls.test_dl(dls.train_ds.items, with_labels=True)
calls = {'get_preds(ds_idx=0)': dict(ds_idx=0), 'get_preds(ds_idx=1)': dict(ds_idx=1),
         'get_preds(dl=test_dl(training items))': dict(dl=plain)}
same = {name: torch.equal(*(learn.get_preds(**kwargs)[0] for _ in range(2))) for name, kwargs in calls.items()}
count = Count()
learn.validate(0, cbs=count)
print(*(f'{name}: {equal}' for name, equal in same.items()), sep=', ')
print(f'images measured by validate(0): {count.seen} of {len(dls.train_ds)}')
assert list(same.values()) == [False, True, True], 'changed: which predictions repeat'
assert (count.seen, len(dls.train_ds)) == (16, 18), 'changed: validate(0) measures all images now'
EOF
