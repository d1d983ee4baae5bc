#!/usr/bin/env bash
# Guess: an AttributeError in a transform's `setups` (a mistyped attribute, an item without a field that was expected)
#   ends in a traceback, as a ValueError or KeyError does.
# What happens: `setup` swallows every AttributeError that is raised anywhere within `setups` and returns None. The
#   transform goes on half set up, here with the mean of zero that its constructor gave it, and nothing is normalised.
# Why: Transform.setup in fasttransform/transform.py wraps the call in `except (AttributeError, NotFoundLookupError)`,
#   to cover transforms that have no `setups`.
# Seen (fasttransform 0.0.5, fastcore 2.2.39, plum-dispatch 2.9.0, Python 3.11, 2026-11):
#   without a mistake: set up, 5 -> 3.0
#   with an AttributeError: set up, 5 -> 5
#   with a KeyError: KeyError
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet fasttransform==0.0.5 fastcore==2.2.39 plum-dispatch==2.9.0 numpy==2.4.6
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
from importlib.metadata import version

from fasttransform import Transform

print(*(f'{o} {version(o)}' for o in ('fasttransform', 'fastcore', 'plum-dispatch')))


class Centre(Transform):
    "Subtracts the mean of the items that it was set up with."

    def __init__(self, count):
        super().__init__()
        self.mean, self.count = 0, count

    def setups(self, items): self.mean = sum(items) / self.count(items)

    def encodes(self, x): return x - self.mean


outcome = {}
for name, count in (('without a mistake', len), ('with an AttributeError', lambda items: items.lenght),
                    ('with a KeyError', lambda items: {}['length'])):
    centre = Centre(count)
    try:
        centre.setup([1, 2, 3])
        outcome[name] = f'set up, 5 -> {centre(5)}'
    except Exception as e: outcome[name] = type(e).__name__
    print(f'{name}: {outcome[name]}')
assert outcome['without a mistake'] == 'set up, 5 -> 3.0', 'changed: setting up a transform'
assert outcome['with an AttributeError'] == 'set up, 5 -> 5', 'changed: the error is raised now'
assert outcome['with a KeyError'] == 'KeyError', 'changed: this error is swallowed, too'
EOF
