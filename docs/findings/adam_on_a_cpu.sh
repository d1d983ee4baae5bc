#!/usr/bin/env bash
# Guess: a step of fastai's Adam takes about as long as one of torch's AdamW, and torch's AdamW by itself picks the
#   fastest of its three implementations (a loop, `foreach`, `fused`), as it does on a GPU.
# What happens: with eight convolutions of 6.6 million weights on one CPU thread torch's fused step takes a sixth of the
#   time of torch's default and an eighth of that of fastai's Adam, for the same weights up to rounding. `foreach` gains
#   little. With small batches the optimizer is a good part of a step.
# Why: fused reads every weight, gradient and moment once. The others make a pass through memory for each operation
#   (fastai/optimizer.py has a Python function for each). _default_to_fused_or_foreach in torch/optim/optimizer.py
#   never picks `fused`, and `foreach` only on a GPU or another accelerator.
# Seen (fastai 2.8.12, torch 2.14.1, Python 3.11, AMD EPYC with AVX-512, one thread, 2026-11), medians in turn:
#   time of a step, fused = 1: fastai 8.0, default 6.0, foreach 5.2
#   largest difference between the weights of fastai's Adam and fused AdamW: 7e-08
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet fastai==2.8.12 fastcore==2.2.39 fasttransform==0.0.5 plum-dispatch==2.9.0 \
    torch==2.14.1 torchvision==0.29.1 numpy==2.4.6
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
import statistics
import time
import warnings

import fastai
from fastai.basics import *

warnings.filterwarnings('ignore')
print('fastai', fastai.__version__, 'torch', torch.__version__)
torch.set_num_threads(1)
torch.manual_seed(0)
sizes = (3, 64), (64, 128), (128, 128), (128, 128), (128, 256), (256, 512), (512, 512), (512, 512)
initial = [nn.Conv2d(a, b, 3).weight.detach() for a, b in sizes]
gradients = [1e-3 * torch.randn_like(o) for o in initial]
same = dict(lr=1e-3, eps=1e-5, weight_decay=0.01)
made = {
    'fastai': lambda ps: Adam(ps, lr=1e-3, mom=0.9, sqr_mom=0.99, eps=1e-5, wd=0.01),
    'default': lambda ps: torch.optim.AdamW(ps, betas=(0.9, 0.99), **same),
    'foreach': lambda ps: torch.optim.AdamW(ps, betas=(0.9, 0.99), foreach=True, **same),
    'fused': lambda ps: torch.optim.AdamW(ps, betas=(0.9, 0.99), fused=True, **same),
}
weights = {name: [nn.Parameter(o.clone()) for o in initial] for name in made}
optimizers, seconds = {name: make(weights[name]) for name, make in made.items()}, {name: [] for name in made}
for ps in weights.values():
    for p, gradient in zip(ps, gradients): p.grad = gradient.clone()
for _ in range(15):
    for name, optimizer in optimizers.items():
        start = time.perf_counter()
        optimizer.step()
        seconds[name].append(time.perf_counter() - start)
ratio = {name: statistics.median(o) / statistics.median(seconds['fused']) for name, o in seconds.items()}
print('time of a step, fused = 1:', ', '.join(f'{k} {v:.1f}' for k, v in ratio.items() if k != 'fused'))
apart = max((a - b).abs().max().item() for a, b in zip(weights['fastai'], weights['fused']))
print(f"largest difference between the weights of fastai's Adam and fused AdamW: {apart:.0e}")
assert min(ratio['fastai'], ratio['default']) > 2, 'changed: the others are nearly as fast as fused'
assert apart < 1e-5, 'changed: the two take different steps'
EOF
