#!/usr/bin/env bash
# Guess: `Learner(wd=0.1)` spares batch norm and biases from weight decay (`wd_bn_bias=False` is its default), whatever
#   optimizer `opt_func` makes; with torch's AdamW wrapped in OptimWrapper the decay is that of fastai's Adam.
# What happens: with OptimWrapper the learner's setting is silently without effect: batch norm and biases decay like
#   everything else. A parameter group of their own, made by the splitter, helps only where neither Learner nor `fit`
#   is given a `wd`, which is set for every group.
# Why: Learner.create_opt writes `do_wd=False` into `opt.state`; OptimWrapper (fastai/optimizer.py) gives it an empty
#   dictionary for that, which torch's optimizer never reads.
# Seen (fastai 2.8.12, torch 2.14.1, Python 3.11, 2026-11), weight of a batch norm after 8 steps with zero gradient:
#   fastai Adam: 1.0000
#   OptimWrapper around torch.optim.AdamW: 0.9227
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet fastai==2.8.12 fastcore==2.2.39 fasttransform==0.0.5 plum-dispatch==2.9.0 \
    torch==2.14.1 torchvision==0.29.1 numpy==2.4.6
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
import warnings

import fastai
from fastai.basics import *

warnings.filterwarnings('ignore')
print('fastai', fastai.__version__, 'torch', torch.__version__)
data = [(torch.randn(4), torch.zeros(1))] * 32


def norm_weight(opt_func):
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    learn = Learner(DataLoaders.from_dsets(data, data, bs=8, device='cpu'), net, loss_func=lambda p, y: 0 * p.sum(),
                    opt_func=opt_func, lr=0.1, wd=0.1)
    assert learn.wd_bn_bias is False
    with learn.no_logging(): learn.fit(2)
    return net[1].weight[0].item()


found = {'fastai Adam': norm_weight(Adam),
         'OptimWrapper around torch.optim.AdamW': norm_weight(partial(OptimWrapper, opt=torch.optim.AdamW))}
for name, weight in found.items(): print(f'{name}: {weight:.4f}')
assert found['fastai Adam'] == 1, 'changed: fastai decays batch norm'
assert found['OptimWrapper around torch.optim.AdamW'] < 0.95, 'changed: OptimWrapper spares batch norm now'
EOF
