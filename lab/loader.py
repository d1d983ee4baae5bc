"""From files to pixels to whole batches: a data folder's images, one reader for all of them, and a fast loader."""
import contextlib
import hashlib
import io
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor

from fastai.vision.all import *
from PIL import ImageOps, UnidentifiedImageError

from lab.errors import InputError, one_line

SIZE = 32  # pixels, the side of an image
CHUNK = 250  # images that a thread decodes in one go
MAX_THREADS = 4  # to decode; more queue for Python's lock: 16 on two cores took 2.5 times as long as 2
TEST_FOLDERS = 'test', 'valid', 'val'  # the first that exists holds the test images
SHOW_PROGRESS = sys.stdout.isatty() or IN_NOTEBOOK  # a bar in a log file is noise


def check_access(folder: Path):
    """Raises `InputError` if `folder` cannot be listed and entered."""
    try: os.scandir(os.path.join(folder, '.')).close()  # '.' is found only by those who may enter
    except OSError as e: raise InputError(f'{folder} cannot be read ({e.strerror})') from e


def check_names(files: Sequence[Path]):
    """Raises `InputError` for the first file whose name tables and messages could not show."""
    for f in files:
        if not str(f).isprintable(): raise InputError(f'{os.fsencode(f)!r} cannot be printed; rename the file')


def image_files(path: str | Path, every: int = 1) -> L:
    """All `path/train/<class>/*` and `path/test/<class>/*` images, sorted; of each class one in `every`.

    Where there is no `test`, the folder may be called `valid` or `val`. Raises `InputError` for any other layout.
    """
    path = Path(path)
    if not os.path.exists(path): raise InputError(f'data folder {path} does not exist')
    if not path.is_dir(): raise InputError(f'{path} is a file, not a data folder')
    check_access(path)
    test = first(name for name in TEST_FOLDERS if (path/name).is_dir()) or 'test'
    classes = {}
    for split in ('train', test):
        if not (path/split).is_dir(): raise InputError(f'data folder {path} has no folder "{split}"'
                                                        f'{" (nor valid, val)" if split == "test" else ""}')
        check_access(path/split)
        classes[split] = {o.name for o in (path/split).iterdir() if o.is_dir() and not o.name.startswith('.')}
    if odd := sorted(classes['train'] ^ classes[test]):
        has, lacks = ('train', test) if odd[0] in classes['train'] else (test, 'train')
        def letters(name): return unicodedata.normalize('NFC', name)
        twin = any(letters(c) == letters(odd[0]) for c in classes[lacks])
        raise InputError(f'class "{odd[0]}" is in {path/has} but not in {path/lacks}' + (
            ', which has one of the same letters, composed differently (in Unicode); rename one of the two folders'
            if twin else ''))
    files = get_image_files(path, folders=['train', test]).sorted()  # a directory's order differs between machines
    by_folder = groupby(files, lambda f: f.parent)
    if not files: raise InputError(f'data folder {path} holds no images; expected {path/"train"/"<class>"/"*.png"}')
    if len(classes['train']) < 2: raise InputError(f'{path/"train"} has fewer than two class folders')
    if stray := first(f for f in files if f.parent.parent.parent != path):
        raise InputError(f'{stray} is not where an image belongs: {stray.parents[1]/"<class>"/"<image>"}' if
                         stray.parent.parent == path else f'{stray} is nested too deeply: images go in <split>/<class>')
    for folder in (path/split/c for split in ('train', test) for c in sorted(classes[split])):
        check_access(folder)
        if folder not in by_folder: raise InputError(f'class folder {folder} holds no images')
    check_names(files)
    if test != 'test': print(f'The test images are those in {path/test}.', flush=True)
    return L(o[::every] for o in by_folder.values()).concat()


