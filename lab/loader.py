"""From files to pixels to whole batches: a data folder's images, their one reader, and a fast loader."""
from fastai.vision.all import *
from PIL import ImageOps

from lab.errors import InputError, one_line

SIZE = 32  # pixels, the side of an image
fit_size = partial(ImageOps.fit, size=(SIZE, SIZE), method=Image.Resampling.BILINEAR)  # the centre square, resized


def show_progress() -> bool:
    """Whether somebody watches: a bar in a log file is noise."""
    return IN_NOTEBOOK or bool(sys.stdout and sys.stdout.isatty())


def list_images(path: Path) -> L:
    """All files in `path` with an extension that Pillow reads, sorted."""
    return get_files(path).filter(lambda f: Image.registered_extensions().get(f.suffix.lower()) in Image.OPEN).sorted()


def image_files(path: str | Path, every: int = 1, split: bool = True) -> L:
    """All `path/train/<class>/*` and `path/test/<class>/*` images, sorted; of each class one in `every`.

    `test` may be called `valid` or `val`; without `split` they are `path/<class>/*`. Raises `InputError`.
    """
    path = Path(path)
    test = first(('test', 'valid', 'val'), lambda name: (path/name).is_dir()) or 'test'
    splits = [path/test, path/'train'] if split else [path]
    if missing := first(folder for folder in (path, *splits) if not folder.is_dir()):
        raise InputError(f'there is no folder {missing}; images belong in train/<class>/ and test/<class>/ (or valid/, '
                         'val/); in Python get_dls(path, valid_pct=0.2) takes <class>/ alone')
    classes = {o.name for folder in splits for o in folder.iterdir() if o.is_dir() and o.name[0] != '.'}
    if not split and 'train' in classes: raise InputError(f'{path} is split already; leave out valid_pct')
    if len(classes) < 2: raise InputError(f'{splits[-1]} has fewer than two class folders')
    images = groupby(L(splits).map(list_images).concat(), lambda f: f.parent)
    if split and (wrong := {*images} ^ {folder/name for folder in splits for name in classes}):
        what = 'holds images, but is no class folder' if min(wrong) in images else 'holds no images that can be read'
        raise InputError(f'{min(wrong)} {what}')
    return L(o[::every] for o in images.values()).concat()


class RGBImage(PILImage):
    """A `PILImage` of any file: upright, as its camera noted, with white for what is transparent."""

    @classmethod
    def create(cls, fn: Path | str | Tensor | ndarray | bytes | io.IOBase | Image.Image, **kwargs):
        """The first image in a file or in bytes, or that of a PIL image, array or tensor. Raises `InputError`."""
        try:
            image = fn if isinstance(fn, Image.Image) else super().create(fn, mode=None)
            if image.mode in 'FI': raise ValueError('its pixels have 32 bits')
            if image.mode.startswith('I;16'): image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
            return cls(image.convert('RGB'))
        except Exception as e:  # Pillow's many kinds
            what = fn if isinstance(fn, str | Path) else f'this {type(fn).__name__}'
            raise InputError(f'{what} cannot be read as an image ({getattr(e, "strerror", 0) or one_line(e)})') from e


class CenterResize(DisplayedTransform):
    """Makes of a `PILImage` of another size its centre square, resized to SIZE × SIZE."""
    order = 4.5  # after the transforms of PIL images, before ToTensor (5)
    def encodes(self, x: PILImage) -> PILImage: return type(x)(fit_size(x))


class Augmentation(DisplayedTransform):
    """Base class of item transforms for training images, uint8 `TensorImage`, (3, H, W) or a batch (N, 3, H, W).

    A subclass implements `augment(batch)`. There `draw` gives every image its own number, from torch's CPU generator.
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
    """A `TfmdDL` that makes whole batches of the decoded images in `dataset.images`, and calls each transform once.

    It asks at every pass whether that is possible; otherwise it reads item by item, as `TfmdDL`. The images belong on
    the data set, since `new()`, and so `test_dl`, `predict` and export, drops a loader's own attributes.
    """

    @property
    def makes_whole_batches(self) -> bool:
        ours = all(isinstance(o, Augmentation) or type(o) in (ToTensor, CenterResize) for o in self.after_item.fs)
        return (ours and 'source' in vars(self.dataset) and self.dataset.source == source_of(self.dataset)
                and not self.before_batch.fs and not self.fake_l.num_workers)

    def create_batches(self, samps):
        if not self.makes_whole_batches: return (yield from super().create_batches(samps))
        images, labels = self.dataset.images, self.dataset.labels
        for idxs in self.chunkify(samps):
            idxs = torch.tensor(idxs).to(images.device, non_blocking=images.is_cuda)  # no step waits
            x, y = self.after_item((TensorImage(images[idxs]), TensorCategory(labels[idxs])))
            yield x.contiguous(), y


def decode_images(files: Sequence[Path], resize: bool = False) -> Tensor:
    """The `files`, (N, 3, 32, 32) uint8 in channels-last memory; `resize` takes centre squares. Raises `InputError`."""
    def decode(file: Path) -> ndarray:
        image = RGBImage.create(file)
        if resize or image.size == (SIZE, SIZE): return np.array(fit_size(image))
        raise InputError(f'{file} is {image.width}×{image.height} pixels, not {SIZE}×{SIZE}; --resize takes the centre')

    images = parallel(decode, files, n_workers=min(4, defaults.cpus), threadpool=True)  # Pillow lets other threads run
    return torch.from_numpy(np.array(images, np.uint8).reshape(-1, SIZE, SIZE, 3)).permute(0, 3, 1, 2)


def source_of(dataset) -> list:
    """What decides about images and labels of a data set: classes, items, and the transforms that open them."""
    return [list(dataset.vocab), *((list(tl.items), list(tl.tfms.fs)) for tl in dataset.tls)]


def cache_images(dls: DataLoaders, resize: bool = False) -> DataLoaders:
    """Decode the images of `dls` into a CUDA GPU's memory, or the CPU's, from where batches go to other devices."""
    device = dls.device if torch.device(dls.device).type == 'cuda' else 'cpu'
    for ds in (dls.train_ds, dls.valid_ds):
        ds.images, ds.source = decode_images(ds.items, resize).to(device), source_of(ds)
        ds.labels = tensor([dls.vocab.o2i[f.parent.name] for f in ds.items]).to(device)
    return dls


def fingerprint(dls: DataLoaders) -> str:
    """A digest of the files of both sets and of their names, in their order, which identifies a run's images."""
    digest = hashlib.sha256()
    for file in [*dls.train_ds.items, *dls.valid_ds.items]:
        digest.update(file.relative_to(dls.path).as_posix().encode(errors='replace') + file.read_bytes())
    return digest.hexdigest()
