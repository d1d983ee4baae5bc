"""CIFAR-10 as fastai `DataLoaders`: where the images come from, their augmentation, and a loader of whole batches."""
import contextlib
import hashlib
import io
import tempfile
import unicodedata
from concurrent.futures import ThreadPoolExecutor

from fastai.vision.all import *
from PIL import ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import functional as TF

from errors import InputError, one_line

SIZE = 32
CIFAR_IMAGES = 60_000
CHUNK = 250  # images that a thread decodes in one go
SHOW_PROGRESS = sys.stdout.isatty() or IN_NOTEBOOK  # a bar in a log file is noise
MEAN_COLOUR = [round(255 * m) for m in cifar_stats[0]]  # zero once normalised, up to the rounding of a byte


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


def check_access(folder: Path):
    """Raises `InputError` if `folder` cannot be listed and entered."""
    try: os.scandir(os.path.join(folder, '.')).close()  # '.' is found only by those who may enter
    except OSError as e: raise InputError(f'{folder} cannot be read ({e.strerror})') from e


def check_names(files: Sequence[Path]):
    """Raises `InputError` for the first file whose name tables and messages could not show."""
    for f in files:
        if not str(f).isprintable(): raise InputError(f'{os.fsencode(f)!r} is a name that cannot be printed; change it')


def image_files(path: str | Path) -> L:
    """All `path/train/<class>/*` and `path/test/<class>/*` images, sorted. Raises `InputError` for any other layout."""
    path = Path(path)
    if not os.path.exists(path): raise InputError(f'data folder {path} does not exist')
    if not path.is_dir(): raise InputError(f'{path} is a file, not a data folder')
    check_access(path)
    classes = {}
    for split in ('train', 'test'):
        if not (path/split).is_dir(): raise InputError(f'data folder {path} has no folder "{split}"')
        check_access(path/split)
        classes[split] = {o.name for o in (path/split).iterdir() if o.is_dir() and not o.name.startswith('.')}
    if odd := sorted(classes['train'] ^ classes['test']):
        has, lacks = ('train', 'test') if odd[0] in classes['train'] else ('test', 'train')
        def letters(name): return unicodedata.normalize('NFC', name)
        twin = any(letters(c) == letters(odd[0]) for c in classes[lacks])
        raise InputError(f'class "{odd[0]}" is in {path/has} but not in {path/lacks}' + (
            ', which has one of the same letters, composed differently (in Unicode); rename one of the two folders'
            if twin else ''))
    files = get_image_files(path, folders=['train', 'test']).sorted()  # a directory's order differs between machines
    counts = Counter(f.parent for f in files)
    if not files: raise InputError(f'data folder {path} holds no images; expected {path/"train"/"<class>"/"*.png"}')
    if len(classes['train']) < 2: raise InputError(f'{path/"train"} has fewer than two class folders')
    if stray := first(f for f in files if f.parent.parent.parent != path):
        raise InputError(f'{stray} is not where an image belongs: {stray.parents[1]/"<class>"/"<image>"}' if
                        stray.parent.parent == path else f'{stray} lies too deep: images belong in <split>/<class>')
    for split in ('train', 'test'):
        for c in sorted(classes[split]):
            check_access(path/split/c)
            if not counts[path/split/c]: raise InputError(f'class folder {path/split/c} holds no images')
    check_names(files)
    return files


def read_image(file: Path | str) -> Tensor:
    """The image in `file`, of any kind and size, as RGB: (3, H, W) uint8. The one reader of images in this project.

    It is upright, as its camera noted, and what is transparent is white. Raises `InputError`.
    """
    try:
        with open(file, 'rb') as f: content = f.read()  # Path.read_bytes takes twice as long
        plain = content[24:26] == b'\x08\x02' and content.startswith(b'\x89PNG')  # 8 bits, RGB
        if plain and b'tRNS' not in content and b'eXIf' not in content:
            # torchvision.io.decode_png would take longer to warn that it will be removed than to decode. Pillow is
            # slower, but explains what is wrong, and takes over where torchvision has no decoder.
            with contextlib.suppress(RuntimeError, AttributeError):
                return torch.ops.image.decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8), 3, False)
        with Image.open(io.BytesIO(content)) as image:
            if getattr(image, 'n_frames', 1) > 1: raise ValueError('it is a sequence of images')
            if image.mode in 'FI': raise ValueError('its pixels have more than 8 bits')
            if image.mode.startswith('I;16'): image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
            return image2tensor(image.convert('RGB'))
    except UnidentifiedImageError as e: raise InputError(f'{file} cannot be read as an image') from e
    except Exception as e:  # Pillow's many kinds
        raise InputError(f'{file} cannot be read as an image ({getattr(e, "strerror", None) or one_line(e)})') from e


