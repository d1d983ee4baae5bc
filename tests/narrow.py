"""Runs train_fastai.py with a network of an eighth of the width, for tests of anything but the network."""
import runpy
import sys
from functools import partialmethod
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from arch import ResNet

ResNet.__init__ = partialmethod(ResNet.__init__, width=8)

if __name__ == '__main__': runpy.run_path(str(ROOT/'train_fastai.py'), run_name='__main__')
