#!/usr/bin/env bash
# Guess: an image that was scaled from uint8 to float16 or bfloat16 comes back the same, or off by a level or two,
#   when torchvision scales it to uint8 again. With float32 it comes back exactly.
# What happens: white turns black. 255 becomes 1.0, and 1.0 becomes 0. There is no error and no warning. It hits
#   v2.ToDtype and the older ConvertImageDtype alike; other levels are off by one at most. `ToPILImage` and
#   `save_image` are safe: they multiply by 255.
# Why: torchvision/transforms/v2/functional/_misc.py multiplies by 255 + 1 - 0.001, so that 1.0 still lands below 256.
#   In half precision 255.999 rounds to 256, which does not fit into uint8. C++ leaves the result of that cast
#   undefined; on x86 it is 0.
# Seen (torchvision 0.29.1, torch 2.14.1, Python 3.11, x86-64, 2026-11):
#   torch.float32: 0 levels change, 255 comes back as 255, off by more than one level: []
#   torch.float16: 16 levels change, 255 comes back as 0, off by more than one level: [255]
#   torch.bfloat16: 128 levels change, 255 comes back as 0, off by more than one level: [255]
set -euo pipefail
[ "$(uname -m)" = x86_64 ] || { echo 'skipped: the result of the cast was looked at on x86-64 only'; exit 0; }
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torchvision==0.29.1 torch==2.14.1 numpy==2.4.6 pillow==13.0.0
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
import torch
import torchvision
from torchvision.transforms import ConvertImageDtype, v2

print('torchvision', torchvision.__version__, 'torch', torch.__version__)
levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
broken = {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    there = v2.ToDtype(dtype, scale=True)(levels)
    back = v2.ToDtype(torch.uint8, scale=True)(there)
    assert torch.equal(back, ConvertImageDtype(torch.uint8)(there)), 'changed: the two transforms differ'
    off = (back.int() - levels.int()).abs().flatten()
    broken[dtype] = torch.nonzero(off > 1).flatten().tolist()
    print(f'{dtype}: {int((off > 0).sum())} levels change, 255 comes back as {back.flatten()[255]}, '
          f'off by more than one level: {broken[dtype]}')
assert broken[torch.float32] == [], 'changed: float32 no longer survives the round trip'
assert broken[torch.float16] == broken[torch.bfloat16] == [255], 'changed: white survives half precision now'
EOF
