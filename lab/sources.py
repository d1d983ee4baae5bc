"""Where the images come from: a folder that is given, CIFAR-10 found or downloaded, or the sample in the repository."""
import contextlib
import errno
import tempfile
from http.client import HTTPException
from urllib.error import URLError

from fastai.vision.all import *
from fastcore.net import urlopen
from filelock import FileLock
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import extract_archive

from lab.errors import InputError, one_line
from lab.loader import show_progress

SAMPLE = Path(__file__).parents[1]/'sample/cifar10_sample.tgz'
SIZES = dict(cifar10=60_000, cifar10_torchvision=60_000, cifar10_sample=6_000)  # images in each folder
MIB = 2**20
TIMEOUT = 20  # seconds without a byte, after which a server counts as one that does not answer
NO_LOCKS = errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS  # of NFS and FUSE
NETWORK_ERRORS = URLError, ConnectionError, TimeoutError, HTTPException  # a full disk raises none of these


class NetworkError(InputError):
    """CIFAR-10 is not on this machine, and no server that has it could be reached."""


def data_folder() -> Path:
    """Where fastai keeps its data sets. Raises `InputError`."""
    try: return fastai_path('data')
    except OSError as e: raise InputError(f'fastai cannot write to {e.filename} ({e.strerror}); set FASTAI_HOME') from e


def is_whole(path: Path, name: str) -> bool:
    """Whether the folder `path` has all images of `name`."""
    return len(get_files(path, '.png', folders=['train', 'test'])) == SIZES[name]


def get_folder(name: str, fill: Callable) -> Path:
    """The folder `name` where fastai keeps its data, which `fill(empty folder)` makes, by one process at a time.

    An error leaves no part of it. Raises `InputError`, and whatever `fill` raises.
    """
    path = data_folder()/name
    with contextlib.ExitStack() as stack:
        try: path.exists() or stack.enter_context(FileLock(path.with_name(f'.{name}.lock')))
        except OSError as e:
            if e.errno not in NO_LOCKS: raise  # it is moved into place whole, so that several may make it
        if not path.exists():
            with tempfile.TemporaryDirectory(prefix=f'.{name}', dir=path.parent) as tmp:
                made = fill(Path(tmp))
                if not is_whole(made, name): raise ValueError('images are missing')
                made.rename(path)
    if is_whole(path, name): return path
    raise InputError(f'{path} does not hold the {SIZES[name]:,} images of CIFAR-10; remove it to get them again')


def unpack(archive: Path, tmp: Path) -> Path:
    """The folder in `archive`, unpacked in `tmp`."""
    extract_archive(str(archive), str(tmp))
    return first(o for o in tmp.iterdir() if o.is_dir())


def fetch(url: str, file: Path) -> Path:
    """Download `url` to `file`. (fastai and torchvision would wait for ever for a server that does not answer.)"""
    with urlopen(url, timeout=TIMEOUT) as answer, file.open('wb') as f:
        parts = range(0, size := int(answer.headers['Content-Length']), MIB)
        for _ in progress_bar(parts, leave=False) if show_progress() else parts: f.write(answer.read(MIB))
        if f.tell() < size: raise ConnectionError('the server broke off')
    return file


def download(tmp: Path) -> Path:
    """fastai's copy, in `tmp`."""
    return unpack(fetch(URLs.CIFAR, tmp/'cifar10.tgz'), tmp)


def write_torchvisions(source: Path | None, tmp: Path) -> Path:
    """torchvision's copy in the folder `source`, or its download, as `<class>/<index>.png` in `tmp`.

    torchvision compares the MD5 sums of its files before it unpickles them. Nothing is written to `source`.
    """
    if source is None: source = unpack(fetch(CIFAR10.url, tmp/CIFAR10.filename), tmp).parent
    elif not (source/CIFAR10.base_folder).is_dir(): source = unpack(source/CIFAR10.filename, tmp).parent
    for split in ('train', 'test'):
        batches = CIFAR10(source, train=split == 'train')
        for name in batches.classes: (tmp/'images'/split/name).mkdir(parents=True)
        for i, (image, label) in enumerate(batches):
            image.save(tmp/'images'/split/batches.classes[label]/f'{i:05}.png', compress_level=1)  # faster, 1 % larger
    return tmp/'images'


def get_first(copies: dict[str, Callable], what: str) -> Path:
    """The first folder of `copies`, by name, that is there or can be made. Raises `NetworkError` and `InputError`."""
    errors = {}
    for name in sorted(copies, key=lambda name: not (data_folder()/name).exists()):
        try: return get_folder(name, copies[name])
        except InputError: raise
        except Exception as e: errors[name] = e  # urllib, tarfile and torchvision raise many kinds
    kind = NetworkError if all(isinstance(e, NETWORK_ERRORS) for e in errors.values()) else InputError
    reasons = '; '.join(f'{name}: {one_line(getattr(e, "reason", e))[:100]}' for name, e in errors.items())
    raise kind(f'{what} could not be read ({reasons}); check network and disk') from last(errors.values())


def get_sample() -> Path:
    """The folder of the sample: 5,000 training and 1,000 test images of CIFAR-10. Raises `InputError`."""
    return get_first(dict(cifar10_sample=partial(unpack, SAMPLE)), f'the archive {SAMPLE}')


def get_data(path: str | Path | None = None) -> Path:
    """The data folder: `path`, or CIFAR-10 as fastai or torchvision find or download it.

    If `path` holds torchvision's copy of CIFAR-10, it is the folder of that copy's images. Raises `NetworkError` if no
    server could be reached, and `InputError`.
    """
    if path is None:
        return get_first(dict(cifar10=download, cifar10_torchvision=partial(write_torchvisions, None)), 'CIFAR-10')
    path = Path(path)
    if path.name in (CIFAR10.base_folder, CIFAR10.filename): path = path.parent
    holds_copy = any((path/o).exists() for o in (CIFAR10.base_folder, CIFAR10.filename))
    if (path/'train').exists() or not holds_copy: return path
    return get_first(dict(cifar10_torchvision=partial(write_torchvisions, path)), f'CIFAR-10 in {path}')
