#!/usr/bin/env bash
# Guess: inside `with torch.autocast(...)` every forward pass casts the weights as they are at that moment, so that it
#   makes no difference whether the block surrounds one training step or several, or an exchange of the weights.
# What happens: autocast casts each weight once and keeps the copy until the outermost block ends. With several steps
#   in one block the optimizer changes the weights, but the network goes on with the first ones: the loss does not
#   move at all. Weights that are exchanged in the block (averaged ones for a test, say) are not seen either, not even
#   under `no_grad`. No error, no warning; `cache_enabled=False` or a block for each step helps.
# Why: cached_cast in aten/src/ATen/autocast_mode.cpp looks a weight up by its identity and never asks for its version
#   counter, which every in-place change advances; the cache is emptied where the last block is left.
# Seen (torch 2.14.1, Python 3.11, CPU, 2026-11):
#   a block for each step: 5.566 4.594 3.801 3.145 2.604 2.158
#   one block for all: 5.566 5.566 5.566 5.566 5.566 5.566
#   output after zeroing the weights inside the block: largest value 1.12, after the block: 0.00
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
import contextlib

import torch
from torch import nn

print('torch', torch.__version__)


def bf16(): return torch.autocast('cpu', dtype=torch.bfloat16)


def losses(around_all, around_each):
    torch.manual_seed(0)
    images, net, found = torch.randn(64, 4), nn.Linear(4, 1), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    with around_all():
        for _ in range(6):
            with around_each(): loss = nn.functional.mse_loss(net(images).float(), images.sum(1, keepdim=True))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    return found


each, one = losses(contextlib.nullcontext, bf16), losses(bf16, contextlib.nullcontext)
print('a block for each step:', *(f'{o:.3f}' for o in each))
print('one block for all:', *(f'{o:.3f}' for o in one))
net, ones = nn.Linear(4, 4, bias=False), torch.ones(1, 4)
with bf16():
    net(ones)
    with torch.no_grad():
        net.weight.zero_()
        inside = net(ones).abs().max().item()
with bf16(): after = net(ones).abs().max().item()
print(f'output after zeroing the weights inside the block: largest value {inside:.2f}, after the block: {after:.2f}')
assert each[-1] < each[0] / 2, 'changed: a block for each step no longer trains'
assert len(set(one)) == 1, 'changed: several steps in one block see the new weights now'
assert inside > 0 and after == 0, 'changed: the cache notices in-place changes now'
EOF
