import errno
import hashlib
import http.server
import json
import pickle
import shutil
import socket
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import args, ends, make_folder
from fastai.data.external import fastai_cfg
from fastai.vision.all import (
    FlipItem,
    PILImage,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    URLs,
    aug_transforms,
    cifar_stats,
)
from PIL import Image
from torchvision.datasets import CIFAR10

from lab import sources
from lab.errors import InputError
from lab.loader import decode_images, image_files
from lab.results import list_augmentations
from lab.runs import Run
from lab.sources import NetworkError, get_data, get_sample
from predict import load_run
from train_fastai import FlipLR, Options, PadCrop, get_dls, get_learner, main

N = 36  # images in every copy of CIFAR-10 here, and in the sample


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Where fastai keeps its data in this test. CIFAR-10 has `N` images, and no server of it can be reached."""
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path/'home'))
    monkeypatch.setattr(sources, 'SIZES', dict.fromkeys(sources.SIZES, N))
    with socket.create_server(('127.0.0.1', 0)) as closed: set_server(monkeypatch, closed.getsockname()[1])
    fastai_cfg.cache_clear()  # which would keep the true home
    yield tmp_path/'home'
    fastai_cfg.cache_clear()


def set_server(monkeypatch, port: int):
    monkeypatch.setattr(URLs, 'CIFAR', f'http://127.0.0.1:{port}/cifar10.tgz')
    monkeypatch.setattr(CIFAR10, 'url', f'http://127.0.0.1:{port}/cifar-10-python.tar.gz')


def listing(home: Path) -> list[str]:
    """What lies in fastai's data folder."""
    return sorted(f.name for f in (home/'data').glob('*'))


