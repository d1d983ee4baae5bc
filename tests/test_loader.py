import os
import random
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import end, make_folder
from fastai.vision.all import PILImage, RandTransform, TensorImage, TfmdDL, ToTensor, Transform, cifar_stats
from PIL import Image

from lab import loader
from lab.errors import InputError
from lab.loader import Augmentation, RGBImage, decode_images, image_files, open_image
from train_fastai import get_dls, get_learner, main


def test_an_epoch_shows_every_image_once_and_anew_each_time(folder):
    dls = get_dls(folder, bs=8)
    dls.train_ds.images = torch.arange(24, dtype=torch.uint8)[:, None, None, None].expand(24, 3, 32, 32).contiguous()
    mean, std = (o[0] for o in cifar_stats)
    epochs = [torch.cat([((x[:, 0] * std + mean) * 255).round().flatten(1).mode(1).values for x, _ in dls.train])
              for _ in range(2)]
    assert sorted(epochs[0].tolist()) == sorted(epochs[1].tolist()) == list(range(24))
    assert epochs[0].tolist() != epochs[1].tolist()
    dls.train.rng = random.Random(5)
    order = [y.tolist() for _, y in dls.train]
    dls.train.rng = random.Random(5)
    assert [y.tolist() for _, y in dls.train] == order, "shuffling is seeded by the loader's generator"


def test_what_a_fastai_user_does_with_a_loader_works(folder):
    dls = get_dls(folder, bs=8)
    dls.show_batch(max_n=4)
    dls.train.show_batch(max_n=4, unique=True)
    dls.show_batch(unique=True)
    files = dls.valid_ds.items[3:6]
    x, = dls.test_dl(files).one_batch()
    torch.testing.assert_close(x, dls.valid.one_batch()[0][3:6])
    assert all(dl.one_batch()[0].is_contiguous() for dl in dls)
    x, y = dls.test_dl(files, with_labels=True).one_batch()
    assert [dls.vocab[i] for i in y] == [f.parent.name for f in files]
    x, = dls.test_dl([PILImage.create(files[0])]).one_batch()
    torch.testing.assert_close(x[0], dls.valid.one_batch()[0][3])


class Invert(Transform):
    """A transform of PIL images, as many of fastai's."""
    order = 1
    def encodes(self, x: PILImage): return type(x)(Image.eval(x, lambda v: 255 - v))


class InvertToTensor(ToTensor):
    def encodes(self, x: PILImage): return TensorImage(255 - torch.from_numpy(np.array(x)).permute(2, 0, 1))


def keep_red(dls):
    for tl in dls.train_ds.tls: tl.items = [f for f in tl.items if f.parent.name == 'red']
    dls.train.n = len(dls.train_ds)


def relabel(dls): dls.train_ds.tls[1].items = dls.train_ds.tls[1].items[::-1]
def swap_items(dls): dls.train_ds.items[:2] = dls.train_ds.items[-2:]
def reverse(samples): return samples[::-1]
def reverse_vocabulary(dls): dls.train_ds.tls[1].tfms.fs[-1].vocab = type(dls.vocab)(dls.vocab.items[::-1], sort=False)


CHANGES = dict(
    nothing=lambda dls: None,
    after_item_add=lambda dls: dls.train.after_item.add(Invert()),
    add_tfms=lambda dls: dls.add_tfms([Invert()], 'after_item', 'train'),
    new_after_item=lambda dls: dls.train.new(after_item=[Invert(), ToTensor()]),
    own_to_tensor=lambda dls: dls.train.new(after_item=[InvertToTensor()]),
    before_batch=lambda dls: dls.train.before_batch.add(Transform(reverse)),
    new_before_batch=lambda dls: dls.train.new(before_batch=reverse),
    after_batch=lambda dls: dls.train.after_batch.add(Transform(lambda x: x * 2)),
    filtered=keep_red, relabelled=relabel, swapped=swap_items, vocabulary=reverse_vocabulary,
    opener=lambda dls: dls.train_ds.tls[0].tfms.add(Invert()),
    shorter=lambda dls: setattr(dls.train, 'get_idxs', lambda: [5, 3, 1]), size=lambda dls: setattr(dls.train, 'bs', 5),
    workers=lambda dls: dls.train.new(num_workers=1))


