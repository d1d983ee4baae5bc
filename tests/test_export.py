"""What `predict.py RUN --export FILE` writes is used here by the libraries that it is written for."""
import argparse
import json
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, ends, make_folder
from PIL import Image
from torch import nn

from arch import ResNet
from predict import load_run, main
from train_fastai import main as train

CLASSES = ['blue', 'green', 'red']


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('run')
    train(data=make_folder(tmp/'data', train=16), out=tmp/'run', epochs=6, bs=8, lr_min=1e-4, lr_max=1e-2)
    return tmp/'run'


@pytest.fixture(scope='module')
def learn(run): return load_run(run)


def some_images(n): return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(n))


def expected(learn, images):
    """Probabilities in float32, from images in 0 … 1, by the learner's own pipeline but for its bytes."""
    normalize = learn.dls.valid.after_batch.normalize
    learn.model.eval()
    with torch.no_grad(): return learn.model((images - normalize.mean.cpu()) / normalize.std.cpu()).exp()


@pytest.fixture(scope='module')
def onnx_file(run, tmp_path_factory):
    pytest.importorskip('onnxscript')
    file = tmp_path_factory.mktemp('onnx')/'net.onnx'
    main(str(run), export=str(file))
    return file


def test_onnx(learn, onnx_file):
    onnx, onnxruntime = pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    file = onnx_file
    assert [f.name for f in file.parent.iterdir()] == ['net.onnx'], 'weights in a second file'
    onnx.checker.check_model(model := onnx.load(file), full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [('', 20)]
    session = onnxruntime.InferenceSession(file)
    assert json.loads(session.get_modelmeta().custom_metadata_map['classes']) == CLASSES
    assert [(o.name, o.type, o.shape) for o in session.get_inputs()] == [('images', 'tensor(float)', ['N', 3, 32, 32])]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [('probabilities', ['N', 3])]
    for n in (1, 2, 7):
        found, = session.run(None, {'images': some_images(n).numpy()})
        np.testing.assert_allclose(found, expected(learn, some_images(n)), rtol=0, atol=1e-5)


def test_pt2(run, learn, tmp_path):
    file, extra = tmp_path/'net.pt2', {'classes.json': ''}
    main(str(run), export=str(file))
    net = torch.export.load(file, extra_files=extra).module()
    assert json.loads(extra['classes.json']) == CLASSES
    for n in (1, 2, 7): torch.testing.assert_close(net(some_images(n)), expected(learn, some_images(n)))


def test_safetensors(run, learn, tmp_path):
    load_file = pytest.importorskip('safetensors.torch').load_file
    from safetensors import safe_open
    file = tmp_path/'net.safetensors'
    main(str(run), export=str(file))
    net = ResNet(3, 3)
    net.load_state_dict(load_file(file))
    with safe_open(file, 'pt') as f: found = {k: json.loads(v) for k, v in f.metadata().items()}
    assert found == dict(classes=CLASSES, mean=[0.491, 0.482, 0.447], std=[0.247, 0.243, 0.261])
    mean, std = (torch.tensor(found[k])[:, None, None] for k in ('mean', 'std'))
    with torch.no_grad(): probabilities = net.eval()((some_images(3) - mean) / std).exp()
    torch.testing.assert_close(probabilities, expected(learn, some_images(3)))


def test_an_exported_network_says_what_the_run_says(run, learn, onnx_file):
    """From a file's bytes by Pillow and NumPy alone, as docs/elsewhere.md has it."""
    onnxruntime = pytest.importorskip('onnxruntime')
    session, file = onnxruntime.InferenceSession(onnx_file), run.parent/'data/test/red/1.png'
    image = Image.open(file).convert('RGB').resize((32, 32))
    images = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255
    learn.to_fp32()
    np.testing.assert_allclose(session.run(None, {'images': images})[0][0], learn.predict(file)[2], atol=1e-5)


def test_a_network_that_ends_in_logits(learn, tmp_path):
    from predict import export_network
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 3))
    class Other: model, dls = net, learn.dls
    export_network(Other, tmp_path/'net.pt2')
    found = torch.export.load(tmp_path/'net.pt2').module()(some_images(4))
    torch.testing.assert_close(found.sum(1), torch.ones(4))


def test_options_stand_anywhere(run, tmp_path, monkeypatch, capsys):
    parse_args, image = argparse.ArgumentParser.parse_args, str(run.parent/'data/test/red/1.png')
    seen = []
    for order in (['--csv', '--export', 'F', str(run), image], [str(run), '--export', 'F', image, '--csv'],
                  [str(run), '--csv', image, '--export', 'F']):
        file = tmp_path/f'{len(seen)}.safetensors'
        monkeypatch.setattr(sys, 'argv', ['predict.py', *(str(file) if o == 'F' else o for o in order)])
        runpy.run_path(str(ROOT/'predict.py'), run_name='__main__')
        assert file.exists()
        seen.append(capsys.readouterr().out)
    assert len({*seen}) == 1
    assert argparse.ArgumentParser.parse_args is parse_args, 'a session that uses %run keeps its own'
    assert seen[0].startswith('file,class,probability')


def test_what_cannot_be_exported_is_one_line(run, tmp_path, monkeypatch, capsys):
    export = lambda name: ends(capsys, 2, main, str(run), export=str(tmp_path/name))  # noqa: E731
    assert export('net.h5').endswith('net.h5 does not end in .onnx, .pt2, .safetensors\n')
    for package, name in (('onnxscript', 'net.onnx'), ('safetensors', 'net.safetensors')):
        for module in (package, package + '.torch'): monkeypatch.setitem(sys.modules, module, None)
        assert f'{name} needs the package {package}: pip install {package}' in export(name)
    assert '"none.png" does not exist' in ends(capsys, 2, main, str(run), 'none.png', export=str(tmp_path/'net.pt2'))
    assert list(tmp_path.iterdir()) == []
    assert 'No such file' in ends(capsys, 1, main, str(run), export=str(tmp_path/'none/net.pt2'))


PAGE = re.findall(r'```python\n(.*?)```', (ROOT/'docs/elsewhere.md').read_text(), re.DOTALL)


@pytest.fixture(scope='module')
def place(run, onnx_file, tmp_path_factory):
    """A folder with the files that the page names."""
    folder = tmp_path_factory.mktemp('page')
    (folder/'runs').mkdir()
    for name, target in (('runs/X', run), ('data', run.parent/'data'), ('net.onnx', onnx_file),
                         ('cat.png', run.parent/'data/test/red/1.png')): (folder/name).symlink_to(target)
    for suffix in ('pt2', 'safetensors'): main(str(run), export=str(folder/f'net.{suffix}'))
    return folder


@pytest.mark.parametrize(('library', 'says'), [
    ('onnxruntime', 'red|green|blue'), ('torch.export', r"(?:'(?:red|green|blue)'.*){7}"), ('safetensors', ''),
    ('cleanlab', r'(?s)blue +\S+ +\S+ +\S+ +4.*\[.*\]'), ('skorch', r' 2 +(\x1b\[\d+m)?\d\.\d')])
def test_the_code_of_the_page_runs(place, monkeypatch, capsys, library, says):
    pytest.importorskip(library)
    code, = (o for o in PAGE if library in o)
    monkeypatch.chdir(place)
    made = {}
    exec(code, made)
    assert re.search(says, capsys.readouterr().out)
    assert np.asarray(made['probabilities']).sum(1) == pytest.approx(1, abs=1e-5)


def test_the_code_of_the_page_is_known():
    assert len(PAGE) == 6, 'the sixth, a server, is tried by tests/serve.py'
