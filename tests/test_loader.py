import os
import random
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ends, make_folder
from fastai.vision.all import (
    CategoryMap,
    PILImage,
    RandTransform,
    TensorImage,
    TfmdDL,
    ToTensor,
    Transform,
    cifar_stats,
    image2tensor,
)
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
    orders = []
    for _ in range(2):
        dls.train.rng = random.Random(5)
        orders.append([y.tolist() for _, y in dls.train])
    assert orders[0] == orders[1], 'shuffling is seeded by the loader\'s generator'


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
    def encodes(self, x: PILImage): return TensorImage(255 - image2tensor(x))


class FirstItem:
    def create_item(self, s): return super().create_item(0)


class Half:
    def do_item(self, s): return super().do_item(s) if s < 12 else None


def subclass(dls, mixin): return dls.train.new(cls=type('Own', (mixin, type(dls.train)), {}))


def keep_red(dls):
    for tl in dls.train_ds.tls: tl.items = [f for f in tl.items if f.parent.name == 'red']
    dls.train.n = len(dls.train_ds)


def relabel(dls): dls.train_ds.tls[1].items = dls.train_ds.tls[1].items[::-1]
def swap_items(dls): dls.train_ds.items[:2] = dls.train_ds.items[-2:]
def reverse(samples): return samples[::-1]


