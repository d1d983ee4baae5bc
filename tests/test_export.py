"""What `predict.py RUN --export FILE` writes is used here by the libraries that it is written for."""
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, args, ends
from torch import nn

from predict import EXPORTS, export_network, load_run, main

CLASSES = ['blue', 'green', 'red']
PAGE = re.findall(r'```python\n(.*?)```', (ROOT/'docs/elsewhere.md').read_text(), re.DOTALL)


@pytest.fixture(scope='module')
def learn(run): return load_run(run).to_fp32()


@pytest.fixture(scope='module')
def place(run, folder, tmp_path_factory):
    """A folder with the files that docs/elsewhere.md names: net.onnx, net.pt2, net.safetensors and cat.png."""
    place = tmp_path_factory.mktemp('exports')
    for suffix in EXPORTS: main(args(run, export=place/f'net{suffix}'))
    assert len([*place.iterdir()]) == 3, 'weights in a second file'
    (place/'cat.png').symlink_to(folder/'test/red/1.png')
    return place


def some_images(n): return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(n))


def expected(learn, images):
    """Probabilities in float32, from images in 0 … 1, by the learner's own pipeline but for its bytes."""
    normalize = learn.dls.valid.after_batch.normalize
    with torch.no_grad(): return learn.model.eval()((images - normalize.mean.cpu()) / normalize.std.cpu()).exp()


def test_onnx(learn, place):
    onnx.checker.check_model(model := onnx.load(place/'net.onnx'), full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [('', 20)]
    session = onnxruntime.InferenceSession(place/'net.onnx')
    assert json.loads(session.get_modelmeta().custom_metadata_map['classes']) == CLASSES
    assert [(o.name, o.type, o.shape) for o in session.get_inputs()] == [('images', 'tensor(float)', ['N', 3, 32, 32])]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [('probabilities', ['N', 3])]
    for n in (1, 7):
        found, = session.run(None, {'images': some_images(n).numpy()})
        np.testing.assert_allclose(found, expected(learn, some_images(n)), rtol=0, atol=1e-5)


def test_a_network_that_ends_in_logits(learn, tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 3))
    export_network(SimpleNamespace(model=net, dls=learn.dls), tmp_path/'net.pt2')
    net = torch.export.load(tmp_path/'net.pt2').module()
    for n in (1, 4): torch.testing.assert_close(net(some_images(n)).sum(1), torch.ones(n))


def test_options_stand_anywhere(run, folder, tmp_path, capsys):
    image, file = folder/'test/red/1.png', tmp_path/'net.safetensors'
    for order in (['--csv', '--export', file, run, image], [run, '--export', file, image, '--csv']):
        main([str(o) for o in order])
        file.unlink()
        assert capsys.readouterr().out.startswith('file,class,probability')


def test_what_cannot_be_exported_is_one_line(run, tmp_path, monkeypatch, capsys):
    def export(name, code=2): return ends(capsys, code, main, run, export=tmp_path/name)
    assert export('net.h5').endswith('net.h5 does not end in .onnx, .pt2, .safetensors\n')
    for package, name in (('onnxscript', 'net.onnx'), ('safetensors', 'net.safetensors')):
        for module in (package, package + '.torch'): monkeypatch.setitem(sys.modules, module, None)
        assert f'{name} needs the package {package}: pip install {package}' in export(name)
    assert [*tmp_path.iterdir()] == []
    assert 'No such file' in export('none/net.pt2', code=1)


@pytest.mark.parametrize('code', PAGE, ids=lambda code: re.findall(r'net\.\w+', code)[0])
def test_code_of_the_page_gives_the_learners_probabilities(learn, place, monkeypatch, code):
    monkeypatch.chdir(place)
    exec(code.replace('torch.rand(7, 3, 32, 32)', 'given'), made := dict(given=some_images(7)))
    right = learn.predict('cat.png')[2][None] if 'cat.png' in code else expected(learn, some_images(7))
    np.testing.assert_allclose(made['probabilities'], right, rtol=0, atol=1e-5)
    assert made['classes'] == CLASSES
