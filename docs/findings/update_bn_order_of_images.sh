#!/usr/bin/env bash
# Guess: `torch.optim.swa_utils.update_bn` runs through a data set once and leaves the mean and variance of its
#   activations in every batch norm, whatever the order of the data.
# What happens: it leaves the mean of the batches' variances. What differs from batch to batch is missing. A loader in
#   the order of a folder (class by class, as for a test) gives a tenth of the true variance here, so that the network
#   scales everything up by three. A last, smaller batch counts as much as a whole one.
# Why: update_bn in torch/optim/swa_utils.py sets the momentum to None, with which batch norm averages each batch's own
#   mean and variance with equal weights; the spread of the batch means does not enter.
# Seen (torch 2.14.1, Python 3.11, 2026-11):
#   variance of the data 9.94, after update_bn: shuffled 9.92, class by class 1.06
#   mean of 150 threes and one batch of a single pair of nines: 6.00 (of the data: 3.08)
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

print('torch', torch.__version__)
torch.manual_seed(0)
two_classes = torch.cat([torch.randn(500, 1) - 3, torch.randn(500, 1) + 3])


def statistics(data, batch):
    net = nn.Sequential(nn.BatchNorm1d(1))
    update_bn(data.split(batch), net)
    return net[0].running_mean.item(), net[0].running_var.item()


true = two_classes.var().item()
shuffled, by_class = statistics(two_classes[torch.randperm(1000)], 100)[1], statistics(two_classes, 100)[1]
print(f'variance of the data {true:.2f}, after update_bn: shuffled {shuffled:.2f}, class by class {by_class:.2f}')
uneven = torch.cat([torch.full((150, 1), 3.), torch.full((2, 1), 9.)])
mean = statistics(uneven, 150)[0]
print(f'mean of 150 threes and one batch of a single pair of nines: {mean:.2f} (of the data: {uneven.mean():.2f})')
assert abs(shuffled / true - 1) < 0.1, 'changed: shuffled data no longer give the variance'
assert by_class < true / 5, 'changed: the order of the data matters less now'
assert abs(mean - 6) < 0.01, 'changed: batches are weighted by their size now'
EOF
