import errno
import hashlib
import http.server
import pickle
import re
import shutil
import socket
import tarfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import args, ends, make_folder, read_metrics
from fastai.vision import all as fv
from PIL import Image
from torchvision.datasets import CIFAR10

from lab import sources
from lab.errors import InputError
from lab.loader import decode_images, image_files
from lab.runs import PRESETS, Run, parse_options
from lab.sources import get_data, get_sample
from train_fastai import Options, PadCrop, get_dls, get_learner, main

N = 36  # images in every copy of CIFAR-10 here, and in the sample


def set_server(monkeypatch, port: int):
    monkeypatch.setattr(fv.URLs, 'CIFAR', f'http://127.0.0.1:{port}/cifar10.tgz')
    monkeypatch.setattr(CIFAR10, 'url', f'http://127.0.0.1:{port}/cifar-10-python.tar.gz')


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Where fastai keeps its data in this test. CIFAR-10 has `N` images, and no server of it can be reached."""
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path/'home'))
    monkeypatch.setattr(sources, 'SIZES', dict.fromkeys(sources.SIZES, N))
    with socket.create_server(('127.0.0.1', 0)) as closed: set_server(monkeypatch, closed.getsockname()[1])
    fv.fastai_cfg.cache_clear()  # which would keep the true home
    yield tmp_path/'home'
    fv.fastai_cfg.cache_clear()


def listing(home: Path) -> list[str]:
    """What lies in fastai's data folder."""
    return sorted(f.name for f in (home/'data').glob('*'))


@pytest.fixture
def server(folder, tmp_path, monkeypatch):
    """A server of what lies in `files`, at first fastai's copy with `N` images; of a file it sends `n` bytes."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        def copyfile(self, source, out): out.write(source.read(self.server.n))
        def log_message(self, *_): pass
    (files := tmp_path/'files').mkdir()
    with tarfile.open(files/'cifar10.tgz', 'w:gz') as tar: tar.add(folder, 'cifar10')
    with http.server.HTTPServer(('127.0.0.1', 0), partial(Handler, directory=files)) as server:
        server.files, server.n = files, None
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        set_server(monkeypatch, server.server_port)
        yield server
        server.shutdown()


@pytest.fixture
def batches(tmp_path, monkeypatch) -> Path:
    """torchvision's copy of a CIFAR-10 of `N` images of three classes, unpacked and packed, in a folder."""
    rng, folder = np.random.default_rng(0), tmp_path/'batches'/CIFAR10.base_folder
    folder.mkdir(parents=True)
    def write(name, content):
        (folder/name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder/name).read_bytes()).hexdigest()
    for name, attribute, n in (('data_batch_1', 'train_list', 24), ('test_batch', 'test_list', N - 24)):
        batch = dict(data=rng.integers(0, 256, (n, 3072), dtype=np.uint8), labels=[i % 3 for i in range(n)])
        monkeypatch.setattr(CIFAR10, attribute, [[name, write(name, batch)]])
    md5 = write('batches.meta', dict(label_names=['cat', 'dog', 'ship']))
    monkeypatch.setattr(CIFAR10, 'meta', CIFAR10.meta | dict(md5=md5))
    with tarfile.open(folder.parent/CIFAR10.filename, 'w:gz') as tar: tar.add(folder, CIFAR10.base_folder)
    return folder.parent


@pytest.fixture
def small_sample(tmp_path, monkeypatch) -> Path:
    """An archive in place of the sample's, of three classes, in a folder with a space and an umlaut."""
    archive = tmp_path/'the sämple/cifar10_sample.tgz'
    archive.parent.mkdir()
    with tarfile.open(archive, 'w:gz') as tar: tar.add(make_folder(tmp_path/'made'), 'cifar10_sample')
    monkeypatch.setattr(sources, 'SAMPLE', archive)
    return archive


def test_cifar10_is_found_through_links_to_another_disk(folder, home):
    assert get_data(str(folder)) == folder, 'a folder that is given is taken as it is'
    path = home/'data/cifar10'
    path.mkdir(parents=True)
    for split in ('train', 'test'): (path/split).symlink_to(folder/split)
    (path/'.ipynb_checkpoints').mkdir()
    Image.new('RGB', (32, 32)).save(path/'.ipynb_checkpoints/0.png')
    assert get_data() == path


