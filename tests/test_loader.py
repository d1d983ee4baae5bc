import os
import random
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ends, make_folder
from fastai.vision.all import PILImage, cifar_stats
from PIL import Image

from lab import loader
from lab.errors import InputError
from lab.loader import RGBImage, decode_images, image_files, read_image
from train_fastai import get_dls, main


def test_an_epoch_shows_every_training_image_once_and_anew_each_time(folder):
    dls = get_dls(folder, bs=8)
    dls.train_ds.images = torch.arange(24, dtype=torch.uint8)[:, None, None, None].expand(24, 3, 32, 32).contiguous()
    mean, std = (o[0] for o in cifar_stats)
    epochs = [torch.cat([((x[:, 0] * std + mean) * 255).round().flatten(1).mode(1).values for x, _ in dls.train])
              for _ in range(2)]
    assert sorted(epochs[0].tolist()) == sorted(epochs[1].tolist()) == list(range(24))
    assert epochs[0].tolist() != epochs[1].tolist()


def test_what_a_fastai_user_does_with_a_loader_works(folder):
    dls = get_dls(folder, bs=8)
    dls.show_batch(max_n=4)
    dls.train.show_batch(max_n=4, unique=True)
    dls.show_batch(unique=True)
    files = dls.valid_ds.items[3:6]
    x, = dls.test_dl(files).one_batch()
    torch.testing.assert_close(x, dls.valid.one_batch()[0][3:6])
    x, y = dls.test_dl(files, with_labels=True).one_batch()
    assert [dls.vocab[i] for i in y] == [f.parent.name for f in files]
    x, = dls.test_dl([PILImage.create(files[0])]).one_batch()
    torch.testing.assert_close(x[0], dls.valid.one_batch()[0][3])


def test_shuffling_is_seeded_by_the_loaders_generator(folder):
    dls = get_dls(folder, bs=8)
    orders = []
    for _ in range(2):
        dls.train.rng = random.Random(5)
        orders.append([y.tolist() for _, y in dls.train])
    assert orders[0] == orders[1]


def save(path, array, **kwargs):
    path.unlink(missing_ok=True)
    Image.fromarray(array, **kwargs).save(path)


def test_grey_alpha_palette_wide_and_turned_images_become_upright_rgb(tmp_path):
    path = make_folder(tmp_path/'d')
    files = sorted((path/'train/red').iterdir())
    grey = np.arange(1024, dtype='uint8').reshape(32, 32)
    colour = np.stack([grey, grey.T, 255 - grey], -1)
    save(files[0], grey)
    save(files[1], np.concatenate([colour, np.full((32, 32, 1), 255, 'uint8')], -1))
    files[2].unlink()
    Image.fromarray(colour).quantize(256).save(files[2])
    save(files[3], np.stack([grey, np.full((32, 32), 255, 'uint8')], -1))
    files[4].unlink()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(colour).save(files[4], exif=exif)
    files[5].unlink()
    Image.fromarray(grey.astype('uint16') * 257).save(files[5])
    images = decode_images(files)
    assert (images[4] == torch.from_numpy(colour[::-1, ::-1].copy()).permute(2, 0, 1)).all()
    assert (images[5] == torch.from_numpy(grey)).all()
    for stock in (False, True):  # and the other ways to read an image agree
        dls = get_dls(path, bs=8, num_workers=0 if stock else None)
        x, = dls.test_dl(files[:6]).one_batch()
        mean, std = (torch.tensor(o)[:, None, None] for o in cifar_stats)
        torch.testing.assert_close(x.as_subclass(torch.Tensor), (images[:6] / 255 - mean) / std)
    assert (images.shape, images.dtype) == ((8, 3, 32, 32), torch.uint8)
    for i in range(4):
        expected = torch.from_numpy(np.array(Image.open(files[i]).convert('RGB'))).permute(2, 0, 1)
        assert (images[i] == expected).all(), i


