import os
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ends, make_folder
from fastai.vision.all import PILImage, Pipeline, TensorImage, cifar_stats
from PIL import Image

import data
from data import (
    MEAN_COLOUR,
    BatchDL,
    Cutout,
    FlipLR,
    PadCrop,
    RGBImage,
    decode_images,
    get_data,
    get_dls,
    image_files,
    read_image,
)
from errors import InputError
from train_fastai import main

N = 400
GREY = torch.tensor(MEAN_COLOUR, dtype=torch.uint8)[:, None, None]


@pytest.fixture
def batch():
    """Random images without a pixel of the mean colour."""
    torch.manual_seed(1)
    x = torch.randint(0, 256, (N, 3, 32, 32), dtype=torch.uint8)
    x[:, 0][x[:, 0] == MEAN_COLOUR[0]] += 1
    return TensorImage(x)


def is_grey(x): return (x == GREY).all(dim=-3)


def test_mean_colour_is_zero_once_normalised():
    for colour, mean, std in zip(MEAN_COLOUR, *cifar_stats, strict=True):
        assert abs(colour / 255 - mean) / std <= 0.5 / 255 / std


def test_pad_crop_shifts_by_up_to_four_and_pads_with_a_reflection(batch):
    out = PadCrop(4)(batch, split_idx=0)
    assert (out.shape, out.dtype, type(out)) == (batch.shape, torch.uint8, TensorImage)
    places = [4, 3, 2, 1, *range(32), 30, 29, 28, 27]
    padded = batch[:, :, places][:, :, :, places]
    shifts = set()
    for img, whole in zip(out, padded, strict=True):
        found = [(i, j) for i in range(9) for j in range(9) if (whole[:, i:i+32, j:j+32] == img).all()]
        assert len(found) == 1
        shifts.update(found)
    assert {i for i, _ in shifts} == {j for _, j in shifts} == set(range(9))
    assert len(shifts) > 70  # of 81: each image draws its own


def test_flip_mirrors_about_half_of_a_batch_and_nothing_else(batch):
    out = FlipLR()(batch, split_idx=0)
    flipped = (out == batch.flip(-1)).flatten(1).all(1)
    assert (flipped | (out == batch).flatten(1).all(1)).all()
    assert 0.4 * N < flipped.sum() < 0.6 * N  # 4 standard deviations


def test_cutout_covers_one_8x8_square_inside_the_image(batch):
    before = batch.clone()
    out = Cutout(8)(batch, split_idx=0)
    assert (batch == before).all(), 'changed its input'
    corners = set()
    for hole, img, old in zip(is_grey(out), out, before, strict=True):
        rows, cols = hole.any(1).nonzero()[:, 0], hole.any(0).nonzero()[:, 0]
        assert len(rows) == len(cols) == 8
        assert hole.sum() == 64
        assert (img == old)[:, ~hole].all()
        corners.add((rows[0].item(), cols[0].item()))
    assert {i for i, _ in corners} == {j for _, j in corners} == set(range(25))


@pytest.mark.parametrize('tfm', [PadCrop(4), FlipLR(), Cutout(8)], ids=lambda t: type(t).__name__)
class TestEachTransform:
    def test_leaves_test_images_alone(self, tfm, batch):
        assert (tfm(batch, split_idx=1) == batch).all()

    def test_image_and_batch_forms_agree(self, tfm, batch):
        one = batch[:1]
        for seed in range(20):
            torch.manual_seed(seed)
            as_batch = tfm(one, split_idx=0)[0]
            torch.manual_seed(seed)
            as_image = tfm(one[0], split_idx=0)
            assert type(as_image) is TensorImage
            assert (as_image == as_batch).all()

    def test_draws_anew_for_each_image(self, tfm, batch):
        same = TensorImage(batch[:1].repeat(64, 1, 1, 1))
        assert len({img.numpy().tobytes() for img in tfm(same, split_idx=0)}) > 1


def test_transforms_come_in_the_assignments_order():
    assert [type(t) for t in Pipeline([Cutout(), FlipLR(), PadCrop()]).fs] == [PadCrop, FlipLR, Cutout]


