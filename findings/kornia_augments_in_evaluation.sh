#!/usr/bin/env bash
# Guess: kornia's augmentations are `nn.Module`s that one may put into a network, and there `eval()` turns them off, as
#   it does dropout, and as Keras does with such layers.
# What happens: they go on. A network with augmentations inside is tested on cropped, mirrored and erased images, and
#   often gives the same image another answer the next time.
# Why: nothing in kornia's augmentations asks for `training`; only `p` decides (kornia/augmentation/base.py).
# Seen (kornia 0.9.0, torch 2.14.1, Python 3.11, 2026-11), of 64 images, in evaluation mode:
#   changed: RandomHorizontalFlip 32, RandomCrop 63, RandomErasing 30; by Dropout 0
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet kornia==0.9.0 torch==2.14.1 numpy==2.4.6
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
import kornia
import torch
from kornia import augmentation as K
from torch import nn

print('kornia', kornia.__version__, 'torch', torch.__version__)
torch.manual_seed(0)
images = torch.rand(64, 3, 32, 32)


def changed(layer):
    network = nn.Sequential(layer).eval()
    assert not layer.training
    return (network(images) != images).flatten(1).any(1).sum().item()


found = {type(o).__name__: changed(o) for o in (K.RandomHorizontalFlip(), K.RandomCrop((32, 32), padding=4),
                                                K.RandomErasing(), nn.Dropout())}
dropout = found.pop('Dropout')
print(f'changed: {", ".join(f"{k} {n}" for k, n in found.items())}; by Dropout {dropout}')
assert dropout == 0 and min(found.values()) > 10, 'changed: eval() turns the augmentations off'
EOF
