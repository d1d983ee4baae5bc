#!/usr/bin/env bash
# Guess: `L(items)` makes a new collection, as `list(items)` and `tuple(items)` do; adding to it or sorting it leaves
#   `items` alone.
# What happens: an L made from a list (or from an L) keeps that very list. Sorting, extending or setting an element of
#   the one changes the other. From a tuple, a range or a generator it is a new list, so that the same function changes
#   its caller's data or not, depending on what it was called with. `L(items, use_list=True)` copies.
# Why: listify in fastcore/basics.py returns a list as it is, and L of an L is the same object by its metaclass
#   (fastcore/foundation.py).
# Seen (fastcore 2.2.39, Python 3.11, 2026-11), the argument afterwards:
#   list: [1, 2, 3, 4]
#   tuple: (3, 1, 2)
#   L: [1, 2, 3, 4]
#   list, with use_list=True: [3, 1, 2]
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet fastcore==2.2.39
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
import fastcore
from fastcore.foundation import L

print('fastcore', fastcore.__version__)


def with_four(items, **kwargs):
    "A function that looks as if it worked on its own copy."
    result = L(items, **kwargs)
    result.append(4)
    result.sort()
    return result


after = {}
for name, items, kwargs in (('list', [3, 1, 2], {}), ('tuple', (3, 1, 2), {}), ('L', L(3, 1, 2), {}),
                            ('list, with use_list=True', [3, 1, 2], dict(use_list=True))):
    assert list(with_four(items, **kwargs)) == [1, 2, 3, 4]
    after[name] = list(items)
    print(f'{name}: {items}')
assert after['list'] == after['L'] == [1, 2, 3, 4], 'changed: L copies what it gets now'
assert after['tuple'] == after['list, with use_list=True'] == [3, 1, 2], 'changed: a copy is none any more'
EOF
