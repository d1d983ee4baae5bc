"""`train_fastai.py` with a narrow network, for tests: a step of it takes milliseconds. Options are passed on."""
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import errors  # isort: skip  # noqa: F401, before fastai, whose import it silences
import learner

learner.get_learner.__defaults__ = (*learner.get_learner.__defaults__[:-1], 8)  # the width

if __name__ == '__main__': runpy.run_path(str(ROOT/'train_fastai.py'), run_name='__main__')
