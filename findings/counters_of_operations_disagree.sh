#!/usr/bin/env bash
# Guess: the tools that count a network's operations agree to a few per cent, with one another and with the number that
#   torchvision states beside its weights ("GFLOPS"), apart from a factor of two where one of them says
#   "multiply-adds".
# What happens: for a ResNet the factor is in the same word: torch's own "FLOPs" are twice torchvision's and fvcore's.
#   For a vision transformer torchinfo finds a hundredth of torchvision's number and thop two thirds, and torch's own
#   counter finds a third less in evaluation mode, under `no_grad`, than in training mode.
# Why: FlopCounterMode (torch/utils/flop_counter.py) counts a multiplication and an addition each, the others both as
#   one. torchinfo counts each weight of a linear layer once an image, not once a token. thop has no rule for
#   nn.MultiheadAttention. In evaluation mode torch computes that in one fused operator, for which its own counter has
#   no rule either. In training mode it misses what happens between the projections, as it has no rule for the CPU's
#   scaled dot-product attention.
# Seen (torch 2.14.1, torchvision 0.29.1, fvcore 0.1.5.post20221221, thop 0.1.1.post2209072238, torchinfo 1.8.0,
#   ptflops 0.7.5, Python 3.11, 2026-11), in 10⁹ for an image of 224×224:
#   resnet18: torchvision 1.81, torch 3.63, torch in training 3.63, fvcore 1.82, thop 1.82, torchinfo 1.81, ptflops 1.83
#   vit_b_16: torchvision 17.56, torch 22.54, torch in training 33.70, fvcore 16.87, thop 11.29, torchinfo 0.17,
#     ptflops 17.61
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 \
  fvcore==0.1.5.post20221221 thop==0.1.1.post2209072238 torchinfo==1.8.0 ptflops==0.7.5
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
import logging
import warnings
from importlib.metadata import version

import torch
import torchinfo
from fvcore.nn import FlopCountAnalysis
from ptflops import get_model_complexity_info
from thop import profile
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model, get_model_weights

warnings.simplefilter('ignore')
logging.disable(logging.CRITICAL)
print(', '.join(f'{p} {version(p)}' for p in ('torch', 'torchvision', 'fvcore', 'thop', 'torchinfo', 'ptflops')))
image = torch.zeros(1, 3, 224, 224)


def count(model):
    with FlopCounterMode(display=False) as counter, torch.no_grad(): model(image)
    return counter.get_total_flops()


def count_by_all(name):
    def new(): return get_model(name).eval()  # some of them change the network
    return {'torchvision': 1e9 * next(iter(get_model_weights(name))).meta['_ops'],
            'torch': count(new()), 'torch in training': count(new().train()),
            'fvcore': FlopCountAnalysis(new(), image).total(),
            'thop': profile(new(), (image,), verbose=False)[0],
            'torchinfo': torchinfo.summary(new(), input_data=image, verbose=0).total_mult_adds,
            'ptflops': get_model_complexity_info(new(), (3, 224, 224), as_strings=False, print_per_layer_stat=False)[0]}


found = {name: count_by_all(name) for name in ('resnet18', 'vit_b_16')}
for name, counts in found.items(): print(f'{name}: ' + ', '.join(f'{k} {n / 1e9:.2f}' for k, n in counts.items()))
resnet, vit = ({k: n / counts['torchvision'] for k, n in counts.items()} for counts in found.values())
assert abs(resnet['torch'] - 2) < 0.02, 'changed: torch counts a ResNet as torchvision does'
assert all(abs(resnet[k] - 1) < 0.02 for k in ('fvcore', 'thop', 'torchinfo', 'ptflops')), 'changed: another count'
assert 1.85 < vit['torch in training'] < 1.95, 'changed: torch counts a transformer in training otherwise'
assert vit['torch'] < 1.4, 'changed: torch counts the fused attention'
assert vit['thop'] < 0.7, 'changed: thop counts attention'
assert vit['torchinfo'] < 0.02, 'changed: torchinfo counts tokens'
EOF