@pytest.mark.parametrize('change', CHANGES)
def test_what_is_changed_on_a_loader_changes_its_batches(folder, change):
    """As on a stock one, though the images were decoded before: what makes batches is asked at every pass."""
    batches = []
    for stock, do in ((False, CHANGES[change]), (True, CHANGES[change]), (True, CHANGES['nothing'])):
        dls = get_dls(folder, bs=8, item_tfms=[], device='cpu')
        if stock: dls.loaders = [dl.new(cls=TfmdDL) for dl in dls.loaders]
        dl = do(dls) or dls.train
        dl.shuffle = dl.drop_last = False
        batches.append([o.as_subclass(torch.Tensor) for b in dl for o in b])
    ours, stock, unchanged = batches
    assert len(ours) == len(stock) >= 2
    for one, other in zip(ours, stock, strict=True): torch.testing.assert_close(one, other)
    same = len(ours) == len(unchanged) and all(a.equal(b) for a, b in zip(ours, unchanged, strict=True))
    assert same == (change in ('nothing', 'workers'))


class Erase(RandTransform):
    """Blackens an image with probability ½."""
    order = 6
    def encodes(self, x: TensorImage): return x * 0


class Brighten(Augmentation):
    """An augmentation that does not say in what order it comes."""
    def augment(self, x): return x // 2 + 128


def test_a_random_transform_draws_for_every_image(folder):
    dls = get_dls(folder, bs=8, item_tfms=[])
    dls.train.after_item.add(Erase(p=0.5))
    for _ in range(5):  # a batch has one in 128 that way, all have one in 2 million
        black = torch.cat([x.flatten(2).std(2).max(1).values < 1e-3 for x, _ in dls.train])
        assert 2 < black.sum() < 22


@pytest.mark.parametrize('order', [None, 9])
def test_an_augmentation_is_applied_to_a_batch_as_to_an_image(folder, order):
    found = []
    for more in ([], [Transform(lambda x: x)]):
        tfm = Brighten()
        if order: tfm.order = order
        dls = get_dls(folder, bs=8, item_tfms=[tfm, *more], device='cpu')
        assert dls.train.makes_whole_batches != bool(more)
        dls.train.shuffle = False
        found.append(dls.train.one_batch()[0])
    torch.testing.assert_close(*found)
    assert found[0].min() > 0


@pytest.mark.parametrize('move', [lambda dls: dls, lambda dls: dls.cpu(), lambda dls: dls.to('cpu')])
def test_a_device_may_be_a_string(folder, move):
    dls = move(get_dls(folder, bs=8, device='cpu'))
    assert torch.device(dls.device).type == dls.train.one_batch()[0].device.type == 'cpu'
    assert get_learner(dls, precision='auto').validate()[0] > 0


def save(path, array):
    path.unlink(missing_ok=True)
    Image.fromarray(array).save(path)


def test_every_kind_of_image_becomes_upright_rgb(tmp_path):
    path = make_folder(tmp_path/'d')
    files = sorted((path/'train/red').iterdir())
    grey = np.arange(1024, dtype='uint8').reshape(32, 32)
    colour, opaque = np.stack([grey, grey.T, 255 - grey], -1), np.full((32, 32, 1), 255, 'uint8')
    upside_down = Image.Exif()
    upside_down[0x0112] = 3
    save(files[0], grey)
    save(files[1], grey.astype('uint16') * 257)
    save(files[2], np.concatenate([colour, opaque], -1))
    save(files[3], np.concatenate([grey[..., None], opaque], -1))
    Image.fromarray(colour[::-1, ::-1]).save(files[4], exif=upside_down)
    Image.fromarray(colour).quantize(256).save(files[5])
    images = decode_images(files)
    assert (images.shape, images.dtype) == ((8, 3, 32, 32), torch.uint8)
    for i in range(4): assert (images[i].permute(1, 2, 0).numpy() == (colour if i == 2 else grey[..., None])).all(), i
    assert (images[4] == images[2]).all()
    assert (images[5].permute(1, 2, 0).numpy() == np.array(Image.open(files[5]).convert('RGB'))).all()
    x, = get_dls(path, bs=8).test_dl(files[:6]).one_batch()  # and the other way to read an image agrees
    mean, std = (torch.tensor(o)[:, None, None] for o in cifar_stats)
    torch.testing.assert_close(x.as_subclass(torch.Tensor).cpu(), (images[:6] / 255 - mean) / std)