def other_size(path): save(path/'train/red/0.png', np.zeros((32, 33, 3), 'uint8'))
def zero_bytes(path): (path/'test/red/0.png').write_bytes(b'')
def text_as_image(path): (path/'train/red/0.png').write_text('hello')
def half_an_image(path): (path/'train/red/1.png').write_bytes((path/'train/red/1.png').read_bytes()[:300])
def first_image_half(path): (path/'train/blue/0.png').write_bytes((path/'train/blue/0.png').read_bytes()[:300])


def malformed_exif(path):
    """As a camera's faulty software leaves it; some readers pass over it."""
    Image.new('RGB', (32, 32)).save(path/'test/red/0.png', exif=b'Exif\0\0no TIFF at all')


def other_letters(path):
    (path/'train/red').rename(path/'train/caf\u00e9')
    (path/'test/red').rename(path/'test/cafe\u0301')


def floating_point(path):
    (path/'train/red/0.png').unlink()
    Image.fromarray(np.zeros((32, 32), 'float32')).save(path/'train/red/0.tif')


def sequence(path): Image.new('RGB', (32, 32)).save(path/'train/red/8.gif', save_all=True, append_images=[
    Image.new('RGB', (32, 32), 'red')])
def broken_link(path): (path/'train/red/8.png').symlink_to('nowhere.png')
def file_as_split(path):
    (path/'test').rename(path/'rest')
    (path/'test').touch()


def no_unicode(path): os.rename(path/'train/red/0.png', os.fsencode(path/'train/red/caf') + b'\xe9.png')
def line_break(path): (path/'train/red/0.png').rename(path/'train/red/a\nb.png')
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
    (extra_class, 'class "pink" is in'), (lacking_class, 'class "red" is in'),
    (empty_class, 'train/pink holds no images'), (no_images, 'holds no images'), (one_class, 'fewer than two class'),
    (image_beside_classes, 'train/0.png is not where'), (image_too_deep, 'train/red/more/0.png is nested too deeply'),
    (other_size, 'train/red/0.png is 33×32 pixels'),
    (zero_bytes, 'test/red/0.png cannot be read'), (text_as_image, 'train/red/0.png cannot be read'),
    (broken_link, 'train/red/8.png cannot be read'), (file_as_split, 'has no folder "test"'),
    (no_unicode, r"red/caf\xe9.png' cannot be printed"), (line_break, r"red/a\nb.png' cannot be printed"),
    (half_an_image, 'train/red/1.png cannot be read'),
    (floating_point, 'train/red/0.tif cannot be read as an image (its pixels have 32 bits'),
    (first_image_half, 'train/blue/0.png cannot be read'), (other_letters, 'composed differently (in Unicode)'),
    (malformed_exif, 'test/red/0.png cannot be read as an image (not a TIFF file'),
    (sequence, 'train/red/8.gif cannot be read as an image (it is a sequence of images)'),
]


@pytest.mark.parametrize(('spoil', 'message'), BAD_FOLDERS, ids=lambda o: getattr(o, '__name__', ''))
def test_a_bad_folder_is_named_in_one_line_and_nothing_is_written(tmp_path, capsys, spoil, message):
    path = make_folder(tmp_path/'d')
    spoil(path)
    with pytest.raises(InputError) as e: get_dls(path, bs=8, num_workers=0)
    assert message in str(e.value)
    assert message in ends(capsys, 2, main, data=path, out=tmp_path/'out', bs=8)
    assert not (tmp_path/'out').exists()


def test_names_with_spaces_and_letters_of_any_language(tmp_path):
    path = make_folder(tmp_path/'ein Ordner')
    for split in ('train', 'test'): (path/split/'red').rename(path/split/'très rouge 赤')
    assert list(get_dls(path, bs=8).vocab) == ['blue', 'green', 'très rouge 赤']


@pytest.mark.skipif(sys.platform == 'win32', reason='permissions of another kind')
@pytest.mark.parametrize(('closed', 'message'), [
    ('train/red/0.png', 'train/red/0.png cannot be read'), ('train/red', 'train/red cannot be read'),
    ('test', 'test cannot be read'), ('.', 'd cannot be read'), ('..', 'd does not exist')])