def read_image(source: Path | str | bytes | io.IOBase | Image.Image) -> Tensor:
    """The image in a file, in bytes or in a PIL image, of any kind and size, as RGB: (3, H, W) uint8.

    The one reader of images in this project. The result is upright, as its camera noted, and what is transparent is
    white. Of a photograph with a second picture inside (MPO) it is the first. Raises `InputError`.
    """
    try:
        if isinstance(source, Image.Image): return convert_to_rgb(source)
        if isinstance(source, str | Path):
            with open(source, 'rb') as f: content = f.read()  # Path.read_bytes takes twice as long
        else: content = source if isinstance(source, bytes) else source.read()
        plain = content[24:26] == b'\x08\x02' and content.startswith(b'\x89PNG')  # 8 bits, RGB
        if plain and b'tRNS' not in content and b'eXIf' not in content:
            # torchvision.io.decode_png would take longer to warn that it will be removed than to decode. Pillow is
            # slower, but explains what is wrong, and takes over where torchvision has no decoder.
            with contextlib.suppress(RuntimeError, AttributeError):
                return torch.ops.image.decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8), 3, False)
        with Image.open(io.BytesIO(content)) as image: return convert_to_rgb(image)
    except Exception as e:  # Pillow's many kinds
        name = source if isinstance(source, str | Path) else 'the image'
        why = '' if isinstance(e, UnidentifiedImageError) else f' ({getattr(e, "strerror", None) or one_line(e)})'
        raise InputError(f'{name} cannot be read as an image{why}') from e


def convert_to_rgb(image: Image.Image) -> Tensor:
    """A PIL image as `read_image` returns it. Raises `ValueError` for animations and for pixels of 32 bits."""
    if getattr(image, 'n_frames', 1) > 1 and image.format != 'MPO': raise ValueError('it is a sequence of images')
    if image.mode in 'FI': raise ValueError('its pixels have 32 bits')
    if image.mode.startswith('I;16'): image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
    return image2tensor(image.convert('RGB'))


class RGBImage(PILImage):
    """A `PILImage` that `read_image` has read, unless it comes from an array or tensor."""

    @classmethod
    def create(cls, fn: Path | str | Tensor | ndarray | bytes | io.IOBase | Image.Image, **kwargs):  # fastai reads them
        if not isinstance(fn, cls | Tensor | ndarray): fn = read_image(fn).permute(1, 2, 0).numpy()
        return super().create(fn, **kwargs)


class FitSize(DisplayedTransform):
    """Brings a `PILImage` of another size to SIZE × SIZE: its centre square, resized."""
    order = 1

    def encodes(self, x: PILImage) -> PILImage:
        return x if x.size == (SIZE, SIZE) else PILImage(ImageOps.fit(x, (SIZE, SIZE), Image.Resampling.BILINEAR))


class Augmentation(DisplayedTransform):
    """Base class of item transforms for training images: uint8 `TensorImage`, (3, H, W) or a batch (N, 3, H, W).

    A subclass implements `augment(batch)`, where every image draws its own randomness by `draw`: from torch's CPU
    generator, whatever device the images are on.
    """
    split_idx = 0  # the training set only

    def encodes(self, x: TensorImage) -> TensorImage:
        batch = x.as_subclass(Tensor)
        return TensorImage(self.augment(batch) if x.ndim == 4 else self.augment(batch[None])[0])

    def draw(self, high: int, x: Tensor) -> Tensor:
        """An integer in [0, high) for each image of the batch `x`, (N,) int64 on its device."""
        return torch.randint(high, (len(x),)).to(x.device, non_blocking=x.is_cuda)


def windows(x: Tensor, h: int, w: int) -> Tensor:
    """A view of every h × w window of the images (N, C, H, W): (N, H-h+1, W-w+1, C, h, w)."""
    return x.permute(0, 2, 3, 1).unfold(1, h, 1).unfold(2, w, 1)


