import os
import random
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ends, make_folder
from fastai.vision.all import PILImage, TfmdDL, ToTensor, Transform, cifar_stats
from PIL import Image

from lab.errors import InputError
from lab.loader import Augmentation, RGBImage, decode_images, image_files
from train_fastai import FlipLR, get_dls, get_learner, main


def test_an_epoch_shows_every_image_once_and_anew_each_time(dls):
    dls.train_ds.images = torch.arange(24, dtype=torch.uint8)[:, None, None, None].expand(24, 3, 32, 32).contiguous()
    mean, std = (o[0] for o in cifar_stats)
    epochs = [torch.cat([((x[:, 0] * std + mean) * 255).round().flatten(1).mode(1).values for x, _ in dls.train])
              for _ in range(2)]
    assert sorted(epochs[0].tolist()) == sorted(epochs[1].tolist()) == list(range(24))
    assert epochs[0].tolist() != epochs[1].tolist()
    orders = []
    for _ in range(2):
        dls.train.rng = random.Random(5)
        orders.append([y.tolist() for _, y in dls.train])
    assert orders[0] == orders[1], "shuffling is seeded by the loader's generator"


def test_what_a_fastai_user_does_with_a_loader_works(dls):
    dls.show_batch(max_n=4, unique=True)
    files, expected = dls.valid_ds.items[3:6], dls.valid.one_batch()[0]
    x, y = dls.test_dl(files, with_labels=True).one_batch()
    torch.testing.assert_close(x, expected[3:6])
    assert [dls.vocab[i] for i in y] == [f.parent.name for f in files]
    x, = dls.test_dl([PILImage.create(files[0])]).one_batch()
    torch.testing.assert_close(x[0], expected[3])
    assert all(dl.one_batch()[0].is_contiguous() for dl in dls)
    assert get_learner(dls.to('cpu'), precision='auto').validate()[0] > 0, 'a device is a string'


class Invert(Transform):
    """A transform of PIL images, as many of fastai's."""
    order = 1
    def encodes(self, x: PILImage): return type(x)(Image.eval(x, lambda v: 255 - v))


class Brighten(Augmentation):
    def augment(self, x): return x // 2 + 128


def keep_red(dls):
    for tl in dls.train_ds.tls: tl.items = [f for f in tl.items if f.parent.name == 'red']
    dls.train.n = len(dls.train_ds)


def relabel(dls): dls.train_ds.tls[1].items = dls.train_ds.tls[1].items[::-1]
def swap_items(dls): dls.train_ds.items[:2] = dls.train_ds.items[-2:]