@pytest.mark.parametrize('fault', ['it is half', 'it is no archive', 'the connection is lost'])
def test_failed_download_is_one_line_and_leaves_nothing(server, home, tmp_path, capsys, fault):
    whole, lost = (archive := server.files/'cifar10.tgz').read_bytes(), fault == 'the connection is lost'
    if lost: server.n = 1000
    else: archive.write_bytes(whole[:1000] if fault == 'it is half' else b'<html>')
    message = ends(capsys, 2, main, epochs=23, out=tmp_path/'out')
    assert re.search(r'CIFAR-10 could not be read \(cifar10: .*\); check network.* add --quick, which', message)
    assert (listing(home), (tmp_path/'out').exists()) == ([], False)
    with pytest.raises(InputError): get_data()
    archive.write_bytes(whole)
    server.n = None
    assert len(image_files(get_data())) == N


def test_incomplete_data_set_is_refused_and_kept(folder, home):
    shutil.copytree(folder, path := home/'data/cifar10')
    (path/'train/red/0.png').unlink()
    with pytest.raises(InputError, match=f'{path} does not hold all of its images'): get_data()
    assert len(list(path.rglob('*.png'))) == N - 1


def test_silent_servers_are_given_up(home, monkeypatch):
    monkeypatch.setattr(sources, 'TIMEOUT', 0.1)
    with socket.create_server(('127.0.0.1', 0)) as silent:
        set_server(monkeypatch, silent.getsockname()[1])
        with pytest.raises(InputError, match=r'cifar10: .*timed out; cifar10_torchvision: .*timed out'): get_data()
    assert listing(home) == []


def test_torchvisions_copy_is_downloaded_where_fastais_is_not(server, batches):
    (batches/CIFAR10.filename).rename(server.files/CIFAR10.filename)
    (server.files/'cifar10.tgz').unlink()
    path = get_data()
    assert (path.name, len(image_files(path))) == ('cifar10_torchvision', N)
    server.shutdown()
    assert get_data() == path, 'downloaded again'


@pytest.mark.parametrize(('given', 'absent'), [('', CIFAR10.filename), (CIFAR10.filename, CIFAR10.base_folder)])
def test_torchvisions_copy_is_read_and_left_alone(home, batches, permissions_bind, given, absent):
    raw = pickle.loads((batches/CIFAR10.base_folder/'test_batch').read_bytes())
    (batches/absent).rename(batches.parent/absent)
    before = {batches, *batches.rglob('*')}
    for o in before: o.chmod(0o555 if o.is_dir() else 0o444)
    path = get_data(batches/given)
    assert {batches, *batches.rglob('*')} == before
    assert (listing(home), len(image_files(path))) == (['cifar10_torchvision'], N)
    for i, (pixels, label) in enumerate(zip(raw['data'], raw['labels'], strict=True)):
        image = np.asarray(Image.open(path/'test'/['cat', 'dog', 'ship'][label]/f'{i:05}.png'))
        assert (image == pixels.reshape(3, 32, 32).transpose(1, 2, 0)).all()


@pytest.mark.parametrize('name', ['cifar-10-batches-py/data_batch_1', 'cifar-10-batches-py/batches.meta'])
def test_damaged_batch_file_is_never_unpickled(home, batches, tmp_path, capsys, monkeypatch, name):
    content = bytearray((batches/name).read_bytes())
    content[20] ^= 1
    (batches/name).write_bytes(content)
    monkeypatch.setattr(pickle, 'load', None)
    message = ends(capsys, 2, main, data=batches, out=tmp_path/'out')
    assert re.search('could not be read.*; check the files\n', message)
    assert listing(home) == []


def test_full_disk_leaves_nothing_half_written(home, small_sample, monkeypatch):
    def full_disk(*_, **__): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(tarfile.TarFile, 'makefile', full_disk)
        with pytest.raises(InputError, match='No space left on device.*; a clone of'): get_sample()
    assert listing(home) == []
    assert len(image_files(get_sample())) == N