@pytest.mark.parametrize('stock', [False, True])
def test_loaders(folder, stock):
    dls = get_dls(folder, bs=8, stock_loader=stock, num_workers=0)
    assert isinstance(dls.train, BatchDL) != stock
    assert (len(dls.train_ds), len(dls.valid_ds), len(dls.train), len(dls.valid)) == (24, 12, 3, 2)
    assert list(dls.vocab) == ['blue', 'green', 'red']
    x, y = dls.train.one_batch()
    assert (x.shape, x.dtype, y.shape) == ((8, 3, 32, 32), torch.float32, (8,))
    means = torch.tensor(cifar_stats[0])[:, None, None], torch.tensor(cifar_stats[1])[:, None, None]
    seen = []
    for x, y in dls.valid:  # test images: as in the files, normalised, in order, none left out
        for img, label in zip(x, y, strict=True):
            file = dls.valid_ds.items[len(seen)]
            pixels = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
            torch.testing.assert_close(img.as_subclass(torch.Tensor), (pixels - means[0]) / means[1])
            assert dls.vocab[label] == file.parent.name
            seen.append(file)
    assert seen == list(dls.valid_ds.items) == sorted(seen)


@pytest.mark.parametrize('stock', [False, True])
def test_training_images_are_each_padded_cropped_flipped_and_cut_and_test_images_are_not(tmp_path, stock):
    """On images whose red tells the column and whose green the row that a pixel came from."""
    path = make_folder(tmp_path/'d')
    place = np.arange(32, dtype='uint8') * 4
    image = np.stack(np.broadcast_arrays(place, place[:, None], np.uint8(250)), -1)
    for file in path.rglob('*.png'): Image.fromarray(image).save(file)
    torch.manual_seed(0)
    dls = get_dls(path, bs=8, stock_loader=stock, num_workers=0)
    mean, std = (torch.tensor(o)[:, None, None] for o in cifar_stats)

    def pixels(batch): return ((batch[0].as_subclass(torch.Tensor) * std + mean) * 255).round().int()

    for batch in dls.valid: assert (pixels(batch) == torch.from_numpy(image).permute(2, 0, 1)).all()
    i, j = torch.meshgrid(torch.arange(32), torch.arange(32), indexing='ij')
    seen = []
    for img in [img for _ in range(5) for batch in dls.train for img in pixels(batch)]:
        covered = img[2] != 250
        inside = ~covered & (i >= 4) & (i < 28) & (j >= 4) & (j < 28)  # never padding
        column, row = img[0, inside] // 4, img[1, inside] // 4
        flipped = (column - j[inside]).unique().numel() > 1
        dx = (column + j[inside] - 31 if flipped else column - j[inside]).unique()
        dy = (row - i[inside]).unique()
        assert len(dx) == len(dy) == 1
        dx, dy = dx.item(), dy.item()
        x, y = (31 - j if flipped else j) + dx, i + dy
        x, y = (31 - (31 - o.abs()).abs() for o in (x, y))  # reflected at the border
        assert (img[0] == 4 * x)[~covered].all()
        assert (img[1] == 4 * y)[~covered].all()
        seen.append((dx, dy, flipped, covered.sum().item()))
    dxs, dys, flips, holes = zip(*seen, strict=True)
    assert set(dxs) == set(dys) == set(range(-4, 5))
    assert 40 < sum(flips) < 80  # of 120
    assert set(holes) == {64}
    for k in (0, 1, 2): assert any(len({o[k] for o in seen[b:b + 8]}) > 1 for b in range(0, 120, 8)), 'one a batch'


def test_an_epoch_shows_every_training_image_once_and_anew_each_time(folder):
    dls = get_dls(folder, bs=8)
    dls.train_ds.images = torch.arange(24, dtype=torch.uint8)[:, None, None, None].expand(24, 3, 32, 32).contiguous()
    mean, std = (o[0] for o in cifar_stats)
    epochs = [torch.cat([((x[:, 0] * std + mean) * 255).round().flatten(1).mode(1).values for x, _ in dls.train])
              for _ in range(2)]
    assert sorted(epochs[0].tolist()) == sorted(epochs[1].tolist()) == list(range(24))
    assert epochs[0].tolist() != epochs[1].tolist()