CHANGES = dict(
    nothing=lambda dls: None,
    augmentation=lambda dls: dls.add_tfms([Brighten()], 'after_item', 'train'),
    add_tfms=lambda dls: dls.add_tfms([Invert()], 'after_item', 'train'),
    new_after_item=lambda dls: dls.train.new(after_item=[Invert(), ToTensor()]),
    before_batch=lambda dls: dls.train.before_batch.add(Transform(lambda samples: samples[::-1])),
    after_batch=lambda dls: dls.train.after_batch.add(Transform(lambda x: x * 2)),
    opener=lambda dls: dls.train_ds.tls[0].tfms.add(Invert()),
    filtered=keep_red, relabelled=relabel, swapped=swap_items, size=lambda dls: setattr(dls.train, 'bs', 5),
    shorter=lambda dls: setattr(dls.train, 'get_idxs', lambda: [5, 3, 1]),
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
    for i, array in enumerate((grey, grey.astype('uint16') * 257, np.concatenate([colour, opaque], -1))):
        assert (np.array(RGBImage.create(array)) == images[i].permute(1, 2, 0).numpy()).all()
    with pytest.raises(InputError, match='^this bytes cannot be read'): RGBImage.create(bytes(10**6))
    (path/'train/red/png').touch()  # a name without an extension
    assert (images[5].permute(1, 2, 0).numpy() == np.array(Image.open(files[5]).convert('RGB'))).all()
    x, = get_dls(path, bs=8).test_dl(files[:6]).one_batch()  # and the other way to read an image agrees
    mean, std = (torch.tensor(o)[:, None, None] for o in cifar_stats)
    torch.testing.assert_close(x.as_subclass(torch.Tensor).cpu(), (images[:6] / 255 - mean) / std)


def test_what_is_transparent_is_white(tmp_path):
    pixels = np.zeros((32, 32, 4), 'uint8')
    pixels[:, :, 0], pixels[8:24, 8:24, 3] = 200, 255  # red, also where it cannot be seen
    Image.fromarray(pixels).save(tmp_path/'rgba.webp', lossless=True)
    palette = Image.fromarray(pixels[:, :, 3] // 255, 'P')
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.save(tmp_path/'palette.png', transparency=0)
    for file in tmp_path.iterdir():
        image = np.asarray(RGBImage.create(file))
        assert image[16, 16].tolist() == [200, 0, 0]
        assert (image[0] == 255).all()
        assert (np.asarray(RGBImage.create(file.read_bytes())) == image).all()


def other_size(path): save(path/'train/red/0.png', np.zeros((32, 33, 3), 'uint8'))
def half_an_image(path): (path/'test/red/1.png').write_bytes((path/'test/red/1.png').read_bytes()[:300])
def first_image_is_text(path): (path/'train/blue/0.png').write_text('hello')
def floating_point(path): save(path/'train/red/0.tif', np.zeros((32, 32), 'float32'))
def broken_link(path): (path/'train/red/8.png').symlink_to('nowhere.png')
def no_test_folder(path): (path/'test').rename(path/'testing')
def lacking_class(path): (path/'train/red').rename(path/'red')
def one_class(path):
    for folder in path.glob('*/[rb]*'): shutil.rmtree(folder)
def image_beside_classes(path): (path/'train/red/0.png').rename(path/'train/0.png')
def gone(path): path.rename(path.with_name('elsewhere'))


@pytest.mark.parametrize(('spoil', 'message'), [
    (gone, 'there is no folder'), (no_test_folder, 'test; images belong in'),
    (lacking_class, 'train/red holds no images'), (one_class, 'fewer than two class'),
    (image_beside_classes, 'train holds images, but'),
    (other_size, 'train/red/0.png is 33×32 pixels, not 32×32; --resize takes'),
    (broken_link, 'train/red/8.png cannot be read'), (half_an_image, 'test/red/1.png cannot be read'),
    (first_image_is_text, 'train/blue/0.png cannot be read'),
    (floating_point, 'train/red/0.tif cannot be read as an image (its pixels have 32 bits')],
    ids=lambda o: getattr(o, '__name__', ''))
def test_a_bad_folder_is_one_line_and_nothing_is_written(tmp_path, capsys, spoil, message):
    spoil(path := make_folder(tmp_path/'d', train=3, test=2))
    assert message in ends(capsys, 2, main, data=path, out=tmp_path/'out', bs=8)
    assert not (tmp_path/'out').exists()


@pytest.mark.skipif(sys.platform == 'win32', reason='permissions of another kind')
@pytest.mark.parametrize('closed', ['train/red/0.png', 'test'])
def test_no_permission(tmp_path, permissions_bind, closed):
    path = make_folder(tmp_path/'d')
    (path/closed).chmod(0)
    with pytest.raises((InputError, PermissionError), match=closed): get_dls(path, bs=8)
    (path/closed).chmod(0o755)


def test_files_come_sorted_whatever_the_directory_says(folder, monkeypatch):
    walk = os.walk
    monkeypatch.setattr(os, 'walk', lambda *a, **k: ((r, d[::-1], f[::-1]) for r, d, f in walk(*a, **k)))
    assert list(image_files(folder)) == sorted(folder.rglob('*.png'), key=lambda f: f.parts)


@pytest.mark.parametrize('names', ['test valid', 'val'])
def test_folders_of_other_names_and_files_of_other_kinds(tmp_path, names):
    path, (taken, *others) = make_folder(tmp_path/'ein Ordner'), names.split()
    for split in ('train', 'test'): (path/split/'red').rename(path/split/'très rouge 赤')
    for name in ('notes.txt', 'labels.json'): (path/'train/blue'/name).touch()
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
    assert dls.valid_ds.items == get_dls(folder/'train', bs=8, valid_pct=0.25, item_tfms=FlipLR()).valid_ds.items
    assert dls.train.makes_whole_batches
    for path, share, message in ((folder, 0.25, 'is split already'), (folder/'train', 20, 'valid_pct 20 is not in')):
        with pytest.raises(InputError, match=message): get_dls(path, bs=8, valid_pct=share)