CHANGES = dict(
    nothing=lambda dls: None,
    after_item_add=lambda dls: dls.train.after_item.add(Invert()),
    add_tfms=lambda dls: dls.add_tfms([Invert()], 'after_item', 'train'),
    new_after_item=lambda dls: dls.train.new(after_item=[Invert(), ToTensor()]),
    own_to_tensor=lambda dls: dls.train.new(after_item=[InvertToTensor()]),
    before_batch=lambda dls: dls.train.before_batch.add(Transform(reverse)),
    new_before_batch=lambda dls: dls.train.new(before_batch=reverse),
    after_batch=lambda dls: dls.train.after_batch.add(Transform(lambda x: x * 2)),
    filtered=keep_red, relabelled=relabel, swapped=swap_items,
    vocabulary=lambda dls: setattr(dls.train_ds.tls[1].tfms.fs[-1], 'vocab', CategoryMap(['red', 'green', 'blue'],
                                                                                       sort=False)),
    opener=lambda dls: dls.train_ds.tls[0].tfms.add(Invert()),
    create_item=lambda dls: dls.train.new(create_item=lambda s: dls.train_ds[23 - s]),
    create_batch=lambda dls: setattr(dls.train, 'create_batch', lambda b: TfmdDL.create_batch(dls.train, b[:3])),
    subclass_create_item=lambda dls: subclass(dls, FirstItem), subclass_do_item=lambda dls: subclass(dls, Half),
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
    for item_by_item in (False, True):
        tfm = Brighten()
        if order: tfm.order = order
        dls = get_dls(folder, bs=8, item_tfms=[tfm], device='cpu')
        if item_by_item: dls.train.after_item.add(Transform(lambda x: x))
        assert dls.train.makes_whole_batches != item_by_item
        dls.train.shuffle = False
        found.append(dls.train.one_batch()[0])
    torch.testing.assert_close(*found)
    assert found[0].min() > 0


@pytest.mark.parametrize('change', [lambda dls: dls, lambda dls: dls.cpu(), lambda dls: dls.to('cpu')])
def test_a_device_may_be_a_string(folder, change):
    dls = change(get_dls(folder, bs=8, device='cpu'))
    assert torch.device(dls.device).type == dls.train.one_batch()[0].device.type == 'cpu'
    assert get_learner(dls, precision='auto').validate()[0] > 0


def save(path, array):
    path.unlink(missing_ok=True)
    Image.fromarray(array).save(path)


def test_every_kind_of_image_becomes_upright_rgb(tmp_path):
    path = make_folder(tmp_path/'d')
    files = sorted((path/'train/red').iterdir())
    grey = np.arange(1024, dtype='uint8').reshape(32, 32)
    colour = np.stack([grey, grey.T, 255 - grey], -1)
    save(files[0], grey)
    save(files[1], np.concatenate([colour, np.full((32, 32, 1), 255, 'uint8')], -1))
    Image.fromarray(colour).quantize(256).save(files[2])
    save(files[3], np.stack([grey, np.full((32, 32), 255, 'uint8')], -1))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(colour).save(files[4], exif=exif)
    save(files[5], grey.astype('uint16') * 257)
    images = decode_images(files)
    assert (images.shape, images.dtype) == ((8, 3, 32, 32), torch.uint8)
    assert (images[4] == torch.from_numpy(colour[::-1, ::-1].copy()).permute(2, 0, 1)).all()
    assert (images[5] == torch.from_numpy(grey)).all()
    for i in range(4):
        expected = torch.from_numpy(np.array(Image.open(files[i]).convert('RGB'))).permute(2, 0, 1)
        assert (images[i] == expected).all(), i
    x, = get_dls(path, bs=8).test_dl(files[:6]).one_batch()  # and the other way to read an image agrees
    mean, std = (torch.tensor(o)[:, None, None] for o in cifar_stats)
    torch.testing.assert_close(x.as_subclass(torch.Tensor).cpu(), (images[:6] / 255 - mean) / std)


def test_what_is_transparent_is_white(tmp_path):
    pixels = np.zeros((32, 32, 4), 'uint8')
    pixels[:, :, 0], pixels[8:24, 8:24, 3] = 200, 255  # red, also where it cannot be seen
    rgba = Image.fromarray(pixels)
    rgba.save(tmp_path/'rgba.png')
    rgba.save(tmp_path/'rgba.webp', lossless=True)
    palette = Image.fromarray(pixels[:, :, 3] // 255, 'P')
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.save(tmp_path/'palette.png', transparency=0)
    for name in ('rgba.png', 'rgba.webp', 'palette.png'):
        image = np.asarray(RGBImage.create(tmp_path/name))
        assert image[16, 16].tolist() == [200, 0, 0]
        assert (image[0] == 255).all()
        assert (np.asarray(open_image((tmp_path/name).read_bytes())) == image).all()


def other_size(path): save(path/'train/red/0.png', np.zeros((32, 33, 3), 'uint8'))
def zero_bytes(path): (path/'test/red/0.png').write_bytes(b'')
def text_as_image(path): (path/'train/red/0.png').write_text('hello')
def half_an_image(path): (path/'train/red/1.png').write_bytes((path/'train/red/1.png').read_bytes()[:300])
def first_image_half(path): (path/'train/blue/0.png').write_bytes((path/'train/blue/0.png').read_bytes()[:300])
def malformed_exif(path):
    """As a camera's faulty software leaves it; some readers pass over it."""
    Image.new('RGB', (32, 32)).save(path/'test/red/0.png', exif=b'Exif\0\0no TIFF at all')
def floating_point(path):
    (path/'train/red/0.png').unlink()
    Image.fromarray(np.zeros((32, 32), 'float32')).save(path/'train/red/0.tif')
def sequence(path): Image.new('RGB', (32, 32)).save(path/'train/red/8.gif', save_all=True, append_images=[
    Image.new('RGB', (32, 32), 'red')])
def broken_link(path): (path/'train/red/8.png').symlink_to('nowhere.png')
def file_as_split(path):
    (path/'test').rename(path/'rest')
    (path/'test').touch()
def no_test_folder(path): (path/'test').rename(path/'testing')
def extra_class(path): (path/'train/pink').mkdir()
def lacking_class(path): (path/'train/red').rename(path/'red')
def empty_class(path):
    for split in ('train', 'test'): (path/split/'pink').mkdir()
def no_images(path):
    for f in path.rglob('*.png'): f.unlink()
def one_class(path):
    for split in ('train', 'test'):
        for c in ('red', 'blue'): (path/split/c).rename(path/f'{split} {c}')
def image_beside_classes(path): (path/'train/red/0.png').rename(path/'train/0.png')
def image_too_deep(path):
    (path/'train/red/more').mkdir()
    (path/'train/red/0.png').rename(path/'train/red/more/0.png')
def gone(path): path.rename(path.with_name('elsewhere'))
def a_file(path):
    gone(path)
    path.write_text('no folder')


BAD_FOLDERS = [
    (gone, 'does not exist'), (a_file, 'is a file'), (no_test_folder, 'has no folder "test"'),
    (extra_class, 'train/pink holds no images'), (lacking_class, 'train/red holds no images'),
    (empty_class, 'train/pink holds no images'), (no_images, 'holds no images'), (one_class, 'fewer than two class'),
    (image_beside_classes, 'train/0.png is not where'), (image_too_deep, 'train/red/more/0.png is not where'),
    (other_size, 'train/red/0.png is 33×32 pixels, not 32×32; --resize takes'),
    (zero_bytes, 'test/red/0.png cannot be read'), (text_as_image, 'train/red/0.png cannot be read'),
    (broken_link, 'train/red/8.png cannot be read'), (file_as_split, 'has no folder "test"'),
    (half_an_image, 'train/red/1.png cannot be read'), (first_image_half, 'train/blue/0.png cannot be read'),
    (floating_point, 'train/red/0.tif cannot be read as an image (its pixels have 32 bits'),
    (malformed_exif, 'test/red/0.png cannot be read as an image (not a TIFF file'),
    (sequence, 'train/red/8.gif cannot be read as an image (it is a sequence of images)'),
]


@pytest.mark.parametrize(('spoil', 'message'), BAD_FOLDERS, ids=lambda o: getattr(o, '__name__', ''))
def test_a_bad_folder_is_one_line_and_nothing_is_written(tmp_path, capsys, spoil, message):
    path = make_folder(tmp_path/'d', train=3, test=2)
    spoil(path)
    with pytest.raises(InputError) as e: get_dls(path, bs=8)
    assert message in str(e.value)
    assert message in ends(capsys, 2, main, data=path, out=tmp_path/'out', bs=8)
    assert not (tmp_path/'out').exists()


@pytest.mark.skipif(sys.platform == 'win32', reason='permissions of another kind')
@pytest.mark.parametrize(('closed', 'message'), [
    ('train/red/0.png', 'train/red/0.png cannot be read'), ('train/red', 'train/red'), ('test', 'test'), ('.', 'd')])
def test_no_permission(tmp_path, permissions_bind, closed, message):
    path = make_folder(tmp_path/'parent/d')
    (path/closed).resolve().chmod(0)
    with pytest.raises(InputError, match=message): get_dls(path, bs=8)
    (path/closed).resolve().chmod(0o755)


def test_names_with_spaces_and_letters_of_any_language(tmp_path):
    path = make_folder(tmp_path/'ein Ordner')
    for split in ('train', 'test'): (path/split/'red').rename(path/split/'très rouge 赤')
    assert list(get_dls(path, bs=8).vocab) == ['blue', 'green', 'très rouge 赤']


def test_files_come_sorted_whatever_the_directory_says(folder, monkeypatch):
    walk = os.walk
    monkeypatch.setattr(os, 'walk', lambda *a, **k: ((r, d[::-1], f[::-1]) for r, d, f in walk(*a, **k)))
    assert list(image_files(folder)) == sorted(folder.rglob('*.png'), key=lambda f: f.parts)


def test_images_are_decoded_without_processes_and_stop_at_once(folder, monkeypatch):
    monkeypatch.setattr(torch.utils.data, 'DataLoader', None)  # which needs shared memory
    monkeypatch.setattr('multiprocessing.process.BaseProcess.start', None)
    assert decode_images(image_files(folder)).shape == (36, 3, 32, 32)
    read, large = [], Image.new('RGB', (64, 64))
    monkeypatch.setattr(loader, 'open_image', lambda file: read.append(file) or large)
    with pytest.raises(InputError, match='64×64 pixels'): decode_images(image_files(folder))
    assert len(read) == 1, 'not after hundreds of photographs'
    assert decode_images(image_files(folder), resize=True).shape == (36, 3, 32, 32)


@pytest.mark.parametrize(('names', 'taken'), [(['test'], None), (['valid'], 'valid'), (['val'], 'val'),
                                              (['val', 'valid'], 'valid'), (['val', 'valid', 'test'], None)])
def test_test_images_may_be_in_a_folder_of_another_name(tmp_path, capsys, names, taken):
    path = make_folder(tmp_path/'d')
    (path/'test').rename(path/names[0])
    for name in names[1:]: shutil.copytree(path/names[0], path/name)
    dls = get_dls(path, bs=8)
    assert capsys.readouterr().out == (f'The test images are those in {path/taken}.\n' if taken else '')
    assert {f.parent.parent.name for f in dls.valid_ds.items} == {taken or 'test'}
    assert (len(dls.train_ds), len(dls.valid_ds)) == (24, 12)
    (path/(taken or 'test')/'red').rename(path/(taken or 'test')/'pink')
    with pytest.raises(InputError, match='train/pink holds no images'): get_dls(path, bs=8)


def test_what_is_no_image_is_left_out_and_counted(tmp_path, capsys, monkeypatch):
    """Wherever the program runs: the machine's own list of types is not asked."""
    monkeypatch.setattr('mimetypes.types_map', {})
    path = make_folder(tmp_path/'d')
    for i, suffix in enumerate(('.webp', '.JPG', '.jfif')):
        Image.open(path/f'train/red/{i}.png').save(path/f'train/red/{i}{suffix}', 'webp' if i == 0 else 'jpeg')
    for name in ('notes.txt', 'labels.json'): (path/'train/red'/name).touch()
    assert len(image_files(path)) == 36 + 3
    err = capsys.readouterr().err
    assert err.count('\n') == 1
    assert '2 files have no extension of an image and are left out' in err


def test_a_share_of_the_images_becomes_the_test_set(folder):
    dls = get_dls(folder/'train', bs=8, valid_pct=0.25)
    assert (len(dls.train_ds), len(dls.valid_ds)) == (18, 6)
    assert [f.parent.name for f in dls.valid_ds.items].count('red') == 2
    assert not {*dls.train_ds.items} & {*dls.valid_ds.items}
    assert dls.valid_ds.items == get_dls(folder/'train', bs=8, valid_pct=0.25).valid_ds.items
    assert dls.train.makes_whole_batches
