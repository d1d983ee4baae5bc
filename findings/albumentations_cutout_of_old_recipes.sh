#!/usr/bin/env bash
# Guess: `A.CoarseDropout(max_holes=1, max_height=16, max_width=16, …, fill_value=mean)`, the cutout of many
#   CIFAR-10 recipes with albumentations, either works or raises a TypeError in its last version.
# What happens: all of these arguments are dropped with a warning, and it cuts what its defaults say: one or two holes
#   of 3 to 6 pixels a side, in black. `PadIfNeeded(value=mean)` likewise pads with black. Where warnings are off, a
#   recipe trains with another augmentation than it states.
# Why: version 2 knows only the new names (num_holes_range, hole_height_range, fill …); unknown ones are a warning.
# Seen (albumentations 2.0.8, Python 3.11, 2026-11), of 500 grey images of 32×32:
#   1 warning: Argument(s) 'max_holes, max_height, max_width, min_holes, min_height, min_width, fill_value' are not
#     valid for transform CoarseDropout
#   covered: 9 to 61 pixels, with 0; today's names: 256 to 256 pixels, with 125
#   padded with 0
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet albumentations==2.0.8 albucore==0.0.24 opencv-python-headless==5.0.0.93 \
  numpy==2.4.6
export HOME="$dir" NO_ALBUMENTATIONS_UPDATE=1; cd "$dir"
venv/bin/python - <<'EOF'
import warnings
from importlib.metadata import version

import albumentations as A
import numpy as np

print('albumentations', version('albumentations'))
image = np.full((32, 32, 3), 200, np.uint8)


def cover(**arguments):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        cutout = A.Compose([A.CoarseDropout(p=1, **arguments)], seed=0)
    cut = [cutout(image=image)['image'] for _ in range(500)]
    areas = [int((o != 200).any(2).sum()) for o in cut]
    return min(areas), max(areas), *np.unique([o[o != 200] for o in cut if o.min() < 200][0]), caught


*old, caught = cover(max_holes=1, max_height=16, max_width=16, min_holes=1, min_height=16, min_width=16, fill_value=125)
*new, none = cover(num_holes_range=(1, 1), hole_height_range=(16, 16), hole_width_range=(16, 16), fill=125)
print(len(caught), 'warning:', caught[0].message)
print('covered: {} to {} pixels, with {}; today\'s names: {} to {} pixels, with {}'.format(*old, *new))
with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    border = A.PadIfNeeded(40, 40, border_mode=0, value=125)(image=image)['image'][0, 0, 0]
print('padded with', border)
assert border == 0, 'changed: the old argument of PadIfNeeded works again'
assert old[1] < 100 and old[2] == 0, 'changed: the old arguments work again'
assert new == [256, 256, 125] and not none, 'changed: the new arguments no longer work'
EOF