def test_both_loaders_show_the_same_distribution(tmp_path):
    make_folder(tmp_path/'d', train=64, test=1)
    moments = []
    for stock in (False, True):
        torch.manual_seed(0)
        dls = get_dls(tmp_path/'d', bs=64, stock_loader=stock, num_workers=0)
        grey, total = torch.zeros(32, 32), 0.
        for _ in range(4):
            for x, _ in dls.train:
                x = x.as_subclass(torch.Tensor)
                grey += (x.abs() < 0.01).all(1).sum(0)
                total += x.mean((0, 2, 3))
        moments.append((grey / (4 * 192), total / (4 * 3)))
    # How often a pixel is in the hole, by place (binomial, 768 draws), and the mean colour
    assert (moments[0][0] - moments[1][0]).abs().max() < 5.5 * (2 * 0.25 / 768) ** 0.5
    assert (moments[0][0].mean() - moments[1][0].mean()).abs() < 0.01
    assert (moments[0][1] - moments[1][1]).abs().max() < 0.05


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
        dls = get_dls(path, bs=8, stock_loader=stock, num_workers=0)
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
def no_test_folder(path): (path/'test').rename(path/'valid')
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
    (image_beside_classes, 'train/0.png is not where'), (image_too_deep, 'train/red/more/0.png lies too deep'),
    (other_size, 'train/red/0.png is 33×32 pixels'),
    (zero_bytes, 'test/red/0.png cannot be read'), (text_as_image, 'train/red/0.png cannot be read'),
    (broken_link, 'train/red/8.png cannot be read'), (file_as_split, 'has no folder "test"'),
    (no_unicode, r"red/caf\xe9.png' is a name that cannot"), (line_break, r"red/a\nb.png' is a name that cannot"),
    (half_an_image, 'train/red/1.png cannot be read'),
    (floating_point, 'train/red/0.tif cannot be read as an image (its pixels have more than 8 bits'),
    (first_image_half, 'train/blue/0.png cannot be read'), (other_letters, 'composed differently (in Unicode)'),
    (sequence, 'train/red/8.gif cannot be read as an image (it is a sequence of images)'),
]


@pytest.mark.parametrize(('spoil', 'message'), BAD_FOLDERS, ids=lambda o: getattr(o, '__name__', ''))
def test_a_bad_folder_is_named_in_one_line_and_nothing_is_written(tmp_path, capsys, spoil, message):
    path = make_folder(tmp_path/'d')
    spoil(path)
    with pytest.raises(InputError) as e: get_dls(path, bs=8, stock_loader=True)
    assert message in str(e.value)
    assert message in ends(capsys, 2, main, data=path, out=tmp_path/'out', bs=8)
    assert not (tmp_path/'out').exists()


def test_fewer_training_images_than_a_batch(folder):
    with pytest.raises(InputError, match='24 training images, fewer than one batch of 25'): get_dls(folder, bs=25)


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


def test_the_genuine_cifar10(cifar10):
    files = image_files(cifar10)
    assert len(files) == 60_000
    images = decode_images(files[10_000:][::50]).float() / 255
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.tensor(cifar_stats[0]), atol=0.01, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.tensor(cifar_stats[1]), atol=0.01, rtol=0)


def test_a_given_folder_is_not_downloaded(folder): assert get_data(str(folder)) == folder


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
    monkeypatch.setattr(data, 'read_image', lambda file: read.append(file) or torch.zeros(3, 64, 64, dtype=torch.uint8))
    with pytest.raises(InputError, match='64×64 pixels'): decode_images(image_files(folder))
    assert len(read) == 1


def test_plain_images_are_left_to_torchvision_and_without_its_decoder_to_pillow(folder, monkeypatch):
    files = image_files(folder)
    with monkeypatch.context() as m:
        m.setattr(Image, 'open', None)
        fast = decode_images(files)
    monkeypatch.setattr(torch.ops, 'image', SimpleNamespace())  # torchvision will remove it
    assert decode_images(files).equal(fast)


def test_cifar10_is_counted_as_it_is_loaded(folder, tmp_path, monkeypatch):
    """Through a link to another disk, and without what is hidden."""
    (tmp_path/'cifar10').mkdir()
    for split in ('train', 'test'): (tmp_path/'cifar10'/split).symlink_to(folder/split)
    (tmp_path/'cifar10/.ipynb_checkpoints').mkdir()
    Image.new('RGB', (32, 32)).save(tmp_path/'cifar10/.ipynb_checkpoints/0.png')
    monkeypatch.setattr(data, 'CIFAR_IMAGES', 36)
    monkeypatch.setattr(data, 'untar_data', lambda _: tmp_path/'cifar10')
    assert get_data() == tmp_path/'cifar10'
