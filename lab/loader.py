"""From files to pixels to whole batches: a data folder's images, their one reader, and a fast loader."""
import hashlib
import io
import sys
from concurrent.futures import ThreadPoolExecutor

from fastai.vision.all import *
from PIL import ImageOps, UnidentifiedImageError

from lab.errors import InputError, one_line

SIZE = 32  # pixels, the side of an image
CHUNK = 250  # images that a thread decodes in one go
TEST_FOLDERS = 'test', 'valid', 'val'  # the first that exists holds the test images
# Not what the machine's mimetypes hold for an image: .webp and .jfif differ from machine to machine.
EXTENSIONS = {'.avif', '.bmp', '.gif', '.jfif', '.jpe', '.jpeg', '.jpg', '.pbm', '.pgm', '.png', '.ppm', '.tga', '.tif',
              '.tiff', '.webp'}


def show_progress() -> bool:
    """Whether somebody watches: a bar in a log file is noise."""
    return IN_NOTEBOOK or bool(sys.stdout and sys.stdout.isatty())


def list_images(path: Path, folders: Sequence[str] = ()) -> L:
    """All images in `path`, or in these `folders` of it, sorted; one line on stderr counts the files left out."""
    files = groupby(get_files(path, folders=folders).sorted(), lambda f: f.suffix.lower() in EXTENSIONS)
    if others := files.get(False):
        print(f'{path}: {len(others)} files have no extension of an image and are left out, as '
              f'{others[0].relative_to(path)}', file=sys.stderr)
    return L(files.get(True))


def image_files(path: str | Path, every: int = 1, split: bool = True) -> L:
    """All `path/train/<class>/*` and `path/test/<class>/*` images, sorted; of each class one in `every`.

    Where there is no `test`, the folder may be called `valid` or `val`. Without `split` they are `path/<class>/*`.
    Raises `InputError` for any other layout.
    """
    path = Path(path)
    if not path.is_dir(): raise InputError(f'data folder {path} {"is a file" if path.exists() else "does not exist"}')
    if not split: return L(o[::every] for o in groupby(list_images(path), lambda f: f.parent).values()).concat()
    test = first(name for name in TEST_FOLDERS if (path/name).is_dir())
    if not test or not (path/'train').is_dir():
        raise InputError(f'data folder {path} has no folder "{"train" if test else "test"}"; images belong in '
                         'train/<class>/ and test/<class>/ (or valid/, val/); get_dls(path, valid_pct=0.2) takes '
                         '<class>/ alone')
    files = list_images(path, ['train', test])
    if stray := first(f for f in files if f.parent.parent.parent != path):
        raise InputError(f'{stray} is not where an image belongs: <split>/<class>/<image>')
    by_folder = groupby(files, lambda f: f.parent)
    classes = {o.name for split in ('train', test) for o in (path/split).iterdir() if o.is_dir() and o.name[0] != '.'}
    for folder in (path/split/name for split in ('train', test) for name in sorted(classes)):
        if folder not in by_folder: raise InputError(f'class folder {folder} holds no images that can be read')
    if len(classes) < 2: raise InputError(f'{path/"train"} has fewer than two class folders with images')
    if test != 'test': print(f'The test images are those in {path/test}.', flush=True)
    return L(o[::every] for o in by_folder.values()).concat()


def open_image(source: Path | str | bytes | io.IOBase | Image.Image) -> Image.Image:
    """The image in a file, in bytes or in a PIL image, of any kind and size, as RGB.

    The one reader of images in this project. The result is upright, as its camera noted, and what is transparent is
    white. Of a photograph with a second picture inside (MPO) it is the first. Raises `InputError`.
    """
    try:
        image = source if isinstance(source, Image.Image) else Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else source)
        if getattr(image, 'n_frames', 1) > 1 and image.format != 'MPO': raise ValueError('it is a sequence of images')
        if image.mode in 'FI': raise ValueError('its pixels have 32 bits')
        if image.mode.startswith('I;16'): image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
        return image.convert('RGB')
    except Exception as e:  # Pillow's many kinds
        name = source if isinstance(source, str | Path) else 'the image'
        why = '' if isinstance(e, UnidentifiedImageError) else f' ({getattr(e, "strerror", None) or one_line(e)})'
        raise InputError(f'{name} cannot be read as an image{why}') from e


def fit_size(image: Image.Image) -> Image.Image:
    """The centre square of `image`, resized to SIZE × SIZE."""
    return image if image.size == (SIZE, SIZE) else ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.BILINEAR)


class RGBImage(PILImage):
    """A `PILImage` that `open_image` has read, unless it comes from an array or tensor."""

    @classmethod
    def create(cls, fn: Path | str | Tensor | ndarray | bytes | io.IOBase | Image.Image, **kwargs):
        if isinstance(fn, cls | Tensor | ndarray): return super().create(fn, **kwargs)
        return cls(open_image(fn))


class CenterResize(DisplayedTransform):
    """Brings a `PILImage` that no other transform has resized to SIZE × SIZE: its centre square, resized."""
    order = 4.5  # after the transforms of PIL images, before ToTensor (5)
    def encodes(self, x: PILImage) -> PILImage: return type(x)(fit_size(x))


