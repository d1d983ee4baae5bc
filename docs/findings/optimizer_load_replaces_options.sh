#!/usr/bin/env bash
# Guess: `optimizer.load_state_dict` brings the moments and step counts back. Weight decay, learning rate and `fused`
#   are those the new optimizer was built with, so that a run can go on with another weight decay.
# What happens: everything that the constructor was given is replaced by what the saved optimizer had, without a word:
#   the new weight decay and rate are gone, and `fused=True` is off if the saved optimizer did not have it (so that each
#   step on a CPU takes several times as long again). Options have to be set after loading.
# Why: Optimizer.load_state_dict in torch/optim/optimizer.py takes the saved parameter groups whole and puts only the
#   parameters themselves back into them.
# Seen (torch 2.14.1, Python 3.11, 2026-11):
#   built with lr 0.01, weight_decay 0.5, fused True; after loading lr 0.1, weight_decay 0.1, fused None
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
import torch
from torch import nn

print('torch', torch.__version__)


def described(optimizer):
    return ', '.join(f'{k} {optimizer.param_groups[0][k]}' for k in ('lr', 'weight_decay', 'fused'))


net = nn.Linear(4, 1)
saved = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
net(torch.ones(1, 4)).sum().backward()
saved.step()
new = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.5, fused=True)
before = described(new)
new.load_state_dict(saved.state_dict())
print(f'built with {before}; after loading {described(new)}')
assert len(new.state) == 2, 'changed: the moments are not loaded'
assert before == 'lr 0.01, weight_decay 0.5, fused True', 'changed: the constructor takes other options'
assert described(new) == described(saved) == 'lr 0.1, weight_decay 0.1, fused None', 'changed: options survive now'
EOF