class BatchDL(TfmdDL):
    """A `TfmdDL` that makes whole batches from `dataset.images`; a data set without them is read item by item.

    The images belong on the data set: `new()`, and with it every `test_dl`, `predict` and export, drops a loader's own
    attributes. The item transforms are the same `after_item` pipeline, called once per batch; all have to be an
    `Augmentation`.
    """
    share = slice(None)  # the part of every batch that this process trains on

    def create_batches(self, samps):
        images, labels = getattr(self.dataset, 'images', None), getattr(self.dataset, 'labels', None)
        if images is None:
            yield from super().create_batches(samps)
            return
        for idxs in self.chunkify(samps):
            idxs = torch.tensor(idxs[self.share]).to(images.device, non_blocking=images.is_cuda)  # no step waits
            x, y = self.after_item((TensorImage(images[idxs]), TensorCategory(labels[idxs])))
            yield x.contiguous(), y


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

    # Threads, since the decoder lets others run, and worker processes need shared memory and a guarded script.
    with ThreadPoolExecutor(min(MAX_THREADS, defaults.cpus)) as pool:
        try:
            starts = range(0, len(files), CHUNK)
            done, bar = pool.map(decode, starts), SHOW_PROGRESS and len(starts) > 4  # else it is over in no time
            for _ in progress_bar(done, total=len(starts), leave=False) if bar else done: pass
        finally: pool.shutdown(cancel_futures=True)
    return images


def read_images(path: str | Path, every: int = 1) -> tuple[L, Tensor]:
    """The files of the data folder `path`, as `image_files` lists them, and their images, as `decode_images` does."""
    files = image_files(path, every)
    return files, decode_images(files)


def keep_images(dls: DataLoaders, files: Sequence[Path], images: Tensor) -> DataLoaders:
    """Put the decoded `images` of `files`, and their labels, on the data sets of `dls`, in a CUDA GPU's memory or the
    CPU's, so that on any other device batches arrive as with fastai."""
    place, device = {file: i for i, file in enumerate(files)}, dls.device if dls.device.type == 'cuda' else 'cpu'
    for ds in (dls.train_ds, dls.valid_ds):
        ds.images = images[[place[f] for f in ds.items]].to(device)
        ds.labels = tensor([dls.vocab.o2i[f.parent.name] for f in ds.items]).to(device)
    return dls


def list_augmentations(dls: DataLoaders) -> list[str]:
    """The transforms of training images in words, as `Cutout(size=8)`."""
    def describe(tfm: Transform) -> str:
        names = inspect.signature(type(tfm).__init__).parameters.keys() - inspect.signature(Transform).parameters.keys()
        return f'{type(tfm).__name__}({", ".join(f"{k}={v}" for k, v in vars(tfm).items() if k in names and v)})'
    return [describe(tfm) for tfm in (*dls.train.after_item.fs, *dls.train.after_batch.fs) if tfm.split_idx == 0]


def digest_images(files: Sequence[Path], images: Tensor, path: Path | None = None) -> str:
    """A digest of the labels and pixels of a data set, the same for all its copies, whatever their files are called.

    `images` (N, 3, H, W) uint8 are those in the `files`. With their folder `path`, the digest is also of the names and
    the order of the files, from which the order of training follows.
    """
    def digest(file: Path, pixels: ndarray) -> bytes:
        split = 'train' if file.parent.parent.name == 'train' else 'test'
        name = file.relative_to(path).as_posix() if path else f'{split}/{file.parent.name}'
        return hashlib.sha256(name.encode() + b'\0' + pixels.tobytes()).digest()
    digests = map(digest, files, images.cpu().permute(0, 2, 3, 1).numpy())
    return hashlib.sha256(b''.join(digests if path else sorted(digests))).hexdigest()


def fingerprint(dls: DataLoaders, names: bool = True) -> str:
    """The digest of both sets, which identifies the images; with `names`, the names and the order of files count."""
    sets = dls.train_ds, dls.valid_ds
    return digest_images([f for ds in sets for f in ds.items], torch.cat([ds.images for ds in sets]),
                         dls.path if names else None)
