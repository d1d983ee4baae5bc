#!/usr/bin/env bash
# Guess: torchmetrics' `Accuracy(task='multiclass')` and `MulticlassAccuracy`, which it is a wrapper of, are the same:
#   the share of right answers.
# What happens: `MulticlassAccuracy` is the mean recall of the classes. They are sure to agree only where all classes
#   have the same number of images, as in CIFAR-10's test set. The type does not tell them apart, as `Accuracy` returns
#   an object of that very class; only its `average` does.
# Why: the wrapper's default is `average='micro'`, the class's own is 'macro' (torchmetrics/classification/accuracy.py,
#   stat_scores.py).
# Seen (torchmetrics 1.9.0, torch 2.14.1, Python 3.11, 2026-11), of 90 cats and 10 dogs that are all called cats:
#   Accuracy(task='multiclass'), a MulticlassAccuracy: 0.90
#   MulticlassAccuracy: 0.50
#   with as many dogs as cats: 0.50 and 0.50
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torchmetrics==1.9.0 torch==2.14.1 numpy==2.4.6
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
import torch
import torchmetrics
from torchmetrics.classification import MulticlassAccuracy

print('torchmetrics', torchmetrics.__version__, 'torch', torch.__version__)
wrapper, own = torchmetrics.Accuracy(task='multiclass', num_classes=2), MulticlassAccuracy(num_classes=2)


def measure(cats, dogs):
    actual = torch.tensor([0] * cats + [1] * dogs)
    return [o(torch.zeros_like(actual), actual).item() for o in (wrapper, own)]


uneven, even = measure(90, 10), measure(50, 50)
print(f"Accuracy(task='multiclass'), a {type(wrapper).__name__}: {uneven[0]:.2f}")
print(f'MulticlassAccuracy: {uneven[1]:.2f}')
print(f'with as many dogs as cats: {even[0]:.2f} and {even[1]:.2f}')
assert type(wrapper) is MulticlassAccuracy, 'changed: they are of different classes'
assert [round(o, 4) for o in uneven + even] == [0.9, 0.5, 0.5, 0.5], 'changed: both have the same average'
EOF
