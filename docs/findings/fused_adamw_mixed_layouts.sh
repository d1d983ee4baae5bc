#!/usr/bin/env bash
# Guess: loading a checkpoint into a channels-last model gives the same next step as loading it into a contiguous one,
#   whatever implementation of AdamW takes it; at worst an error says that the layouts do not fit.
# What happens: torch's fused AdamW on a CPU takes a wrong step, without an error or a warning. The weights and the
#   gradient are channels-last, the moments from the checkpoint are contiguous, and the kernel pairs each weight with
#   the moment at the same place in memory, which belongs to another weight. The plain and the foreach
#   implementations step correctly. Saving and loading in the same layout is safe.
# Why: the CPU kernel in aten/src/ATen/native/cpu/FusedAdamKernel.cpp walks through the data pointers of weight,
#   gradient and moments and never looks at strides. `Optimizer.load_state_dict` keeps the layout of the saved moments.
# Seen (torch 2.14.1, Python 3.11, 2026-11):
#   fused=False: largest difference between the layouts 0.0000, size of the step 0.0812
#   fused=True: largest difference between the layouts 0.1165, size of the step 0.0812
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
from copy import deepcopy

import torch
from torch import nn

print('torch', torch.__version__)
images = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(1))


def step(conv, optimizer):
    optimizer.zero_grad()
    conv(images).square().mean().backward()
    optimizer.step()


def after_loading(saved_model, saved_optimizer, layout, fused):
    conv = nn.Conv2d(8, 8, 3).to(memory_format=layout)
    conv.load_state_dict(saved_model)
    optimizer = torch.optim.AdamW(conv.parameters(), lr=0.1, fused=fused)
    optimizer.load_state_dict(deepcopy(saved_optimizer))
    step(conv, optimizer)
    return conv.weight.detach().contiguous()


difference = {}
for fused in (False, True):
    torch.manual_seed(0)
    first = nn.Conv2d(8, 8, 3)
    optimizer = torch.optim.AdamW(first.parameters(), lr=0.1, fused=fused)
    for _ in range(3): step(first, optimizer)
    saved = first.state_dict(), optimizer.state_dict()
    plain, last = (after_loading(*saved, layout, fused) for layout in (torch.contiguous_format, torch.channels_last))
    difference[fused], size = (plain - last).abs().max().item(), (plain - first.weight).abs().max().item()
    print(f'{fused=}: largest difference between the layouts {difference[fused]:.4f}, size of the step {size:.4f}')
assert difference[False] < 1e-5, 'changed: the plain implementation now depends on the layout'
assert difference[True] > 0.05, 'changed: the fused implementation now copes with mixed layouts'
EOF
