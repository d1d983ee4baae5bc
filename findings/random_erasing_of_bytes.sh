#!/usr/bin/env bash
# Guess: torchvision's `RandomErasing(value='random')`, which erases "each pixel with random values", fills a hole in a
#   uint8 image with values from 0 to 255, and `value=0.5` with half of the full brightness.
# What happens: two thirds of the values in the hole are 0, and nearly all others 1 or 255. `value=0.5` fills with 0.
# Why: RandomErasing (torchvision/transforms/v2/_augment.py) draws from the standard normal distribution, whatever the
#   type of the image, and the assignment turns that into uint8: decimals are cut off, and on x86-64 negative values
#   wrap around. It is meant for normalised float images, where it works.
# Seen (torchvision 0.29.1, torch 2.14.1, Python 3.11, 2026-11), of the values in the holes:
#   uint8: 0 68 %, 1 or 255 27 %, others 5 %; from 10 to 245: 0 %
#   float32: mean -0.00, standard deviation 1.00
#   value=0.5: 0
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 numpy==2.4.6
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
import torch
import torchvision
from torchvision.transforms import v2

print('torchvision', torchvision.__version__, 'torch', torch.__version__)
torch.manual_seed(0)


def fill(image, value):
    erase = v2.RandomErasing(p=1, scale=(0.3, 0.3), ratio=(1, 1), value=value)
    erased = torch.stack([erase(image) for _ in range(200)])
    return erased[erased != image]


grey = torch.full((3, 32, 32), 128, dtype=torch.uint8)
hole = fill(grey, 'random')
def share(wanted): return wanted.float().mean().item()
zero, one, middle = share(hole == 0), share((hole == 1) | (hole == 255)), share((hole >= 10) & (hole <= 245))
print(f'uint8: 0 {zero:.0%}, 1 or 255 {one:.0%}, others {1 - zero - one:.0%}; from 10 to 245: {middle:.0%}')
hole = fill(grey / 255, 'random')
print(f'float32: mean {hole.mean():.2f}, standard deviation {hole.std():.2f}')
half = fill(grey, 0.5).unique().tolist()
print('value=0.5:', *half)
assert zero > 0.6 and middle == 0, 'changed: holes in bytes have other values'
assert abs(hole.std() - 1) < 0.05, 'changed: holes in floats have other values'
assert half == [0], 'changed: half is something else'
EOF
