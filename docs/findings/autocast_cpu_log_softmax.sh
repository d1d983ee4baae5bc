#!/usr/bin/env bash
# Guess: `cross_entropy` is `log_softmax` and `nll_loss`, also under autocast, which computes softmax in float32 to be
#   safe, as it does on a GPU; the probabilities of a network that ends in a softmax sum to 1.
# What happens: on a CPU autocast leaves softmax and log_softmax in bfloat16. Probabilities do not quite sum to 1, and a
#   network that ends in log_softmax has losses that are off by more than a tenth, while `cross_entropy` on the logits
#   is computed in float32 and exact. On a GPU all of them are computed in float32.
# Why: the CPU list of what is computed in float32, in aten/src/ATen/autocast_mode.cpp, holds cross_entropy_loss and
#   nll_loss, but neither softmax nor log_softmax, which are on the list for GPUs. nll_loss gets rounded values.
# Seen (torch 2.14.1, Python 3.11, 2026-11):
#   log_softmax is on the list of AutocastCUDA
#   softmax is torch.bfloat16, sums differ from 1 by up to 0.0024
#   error of a loss: cross_entropy 0.0000, nll_loss of log_softmax 0.1251
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
import torch
from torch.nn import functional as F

print('torch', torch.__version__)
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
listed = {key: has_kernel('aten::log_softmax.int', key) for key in ('AutocastCPU', 'AutocastCUDA')}
print('log_softmax is on the list of', *(key for key in listed if listed[key]))
torch.manual_seed(0)
logits, classes = (8 * torch.randn(512, 10)).bfloat16(), torch.randint(10, (512,))
with torch.autocast('cpu', dtype=torch.bfloat16):
    probabilities = logits.softmax(-1)
    whole = F.cross_entropy(logits, classes, reduction='none')
    parts = F.nll_loss(F.log_softmax(logits, -1), classes, reduction='none')
exact = F.cross_entropy(logits.float(), classes, reduction='none')
sums = (probabilities.float().sum(-1) - 1).abs().max().item()
errors = [(o.float() - exact).abs().max().item() for o in (whole, parts)]
print(f'softmax is {probabilities.dtype}, sums differ from 1 by up to {sums:.4f}')
print(f'error of a loss: cross_entropy {errors[0]:.4f}, nll_loss of log_softmax {errors[1]:.4f}')
assert listed == {'AutocastCPU': False, 'AutocastCUDA': True}, 'changed: the lists are others'
assert probabilities.dtype == torch.bfloat16 and sums > 0.001, 'changed: softmax is computed in float32 now'
assert errors[0] < 1e-5, 'changed: cross_entropy is no longer computed in float32'
assert errors[1] > 0.02, 'changed: log_softmax is computed in float32 now'
EOF