def test_folder_that_fastai_cannot_make_is_one_line(tmp_path, home, permissions_bind, capsys):
    tmp_path.chmod(0o555)
    assert f"Permission denied: '{home}'" in ends(capsys, 1, main, quick=True, out=tmp_path/'out')
    tmp_path.chmod(0o755)


def test_the_sample_is_a_tenth_of_cifar10(sample):
    """Of the genuine one, every tenth image of each class."""
    files = image_files(sample)
    assert [len([*sample.glob(o)]) for o in ('train/*', 'train/*/*', 'test/*/*')] == [10, 5000, 1000]
    assert {len([*folder.iterdir()]) for folder in sample.glob('*/*')} == {500, 100}
    images = decode_images(files[1000::3]).float() / 255
    for of, expected in zip((images.mean, images.std), fv.cifar_stats, strict=True):
        assert of((0, 2, 3)).tolist() == pytest.approx(expected, abs=0.01)


def test_bare_command_without_a_network_is_a_quick_look(small_sample, tmp_path, capsys, monkeypatch, no_pictures):
    """To its end, and the result says so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, 'quick', dict(epochs=2, bs=8))
    monkeypatch.setattr('train_fastai.find_lrs', lambda _, **__: (1e-4, 1e-3))
    monkeypatch.setattr('train_fastai.save_finder', lambda *_: None)
    main([])
    told = 'CIFAR-10 could not be read.* this is a quick look at the sample'
    assert re.search(told, capsys.readouterr().out, re.DOTALL)
    folder, = (tmp_path/'runs').iterdir()
    assert (folder/'report.md').read_text().startswith('# Quick look: ')
    m = read_metrics(folder)
    assert (m['options']['quick'], m['epochs'], m['batch_size'], m['train_images']) == (True, 2, 8, 24)


def test_quick_look_takes_all_of_the_sample_else_a_tenth(small_sample, folder):
    def images(**options): return Run(parse_options(Options, args(quick=True, out='none', **options))).locate_images()
    assert images(data=str(folder)) == dict(path=folder, bs=64, every=10, resize=False)
    assert images() == dict(path=get_sample(), bs=64, every=1, resize=False)
    assert images(bs=8, resize=True) == dict(path=get_sample(), bs=8, every=1, resize=True)


@pytest.fixture(scope='module')
def mixed(tmp_path_factory) -> Path:
    """A data folder of images of four sizes."""
    path = make_folder(tmp_path_factory.mktemp('data')/'mixed')
    for i, file in enumerate(sorted(path.rglob('*.png'))):
        Image.open(file).resize([(64, 64), (50, 40), (32, 32), (28, 28)][i % 4]).save(file)
    return path


@pytest.mark.parametrize('options', [
    dict(resize=True, batch_tfms=fv.aug_transforms()), dict(item_tfms=[fv.Resize(40), PadCrop(4), fv.RandomCrop(32)]),
    dict(item_tfms=[fv.Resize(40)], batch_tfms=fv.aug_transforms(size=32))])
def test_images_of_any_size_are_trained_on(mixed, options):
    """By the centre square, or as a transform of fastai's has it."""
    dls = get_dls(mixed, bs=8, **options)
    assert {x.shape for dl in (dls.train, dls.valid) for x, _ in dl} == {(8, 3, 32, 32), (4, 3, 32, 32)}
    learn = get_learner(dls)
    learn.fit(1, 1e-3)
    assert learn.history.rows[0]['test_loss'] > 0
    assert learn.predict(mixed/'test/red/0.png')[0] in dls.vocab


def test_a_transform_that_resizes_comes_first(mixed):
    squish = fv.Resize(32, method='squish')
    dls = get_dls(mixed, bs=8, item_tfms=[squish])
    for file, (x, _) in zip(dls.valid_ds.items, map(dls.valid.after_item, dls.valid_ds), strict=True):
        assert (x.permute(1, 2, 0).numpy() == np.asarray(squish(fv.PILImage.create(file), split_idx=1))).all()
