#!/usr/bin/env bash
# Guess: `accelerate launch --cpu --num_processes 2 script.py` runs the script in two processes that share the work on
#   the CPU, or says that it cannot.
# What happens: it starts a single process, which trains on all of the data, and says nothing about the other one; the
#   exit status is 0. torch's own launcher starts two with the same script, and Accelerator then finds them both.
# Why: launch_command in accelerate/commands/launch.py takes each of its launchers of several processes only "and not
#   args.cpu"; what is left is simple_launcher, which does not look at the number of processes.
# Seen (accelerate 1.15.0, torch 2.14.1, Python 3.11, 2026-11):
#   accelerate launch --cpu --num_processes 2: process 0 of 1
#   python -m torch.distributed.run --nproc-per-node 2: process 0 of 2, process 1 of 2
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet accelerate==1.15.0 torch==2.14.1 numpy==2.4.6
export HOME="$dir"; cd "$dir"
venv/bin/python - <<'EOF'
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

print('accelerate', version('accelerate'), 'torch', version('torch'))
Path('script.py').write_text('''
from accelerate import Accelerator
a = Accelerator(cpu=True)
print(f'process {a.process_index} of {a.num_processes}', flush=True)
a.end_training()
''')
lines = {}
for name, command in {
    'accelerate launch --cpu --num_processes 2':
        'accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no',
    'python -m torch.distributed.run --nproc-per-node 2': 'torch.distributed.run --nproc-per-node 2',
}.items():
    run = subprocess.run([sys.executable, '-m', *command.split(), 'script.py'], stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
    assert run.returncode == 0, run.stderr
    lines[name] = sorted(re.findall(r'process \d of \d', run.stdout))
    print(f'{name}: {", ".join(lines[name])}')
one, two = lines.values()
assert one == ['process 0 of 1'], 'changed: accelerate launch starts another number of processes'
assert two == ['process 0 of 2', 'process 1 of 2'], 'changed: what torch starts'
EOF
