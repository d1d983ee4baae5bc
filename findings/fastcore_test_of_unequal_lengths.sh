#!/usr/bin/env bash
# Guess: a test with `test_eq(a, b)` or `test_close(a, b)` fails when the two have different lengths or shapes, above
#   all when one of them is empty: that is what a test is there for.
# What happens: `test_close` compares lists only as far as the shorter one goes, so that an empty result is close to
#   anything. With arrays, `test_eq` and `test_close` broadcast: an array with no rows equals one with a single row, and
#   two equal numbers equal one of them. Only `test_eq` of lists looks at the length. A function that returns nothing
#   passes its tests.
# Why: is_close in fastcore/test.py goes through both with `zip`; array_equal in fastcore/imports.py, unlike NumPy's
#   function of that name, takes `(a==b).all()`, which is true of an empty array.
# Seen (fastcore 2.2.39, numpy 2.4.6, Python 3.11, 2026-11):
#   test_close([], [1.0]): passes
#   test_close([1.0, 2.0], [1.0, 2.0, 3.0]): passes
#   test_eq(np.empty((0, 3)), np.ones((1, 3))): passes
#   test_eq(np.ones(2), np.ones(1)): passes
#   test_eq([], [1.0]): fails
#   test_eq(np.ones(2), np.zeros(2)): fails
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet fastcore==2.2.39 numpy==2.4.6
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
import fastcore
import numpy as np
from fastcore.test import test_close, test_eq

print('fastcore', fastcore.__version__, 'numpy', np.__version__)
cases = {
    'test_close([], [1.0])': 'passes',
    'test_close([1.0, 2.0], [1.0, 2.0, 3.0])': 'passes',
    'test_eq(np.empty((0, 3)), np.ones((1, 3)))': 'passes',
    'test_eq(np.ones(2), np.ones(1))': 'passes',
    'test_eq([], [1.0])': 'fails',
    'test_eq(np.ones(2), np.zeros(2))': 'fails',
}
for case, expected in cases.items():
    try:
        eval(case, dict(np=np, test_close=test_close, test_eq=test_eq))
        result = 'passes'
    except AssertionError: result = 'fails'
    print(f'{case}: {result}')
    assert result == expected, f'changed: it was "{expected}"'
EOF
