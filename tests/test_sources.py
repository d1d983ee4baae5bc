import http.server
import re
import shutil
import threading
from pathlib import Path

import pytest
from conftest import ends
from fastai.data.external import fastai_cfg
from fastai.vision.all import URLs
from PIL import Image

from lab import sources
from lab.sources import get_data
from train_fastai import main


def test_a_given_folder_is_not_downloaded(folder): assert get_data(str(folder)) == folder


def test_cifar10_is_counted_as_it_is_loaded(folder, tmp_path, monkeypatch):
    """Through a link to another disk, and without what is hidden."""
    (tmp_path/'cifar10').mkdir()
    for split in ('train', 'test'): (tmp_path/'cifar10'/split).symlink_to(folder/split)
    (tmp_path/'cifar10/.ipynb_checkpoints').mkdir()
    Image.new('RGB', (32, 32)).save(tmp_path/'cifar10/.ipynb_checkpoints/0.png')
    monkeypatch.setattr(sources, 'CIFAR_IMAGES', 36)
    monkeypatch.setattr(sources, 'untar_data', lambda _: tmp_path/'cifar10')
    assert get_data() == tmp_path/'cifar10'


@pytest.fixture
def server(folder, tmp_path, monkeypatch):
    """A source of CIFAR-10 on this machine; its `send` makes the answer of an archive of 36 images."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = self.server.send(archive)
            self.send_response(200)
            self.send_header('Content-Length', str(len(archive)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_): pass
    (tmp_path/'cifar10').symlink_to(folder)
    archive = Path(shutil.make_archive(tmp_path/'archive', 'gztar', folder.parent, folder.name)).read_bytes()
    server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
    server.send = lambda archive: archive
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path/'home'))
    monkeypatch.setattr(URLs, 'CIFAR', f'http://127.0.0.1:{server.server_port}/cifar10.tgz')
    monkeypatch.setattr(sources, 'CIFAR_IMAGES', 36)
    fastai_cfg.cache_clear()  # which would keep the true home
    yield server
    fastai_cfg.cache_clear()
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
        found = re.match(r'error: (.*) holds (\d+) of the 36 images of CIFAR-10; remove it, and (.*) if', message)
        assert found.groups() == (f'{home}/data/cifar10', found[2], f'{home}/archive/cifar10.tgz')
        assert 0 < int(found[2]) < 36
    shutil.rmtree(found[1])
    Path(found[3]).unlink()
    server.send = whole
    assert len(list(get_data().rglob('*.png'))) == 36
