#!/usr/bin/env bash
# Guess: skorch's NeuralNetClassifier, whose default criterion is `nn.NLLLoss`, trains a network that ends in
#   `nn.LogSoftmax`, the pair that torch's documentation names; and that one that ends in logits fails visibly.
# What happens: the loss is NaN in every epoch, without an error or a warning, while the weights go on changing. With
#   log-softmax the gradient has the wrong sign, so that training ends with every answer wrong; with logits it has the
#   wrong sign wherever a logit is negative. The default wants probabilities. With `criterion=nn.CrossEntropyLoss`
#   log-probabilities and logits will do, and `predict_proba` returns probabilities.
# Why: NeuralNetClassifier.get_loss (skorch/classifier.py) takes the logarithm of the network's output if the criterion
#   is NLLLoss; that of a negative number is NaN, and its gradient is not.
# Seen (skorch 1.4.0, torch 2.14.1, Python 3.11, 2026-11), loss of the last of 20 epochs, sum of the first image's
#   "probabilities", accuracy on three classes of equal size:
#   LogSoftmax, default criterion: nan, -11.06, 0.00
#   logits, default criterion: nan, -0.35, 0.53
#   Softmax, default criterion: 0.13, 1.00, 0.98
#   LogSoftmax, CrossEntropyLoss: 0.13, 1.00, 0.98
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet skorch==1.4.0 torch==2.14.1 numpy==2.4.6 scikit-learn==1.9.1
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
import math
import warnings
from importlib.metadata import version

import numpy as np
import torch
from skorch import NeuralNetClassifier
from torch import nn

print('skorch', version('skorch'), 'torch', torch.__version__)
y = np.arange(300) % 3
x = (np.random.default_rng(0).normal(size=(300, 3)) + 3 * np.eye(3)[y]).astype(np.float32)


def train(*last, **options):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 3), *last)
    net = NeuralNetClassifier(network, max_epochs=20, lr=0.1, verbose=0, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        net.fit(x, y)
    return net.history[-1, 'train_loss'], net.predict_proba(x)[0].sum(), (net.predict(x) == y).mean(), len(caught)


found = {'LogSoftmax, default criterion': train(nn.LogSoftmax(1)), 'logits, default criterion': train(),
         'Softmax, default criterion': train(nn.Softmax(1)),
         'LogSoftmax, CrossEntropyLoss': train(nn.LogSoftmax(1), criterion=nn.CrossEntropyLoss)}
for name, (loss, total, accuracy, _) in found.items(): print(f'{name}: {loss:.2f}, {total:.2f}, {accuracy:.2f}')
broken, fine = [*found.values()][:2], [*found.values()][2:]
assert all(math.isnan(loss) and accuracy < 0.7 and not caught for loss, _, accuracy, caught in broken), \
    'changed: it trains, or warns'
assert all(abs(total - 1) < 1e-5 and accuracy > 0.9 for _, total, accuracy, _ in fine), 'changed: these fail now'
EOF
