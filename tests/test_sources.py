import errno
import hashlib
import http.server
import json
import pickle
import re
import runpy
import shutil
import signal
import socket
import sys
import tarfile
import threading
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import ROOT, ends, make_folder
from fastai.data.external import fastai_cfg
from fastai.vision.all import URLs, cifar_stats
from PIL import Image
from torchvision.datasets import CIFAR10

from lab import sources
from lab.errors import InputError
from lab.loader import decode_images, image_files
from lab.runs import Run
from lab.sources import NetworkError, get_data, get_sample
from predict import load_run
from train_fastai import Options, main

N = 36  # images in every copy of CIFAR-10 here


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where fastai keeps its data in this test. CIFAR-10 has `N` images, and no server of it can be reached."""
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path/'home'))
    monkeypatch.setattr(sources, 'CIFAR_IMAGES', N)
    with socket.create_server(('127.0.0.1', 0)) as closed: port = closed.getsockname()[1]
    monkeypatch.setattr(URLs, 'CIFAR', f'http://127.0.0.1:{port}/cifar10.tgz')
    monkeypatch.setattr(CIFAR10, 'url', f'http://127.0.0.1:{port}/cifar-10-python.tar.gz')
    fastai_cfg.cache_clear()  # which would keep the true home
    yield tmp_path/'home'
    fastai_cfg.cache_clear()


def listing(home: Path) -> list[str]:
    """What lies in fastai's data folder, locks left out."""
    return sorted(f.name for f in (home/'data').glob('*') if f.suffix != '.lock')


def test_a_given_folder_is_not_downloaded(folder): assert get_data(str(folder)) == folder


def test_cifar10_is_counted_as_it_is_loaded(folder, home):
    """Through a link to another disk, and without what is hidden."""
    path = home/'data/cifar10'
    path.mkdir(parents=True)
    for split in ('train', 'test'): (path/split).symlink_to(folder/split)
    (path/'.ipynb_checkpoints').mkdir()
    Image.new('RGB', (32, 32)).save(path/'.ipynb_checkpoints/0.png')
    assert get_data() == path


@pytest.fixture
def server(folder, tmp_path, home, monkeypatch):
    """A source of fastai's copy on this machine; its `send` makes the answer of an archive of 36 images.

    It sends torchvision's copy, too, if that is in its attribute `batches`.
    """
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            archive, send = ((fastais, self.server.send) if self.path == '/cifar10.tgz' else
                             (self.server.batches, lambda archive: archive))
            if archive is None:
                self.send_error(404)
                return
            content = send(archive)
            self.send_response(200)
            self.send_header('Content-Length', str(len(archive)))
            self.end_headers()
            if self.command == 'GET': self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_): pass
    (tmp_path/'cifar10').symlink_to(folder)
    fastais = Path(shutil.make_archive(tmp_path/'archive', 'gztar', folder.parent, folder.name)).read_bytes()
    server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
    server.send, server.batches = lambda archive: archive, None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(URLs, 'CIFAR', f'http://127.0.0.1:{server.server_port}/cifar10.tgz')
    monkeypatch.setattr(CIFAR10, 'url', f'http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz')
    yield server
    server.shutdown()
    server.server_close()


