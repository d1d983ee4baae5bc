import io
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, Malicious, ends, make_folder
from fastai.vision.all import ClassificationInterpretation, PILImage, image2tensor
from PIL import Image

import predict
from lab.errors import InputError
from lab.loader import FitSize, RGBImage
from predict import load_run, main
from train_fastai import main as train


@pytest.fixture(scope='module')
def data(tmp_path_factory): return make_folder(tmp_path_factory.mktemp('data')/'d', train=16, test=6)


@pytest.fixture(scope='module')
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')/'run'
    train(data=data, out=out, epochs=6, bs=8, lr_min=1e-4, lr_max=1e-3)
    return out


def read_image(file): return image2tensor(FitSize()(RGBImage.create(file)))


def read_csv(capsys, *args):
    capsys.readouterr()
    main(*map(str, args), csv=True)
    return pd.read_csv(io.StringIO(capsys.readouterr().out))


def test_the_loaded_learner_is_ready_from_anywhere(run, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn = load_run(run, data)
    m = json.loads((run/'metrics.json').read_text())
    assert learn.validate()[-1] == pytest.approx(m['test_accuracy'])
    assert learn.validate()[-2] == pytest.approx(m['test_loss'])
    preds, targets = learn.get_preds()
    assert preds.shape == (18, 3)
    wrong = pd.read_csv(run/'misclassified.csv')
    assert (preds.argmax(1) != targets).sum() == len(wrong)
    learn.show_results()
    interp = ClassificationInterpretation.from_learner(learn)
    interp.plot_top_losses(4)
    assert interp.confusion_matrix().trace() == 18 - len(wrong)


def test_without_its_images_it_predicts_the_same(run, data, tmp_path):
    with_data = load_run(run, data)
    moved = tmp_path/'moved'
    shutil.copytree(run, moved)
    m = json.loads((moved/'metrics.json').read_text())
    m['options']['data'] = str(tmp_path/'gone')
    (moved/'metrics.json').write_text(json.dumps(m))
    without = load_run(moved)
    assert len(without.dls.valid_ds) == 0
    for file in (data/'test/red/0.png', data/'test/blue/1.png'):
        name, _, probabilities = with_data.predict(file)
        assert without.predict(file)[0] == name
        torch.testing.assert_close(without.predict(file)[2], probabilities)


def test_probabilities_and_candidates(run, data, capsys):
    files = sorted((data/'test/green').iterdir())
    table = read_csv(capsys, run, *files)
    assert list(table) == ['file', 'class', 'probability', 'class_2', 'probability_2', 'class_3', 'probability_3']
    assert list(table.file) == list(map(str, files))
    learn = load_run(run)
    for row in table.itertuples():
        name, _, probabilities = learn.predict(row.file)
        assert row[2] == name
        assert [row[3], row[5], row[7]] == pytest.approx(sorted(probabilities.tolist(), reverse=True), rel=0.05)
        assert {row[2], row[4], row[6]} == {'blue', 'green', 'red'}
    main(str(run), *map(str, files))
    text = capsys.readouterr().out.splitlines()
    assert len({len(line.rstrip()) for line in text[1:]}) == 1, 'not aligned'
    for line, row in zip(text[1:], table.itertuples(), strict=True):
        assert line.split()[:4] == [row.file, row[2], f'{100 * row[3]:.1f}', '%']


def test_a_folder_of_images(run, data, tmp_path, capsys):
    for i, c in enumerate(('red', 'blue')): shutil.copy(data/f'test/{c}/{i}.png', tmp_path/f'{i}.png')
    (tmp_path/'notes.txt').touch()
    table = read_csv(capsys, run, tmp_path)
    assert list(table.file) == [str(tmp_path/'0.png'), str(tmp_path/'1.png')]
    assert len(read_csv(capsys, run, tmp_path, data/'test/red/5.png')) == 3


def test_evaluation_agrees_with_the_run_and_with_a_count_by_hand(run, data, capsys):
    table = read_csv(capsys, run, data/'test')
    m = json.loads((run/'metrics.json').read_text())
    right = table.actual == table['class']
    assert right.mean() == pytest.approx(m['test_accuracy'])
    assert list(table.actual) == [f.split('/')[-2] for f in table.file]
    main(str(run), str(data/'test'))
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    assert ['accuracy', f'{100 * m["test_accuracy"]:.2f}', '%'] in lines
    def shown(share): return [f'{100 * share:.1f}', '%']
    for c in ('blue', 'green', 'red'):
        named = table['class'] == c
        assert [c, '6', *shown(right[table.actual == c].mean()),
                *(shown(right[named].mean()) if named.any() else '–')] in lines
    errors = table[~right].groupby(['actual', 'class']).size()
    for (actual, predicted), n in errors.items(): assert [actual, predicted, str(n)] in lines

    learn = load_run(run, data)
    x = torch.cat([x.as_subclass(torch.Tensor) for x, _ in learn.dls.valid])
    net = learn.model.eval()
    with torch.no_grad(): mean = (net(x) + net(x.flip(-1))) / 2
    targets = torch.tensor([learn.dls.vocab.o2i[f.parent.name] for f in learn.dls.valid_ds.items])
    line = next(line for line in lines if line[:3] == ['accuracy,', 'flip', 'averaging'])
    expected = (mean.argmax(1) == targets).float().mean().item()
    assert float(line[3]) / 100 == pytest.approx(expected, abs=1e-4)


def test_flip_averaging_is_the_mean_of_log_probabilities():
    """The first image's mean probability is largest for class a, its mean log-probability for class b."""
    log_probs = torch.tensor([[0.70, 0.28, 0.02], [0.9, 0.05, 0.05]]).log()
    flipped = torch.tensor([[0.10, 0.36, 0.54], [0.8, 0.10, 0.10]]).log()
    text = predict.evaluate(log_probs, flipped, torch.tensor([1, 0]), ['a', 'b', 'c'])
    assert text.splitlines()[1].split()[-2:] == ['50.00', '%']
    assert text.splitlines()[2].split()[3:5] == ['100.00', '%']


def test_where_nothing_is_confused_that_is_said():
    text = predict.evaluate(*[torch.eye(3).log()] * 2, torch.arange(3), ['cat', 'd|g', 'eel'])
    assert text.endswith('Every image is classified correctly.')


def save_as(mode, pixels, file):
    image = Image.fromarray(pixels)
    if mode == 'I;16': image = Image.fromarray(np.asarray(image.convert('L')).astype('uint16') * 257)
    elif mode != 'RGB': image = image.convert(mode)
    image.save(file)
    return file


@pytest.mark.parametrize('mode', ['RGB', 'L', 'LA', 'RGBA', 'P', '1', 'I;16', 'CMYK'])
@pytest.mark.parametrize('size', [(32, 32), (64, 96), (7, 5), (200, 33)])
def test_images_of_any_size_and_mode(tmp_path, mode, size):
    """On images of a few large fields of a colour, the left grey, the right white."""
    w, h = size
    pixels = np.full((h, w, 3), 128, 'uint8')
    pixels[:, w // 2:] = 255
    image = read_image(save_as(mode, pixels, tmp_path/('x.tif' if mode == 'CMYK' else 'x.png')))
    assert (image.shape, image.dtype) == ((3, 32, 32), torch.uint8)
    left, right = image[:, :, :10].float().mean(), image[:, :, -10:].float().mean()
    assert right > 250
    if mode != '1': assert abs(left - 128) < 3


def test_the_centre_square_of_a_larger_image(tmp_path):
    """On an image whose green tells the row and whose blue the column."""
    pixels = np.stack(np.broadcast_arrays(np.uint8(0), np.arange(64, dtype='uint8')[:, None], np.arange(128)), -1)
    pixels = pixels.astype('uint8')
    Image.fromarray(pixels).save(tmp_path/'x.png')
    found = read_image(tmp_path/'x.png').permute(1, 2, 0).float()
    assert (found - torch.from_numpy(pixels[::2, 32:96:2].astype('float32'))).abs().max() <= 1
    Image.fromarray(pixels[::2, ::2]).save(tmp_path/'y.png')
    small = read_image(tmp_path/'y.png').permute(1, 2, 0)
    assert (small.numpy() == pixels[::2, 32:96:2]).all(), 'a crop of the right size is not resampled'


def test_a_photograph_is_turned_upright(tmp_path):
    pixels = np.zeros((32, 32, 3), 'uint8')
    pixels[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path/'x.png', exif=exif)
    assert read_image(tmp_path/'x.png')[:, -1].min() == 255


def test_learn_predict_reads_images_as_the_command_does(run, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (90, 50, 3), 'uint8')
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path/'x.png', exif=exif)
    save_as('I;16', pixels, tmp_path/'y.png')
    table = read_csv(capsys, run, tmp_path)
    learn = load_run(run)
    for row in table.itertuples():
        name, _, probabilities = learn.predict(row.file)
        assert row[2] == name
        assert row.probability == pytest.approx(probabilities.max().item(), rel=1e-3)
    assert learn.predict(PILImage.create(pixels))[0] in learn.dls.vocab


def test_a_learner_without_images_does_what_one_can_without(run, data):
    learn = load_run(run)
    assert learn.dls.valid.bs == 512
    files = sorted((data/'test').rglob('*.png'))
    preds, targets = learn.get_preds(dl=learn.dls.test_dl(files, with_labels=True))
    assert [learn.dls.vocab[i] for i in targets] == [f.parent.name for f in files]
    torch.testing.assert_close(preds, load_run(run, data).get_preds()[0])


@pytest.mark.parametrize('ending', ['tif', 'png'])
def test_sixteen_bits(tmp_path, ending):
    Image.fromarray(np.full((32, 32), 200 * 257, 'uint16')).save(tmp_path/f'x.{ending}')
    assert (read_image(tmp_path/f'x.{ending}') == 200).all()


def test_columns_of_any_letters_are_aligned():
    table = pd.DataFrame(dict(file=['猫.png', 'a.png', 'long name.png'], probability=[0.5, 1., 0.25]))
    assert predict.align(table).splitlines() == ['         file  probability', '       猫.png       50.0 %',
                                                 '        a.png      100.0 %', 'long name.png       25.0 %']


def floating_point(tmp_path): Image.fromarray(np.zeros((32, 32), 'float32')).save(tmp_path/'float.tif')
def empty(tmp_path): (tmp_path/'empty').mkdir()
def text(tmp_path): (tmp_path/'text.png').write_text('hello')
def nothing(tmp_path): pass


def other_class(tmp_path):
    for c in ('red', 'pink'):
        (tmp_path/'eval'/c).mkdir(parents=True)
        Image.new('RGB', (32, 32)).save(tmp_path/'eval'/c/'0.png')


def line_break(tmp_path): Image.new('RGB', (32, 32)).save(tmp_path/'a\nb.png')


def stray_image(tmp_path):
    (tmp_path/'eval/red').mkdir(parents=True)
    for name in ('0.png', 'red/0.png'): Image.new('RGB', (32, 32)).save(tmp_path/'eval'/name)


@pytest.mark.parametrize(('make', 'images', 'message'), [
    (nothing, [], 'no image was given'), (nothing, ['none.png'], '"none.png" does not exist'),
    (empty, ['empty'], 'empty holds no images'), (text, ['text.png'], 'text.png cannot be read as an image'),
    (other_class, ['eval'], 'eval/pink/0.png is not in a sub-folder with the name of a class'),
    (stray_image, ['eval'], 'eval/0.png is not in a sub-folder with the name of a class'),
    (floating_point, ['float.tif'], 'float.tif cannot be read as an image (its pixels have 32 bits'),
    (line_break, ['a\nb.png'], r"'a\nb.png' cannot be printed"),
    (nothing, ['/dev/null'], '/dev/null cannot be read'), (nothing, [''], '"" does not exist'),
    (nothing, ['x' * 300], 'does not exist'), (other_class, ['eval', 'eval'], 'give it alone')],
    ids=lambda o: getattr(o, '__name__', None))
def test_bad_images_are_one_line(run, tmp_path, capsys, monkeypatch, make, images, message):
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert message in ends(capsys, 2, main, str(run), *images)
    assert capsys.readouterr().out == ''


def test_a_class_that_may_not_be_read_is_not_left_out(run, tmp_path, capsys, permissions_bind):
    for c in ('red', 'blue'):
        (tmp_path/'eval'/c).mkdir(parents=True)
        Image.new('RGB', (32, 32)).save(tmp_path/'eval'/c/'0.png')
    (tmp_path/'eval/red').chmod(0)
    assert 'eval/red cannot be read' in ends(capsys, 2, main, str(run), str(tmp_path/'eval'))
    (tmp_path/'eval/red').chmod(0o755)


def test_a_reader_that_leaves_is_no_error(run, data):
    images = 20 * list(map(str, (data/'test').rglob('*.png')))  # more than a pipe's buffer in Python
    process = subprocess.Popen([sys.executable, str(ROOT/'predict.py'), str(run), *images, '--csv'],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ''
    assert process.wait() == 141


def no_weights(run): (run/'model.pth').unlink()
def no_metrics(run): (run/'metrics.json').unlink()
def odd_metrics(run): (run/'metrics.json').write_text('[]')
def class_as_path(run):
    m = json.loads((run/'metrics.json').read_text())
    (run/'metrics.json').write_text(json.dumps(m | dict(classes=['a', 'b', str(run/'escaped')])))


def no_options(run): (run/'metrics.json').write_text('{"classes": ["a", "b"], "options": {}}')
def damaged(run): (run/'model.pth').write_bytes((run/'model.pth').read_bytes()[:1000])
def foreign(run): torch.save(dict(a=torch.ones(3)), run/'model.pth')


def malicious(run): torch.save(dict(a=Malicious()), run/'model.pth')
def malicious_pickle(run): (run/'model.pth').write_bytes(pickle.dumps(Malicious()))


@pytest.mark.parametrize(('spoil', 'message'), [
    (no_weights, 'holds no finished run'), (no_metrics, 'metrics.json'), (odd_metrics, 'metrics.json'),
    (no_options, 'metrics.json'), (class_as_path, 'classes without names'),
    (damaged, 'model.pth is damaged'),
    (foreign, 'does not hold the weights of ResNet; load_run(…, model=…) takes another'),
    (malicious, 'it was not opened'), (malicious_pickle, 'model.pth is damaged')],
    ids=lambda o: getattr(o, '__name__', None))
def test_a_run_that_cannot_be_used_is_one_line_and_no_code_of_it_runs(run, data, tmp_path, capsys, monkeypatch, spoil,
                                                                      message):
    monkeypatch.setenv('MALICIOUS_DIR', str(tmp_path/'was here'))
    bad = tmp_path/'bad'
    shutil.copytree(run, bad)
    spoil(bad)
    assert message in ends(capsys, 2, main, str(bad), str(data/'test/red/0.png'))
    assert not (tmp_path/'was here').exists()
    assert not (bad/'escaped').exists()


def test_other_images_where_the_images_were(run, tmp_path):
    other = tmp_path/'other'
    shutil.copytree(run, other)
    path = make_folder(tmp_path/'d', train=16)
    for split in ('train', 'test'): (path/split/'red').rename(path/split/'pink')
    with pytest.raises(InputError, match=f'{path} holds other images than {other} was trained on'):
        load_run(other, path)
    assert list(load_run(other).dls.vocab) == ['blue', 'green', 'red']


def test_a_run_in_float32_is_loaded_in_float32(data, tmp_path):
    train(data=data, out=tmp_path/'out', epochs=1, bs=8, lr_min=1e-4, lr_max=1e-3, precision='fp32')
    m = json.loads((tmp_path/'out/metrics.json').read_text())
    assert load_run(tmp_path/'out', data).validate()[0] == pytest.approx(m['test_loss'], rel=1e-6)


def test_a_terminal_of_few_letters_and_an_option_between_run_and_images(run, data, tmp_path):
    shutil.copy(data/'test/red/0.png', tmp_path/'für.png')
    done = subprocess.run([sys.executable, str(ROOT/'predict.py'), str(run), '--csv', str(tmp_path/'für.png')],
                          capture_output=True, env=dict(os.environ, PYTHONIOENCODING='ascii'))
    assert (done.returncode, done.stderr) == (0, b'')
    assert done.stdout.startswith(b'file,class,probability')
    assert b'f?r.png' in done.stdout


def test_predicting_needs_no_home(run, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('lab.sources.fastai_path', None)
    main(str(run), str(data/'test/red/0.png'))
    assert 'red' in capsys.readouterr().out


def as_of_an_earlier_version(run, out):
    """Copies a run to `out` as an earlier version would have left it: other options, weights channels-last."""
    shutil.copytree(run, out)
    m = json.loads((out/'metrics.json').read_text())
    del m['recipe'], m['options']['lr_end']
    m['options'] |= dict(taste=m['options'].pop('quick'), final_div=1)
    assert m['options'].keys() == {'data', 'out', 'epochs', 'bs', 'seed', 'lr_min', 'lr_max', 'final_div', 'wd',
                                   'label_smoothing', 'ema', 'precision', 'taste'}
    (out/'metrics.json').write_text(json.dumps(m))
    weights = torch.load(out/'model.pth', weights_only=True)
    torch.save({k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in weights.items()},
               out/'model.pth')
    return out


def test_a_run_of_an_earlier_version_is_read(run, data, tmp_path, capsys):
    old = as_of_an_earlier_version(run, tmp_path/'old')
    learn = load_run(old, data)
    assert learn.validate()[-1] == pytest.approx(json.loads((run/'metrics.json').read_text())['test_accuracy'])
    assert all(p.is_contiguous() for p in learn.model.parameters())
    outputs = []
    for o in (run, old):
        main(str(o), str(data/'test'))
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_a_quick_look_under_its_earlier_name_is_read(tmp_path, capsys):
    path = make_folder(tmp_path/'d', train=41, test=11)
    train(data=path, out=tmp_path/'run', quick=True, epochs=1, bs=4, lr_min=1e-4, lr_max=1e-3)
    old = as_of_an_earlier_version(tmp_path/'run', tmp_path/'old')
    assert [len(ds) for ds in (load_run(old, path).dls.train_ds, load_run(old, path).dls.valid_ds)] == [15, 6]