class RGBImage(PILImage):
    """A `PILImage` whose files are read by `read_image`."""

    @classmethod
    def create(cls, fn: Path | str | Tensor | ndarray | bytes | Image.Image, **kwargs):  # the types steer fastai
        if isinstance(fn, str | Path): fn = read_image(fn).permute(1, 2, 0).numpy()
        return super().create(fn, **kwargs)


class FitSize(DisplayedTransform):
    """Brings a `PILImage` of another size to SIZE × SIZE: its centre square, resized."""
    order = 1

    def encodes(self, x: PILImage) -> PILImage:
        return x if x.size == (SIZE, SIZE) else PILImage(ImageOps.fit(x, (SIZE, SIZE), Image.Resampling.BILINEAR))


class Augmentation(DisplayedTransform):
    """An item transform for training images: uint8 `TensorImage`, one image (3, H, W) or a batch (N, 3, H, W).

    Every image of a batch draws its own randomness, from torch's CPU generator whatever device the images are on.
    """
    split_idx = 0  # the training set only

    def encodes(self, x: TensorImage) -> TensorImage:
        batch = x.as_subclass(Tensor)
        return TensorImage(self.augment(batch) if x.ndim == 4 else self.augment(batch[None])[0])

    def draw(self, high: int, x: Tensor) -> Tensor:
        """An integer in [0, high) for each image of the batch `x`, (N,) int64 on its device."""
        return torch.randint(high, (len(x),)).to(x.device, non_blocking=True)


def windows(x: Tensor, h: int, w: int) -> Tensor:
    """A view of every h × w window of the images (N, C, H, W): (N, H-h+1, W-w+1, C, h, w)."""
    return x.permute(0, 2, 3, 1).unfold(1, h, 1).unfold(2, w, 1)


class PadCrop(Augmentation):
    """Pads every side with `pad` pixels of the image's reflection, then crops the original size at a random place."""
    order = 6  # item transforms run in this order, after ToTensor (5)

    def __init__(self, pad: int = 4): self.pad = pad

    def padded(self, x: Tensor) -> Tensor: return TF.pad(x, self.pad, padding_mode='reflect')

    def augment(self, x: Tensor) -> Tensor:
        (n, _, h, w), high = x.shape, 2*self.pad + 1
        return windows(self.padded(x), h, w)[torch.arange(n, device=x.device), self.draw(high, x), self.draw(high, x)]


class FlipLR(Augmentation):
    """Mirrors each image left-right with probability ½."""
    order = 7

    def augment(self, x: Tensor) -> Tensor:
        return torch.where(self.draw(2, x).bool()[:, None, None, None], x.flip(-1), x)


class Cutout(Augmentation):
    """Covers a `size` × `size` square at a random place inside the image with the mean colour (arXiv:1708.04552)."""
    order = 8

    def __init__(self, size: int = 8): self.size = size

    def augment(self, x: Tensor) -> Tensor:
        x = x.clone()
        holes = windows(x, self.size, self.size)
        top, left = self.draw(holes.shape[1], x), self.draw(holes.shape[2], x)
        colour = torch.tensor(MEAN_COLOUR, dtype=torch.uint8).to(x.device, non_blocking=True)
        holes[torch.arange(len(x), device=x.device), top, left] = colour[:, None, None]
        return x


class BatchDL(TfmdDL):
    """A `TfmdDL` that makes whole batches from `dataset.images`, if the data set has them, else item by item as ever.

    The images belong on the data set: `new()`, and with it every `test_dl`, `predict` and export, drops a loader's own
    attributes. The item transforms are the same `after_item` pipeline, called once a batch.
    """
    share = slice(None)  # of every batch: what this process makes of it, where several share it out

    def create_batches(self, samps):
        images, labels = getattr(self.dataset, 'images', None), getattr(self.dataset, 'labels', None)
        if images is None:
            yield from super().create_batches(samps)
            return
        for idxs in self.chunkify(samps):
            idxs = torch.tensor(idxs[self.share]).to(images.device, non_blocking=True)  # no step waits for the GPU
            yield self.after_item((TensorImage(images[idxs]), TensorCategory(labels[idxs])))


