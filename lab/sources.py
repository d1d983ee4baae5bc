"""Where the images come from: a folder that is given, CIFAR-10 found or downloaded, or the sample in the repository."""
import contextlib

from fastai.vision.all import *
from torchvision.datasets import CIFAR10

from lab.errors import InputError, one_line

SAMPLE = Path(__file__).parents[1]/'sample/cifar10_sample.tgz'
SIZES = dict(cifar10=60_000, cifar10_torchvision=60_000, cifar10_sample=6_000)  # images in each folder
TIMEOUT = 20  # seconds without a byte, after which a server counts as one that does not answer


def unpack(archive: Path | str, tmp: Path) -> Path:
    """The folder in `archive`, a file or a URL, unpacked in `tmp`."""
    if isinstance(archive, str):
        print(f'Downloading {archive} …', flush=True)
        archive = urlsave(archive, tmp, timeout=TIMEOUT)
    return untar_dir(archive, tmp)


def write_torchvisions(source: Path | str, tmp: Path) -> Path:
    """torchvision's copy, a folder, archive or URL, whose MD5 sums it compares, as `<split>/<class>/<index>.png`."""
    root = (source if os.path.isdir(source) else unpack(source, tmp)).parent
    for split in ('train', 'test'):
        batches = CIFAR10(root, train=split == 'train')
        for name in batches.classes: (tmp/'images'/split/name).mkdir(parents=True)
        for i, (image, label) in enumerate(batches):
            image.save(tmp/'images'/split/batches.classes[label]/f'{i:05}.png', compress_level=1)  # faster, 1 % larger
    return tmp/'images'


def get_first(what: str, advice: str, **copies: Callable) -> Path:
    """The first folder of `copies` that is there, or else that its function can make. Raises `InputError`."""
    def check(folder: Path) -> Path:
        if len(get_files(folder, '.png', folders=['train', 'test'])) == SIZES[path.name]: return folder
        raise ValueError(f'{folder} does not hold all of its images')

    home, errors = fastai_path('data'), {}
    for path in sorted((home/name for name in copies), key=lambda path: not path.exists()):
        try:
            if path.exists(): return check(path)
            home.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f'.{path.name}', dir=home) as tmp:
                made = check(copies[path.name](Path(tmp)))
                with contextlib.suppress(OSError): made.rename(path)  # another process may have been faster
            return path
        except Exception as e: errors[path.name] = e  # urllib, tarfile and torchvision raise many kinds
    reasons = '; '.join(f'{name}: {one_line(getattr(e, "reason", e))[:200]}' for name, e in errors.items())
    raise InputError(f'{what} could not be read ({reasons}); {advice}') from last(errors.values())


def get_sample() -> Path:
    """The folder of the sample: 5,000 training and 1,000 test images of CIFAR-10. Raises `InputError`."""
    return get_first('the sample', 'a clone of the repository has it', cifar10_sample=partial(unpack, SAMPLE))


def get_data(path: str | Path | None = None) -> Path:
    """The data folder: `path`, or torchvision's copy in it as images, or CIFAR-10, downloaded. Raises `InputError`."""
    if path is None:
        return get_first('CIFAR-10', 'check network and disk, or add --quick, which needs no network',
                         cifar10=partial(unpack, URLs.CIFAR),
                         cifar10_torchvision=partial(write_torchvisions, CIFAR10.url))
    path = Path(path)
    if path.name in (CIFAR10.base_folder, CIFAR10.filename): path = path.parent
    copy = first(path/name for name in (CIFAR10.base_folder, CIFAR10.filename) if (path/name).exists())
    if (path/'train').exists() or not copy: return path
    return get_first(f'CIFAR-10 in {path}', 'check the files', cifar10_torchvision=partial(write_torchvisions, copy))