class Augmentation(DisplayedTransform):
    """Base class of item transforms for training images: uint8 `TensorImage`, (3, H, W) or a batch (N, 3, H, W).

    A subclass implements `augment(batch)`, where every image draws its own randomness by `draw`: from torch's CPU
    generator, whatever device the images are on.
    """
    order, split_idx = 6, 0  # after ToTensor (5); the training set only

    def encodes(self, x: TensorImage) -> TensorImage:
        batch = x.as_subclass(Tensor)
        return TensorImage(self.augment(batch) if x.ndim == 4 else self.augment(batch[None])[0])

    def draw(self, high: int, x: Tensor) -> Tensor:
        """An integer in [0, high) for each image of the batch `x`, (N,) int64 on its device."""
        return torch.randint(high, (len(x),)).to(x.device, non_blocking=x.is_cuda)

    @staticmethod
    def sliding_windows(x: Tensor, h: int, w: int) -> Tensor:
        """A view of every h × w window of the images (N, C, H, W): (N, H-h+1, W-w+1, C, h, w)."""
        return x.permute(0, 2, 3, 1).unfold(1, h, 1).unfold(2, w, 1)


class BatchDL(TfmdDL):
    """A `TfmdDL` that makes whole batches of the decoded images in `dataset.images`.

    It does so if every item transform is an `Augmentation`, which it calls once for a batch; with any other, and for
    images that were not decoded, it reads item by item, as `TfmdDL`. The images belong on the data set: `new()`, and
    with it every `test_dl`, `predict` and export, drops a loader's own attributes.
    """

    @property
    def makes_whole_batches(self) -> bool:
        """Asked at every pass, since transforms and items may change at any time."""
        own = any(name in vars(self) or getattr(type(self), name) is not getattr(TfmdDL, name)
                  for name in ('create_item', 'create_batch', 'do_item', 'do_batch', 'retain'))
        return (is_cached(self.dataset) and not own and not self.before_batch.fs and not self.fake_l.num_workers
                and all(isinstance(tfm, Augmentation) or type(tfm) in (ToTensor, CenterResize)
                        for tfm in self.after_item.fs))

    def create_batches(self, samps):
        if not self.makes_whole_batches:
            yield from super().create_batches(samps)
            return
        images, labels = self.dataset.images, self.dataset.labels
        for idxs in self.chunkify(samps):
            idxs = torch.tensor(idxs).to(images.device, non_blocking=images.is_cuda)  # no step waits
            x, y = self.after_item((TensorImage(images[idxs]), TensorCategory(labels[idxs])))
            yield x.contiguous(), y


def decode_images(files: Sequence[Path], resize: bool = False) -> Tensor:
    """The `files` decoded, in threads: (N, 3, 32, 32) uint8 in channels-last memory.

    With `resize`, images of another size become 32×32 by their centre square. Raises `InputError`.
    """
    def decode(file: Path) -> ndarray:
        image = fit_size(open_image(file)) if resize else open_image(file)
        if image.size == (SIZE, SIZE): return np.array(image)
        raise InputError(f'{file} is {image.width}×{image.height} pixels, not {SIZE}×{SIZE}; --resize takes the centre '
                         'square of every image')

    # Threads, since Pillow lets others run, and worker processes need shared memory and a guarded script.
    with ThreadPoolExecutor(min(4, defaults.cpus)) as pool:
        chunks = pool.map(lambda chunk: np.stack([decode(f) for f in chunk]), list(chunked(files, CHUNK)))
        try:
            if show_progress() and len(files) > 4 * CHUNK:  # else it is over in no time
                chunks = progress_bar(chunks, total=-(-len(files) // CHUNK), leave=False)
            none = np.empty((0, SIZE, SIZE, 3), np.uint8)
            return torch.from_numpy(np.concatenate([none, *chunks])).permute(0, 3, 1, 2)
        finally: pool.shutdown(cancel_futures=True)


def source_of(dataset) -> list:
    """What decides about images and labels of a data set of fastai: items, the transforms that open them, classes."""
    return [list(dataset.vocab), *((list(tl.items), list(tl.tfms.fs)) for tl in dataset.tls)]


def is_cached(dataset) -> bool:
    """Whether the decoded images of a data set are there, and are still those of its items."""
    return 'images' in vars(dataset) and source_of(dataset) == dataset.source


def cache_images(dls: DataLoaders, files: Sequence[Path], images: Tensor) -> DataLoaders:
    """Put the decoded `images` of `files`, and their labels, on the data sets of `dls`, in a CUDA GPU's memory or the
    CPU's, so that on any other device batches arrive as with fastai."""
    place, device = {file: i for i, file in enumerate(files)}, torch.device(dls.device)
    if device.type != 'cuda': device = 'cpu'
    for ds in (dls.train_ds, dls.valid_ds):
        ds.images = images[[place[f] for f in ds.items]].to(device)
        ds.labels = tensor([dls.vocab.o2i[f.parent.name] for f in ds.items]).to(device)
        ds.source = source_of(ds)
    return dls


def get_images(dataset, places: Sequence[int]) -> Tensor:
    """The images of a data set at `places`, (n, 3, 32, 32) uint8 on the CPU, decoded before or now."""
    if is_cached(dataset): return dataset.images[list(places)].cpu()
    return decode_images([dataset.items[i] for i in places], resize=True)


def fingerprint(dls: DataLoaders) -> str:
    """A digest of the names, in their order, and of the pixels of both sets, which identifies a run's images."""
    digest = hashlib.sha256()
    for ds in (dls.train_ds, dls.valid_ds):
        digest.update('\n'.join(f.relative_to(dls.path).as_posix() for f in ds.items).encode(errors='replace'))
        digest.update(get_images(ds, range_of(ds.items)).contiguous(memory_format=torch.channels_last)
                      .permute(0, 2, 3, 1).numpy())
    return digest.hexdigest()
