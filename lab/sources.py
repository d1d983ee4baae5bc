"""Where the images come from: a folder that is given, or CIFAR-10 as fastai finds or downloads it."""
import contextlib

from fastai.vision.all import *

from lab.errors import InputError, one_line
from lab.loader import SHOW_PROGRESS

CIFAR_IMAGES = 60_000


def get_data(path: str | Path | None = None) -> Path:
    """The data folder: `path`, or CIFAR-10 as fastai's `untar_data` finds or downloads it. Raises `InputError`."""
    if path == '': raise InputError('--data is empty; give a folder, or leave it out')
    if path is not None: return Path(path)
    archive = fastai_path('archive')/'cifar10.tgz'
    try:
        with contextlib.nullcontext() if SHOW_PROGRESS else contextlib.redirect_stdout(None):
            path = untar_data(URLs.CIFAR)
    except Exception as e:  # fastdownload raises a bare Exception for a damaged archive, urllib many kinds of OSError
        if not getattr(e, 'errno', None): archive.unlink(missing_ok=True)  # else untar_data would try it for ever
        raise InputError(f'CIFAR-10 could not be downloaded and unpacked ({one_line(e)}); '
                         'check network and disk, or pass a folder that holds it: --data DIR') from e
    n = len(get_image_files(path, folders=['train', 'test']))
    if n != CIFAR_IMAGES:  # a cut archive can be unpacked, and unpacking cut short
        raise InputError(f'{path} holds {n:,} of the {CIFAR_IMAGES:,} images of CIFAR-10; remove it, and {archive} '
                         'if it exists, and CIFAR-10 is downloaded again')
    return path


