"""Where the images come from: a folder that is given, CIFAR-10 found or downloaded, or the sample in the repository."""
import contextlib
import http.client
import io
import socket
import ssl
import tempfile
from urllib.error import URLError

import fastdownload.core
from fastai.vision.all import *
from filelock import FileLock
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, extract_archive

from lab.errors import InputError, one_line
from lab.learner import replaced
from lab.loader import SHOW_PROGRESS, decode_images, digest_images, image_files

SAMPLE = Path(__file__).parents[1]/'sample/cifar10_sample.tgz'
SAMPLE_DIGEST = 'ff69e8dc81eb1dde5be28c65662622b5e798115961b2b1ac94acc9ddbfcb5a11'
CIFAR_IMAGES = 60_000
TORCHVISION_COPY = 'cifar10_torchvision'
TIMEOUT = 20  # seconds without a byte, after which a server counts as one that does not answer
# What is raised where a server cannot be reached, does not answer or breaks off. A full disk raises none of these.
NETWORK_ERRORS = URLError, ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError, http.client.HTTPException


class NetworkError(InputError):
    """CIFAR-10 is not on this machine, and no server that has it could be reached."""


def data_folder() -> Path:
    """Where fastai keeps its data sets. Raises `InputError`."""
    try: return fastai_path('data')
    except OSError as e:
        raise InputError(f'fastai cannot write to {e.filename} ({e.strerror}); set FASTAI_HOME') from e


@contextlib.contextmanager
def downloading():
    """Context manager in which a server that does not answer raises `TimeoutError`, and log files get no bars."""
    download = partial(fastdownload.download_url, timeout=TIMEOUT)  # untar_data itself would wait for ever
    before = socket.getdefaulttimeout()
    with replaced(fastdownload.core, 'download_url', download), contextlib.ExitStack() as silence:
        if not SHOW_PROGRESS:
            for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
                silence.enter_context(redirect(io.StringIO()))
        socket.setdefaulttimeout(TIMEOUT)
        try: yield
        finally: socket.setdefaulttimeout(before)