@pytest.mark.parametrize('name', ['rgba.png', 'rgba.webp', 'palette.png'])
def test_what_is_transparent_is_white(tmp_path, name):
    pixels = np.zeros((32, 32, 4), 'uint8')
    pixels[:, :, 0], pixels[8:24, 8:24, 3] = 200, 255  # red, also where it cannot be seen
    image, options = Image.fromarray(pixels), dict(lossless=True)
    if name == 'palette.png':
        image, options = Image.fromarray(pixels[:, :, 3] // 255, 'P'), dict(transparency=0)
        image.putpalette([0, 0, 0, 200, 0, 0])
    image.save(tmp_path/name, **options)
    image = np.asarray(RGBImage.create(tmp_path/name))
    assert image[16, 16].tolist() == [200, 0, 0]
    assert (image[0] == 255).all()
    assert (np.asarray(open_image((tmp_path/name).read_bytes())) == image).all()


def other_size(path): save(path/'train/red/0.png', np.zeros((32, 33, 3), 'uint8'))
def zero_bytes(path): (path/'test/red/0.png').write_bytes(b'')
def half_an_image(path): (path/'train/red/1.png').write_bytes((path/'train/red/1.png').read_bytes()[:300])
def first_image_is_text(path): (path/'train/blue/0.png').write_text('hello')
def malformed_exif(path):
    """As a camera's faulty software leaves it; some readers pass over it."""
    Image.new('RGB', (32, 32)).save(path/'test/red/0.png', exif=b'Exif\0\0no TIFF at all')
def floating_point(path): save(path/'train/red/0.tif', np.zeros((32, 32), 'float32'))
def broken_link(path): (path/'train/red/8.png').symlink_to('nowhere.png')
def no_test_folder(path): (path/'test').rename(path/'testing')
def extra_class(path): (path/'train/pink').mkdir()
def lacking_class(path): (path/'train/red').rename(path/'red')
def no_images(path):
    for f in path.rglob('*.png'): f.rename(f.with_suffix('.heic'))
def one_class(path):
    for folder in path.glob('*/[rb]*'): shutil.rmtree(folder)
def image_beside_classes(path): (path/'train/red/0.png').rename(path/'train/0.png')
def image_too_deep(path): shutil.copytree(path/'train/red', path/'train/red/more')
def gone(path): path.rename(path.with_name('elsewhere'))
def a_file(path):
    gone(path)
    path.write_text('no folder')


BAD_FOLDERS = [
    (gone, 'there is no folder'), (a_file, 'there is no folder'), (no_test_folder, 'test; images belong in'),
    (extra_class, 'test/pink holds no images'), (lacking_class, 'train/red holds no images'),
    (no_images, 'holds no images'), (one_class, 'fewer than two class'),
    (image_beside_classes, 'train holds images, but'), (image_too_deep, 'train/red/more holds images, but'),
    (other_size, 'train/red/0.png is 33×32 pixels, not 32×32; --resize takes'),
    (zero_bytes, 'test/red/0.png cannot be read'), (broken_link, 'train/red/8.png cannot be read'),
    (half_an_image, 'train/red/1.png cannot be read'), (first_image_is_text, 'train/blue/0.png cannot be read'),
    (floating_point, 'train/red/0.tif cannot be read as an image (its pixels have 32 bits'),
    (malformed_exif, 'test/red/0.png cannot be read as an image (not a TIFF file'),
]


@pytest.mark.parametrize(('spoil', 'message'), BAD_FOLDERS, ids=lambda o: getattr(o, '__name__', ''))
def test_a_bad_folder_is_one_line_and_nothing_is_written(tmp_path, capsys, spoil, message):
    path = make_folder(tmp_path/'d', train=3, test=2)
    spoil(path)
    with pytest.raises(InputError) as e: get_dls(path, bs=8)
    assert message in str(e.value)
    assert message in end(capsys, 2, main, data=path, out=tmp_path/'out', bs=8).splitlines()[-1]
    assert not (tmp_path/'out').exists()


@pytest.mark.skipif(sys.platform == 'win32', reason='permissions of another kind')
@pytest.mark.parametrize('closed', ['train/red/0.png', 'train/red', 'test'])
def test_no_permission(tmp_path, permissions_bind, closed):
    path = make_folder(tmp_path/'parent/d')
    (path/closed).chmod(0)
    with pytest.raises(InputError, match=closed): get_dls(path, bs=8)
    (path/closed).chmod(0o755)


def test_files_come_sorted_whatever_the_directory_says(folder, monkeypatch):
    walk = os.walk
    monkeypatch.setattr(os, 'walk', lambda *a, **k: ((r, d[::-1], f[::-1]) for r, d, f in walk(*a, **k)))
    assert list(image_files(folder)) == sorted(folder.rglob('*.png'), key=lambda f: f.parts)


def test_images_are_decoded_without_processes_and_stop_at_once(folder, monkeypatch):
    monkeypatch.setattr(torch.utils.data, 'DataLoader', None)  # which needs shared memory
    monkeypatch.setattr('multiprocessing.process.BaseProcess.start', None)
    assert decode_images(image_files(folder)).shape == (36, 3, 32, 32)
    read, large, files = [], Image.new('RGB', (64, 64)), [*image_files(folder)] * 100
    monkeypatch.setattr(loader, 'open_image', lambda file: read.append(file) or large)
    with pytest.raises(InputError, match='64×64 pixels'): decode_images(files)
    assert len(read) < len(files)
    assert decode_images(files[:36], resize=True).shape == (36, 3, 32, 32)


@pytest.mark.parametrize('names', ['test valid', 'valid', 'val', 'valid val'])
def test_folders_of_other_names(tmp_path, names):
    path, (taken, *others) = make_folder(tmp_path/'ein Ordner'), names.split()
    for split in ('train', 'test'): (path/split/'red').rename(path/split/'très rouge 赤')
    for name in others: shutil.copytree(path/'test', path/name)
    (path/'test').rename(path/taken)
    dls = get_dls(path, bs=8)
    assert list(dls.vocab) == ['blue', 'green', 'très rouge 赤']
    assert {f.parent.parent.name for f in dls.valid_ds.items} == {taken}
    assert (len(dls.train_ds), len(dls.valid_ds)) == (24, 12)


def test_a_share_of_the_images_becomes_the_test_set(folder):
    dls = get_dls(folder/'train', bs=8, valid_pct=0.25)
    assert (len(dls.train_ds), len(dls.valid_ds)) == (18, 6)
    assert [f.parent.name for f in dls.valid_ds.items].count('red') == 2
    assert not {*dls.train_ds.items} & {*dls.valid_ds.items}
    assert dls.valid_ds.items == get_dls(folder/'train', bs=8, valid_pct=0.25).valid_ds.items
    assert dls.train.makes_whole_batches


def test_what_is_no_image_is_left_out_and_counted(tmp_path, capsys, monkeypatch):
    """Wherever the program runs: the machine's own list of types is not asked."""
    monkeypatch.setattr('mimetypes.types_map', {})
    path = make_folder(tmp_path/'d')
    for i, suffix in enumerate(('.webp', '.JPG', '.jfif')):
        Image.open(path/f'train/red/{i}.png').save(path/f'train/red/{i}{suffix}', 'webp' if i == 0 else 'jpeg')
    for name in ('notes.txt', 'labels.json'): (path/'train/red'/name).touch()
    assert len(image_files(path)) == 36 + 3
    assert '2 files that are no images are left out, as labels.json\n' in capsys.readouterr().err