def decode_images(files: Sequence[Path]) -> Tensor:
    """The `files` decoded, in threads: (N, 3, 32, 32) uint8 in channels-last memory. Raises `InputError`."""
    images = torch.empty(len(files), 3, SIZE, SIZE, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)

    def decode(start: int):
        decoded = []
        for file in files[start:start + CHUNK]:
            decoded.append(image := read_image(file))
            if image.shape[1:] != (SIZE, SIZE):
                raise InputError(f'{file} is {image.shape[2]}×{image.shape[1]} pixels, not {SIZE}×{SIZE}; '
                                 'resize or remove it')
        images[start:start + CHUNK] = torch.stack(decoded)

    # Threads: the decoder lets others run, and worker processes need shared memory and a guarded script.
    with ThreadPoolExecutor(min(4, defaults.cpus)) as pool:  # many threads are slower: they queue for Python's lock
        try:
            starts = range(0, len(files), CHUNK)
            done, bar = pool.map(decode, starts), SHOW_PROGRESS and len(starts) > 4  # else it is over in no time
            for _ in progress_bar(done, total=len(starts), leave=False) if bar else done: pass
        finally: pool.shutdown(cancel_futures=True)
    return images


def get_dls(path: str | Path, bs: int = 512, stock_loader: bool = False, num_workers: int | None = None,
            device: torch.device | None = None, every: int = 1) -> DataLoaders:
    """`DataLoaders` of the folder `path` (see `image_files`), as a `DataBlock` builds them.

    Batches are `TensorImage` (bs, 3, 32, 32) float32, normalised with CIFAR-10's statistics, and `TensorCategory`
    (bs,). Training batches are shuffled and augmented, the last partial one is dropped; test images are only
    normalised. By default all images are decoded once, into the memory of `device`; with `stock_loader` fastai's own
    loader decodes and augments item by item in `num_workers` processes. Of each folder only one image in `every` is
    taken. Raises `InputError`.
    """
    files = L(o[::every] for o in groupby(image_files(path), lambda f: f.parent).values()).concat()
    images = decode_images(files)  # with the stock loader just a check: better now than in mid-training
    block = DataBlock(blocks=(ImageBlock(RGBImage), CategoryBlock), get_items=lambda _: files, get_y=parent_label,
                      splitter=GrandparentSplitter(train_name='train', valid_name='test'),
                      item_tfms=[FitSize(), PadCrop(4), FlipLR(), Cutout(8)],
                      batch_tfms=Normalize.from_stats(*cifar_stats), dl_type=TfmdDL if stock_loader else BatchDL)
    dls = block.dataloaders(path, path=path, bs=bs, num_workers=num_workers if stock_loader else 0, device=device)
    if len(dls.train) == 0:
        share = f', taking one in {every}' if every > 1 else ''
        raise InputError(f'{path} has {len(dls.train_ds)} training images{share}, fewer than one batch of {bs}; '
                         'lower --bs')
    if stock_loader: return dls
    place, class_index = {file: i for i, file in enumerate(files)}, dls.vocab.o2i
    for ds in (dls.train_ds, dls.valid_ds):
        ds.images = images[[place[f] for f in ds.items]].to(dls.device)
        ds.labels = tensor([class_index[f.parent.name] for f in ds.items]).to(dls.device)
    return dls


def get_empty_dls(vocab: list[str]) -> DataLoaders:
    """`DataLoaders` of the classes `vocab` without an image, for a learner that only predicts."""
    with tempfile.TemporaryDirectory() as folder:
        for split, name in itertools.product(('train', 'test'), vocab):
            (Path(folder)/split/name).mkdir(parents=True)
            Image.new('RGB', (SIZE, SIZE)).save(Path(folder)/split/name/'blank.png')
        return DataLoaders(*(dl.new(bs=512) for dl in get_dls(folder, bs=1).new_empty().loaders))


def fingerprint(dls: DataLoaders) -> str:
    """A digest of all names, labels and pixels, which identifies the data; not with the stock loader."""
    digest = hashlib.sha256()
    for ds in (dls.train_ds, dls.valid_ds):
        digest.update('\n'.join(f.relative_to(dls.path).as_posix() for f in ds.items).encode())
        digest.update(ds.images.cpu().permute(0, 2, 3, 1).numpy())
    return digest.hexdigest()
