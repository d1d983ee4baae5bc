#!/usr/bin/env bash
# Guess: counting a network's operations leaves the network as it is, so that one may do it before training.
# What happens: three popular counters leave three different traces. ptflops leaves the network in evaluation mode, so
#   that a loop that does not call `train()` again trains with batch norm's initial statistics and without dropout.
#   fvcore lets batch norm take in its example image. thop leaves two buffers in every module that it has no rule for,
#   with which the state dict no longer loads into a fresh network.
# Why: ptflops calls `eval()` on the network that it was given (pytorch_engine.py, aten_engine.py). fvcore traces it in
#   the mode it is in. thop registers `total_ops` and `total_params` in every module and removes them only from
#   those that it has a rule for (profile.py).
# Seen (torch 2.14.1, ptflops 0.7.5, fvcore 0.1.5.post20221221, thop 0.1.1.post2209072238, Python 3.11, 2026-11), of a
#   network that was in training mode:
#   ptflops: in evaluation mode
#   fvcore: batch norm has seen 1 batch
#   thop: 2 more entries in the state dict: 4.total_ops, 4.total_params
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6 \
  ptflops==0.7.5 fvcore==0.1.5.post20221221 thop==0.1.1.post2209072238
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
import logging
import warnings
from importlib.metadata import version

import torch
from fvcore.nn import FlopCountAnalysis
from ptflops import get_model_complexity_info
from thop import profile
from torch import nn

warnings.simplefilter('ignore')
logging.disable(logging.CRITICAL)
print(', '.join(f'{p} {version(p)}' for p in ('torch', 'ptflops', 'fvcore', 'thop')))
image = torch.zeros(1, 3, 32, 32)


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveMaxPool2d(1),
                         nn.Flatten(), nn.Linear(8, 10)).train()


counted = network()
get_model_complexity_info(counted, (3, 32, 32), as_strings=False, print_per_layer_stat=False)
print('ptflops: in', 'training' if counted.training else 'evaluation', 'mode')
assert not counted.training, 'changed: ptflops leaves the mode as it was'

counted = network()
FlopCountAnalysis(counted, image).total()
seen = counted[1].num_batches_tracked.item()
print('fvcore: batch norm has seen', seen, 'batch')
assert seen == 1 and counted[1].running_var[0] < 1, 'changed: fvcore leaves the statistics as they were'

counted = network()
profile(counted, (image,), verbose=False)
more = [k for k in counted.state_dict() if k not in network().state_dict()]
print(f'thop: {len(more)} more entries in the state dict: {", ".join(more)}')
assert more == ['4.total_ops', '4.total_params'], 'changed: thop removes what it registered'
EOF
