#!/usr/bin/env python
"""Makes `cifar10_sample.tgz`: of each class of CIFAR-10 every tenth image, in fastai's layout.

    python sample/make_sample.py ~/.fastai/data/cifar10

The same images give the same archive on every machine with the same zlib.
"""
import gzip
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from lab.loader import image_files

if __name__ == '__main__':
    data, archive = Path(sys.argv[1]), Path(__file__).with_name('cifar10_sample.tgz')
    with (archive.open('wb') as f, gzip.GzipFile('', 'wb', 9, f, mtime=0) as packed,
          tarfile.open(fileobj=packed, mode='w', format=tarfile.USTAR_FORMAT) as tar):
        for file in image_files(data, every=10):
            info = tarfile.TarInfo(f'cifar10_sample/{file.relative_to(data).as_posix()}')
            info.size = file.stat().st_size
            with file.open('rb') as content: tar.addfile(info, content)
    print(f'{archive}: {archive.stat().st_size / 1e6:.1f} MB')
