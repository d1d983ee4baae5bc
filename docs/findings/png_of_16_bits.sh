#!/usr/bin/env bash
# Guess: a grey PNG of 16 bits opens as what it shows, whichever of the usual calls opens it: Pillow's `convert` keeps
#   the upper eight bits, torchvision's `ToTensor` gives floats between 0 and 1.
# What happens: three calls give three pictures, none with an error. Pillow's `convert` cuts every value above 255 off,
#   so that nearly everything is white. `ToTensor` gives int16 as it is, and the bright half of the picture negative.
#   Only the v2 transforms keep it. A data set with a few 16-bit files among others trains on white squares.
# Why: Pillow's libImaging/Convert.c clips from I;16 to L instead of scaling. torchvision's transforms/functional.py
#   lists NumPy's int16, not uint16, for Pillow's mode I;16, and divides only uint8 by 255.
# Seen (Pillow 13.0.0, torchvision 0.29.1, torch 2.14.1, Python 3.11, 2026-11), for an even ramp from black to white:
#   convert("RGB"): 99.6% of the pixels are white
#   ToTensor: torch.int16 from -32640 to 32639, 50.0% of the pixels are negative
#   v2 ToImage, ToDtype(float32, scale=True): 0.00 to 1.00, mean 0.50
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torchvision==0.29.1 torch==2.14.1 numpy==2.4.6 pillow==13.0.0
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torchvision.transforms import ToTensor, v2

print('Pillow', PIL.__version__, 'torchvision', torchvision.__version__, 'torch', torch.__version__)
Image.fromarray((np.arange(256) * 257).astype(np.uint16).reshape(16, 16)).save('ramp.png')
image = Image.open('ramp.png')
assert image.mode == 'I;16', f'changed: the mode is {image.mode}'
white = (np.asarray(image.convert('RGB')) == 255).all(-1).mean()
print(f'convert("RGB"): {white:.1%} of the pixels are white')
tensor = ToTensor()(image)
negative = (tensor < 0).float().mean().item()
print(f'ToTensor: {tensor.dtype} from {tensor.min()} to {tensor.max()}, {negative:.1%} of the pixels are negative')
scaled = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])(image)
print(f'v2 ToImage, ToDtype(float32, scale=True): {scaled.min():.2f} to {scaled.max():.2f}, mean {scaled.mean():.2f}')
assert white > 0.99, 'changed: Pillow no longer clips'
assert tensor.dtype == torch.int16 and negative > 0.4, 'changed: ToTensor handles 16 bits now'
assert abs(scaled.mean() - 0.5) < 0.01, 'changed: the v2 transforms no longer scale 16 bits'
EOF