@pytest.fixture
def server(folder, tmp_path, monkeypatch):
    """A server of fastai's copy, as `send` makes it from an archive of `N` images, and of torchvision's `batches`."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = self.server.send(fastais) if self.path == '/cifar10.tgz' else self.server.batches
            self.send_response(200 if content else 404)
            self.send_header('Content-Length', str(len(content) + (self.server.send is is_lost)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_): pass
    (tmp_path/'cifar10').symlink_to(folder)
    fastais = Path(shutil.make_archive(tmp_path/'archive', 'gztar', folder.parent, folder.name)).read_bytes()
    with http.server.HTTPServer(('127.0.0.1', 0), Handler) as server:
        server.send, server.batches = lambda archive: archive, b''
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        set_server(monkeypatch, server.server_port)
        yield server
        server.shutdown()


@pytest.fixture
def batches(tmp_path, monkeypatch) -> Path:
    """torchvision's copy of a CIFAR-10 of `N` images of three classes, unpacked and packed, in a folder."""
    rng, folder = np.random.default_rng(0), tmp_path/'batches'/CIFAR10.base_folder
    folder.mkdir(parents=True)
    for name, n in [(name, N // 9) for name, _ in CIFAR10.train_list] + [('test_batch', N - 5 * (N // 9))]:
        batch = dict(data=rng.integers(0, 256, (n, 3072), dtype=np.uint8), labels=[i % 3 for i in range(n)])
        (folder/name).write_bytes(pickle.dumps(batch))
    (folder/'batches.meta').write_bytes(pickle.dumps(dict(label_names=['cat', 'dog', 'ship'])))
    with tarfile.open(folder.parent/CIFAR10.filename, 'w:gz') as tar: tar.add(folder, CIFAR10.base_folder)
    sums = {f.name: hashlib.md5(f.read_bytes()).hexdigest() for f in folder.iterdir()}
    for attribute in ('train_list', 'test_list'):
        monkeypatch.setattr(CIFAR10, attribute, [[name, sums[name]] for name, _ in getattr(CIFAR10, attribute)])
    monkeypatch.setattr(CIFAR10, 'meta', CIFAR10.meta | dict(md5=sums['batches.meta']))
    return folder.parent


@pytest.fixture
def small_sample(tmp_path, monkeypatch) -> Path:
    """An archive in place of the sample's, of three classes, in a folder with a space and an umlaut."""
    archive = tmp_path/'the sämple/cifar10_sample.tgz'
    archive.parent.mkdir()
    with tarfile.open(archive, 'w:gz') as tar: tar.add(make_folder(tmp_path/'made'), 'cifar10_sample')
    monkeypatch.setattr(sources, 'SAMPLE', archive)
    return archive


def test_given_folder_is_taken_as_it_is(folder): assert get_data(str(folder)) == folder


def test_cifar10_is_found_through_links_to_another_disk(folder, home):
    path = home/'data/cifar10'
    path.mkdir(parents=True)
    for split in ('train', 'test'): (path/split).symlink_to(folder/split)
    (path/'.ipynb_checkpoints').mkdir()
    Image.new('RGB', (32, 32)).save(path/'.ipynb_checkpoints/0.png')
    assert get_data() == path


def is_half(archive): return archive[:len(archive) // 2]
def is_no_archive(archive): return b'<html>'.ljust(len(archive))
def loses_its_end(archive): return is_half(archive).ljust(len(archive), b'\0')
def is_lost(archive): return is_half(archive)  # the connection


@pytest.mark.parametrize('fault', [is_half, is_no_archive, loses_its_end, is_lost])
def test_failed_download_is_one_line_and_leaves_nothing(server, home, tmp_path, capsys, fault):
    whole, server.send = server.send, fault
    assert 'CIFAR-10 could not be read (cifar10: ' in ends(capsys, 2, main, seed=43, out=tmp_path/'out')
    assert (listing(home), (tmp_path/'out').exists()) == ([], False)
    with pytest.raises(InputError) as e: get_data()
    assert (e.type is NetworkError) == (fault is is_lost), 'a damaged archive is no reason for a quick look'
    server.send = whole
    assert len(image_files(get_data())) == N


@pytest.mark.parametrize(('name', 'get'), [('cifar10', get_data), ('cifar10_sample', get_sample)])
def test_incomplete_data_set_is_refused_and_kept(folder, home, small_sample, name, get):
    shutil.copytree(folder, path := home/'data'/name)
    (path/'train/red/0.png').unlink()
    with pytest.raises(InputError, match=f'{path} does not hold the 36 images of CIFAR-10; remove it'): get()
    assert len(list(path.rglob('*.png'))) == N - 1


def test_another_process_may_be_faster(folder, tmp_path, monkeypatch):
    def fill(tmp):
        shutil.copytree(folder, tmp_path/'cifar10')
        return Path(shutil.copytree(folder, tmp/'cifar10'))
    assert sources.get_folder(tmp_path/'cifar10', fill) == tmp_path/'cifar10'
    assert len(image_files(tmp_path/'cifar10')) == N
    assert [*tmp_path.iterdir()] == [tmp_path/'cifar10']


def test_silent_servers_are_given_up(home, monkeypatch):
    monkeypatch.setattr(sources, 'TIMEOUT', 0.3)
    start = time.monotonic()
    with socket.create_server(('127.0.0.1', 0)) as silent:
        set_server(monkeypatch, silent.getsockname()[1])
        with pytest.raises(NetworkError, match=r'cifar10: .*timed out; cifar10_torchvision: .*timed out'): get_data()
    assert 0.6 < time.monotonic() - start < 5
    assert listing(home) == []


def test_torchvisions_copy_is_downloaded_where_fastais_is_not(server, batches):
    server.send, server.batches = lambda _: b'', (batches/CIFAR10.filename).read_bytes()
    path = get_data()
    assert (path.name, len(image_files(path))) == ('cifar10_torchvision', N)
    server.shutdown()
    assert get_data() == path, 'downloaded again'


@pytest.mark.parametrize('given', ['both', CIFAR10.base_folder, CIFAR10.filename])
def test_torchvisions_copy_is_read_and_left_alone(home, batches, permissions_bind, given):
    raw = pickle.loads((batches/CIFAR10.base_folder/'test_batch').read_bytes())
    if given == CIFAR10.filename: shutil.rmtree(batches/CIFAR10.base_folder)
    if given == CIFAR10.base_folder: (batches/CIFAR10.filename).unlink()
    before = {batches, *batches.rglob('*')}
    for o in before: o.chmod(0o555 if o.is_dir() else 0o444)
    path = get_data(batches if given == 'both' else batches/given)
    assert {batches, *batches.rglob('*')} == before
    assert listing(home) == ['cifar10_torchvision']
    assert len(image_files(path)) == N
    for i, (pixels, label) in enumerate(zip(raw['data'], raw['labels'], strict=True)):
        image = np.asarray(Image.open(path/'test'/['cat', 'dog', 'ship'][label]/f'{i:05}.png'))
        assert (image == pixels.reshape(3, 32, 32).transpose(1, 2, 0)).all()


@pytest.mark.parametrize('name', ['cifar-10-batches-py/data_batch_3', 'cifar-10-batches-py/batches.meta'])
def test_damaged_batch_file_is_never_unpickled(home, batches, tmp_path, capsys, monkeypatch, name):
    content = bytearray((batches/name).read_bytes())
    content[20] ^= 1
    (batches/name).write_bytes(content)
    monkeypatch.setattr(pickle, 'load', None)
    assert 'could not be read' in ends(capsys, 2, main, data=batches, out=tmp_path/'out')
    assert listing(home) == []


def test_full_disk_leaves_nothing_half_written(home, server, batches, small_sample, monkeypatch):
    def full_disk(*_, **__): raise OSError(errno.ENOSPC, 'No space left on device')
    for get, where in ((get_data, (tarfile.TarFile, 'makefile')), (get_sample, (tarfile.TarFile, 'makefile')),
                       (lambda: get_data(batches), (Image.Image, 'save'))):
        with monkeypatch.context() as m:
            m.setattr(*where, full_disk)
            with pytest.raises(InputError, match='No space left on device.*; (check|it comes)') as e: get()
        assert e.type is not NetworkError
        assert listing(home) == []
        assert len(image_files(path := get())) == N
        shutil.rmtree(path)


def test_folder_that_fastai_cannot_make_is_one_line(tmp_path, home, permissions_bind, capsys):
    tmp_path.chmod(0o555)
    message = ends(capsys, 2, main, quick=True, out=tmp_path/'out')
    assert message == f'error: fastai cannot write to {home} (Permission denied); set FASTAI_HOME\n'
    tmp_path.chmod(0o755)


def test_the_sample_is_a_tenth_of_cifar10(sample):
    """Of the genuine one, every tenth image of each class."""
    files = image_files(sample)
    assert [len([*sample.glob(o)]) for o in ('train/*', 'train/*/*', 'test/*/*')] == [10, 5000, 1000]
    assert {len([*folder.iterdir()]) for folder in sample.glob('*/*')} == {500, 100}
    images = decode_images(files[1000::3]).float() / 255
    for of, expected in zip((images.mean, images.std), cifar_stats, strict=True):
        assert of((0, 2, 3)).tolist() == pytest.approx(expected, abs=0.01)


def test_damaged_sample_is_one_line_and_leaves_nothing(small_sample, home, tmp_path, capsys):
    small_sample.write_bytes(small_sample.read_bytes()[:-1000])
    message = ends(capsys, 2, main, quick=True, out=tmp_path/'out')
    assert message.startswith('error: the sample could not be read (')
    assert message.endswith('; it comes with a clone of the repository; --data DIR takes other images\n')
    assert listing(home) == []


def test_bare_command_without_a_network_is_a_quick_look(small_sample, tmp_path, capsys, monkeypatch, no_pictures):
    """To its end, and the result says so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('lab.runs.QUICK', dict(epochs=2, bs=8))
    monkeypatch.setattr('train_fastai.find_lrs', lambda _: (1e-4, 1e-3))
    monkeypatch.setattr('train_fastai.save_finder', lambda *_: None)
    main([])
    printed = capsys.readouterr()
    assert printed.err == ''
    assert 'CIFAR-10 could not be read' in printed.out
    assert 'this is a quick look at the sample' in printed.out
    folder, = (tmp_path/'runs').iterdir()
    report, m = (folder/'report.md').read_text(), json.loads((folder/'metrics.json').read_text())
    assert report.startswith('# Quick look: ')
    assert ' --quick\n' in report
    assert (m['options']['quick'], m['epochs'], m['batch_size'], m['train_images']) == (True, 2, 8, 24)


@pytest.mark.parametrize('options', [dict(seed=43), dict(epochs=24), dict(out='here', bs=512)])
def test_other_commands_without_a_network_are_an_error(small_sample, tmp_path, capsys, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    assert 'or --quick, which needs none' in ends(capsys, 2, main, **options)
    assert not {*tmp_path.iterdir()} & {tmp_path/'here', tmp_path/'runs'}


def test_quick_look_takes_all_of_the_sample_else_a_tenth(small_sample, folder):
    def images(**options): return Run(Options(quick=True, out='none', **options)).locate_images()
    assert images(data=str(folder)) == dict(path=folder, bs=64, every=10, resize=False)
    assert images() == dict(path=get_sample(), bs=64, every=1, resize=False)
    assert images(bs=8)['bs'] == 8


@pytest.fixture(scope='module')
def mixed(tmp_path_factory) -> Path:
    """A data folder of images of four sizes."""
    path = make_folder(tmp_path_factory.mktemp('data')/'mixed')
    for i, file in enumerate(sorted(path.rglob('*.png'))):
        Image.open(file).resize([(64, 64), (50, 40), (32, 32), (28, 28)][i % 4]).save(file)
    return path


@pytest.mark.parametrize('options', [
    dict(resize=True), dict(resize=True, batch_tfms=aug_transforms()),
    dict(item_tfms=[FlipItem(), RandomResizedCrop(32)]), dict(item_tfms=[Resize(40), PadCrop(4), RandomCrop(32)]),
    dict(item_tfms=[Resize(40)], batch_tfms=aug_transforms(size=32))])
def test_images_of_any_size_are_trained_on(mixed, options):
    """By the centre square, or as a transform of fastai's has it; all of the recipe is told."""
    dls = get_dls(mixed, bs=8, **options)
    assert {x.shape for dl in (dls.train, dls.valid) for x, _ in dl} == {(8, 3, 32, 32), (4, 3, 32, 32)}
    learn = get_learner(dls)
    learn.fit(1, 1e-3)
    assert learn.history.rows[0]['test_loss'] > 0
    assert learn.predict(mixed/'test/red/0.png')[0] in dls.vocab
    told = ' '.join(list_augmentations(dls))
    for tfm in (*options.get('item_tfms', [FlipLR()]), *options.get('batch_tfms', [])):
        assert type(tfm).__name__.replace('AffineCoordTfm', 'Flip') in told


def test_a_transform_that_resizes_comes_first(mixed):
    squish = Resize(32, method='squish')
    dls = get_dls(mixed, bs=8, item_tfms=[squish])
    for file, (x, _) in zip(dls.valid_ds.items, map(dls.valid.after_item, dls.valid_ds), strict=True):
        assert (x.permute(1, 2, 0).numpy() == np.asarray(squish(PILImage.create(file), split_idx=1))).all()


def test_resize_is_an_option_of_the_command(mixed, tmp_path, no_pictures):
    main(args(data=mixed, out=tmp_path/'run', resize=True, bs=8, epochs=1, lr_min=1e-4, lr_max=1e-3))
    m, learn = json.loads((tmp_path/'run/metrics.json').read_text()), load_run(tmp_path/'run', mixed)
    assert learn.validate()[1] == pytest.approx(m['test_accuracy'])