def test_no_permission(tmp_path, permissions_bind, closed, message):
    path = make_folder(tmp_path/'parent/d')
    (path/closed).resolve().chmod(0)
    with pytest.raises(InputError, match=message): get_dls(path, bs=8)
    (tmp_path/'parent').chmod(0o755)
    (path/closed).resolve().chmod(0o755)


def test_files_come_sorted_whatever_the_directory_says(folder, monkeypatch):
    walk = os.walk
    monkeypatch.setattr(os, 'walk', lambda *a, **k: ((r, d[::-1], f[::-1]) for r, d, f in walk(*a, **k)))
    assert list(image_files(folder)) == sorted(folder.rglob('*.png'), key=lambda f: f.parts)


def test_what_is_transparent_is_white_for_every_reader(tmp_path):
    pixels = np.zeros((32, 32, 4), 'uint8')
    pixels[:, :, 0], pixels[8:24, 8:24, 3] = 200, 255  # red, also where it cannot be seen
    rgba = Image.fromarray(pixels)
    rgba.save(tmp_path/'rgba.png')
    rgba.save(tmp_path/'rgba.webp', lossless=True)
    palette = Image.fromarray(pixels[:, :, 3] // 255, 'P')
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.save(tmp_path/'palette.png', transparency=0)
    for name in ('rgba.png', 'rgba.webp', 'palette.png'):
        image = read_image(tmp_path/name)
        assert (image[:, 16, 16] == torch.tensor([200, 0, 0])).all()
        assert (image[:, 0, 0] == 255).all()
        assert (np.asarray(RGBImage.create(tmp_path/name)) == image.permute(1, 2, 0).numpy()).all()


def test_images_are_read_without_shared_memory_or_processes(folder, monkeypatch):
    monkeypatch.setattr(torch.utils.data, 'DataLoader', None)
    monkeypatch.setattr('multiprocessing.process.BaseProcess.start', None)
    assert decode_images(image_files(folder)).shape == (36, 3, 32, 32)


def test_images_of_another_size_are_told_of_at_once(folder, monkeypatch):
    """Not after hundreds of photographs have been read."""
    read = []
    large = torch.zeros(3, 64, 64, dtype=torch.uint8)
    monkeypatch.setattr(loader, 'read_image', lambda file: read.append(file) or large)
    with pytest.raises(InputError, match='64×64 pixels'): decode_images(image_files(folder))
    assert len(read) == 1


def test_plain_images_are_left_to_torchvision_and_without_its_decoder_to_pillow(folder, monkeypatch):
    files = image_files(folder)
    with monkeypatch.context() as m:
        m.setattr(Image, 'open', None)
        fast = decode_images(files)
    monkeypatch.setattr(torch.ops, 'image', SimpleNamespace())  # torchvision will remove it
    assert decode_images(files).equal(fast)


@pytest.mark.parametrize(('names', 'taken'), [(['test'], None), (['valid'], 'valid'), (['val'], 'val'),
                                              (['val', 'valid'], 'valid'), (['val', 'valid', 'test'], None)])
def test_test_images_may_be_in_a_folder_with_another_name_which_is_told(tmp_path, capsys, names, taken):
    path = make_folder(tmp_path/'d')
    (path/'test').rename(path/names[0])
    for name in names[1:]: shutil.copytree(path/names[0], path/name)
    dls = get_dls(path, bs=8)
    assert capsys.readouterr().out == (f'The test images are those in {path/taken}.\n' if taken else '')
    assert {f.parent.parent.name for f in dls.valid_ds.items} == {taken or 'test'}
    assert (len(dls.train_ds), len(dls.valid_ds)) == (24, 12)


def test_classes_of_a_folder_with_another_name_are_compared_too(tmp_path):
    path = make_folder(tmp_path/'d')
    (path/'test').rename(path/'val')
    (path/'val/red').rename(path/'val/pink')
    with pytest.raises(InputError, match='class "pink" is in .*/val but not in .*/train'): get_dls(path, bs=8)
