#!/usr/bin/env bash
# Guess: `accelerator.unwrap_model(model)` gives back the model as it was before `prepare`, and what it predicts is
#   computed in float32, whatever precision it was trained in.
# What happens: with mixed precision the unwrapped model still runs in autocast: its predictions are rounded to
#   bfloat16, outside of any autocast block. `prepare` has changed the forward method of the very object it was given,
#   so that the script's own `model` does the same. `unwrap_model(model, keep_fp32_wrapper=False)` undoes it, for both.
# Why: extract_model_from_parallel in accelerate/utils/other.py puts the original `forward` back only when
#   keep_fp32_wrapper is false, and it is true by default.
# Seen (accelerate 1.15.0, torch 2.14.1, Python 3.11, CPU, 2026-11), largest difference from a float32 copy:
#   unwrapped: 0.0055, the object that was given to prepare: 0.0055
#   unwrapped with keep_fp32_wrapper=False: 0.0000, the object that was given to prepare: 0.0000
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet accelerate==1.15.0 torch==2.14.1 numpy==2.4.6
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
from copy import deepcopy
from importlib.metadata import version

import torch
from accelerate import Accelerator
from torch import nn

print('accelerate', version('accelerate'), 'torch', version('torch'))
torch.manual_seed(0)
model, images = nn.Linear(64, 64), torch.randn(8, 64)
plain = deepcopy(model)
accelerator = Accelerator(cpu=True, mixed_precision='bf16')
prepared = accelerator.prepare(model)


@torch.no_grad()
def differences(unwrapped): return [(o(images) - plain(images)).abs().max().item() for o in (unwrapped, model)]


kept = differences(accelerator.unwrap_model(prepared))
gone = differences(accelerator.unwrap_model(prepared, keep_fp32_wrapper=False))
for name, found in {'unwrapped': kept, 'unwrapped with keep_fp32_wrapper=False': gone}.items():
    print(f'{name}: {found[0]:.4f}, the object that was given to prepare: {found[1]:.4f}')
assert min(kept) > 1e-4, 'changed: an unwrapped model computes in float32 now'
assert max(gone) < 1e-6, 'changed: keep_fp32_wrapper=False no longer helps'
EOF