def breaks_off(archive): return archive[:len(archive) // 2]
def is_no_archive(archive): return b'<html>'.ljust(len(archive))


@pytest.mark.parametrize('fault', [breaks_off, is_no_archive])
def test_a_download_that_fails_is_one_line_and_leaves_nothing_that_stands_in_the_way(server, tmp_path, capsys, fault):
    whole, server.send = server.send, fault
    for _ in range(2):
        assert 'CIFAR-10 could not be downloaded' in ends(capsys, 2, main, out=tmp_path/'out')
        assert not (tmp_path/'home/data/cifar10').exists()
        assert not (tmp_path/'out').exists()
    server.send = whole
    assert len(list(get_data().rglob('*.png'))) == 36


def test_no_network_is_one_line(server, tmp_path, capsys):
    server.shutdown()
    server.server_close()
    assert 'check network and disk, or pass a folder' in ends(capsys, 2, main, out=tmp_path/'out')


def test_half_a_data_set_is_not_taken_for_the_whole(server, tmp_path, capsys):
    """Python unpacks what there is of an archive whose rest is lost."""
    whole, server.send = server.send, lambda archive: archive[:len(archive) // 2].ljust(len(archive), b'\0')
    for _ in range(2):
        message = ends(capsys, 2, main, out=tmp_path/'out')
        home = tmp_path/'home'
        found = re.match(r'error: (.*) holds (\d+) of the 36 images of CIFAR-10; remove it \(and (.*), if', message)
        assert found.groups() == (f'{home}/data/cifar10', found[2], f'{home}/archive/cifar10.tgz')
        assert 0 < int(found[2]) < 36
    shutil.rmtree(found[1])
    Path(found[3]).unlink()
    server.send = whole
    assert len(list(get_data().rglob('*.png'))) == 36


@pytest.fixture
def silent_server(monkeypatch):
    """The address of a server that accepts connections and never sends a byte."""
    monkeypatch.setattr(sources, 'TIMEOUT', 0.3)
    with socket.create_server(('127.0.0.1', 0)) as server: yield f'http://127.0.0.1:{server.getsockname()[1]}'


def test_a_server_that_never_answers_is_given_up(home, silent_server, monkeypatch):
    monkeypatch.setattr(URLs, 'CIFAR', f'{silent_server}/cifar10.tgz')
    monkeypatch.setattr(CIFAR10, 'url', f'{silent_server}/cifar-10-python.tar.gz')
    start = time.monotonic()
    with pytest.raises(NetworkError, match=r"fastai's: .*timed out.*; torchvision's: .*timed out"): get_data()
    assert 0.6 < time.monotonic() - start < 5
    assert socket.getdefaulttimeout() is None
    assert listing(home) == []


def test_torchvisions_server_is_asked_where_fastais_never_answers(server, silent_server, batches, monkeypatch):
    server.batches = (batches/'cifar-10-python.tar.gz').read_bytes()
    monkeypatch.setattr(URLs, 'CIFAR', f'{silent_server}/cifar10.tgz')
    path = get_data()
    assert path.name == 'cifar10_torchvision'
    assert len(image_files(path)) == N
    server.shutdown()
    assert get_data() == path, 'downloaded again'


def make_batches(path: Path, monkeypatch) -> Path:
    """torchvision's copy of a CIFAR-10 of `N` images of three classes in the folder `path`, unpacked and packed."""
    rng, folder, sums = np.random.default_rng(0), path/CIFAR10.base_folder, {}
    folder.mkdir(parents=True)
    parts = [(name, N // 9) for name, _ in CIFAR10.train_list] + [('test_batch', N - 5 * (N // 9))]
    for name, n in parts:
        batch = dict(data=rng.integers(0, 256, (n, 3072), dtype=np.uint8), labels=[i % 3 for i in range(n)])
        (folder/name).write_bytes(pickle.dumps(batch))
    (folder/'batches.meta').write_bytes(pickle.dumps(dict(label_names=['cat', 'dog', 'ship'])))
    archive = path/CIFAR10.filename
    with tarfile.open(archive, 'w:gz') as tar: tar.add(folder, CIFAR10.base_folder)
    sums = {f.name: hashlib.md5(f.read_bytes()).hexdigest() for f in (archive, *folder.iterdir())}
    for attribute in ('train_list', 'test_list'):
        monkeypatch.setattr(CIFAR10, attribute, [[name, sums[name]] for name, _ in getattr(CIFAR10, attribute)])
    monkeypatch.setattr(CIFAR10, 'meta', CIFAR10.meta | dict(md5=sums['batches.meta']))
    monkeypatch.setattr(CIFAR10, 'tgz_md5', sums[archive.name])
    return path


@pytest.fixture
def batches(tmp_path, monkeypatch): return make_batches(tmp_path/'batches', monkeypatch)


def close(path: Path) -> set[Path]:
    """Forbid to write below `path`; return what lies there."""
    found = {path, *path.rglob('*')}
    for o in found: o.chmod(0o555 if o.is_dir() else 0o444)
    return found


@pytest.mark.parametrize('given', ['both', CIFAR10.base_folder, CIFAR10.filename, 'the folder itself'])
def test_torchvisions_copy_is_read_wherever_it_lies_and_left_alone(home, batches, permissions_bind, given, capsys):
    expected = [np.concatenate([pickle.loads((batches/CIFAR10.base_folder/name).read_bytes())['data']
                                for name, _ in part]) for part in (CIFAR10.train_list, CIFAR10.test_list)]
    if given == CIFAR10.filename: shutil.rmtree(batches/CIFAR10.base_folder)
    if given == CIFAR10.base_folder: (batches/CIFAR10.filename).unlink()
    before = close(batches)
    path = get_data(batches/CIFAR10.base_folder if given == 'the folder itself' else batches)
    assert str(batches) in capsys.readouterr().out
    assert {batches, *batches.rglob('*')} == before
    assert listing(home) == ['cifar10_torchvision']
    for split, pixels in zip(('train', 'test'), expected, strict=True):
        for i, image in enumerate(pixels.reshape(-1, 3, 32, 32)):
            label = (i % 4 if split == 'train' else i) % 3  # four images a batch
            file = path/split/['cat', 'dog', 'ship'][label]/f'{i:05}.png'
            assert (np.asarray(Image.open(file)) == image.transpose(1, 2, 0)).all()
    assert len(image_files(path)) == N


def test_images_of_torchvisions_copy_are_written_once_and_again_if_some_are_missing(home, batches):
    path = get_data(batches)
    files = image_files(path)
    times = [f.stat().st_mtime_ns for f in files]
    assert [f.stat().st_mtime_ns for f in image_files(get_data(batches))] == times
    files[0].unlink()
    assert image_files(get_data(batches)) == files


def test_another_copy_of_a_runs_images_is_accepted_to_look_at_and_not_to_resume(home, batches, tmp_path, capsys):
    """Two copies: with other names, and in another order."""
    path, out = get_data(batches), tmp_path/'out'
    main(data=batches, out=out, bs=4, epochs=1, lr_min=1e-4, lr_max=1e-3)
    other = tmp_path/'other'
    for i, file in enumerate(reversed(image_files(path))):
        copy = other/file.parent.relative_to(path).parent.name.replace('test', 'valid')/file.parent.name/f'{i:02}.png'
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    for data in (batches, path, other):
        learn = load_run(out, data)
        assert len(learn.dls.train_ds) + len(learn.dls.valid_ds) == N
    weights = (out/'model.pth').rename(tmp_path/'weights.pth')
    assert 'these are not the images' in ends(capsys, 2, main, resume=str(out), data=str(other))
    main(resume=str(out))
    assert (out/'model.pth').read_bytes() == weights.read_bytes()
    next(other.rglob('*.png')).rename(other/'train/dog/moved.png')  # another label
    with pytest.raises(InputError, match='holds other images'): load_run(out, other)


def damage(file: Path, at: int = 20):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize('name', ['data_batch_3', 'batches.meta', CIFAR10.filename])
def test_a_damaged_batch_file_is_named_and_not_opened(home, batches, tmp_path, capsys, monkeypatch, name):
    file = batches/CIFAR10.filename if name == CIFAR10.filename else batches/CIFAR10.base_folder/name
    damage(file)
    if name == CIFAR10.filename: shutil.rmtree(batches/CIFAR10.base_folder)
    monkeypatch.setattr(pickle, 'load', None)
    message = ends(capsys, 2, main, data=batches, out=tmp_path/'out')
    assert message == f'error: {file} is missing or not the original; copy or download it again\n'
    assert listing(home) == []


def full_disk(*_, **__): raise OSError(errno.ENOSPC, 'No space left on device')


def test_a_full_disk_while_images_are_written_leaves_nothing(home, batches, tmp_path, capsys, monkeypatch):
    save, saved = Image.Image.save, []

    def until_full(image, file, **options):
        saved.append(file)
        full_disk() if len(saved) > 10 else save(image, file, **options)
    with monkeypatch.context() as m:
        m.setattr(Image.Image, 'save', until_full)
        message = ends(capsys, 2, main, data=batches, out=tmp_path/'out')
    assert f'could not be unpacked from {batches}' in message
    assert 'No space left on device' in message
    assert listing(home) == []
    assert len(image_files(get_data(batches))) == N


def half_moved(source, target):
    """As `shutil.move` to another disk, which is full after half of the files."""
    files = [f for f in sorted(Path(source).rglob('*')) if f.is_file()]
    for f in files[:len(files) // 2]:
        copy = Path(target)/f.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, copy)
    full_disk()


def test_a_full_disk_while_cifar10_is_unpacked_is_no_want_of_network(server, home, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(shutil, 'move', half_moved)
        with pytest.raises(InputError, match='No space left on device') as e: get_data()
    assert e.type is not NetworkError
    assert listing(home) == []
    server.shutdown()  # the archive is kept
    assert len(image_files(get_data())) == N


@pytest.fixture
def small_sample(tmp_path, home, monkeypatch) -> Path:
    """An archive in place of the sample's, of three classes and 99 images, in a folder with a space and an umlaut."""
    archive = tmp_path/'the sämple/cifar10_sample.tgz'
    archive.parent.mkdir()
    folder = make_folder(tmp_path/'made/cifar10_sample', train=30, test=3)
    shutil.make_archive(archive.with_suffix(''), 'gztar', folder.parent, folder.name)
    archive.with_suffix('.tar.gz').rename(archive)
    monkeypatch.setattr(sources, 'SAMPLE', archive)
    files = image_files(folder)
    monkeypatch.setattr(sources, 'SAMPLE_DIGEST', sources.digest_images(files, decode_images(files), folder))
    return archive


def test_the_sample_is_a_tenth_of_cifar10(sample):
    """Of the genuine one, every tenth image of each class."""
    files = image_files(sample)
    assert len(files) == 6000
    assert {len(list(folder.iterdir())) for folder in sample.glob('train/*')} == {500}
    assert {len(list(folder.iterdir())) for folder in sample.glob('test/*')} == {100}
    images = decode_images(files[1000:]).float() / 255
    assert np.allclose(images.mean((0, 2, 3)), cifar_stats[0], atol=0.01)
    assert np.allclose(images.std((0, 2, 3)), cifar_stats[1], atol=0.01)
    digest = sources.digest_images(files, decode_images(files), sample)
    assert digest == sources.SAMPLE_DIGEST
    assert digest in (ROOT/'sample/README.md').read_text()


def change_a_pixel(path):
    image = Image.open(path/'train/red/7.png')
    image.putpixel((3, 3), (1, 2, 3))
    image.save(path/'train/red/7.png')


def lose_an_image(path): (path/'test/blue/0.png').unlink()
def add_an_image(path): shutil.copy(path/'test/blue/0.png', path/'test/blue/9.png')
def break_an_image(path): (path/'test/blue/0.png').write_bytes(b'')
def rename_an_image(path): (path/'test/blue/0.png').rename(path/'test/blue/9.png')
def lose_a_folder(path): shutil.rmtree(path/'test')


@pytest.mark.parametrize('spoil', [change_a_pixel, lose_an_image, add_an_image, break_an_image, rename_an_image,
                                   lose_a_folder])
def test_a_sample_that_is_not_whole_is_unpacked_again(small_sample, spoil):
    path = get_sample()
    files, times = image_files(path), {f: f.stat().st_mtime_ns for f in path.rglob('*')}
    get_sample()
    assert {f: f.stat().st_mtime_ns for f in path.rglob('*')} == times
    spoil(path)
    assert get_sample() == path
    assert image_files(path) == files


@pytest.mark.parametrize('cut', [0.3, 0.9])
def test_a_damaged_sample_is_one_line_and_leaves_nothing(small_sample, home, tmp_path, capsys, cut):
    content = small_sample.read_bytes()
    for damaged in (content[:int(cut * len(content))], bytes(100)):
        small_sample.write_bytes(damaged)
        message = ends(capsys, 2, main, quick=True, out=tmp_path/'out')
        assert message.startswith(f'error: {small_sample} could not be unpacked (')
        assert message.endswith('restore the file with git\n')
        assert listing(home) == []
        assert not (tmp_path/'out').exists()
    small_sample.write_bytes(content)
    assert len(image_files(get_sample())) == 99


def test_a_full_disk_while_the_sample_is_unpacked(small_sample, home, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(shutil, 'move', half_moved)
        message = ends(capsys, 2, main, quick=True, out=tmp_path/'out')
    assert 'No space left on device); check the disk' in message
    assert listing(home) == []
    assert len(image_files(get_sample())) == 99


def test_a_folder_that_fastai_cannot_make(tmp_path, home, permissions_bind, capsys):
    tmp_path.chmod(0o555)
    message = ends(capsys, 2, main, quick=True, out=tmp_path/'out')
    assert message == f'error: fastai cannot write to {home} (Permission denied); set FASTAI_HOME\n'
    tmp_path.chmod(0o755)


QUICK = 'Until then, this is a quick look at the sample'


def call_program(monkeypatch, *args: str):
    """Run train_fastai.py with the arguments `args`, as from a command line, but in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, 'argv', ['train_fastai.py', *args])
    try: runpy.run_path(str(ROOT/'train_fastai.py'), run_name='__main__')
    finally:
        for number, handler in handlers.items(): signal.signal(number, handler)


@pytest.mark.parametrize('out', [[], ['--out', 'here']])
def test_without_network_the_bare_command_is_a_quick_look(small_sample, tmp_path, capsys, monkeypatch, out):
    """To its end, and every part of the result says so."""
    monkeypatch.chdir(tmp_path)
    titles = []
    monkeypatch.setattr(plt.Figure, 'savefig', lambda fig, *_, **__: titles.append(title(fig)))
    call_program(monkeypatch, *out)
    printed = capsys.readouterr()
    assert printed.err == ''
    lines = printed.out.splitlines()
    why, = (line for line in lines if QUICK in line)
    assert 'CIFAR-10 could not be downloaded' in why
    assert '--data DIR' in why
    assert '90 training and 9 test images of 3 classes' in lines
    folder, = (p.parent for p in tmp_path.rglob('model.pth'))
    assert lines[-1] == f'Everything of this quick look is in {folder.relative_to(tmp_path)}'
    assert folder.name == 'here' if out else folder.parent.name == 'runs'
    report = (folder/'report.md').read_text()
    assert report.startswith('# Quick look: ')
    assert ' --quick\n' in report
    m = json.loads((folder/'metrics.json').read_text())
    assert (m['quick_look'], m['options']['quick'], m['epochs'], m['batch_size']) == (True, True, 4, 64)
    assert len(titles) == 7
    for o in titles: assert o.endswith(' (quick look)'), o
    weights = (folder/'model.pth').rename(tmp_path/'weights.pth')
    main(resume=folder)
    assert (folder/'model.pth').read_bytes() == weights.read_bytes()


def title(fig) -> str: return fig.get_suptitle() or fig.axes[0].get_title()


@pytest.mark.parametrize('args', [['--seed', '43'], ['--epochs', '24'], ['--out', 'here', '--bs', '512']])
def test_without_network_any_other_command_is_an_error(small_sample, tmp_path, capsys, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    assert 'check network and disk, or pass a folder' in ends(capsys, 2, call_program, monkeypatch, *args)
    assert not (tmp_path/'here').exists()
    assert not (tmp_path/'runs').exists()


def test_without_network_several_processes_are_an_error(small_sample, monkeypatch):
    monkeypatch.setattr('lab.runs.RANKS', 2)
    with pytest.raises(NetworkError), Run(Options(), set(), by_command=True) as run: run.find_images()


def test_a_damaged_download_is_no_reason_for_a_quick_look(server, small_sample, capsys, monkeypatch):
    server.send = is_no_archive
    assert 'CIFAR-10 could not be downloaded' in ends(capsys, 2, call_program, monkeypatch)


def test_a_quick_look_at_a_folder_takes_a_tenth_and_at_the_sample_all(small_sample, folder, tmp_path):
    def images(**options):
        with Run(Options(quick=True, out=tmp_path/'out', **options), set()) as run: return run.find_images()
    assert images(data=str(folder)) == dict(path=folder, bs=64, every=10)
    assert images() == dict(path=get_sample(), bs=64, every=1)
    assert images(bs=8) == dict(path=get_sample(), bs=8, every=1)
