"""Where the images come from: a folder that is given, CIFAR-10 found or downloaded, or the sample in the repository."""
import contextlib
from urllib.request import urlopen

from fastai.vision.all import *
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import extract_archive

from lab.errors import InputError, one_line

SAMPLE = Path(__file__).parents[1]/'sample/cifar10_sample.tgz'
SIZES = dict(cifar10=60_000, cifar10_torchvision=60_000, cifar10_sample=6_000)  # images in each folder
TIMEOUT = 20  # seconds without a byte, after which a server counts as one that does not answer


def unpack(archive: Path | str, tmp: Path) -> Path:
    """The folder in `archive`, a file or a URL, unpacked in `tmp`."""
    if isinstance(archive, str):
        print(f'Downloading {archive} …', flush=True)
        with urlopen(archive, timeout=TIMEOUT) as answer: (tmp/Path(archive).name).write_bytes(answer.read())
        archive = tmp/Path(archive).name
    extract_archive(archive, tmp)
    return first(o for o in tmp.iterdir() if o.is_dir())


def write_torchvisions(source: Path | str, tmp: Path) -> Path:
    """torchvision's copy, a folder, archive or URL, whose MD5 sums it compares, as `<split>/<class>/<index>.png`."""
    root = (source if os.path.isdir(source) else unpack(source, tmp)).parent
    for split in ('train', 'test'):
        batches = CIFAR10(root, train=split == 'train')
        for name in batches.classes: (tmp/'images'/split/name).mkdir(parents=True)
        for i, (image, label) in enumerate(batches):
            image.save(tmp/'images'/split/batches.classes[label]/f'{i:05}.png', compress_level=1)  # faster, 1 % larger
    return tmp/'images'


def get_folder(path: Path, fill: Callable) -> Path:
    """The data set `path`: if missing, what `fill(empty folder)` makes, once it is whole. Raises also `InputError`."""
    def is_whole(folder): return len(get_files(folder, '.png', folders=['train', 'test'])) == SIZES[path.name]
    if not path.exists():
        with tempfile.TemporaryDirectory(prefix=f'.{path.name}', dir=path.parent) as tmp:
            made = fill(Path(tmp))
            if not is_whole(made): raise ValueError('images are missing')
            with contextlib.suppress(OSError): made.rename(path)  # another process may have been faster
    if is_whole(path): return path
    raise InputError(f'{path} does not hold the {SIZES[path.name]:,} images of CIFAR-10; remove it to get them again')


def get_first(copies: dict[str, Callable], what: str, advice: str = 'check network and disk') -> Path:
    """The first folder of `copies`, by name, that is there or can be made. Raises `InputError`."""
    try: (home := fastai_path('data')).mkdir(parents=True, exist_ok=True)
    except OSError as e: raise InputError(f'fastai cannot write to {e.filename} ({e.strerror}); set FASTAI_HOME') from e
    errors = {}
    for path in sorted((home/name for name in copies), key=lambda path: not path.exists()):
        try: return get_folder(path, copies[path.name])
        except InputError: raise
        except Exception as e: errors[path.name] = e  # urllib, tarfile and torchvision raise many kinds
    reasons = '; '.join(f'{name}: {one_line(getattr(e, "reason", e))[:100]}' for name, e in errors.items())
    raise InputError(f'{what} could not be read ({reasons}); {advice}') from last(errors.values())


def get_sample() -> Path:
    """The folder of the sample: 5,000 training and 1,000 test images of CIFAR-10. Raises `InputError`."""
    return get_first(dict(cifar10_sample=partial(unpack, SAMPLE)), 'the sample',
                     'it comes with a clone of the repository; --data DIR takes other images')


def get_data(path: str | Path | None = None) -> Path:
    """The data folder: `path`, or torchvision's copy in it as images, or CIFAR-10, downloaded. Raises `InputError`."""
    if path is None:
        return get_first(dict(cifar10=partial(unpack, URLs.CIFAR),
                              cifar10_torchvision=partial(write_torchvisions, CIFAR10.url)), 'CIFAR-10')
    path = Path(path)
    if path.name in (CIFAR10.base_folder, CIFAR10.filename): path = path.parent
    copy = first(path/name for name in (CIFAR10.base_folder, CIFAR10.filename) if (path/name).exists())
    if (path/'train').exists() or not copy: return path
    return get_first(dict(cifar10_torchvision=partial(write_torchvisions, copy)), f'CIFAR-10 in {path}')