@contextlib.contextmanager
def filling(folder: Path):
    """Context manager for making a `folder`: by one process at a time, and an error leaves no part of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f'.{folder.name}.lock')):
        try: yield
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def is_sample(path: Path) -> bool:
    """Whether the folder `path` holds the images of the sample, all of them and no others."""
    try: return digest_images(files := image_files(path), decode_images(files), path) == SAMPLE_DIGEST
    except InputError: return False


def get_sample() -> Path:
    """The folder of the sample: 5,000 training and 1,000 test images of CIFAR-10, unpacked where fastai keeps its data.

    Raises `InputError`.
    """
    path = data_folder()/SAMPLE.stem
    if is_sample(path): return path
    try:
        with filling(path), downloading():
            if not is_sample(path): untar_data(SAMPLE.as_uri(), force_download=True)
            if not is_sample(path): raise ValueError('its images are not the expected ones')
    except Exception as e:  # of tarfile, zlib, shutil and the file system
        raise InputError(f'{SAMPLE} could not be unpacked ({one_line(e)[:200]}); '
                         f'{"check the disk" if is_disk_error(e) else "restore the file with git"}') from e
    return path


def count_images(path: Path) -> int: return len(get_image_files(path, folders=['train', 'test']))


def get_fastai_copy() -> Path:
    """CIFAR-10 as `untar_data` finds or downloads it. Raises `InputError`, and whatever `untar_data` raises."""
    path, archive = data_folder()/'cifar10', fastai_path('archive')/'cifar10.tgz'
    if not path.exists():
        try:
            with filling(path), downloading():
                if not path.exists(): untar_data(URLs.CIFAR)
        except Exception as e:
            if not is_disk_error(e): archive.unlink(missing_ok=True)  # a broken archive would be tried again and again
            raise
    n = count_images(path)
    if n != CIFAR_IMAGES:  # a cut archive can be unpacked, and unpacking killed
        raise InputError(f'{path} holds {n:,} of the {CIFAR_IMAGES:,} images of CIFAR-10; remove it (and {archive}, '
                         'if it exists); CIFAR-10 will then be downloaded again')
    return path


def get_torchvision_copy(source: Path | None = None) -> Path:
    """CIFAR-10 as torchvision keeps it in the folder `source`, or downloads it, written once as `<class>/<index>.png`.

    The MD5 sums of the files are compared before torchvision unpickles them. Nothing is written to `source`. Raises
    `InputError` for a damaged file, and whatever the download raises.
    """
    path = data_folder()/TORCHVISION_COPY
    if count_images(path) == CIFAR_IMAGES: return path
    with filling(path), downloading(), tempfile.TemporaryDirectory(prefix='.cifar10', dir=path.parent) as tmp:
        if count_images(path) == CIFAR_IMAGES: return path  # another process has written them
        if source is None: CIFAR10(tmp, download=True)
        elif not (source/CIFAR10.base_folder).is_dir():
            check_sum(source/CIFAR10.filename, CIFAR10.tgz_md5)
            extract_archive(str(source/CIFAR10.filename), tmp)
        root = source if source and (source/CIFAR10.base_folder).is_dir() else Path(tmp)
        for file, md5 in (*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta['filename'], CIFAR10.meta['md5'])):
            check_sum(root/CIFAR10.base_folder/file, md5)
        images = Path(tmp)/'images'
        for split in ('train', 'test'):
            batches = CIFAR10(root, train=split == 'train')
            for name in batches.classes: (images/split/name).mkdir(parents=True)
            for i, (image, label) in enumerate(batches):
                image.save(images/split/batches.classes[label]/f'{i:05}.png', compress_level=1)  # faster, 1 % larger
        shutil.rmtree(path, ignore_errors=True)
        images.rename(path)
    return path


def check_sum(file: Path, md5: str):
    """Raises `InputError` for a `file` with another MD5 sum."""
    if not check_integrity(file, md5):
        raise InputError(f'{file} is missing or not the original; copy or download it again')


def is_disk_error(e: Exception) -> bool:
    """Whether `e` comes from the file system, because of a full disk, say, or a folder that is closed."""
    return bool(getattr(e, 'errno', None)) and not isinstance(e, NETWORK_ERRORS)


def get_data(path: str | Path | None = None) -> Path:
    """The data folder: `path`, or CIFAR-10 as fastai or torchvision find or download it.

    If `path` holds torchvision's copy of CIFAR-10, it is the folder of that copy's images. Raises `NetworkError` if no
    server could be reached, and `InputError`.
    """
    if path == '': raise InputError('--data is empty; give a folder, or leave it out')
    copies, what = {"fastai's": get_fastai_copy, "torchvision's": get_torchvision_copy}, 'downloaded and unpacked'
    if path is not None:
        path = Path(path)
        if path.name in (CIFAR10.base_folder, CIFAR10.filename): path = path.parent
        holds = {name for name in ('train', CIFAR10.base_folder, CIFAR10.filename) if os.path.exists(path/name)}
        if 'train' in holds or not holds: return path
        print(f"{path} holds torchvision's copy of CIFAR-10, whose images are read from PNG files below "
              f"{data_folder()}, written once.", flush=True)
        copies, what = {"torchvision's": partial(get_torchvision_copy, path)}, f'unpacked from {path}'
    elif count_images(data_folder()/TORCHVISION_COPY) == CIFAR_IMAGES and not (data_folder()/'cifar10').exists():
        return data_folder()/TORCHVISION_COPY
    errors = {}
    for name, get_copy in copies.items():
        try: return get_copy()
        except InputError: raise
        except Exception as e:  # fastdownload raises a bare Exception for a damaged archive, urllib many kinds
            errors[name] = e
            if is_disk_error(e): break  # the next source would meet the same
    kind = NetworkError if all(isinstance(e, NETWORK_ERRORS) for e in errors.values()) else InputError
    reasons = '; '.join(f'{name}: {one_line(getattr(e, "reason", e))[:100]}' for name, e in errors.items())
    raise kind(f'CIFAR-10 could not be {what} ({reasons}); check network and disk, or pass a folder that holds it: '
               '--data DIR') from last(errors.values())
