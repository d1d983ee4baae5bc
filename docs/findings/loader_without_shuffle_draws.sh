#!/usr/bin/env bash
# Guess: a DataLoader that neither shuffles nor has workers uses no randomness, so that a look at the validation loss
#   between two epochs changes nothing about the training that follows.
# What happens: every `iter()` of any DataLoader takes a number from torch's global generator. Training with a
#   validation after each epoch drops other units, shuffles otherwise and ends with other weights than training without,
#   from the same seed. A generator of its own for the validation loader (`generator=torch.Generator()`) keeps it apart.
# Why: _BaseDataLoaderIter in torch/utils/data/dataloader.py draws the seed of its workers, whether it has any or not.
# Seen (torch 2.14.1, Python 3.11, 2026-11):
#   the next random number after a pass over the validation loader is the same: False
#   final weights with and without validation are the same: False
#   the same with a generator of its own for the validation loader: True
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

print('torch', torch.__version__)
data = TensorDataset(torch.randn(64, 4, generator=torch.Generator().manual_seed(1)))


def weights(validation):
    torch.manual_seed(0)
    net, training = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 1)), DataLoader(data, 16, shuffle=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        net.train()
        for images, in training:
            optimizer.zero_grad()
            net(images).square().mean().backward()
            optimizer.step()
        net.eval()
        if validation is not None:
            with torch.no_grad(): _ = [net(images) for images, in validation]
    return net[0].weight.detach()


torch.manual_seed(0)
expected = torch.rand(1)
torch.manual_seed(0)
for _ in DataLoader(data, 16): pass
untouched = torch.equal(expected, torch.rand(1))
print('the next random number after a pass over the validation loader is the same:', untouched)
same = torch.equal(weights(None), weights(DataLoader(data, 16)))
print('final weights with and without validation are the same:', same)
apart = torch.equal(weights(None), weights(DataLoader(data, 16, generator=torch.Generator())))
print('the same with a generator of its own for the validation loader:', apart)
assert not untouched and not same, 'changed: a loader without shuffling draws nothing now'
assert apart, 'changed: a generator of its own no longer keeps the loader apart'
EOF
