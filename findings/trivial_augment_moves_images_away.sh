#!/usr/bin/env bash
# Guess: torchvision's `TrivialAugmentWide()` moves a small image by a few pixels, as `RandAugment` and `AutoAugment`,
#   which move by a share of the width, do.
# What happens: it moves by up to 32 pixels, whatever the size. Of images of CIFAR-10's size it leaves one in two hundred
#   black altogether and one in fourteen mostly black, all with their labels.
# Why: TrivialAugmentWide (torchvision/transforms/v2/_auto_augment.py) draws translations from 0 to 32 pixels, the range
#   of the paper (arXiv:2103.10158); the other two scale theirs with the image.
# Seen (torchvision 0.29.1, torch 2.14.1, Python 3.11, 2026-11), of 5,000 images of 32×32:
#   TrivialAugmentWide: black altogether 0.5 %, mostly black 7.1 %
#   RandAugment: black altogether 0.0 %, mostly black 0.0 %
#   AutoAugment, CIFAR-10's: black altogether 0.0 %, mostly black 1.7 %
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
image = torch.full((3, 32, 32), 200, dtype=torch.uint8)
found = {}
for name, augment in {'TrivialAugmentWide': v2.TrivialAugmentWide(), 'RandAugment': v2.RandAugment(),
                      "AutoAugment, CIFAR-10's": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)}.items():
    torch.manual_seed(0)
    gone = torch.stack([(augment(image) == 0).all(0).float().mean() for _ in range(5000)])
    whole, most = found[name] = (gone == 1).float().mean().item(), (gone > 0.5).float().mean().item()
    print(f'{name}: black altogether {whole:.1%}, mostly black {most:.1%}')
(whole, most), *others = found.values()
assert whole > 0.002 and most > 0.04, 'changed: TrivialAugmentWide knows how large an image is'
assert all(whole == 0 and most < 0.03 for whole, most in others), 'changed: the others move images away, too'
EOF
