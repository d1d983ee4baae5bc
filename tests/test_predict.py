import io
import json
import os
import pickle
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Malicious, args, ends
from fastai.vision.all import ClassificationInterpretation, PILImage
from PIL import Image

import predict
from lab.errors import InputError
from lab.loader import decode_images
from predict import load_run, main


def read_csv(capsys, *given):
    capsys.readouterr()
    main(args(*given, csv=True))
    return pd.read_csv(io.StringIO(capsys.readouterr().out))


def show(capsys, *given) -> list[str]:
    """The lines that `main` prints."""
    capsys.readouterr()
    main(args(*given))
    return capsys.readouterr().out.splitlines()


def read_metrics(run): return json.loads((run/'metrics.json').read_text())


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run with other metrics and options than it had."""
    def make(options=None, **metrics):
        shutil.copytree(run, out := tmp_path/'copy')
        m = read_metrics(run) | metrics
        (out/'metrics.json').write_text(json.dumps(m | dict(options=m['options'] | (options or {}))))
        return out
    return make


def test_loaded_learner_is_ready_from_anywhere(run, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn, m = load_run(run, folder), read_metrics(run)
    assert list(learn.validate()) == pytest.approx([m['test_loss'], m['test_accuracy']])
    preds, targets = learn.get_preds()
    assert preds.shape == (12, 3)
    wrong = pd.read_csv(run/'misclassified.csv')
    assert (preds.argmax(1) != targets).sum() == len(wrong)
    learn.show_results()
    interp = ClassificationInterpretation.from_learner(learn)
    interp.plot_top_losses(4)
    assert interp.confusion_matrix().trace() == 12 - len(wrong)


def test_loaded_learner_has_the_recipe_of_the_run(copy, folder):
    """C10: to train on as the run was trained, not as the defaults say."""
    out = copy(dict(wd=0.01, label_smoothing=0.05, ema=0.9, seed=7, bs=2, quick=True), precision='fp32')
    learn = load_run(out, folder)
    assert (learn.wd, learn.loss_func.label_smoothing, learn.weight_average.decay) == (0.01, 0.05, 0.9)
    assert (learn.seed_epochs.seed, learn.path, learn.dls.bs) == (7, out/'learner', 2)
    assert [len(ds) for ds in (learn.dls.train_ds, learn.dls.valid_ds)] == [3, 3], 'of each class one in ten'
    assert not hasattr(learn, 'precision')
    learn.create_opt()
    assert {h['wd'] for h in learn.opt.hypers} <= {0.01, 0}


def test_without_its_images_it_predicts_the_same(copy, folder, monkeypatch):
    monkeypatch.setattr('lab.sources.fastai_path', None)  # there is no home for data either
    learn, with_data = load_run(out := copy(dict(data='gone'))), load_run(out, folder)
    files = sorted((folder/'test').rglob('*.png'))
    preds, targets = learn.get_preds(dl=learn.dls.test_dl(files, with_labels=True))
    assert [learn.dls.vocab[i] for i in targets] == [f.parent.name for f in files]
    torch.testing.assert_close(preds, with_data.get_preds()[0])
    for file in files[::5]: torch.testing.assert_close(learn.predict(file)[2], with_data.predict(file)[2])


def test_other_classes_than_those_of_the_run_are_refused(run, folder, tmp_path):
    shutil.copytree(folder, other := tmp_path/'other')
    for split in ('train', 'test'): (other/split/'red').rename(other/split/'pink')
    with pytest.raises(InputError, match=f'{other} has other classes than {run}: blue, green, pink'):
        load_run(run, other)


def test_table_has_each_class_with_its_probability(run, folder, capsys):
    files = sorted((folder/'test/green').iterdir())
    table, learn = read_csv(capsys, run, *files), load_run(run)
    assert list(table) == ['file', 'class', 'probability', 'class_2', 'probability_2', 'class_3', 'probability_3']
    assert list(table.file) == list(map(str, files))
    for row in table.itertuples():
        name, _, probabilities = learn.predict(row.file)
        assert row[2] == name
        assert [row[3], row[5], row[7]] == pytest.approx(sorted(probabilities.tolist(), reverse=True), rel=0.05)
        assert {row[2], row[4], row[6]} == {'blue', 'green', 'red'}
    *lines, _, note = show(capsys, run, *files)
    assert len({len(line.rstrip()) for line in lines[1:]}) == 1, 'not aligned'
    for line, row in zip(lines[1:], table.itertuples(), strict=True):
        assert line.split()[:4] == [row.file, row[2], f'{100 * row[3]:.1f}', '%']
    assert 'always names one of its 3 classes' in note


def test_what_counts_as_an_image_is_the_same_everywhere(run, tmp_path, capsys, monkeypatch):
    """E12: whatever the machine's mimetypes say; and hidden files are no images."""
    monkeypatch.setattr('fastai.data.transforms.image_extensions', set())
    for name in ('one/a.webp', 'one/b.jfif', 'one/c.JPG', 'eval/red/d.webp', 'eval/blue/e.bmp'):
        (file := tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (32, 32)).save(file, format='jpeg' if file.suffix == '.jfif' else None)
    for name in ('labels.csv', 'x.svg', '.hidden.png', '._c.JPG'): (tmp_path/'one'/name).touch()
    assert [f[-4:] for f in read_csv(capsys, run, tmp_path/'one').file] == ['webp', 'jfif', '.JPG']
    assert list(read_csv(capsys, run, tmp_path/'eval').actual) == ['blue', 'red']
    assert 'actual' not in read_csv(capsys, run, tmp_path/'eval/red', tmp_path/'eval/blue')


def test_evaluation_is_that_of_the_run_and_of_a_count_by_hand(run, folder, capsys):
    table, m = read_csv(capsys, run, folder/'test'), read_metrics(run)
    right = table.actual == table['class']
    assert right.mean() == pytest.approx(m['test_accuracy'])
    assert list(table.actual) == [f.split('/')[-2] for f in table.file]
    lines = [line.split() for line in show(capsys, run, folder/'test')]
    assert ['accuracy', f'{100 * m["test_accuracy"]:.2f}', '%'] in lines
    def shown(share): return [f'{100 * share:.1f}', '%']
    for c in ('blue', 'green', 'red'):
        named = table['class'] == c
        assert [c, '4', *shown(right[table.actual == c].mean()),
                *(shown(right[named].mean()) if named.any() else '–')] in lines
    for (actual, predicted), n in table[~right].groupby(['actual', 'class']).size().items():
        assert [actual, predicted, str(n)] in lines

    learn = load_run(run, folder)
    x = torch.cat([x.as_subclass(torch.Tensor) for x, _ in learn.dls.valid])
    net = learn.model.eval()
    with torch.no_grad(): right = (net(x) + net(x.flip(-1))).argmax(1) == learn.dls.valid_ds.labels
    assert ['accuracy,', 'flip', 'averaging', f'{100 * right.float().mean():.2f}', '%'] in [line[:5] for line in lines]


def test_flip_averaging_is_the_mean_of_log_probabilities():
    """The first image's mean probability is largest for class a, its mean log-probability for class b."""
    log_probs = torch.tensor([[0.70, 0.28, 0.02], [0.9, 0.05, 0.05]]).log()
    flipped = torch.tensor([[0.10, 0.36, 0.54], [0.8, 0.10, 0.10]]).log()
    text = predict.describe_accuracy(log_probs, flipped, torch.tensor([1, 0]), ['a', 'b', 'c'])
    assert text.splitlines()[1].split()[-2:] == ['50.00', '%']
    assert text.splitlines()[2].split()[3:5] == ['100.00', '%']
    text = predict.describe_accuracy(*[torch.eye(3).log()] * 2, torch.arange(3), ['cat', 'd|g', 'eel'])
    assert text.endswith('Most confused:\nnone')
    text = predict.describe_accuracy(*[torch.eye(3)[:2].log()] * 2, torch.tensor([0, 2]), ['cat', 'd|g', 'eel'])
    assert [line.split() for line in text.splitlines()[5:8]] == [
        ['cat', '1', '100.0', '%', '100.0', '%'], ['d|g', '0', '–', '0.0', '%'], ['eel', '1', '0.0', '%', '–']]


def test_centre_square_of_a_larger_image(tmp_path):
    """On an image whose green tells the row and whose blue the column."""
    pixels = np.stack(np.broadcast_arrays(0, np.arange(64)[:, None], np.arange(128)), -1).astype('uint8')
    Image.fromarray(pixels).save(tmp_path/'x.png')
    Image.fromarray(pixels[::2, ::2]).save(tmp_path/'y.png')
    large, small = decode_images([tmp_path/'x.png', tmp_path/'y.png'], resize=True).permute(0, 2, 3, 1).numpy()
    assert np.abs(large - pixels[::2, 32:96:2].astype('float32')).max() <= 1
    assert (small == pixels[::2, 32:96:2]).all(), 'a crop of the right size is not resampled'
    for size in ((7, 5), (1, 1000)):
        Image.new('CMYK', size).save(tmp_path/'z.tif')
        assert (decode_images([tmp_path/'z.tif'], resize=True) == 255).all()


def test_learn_predict_reads_images_as_the_command_does(run, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (90, 50, 3), 'uint8')
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path/'x.png', exif=exif)
    Image.fromarray(pixels[:, :, 0].astype('uint16') * 257).save(tmp_path/'y.png')
    learn = load_run(run)
    for row in read_csv(capsys, run, tmp_path).itertuples():
        name, _, probabilities = learn.predict(row.file)
        assert row[2] == name
        assert row.probability == pytest.approx(probabilities.max().item(), rel=1e-3)
    assert learn.predict(PILImage.create(pixels))[0] in learn.dls.vocab


def make(path, *names):
    for name in names:
        (path/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (32, 32)).save(path/name)


def empty(path): (path/'empty').mkdir()
def text(path): (path/'text.png').write_text('hello')
def nothing(path): pass
def other_class(path): make(path, 'eval/red/0.png', 'eval/pink/0.png')
def stray_image(path): make(path, 'eval/red/0.png', 'eval/0.png')


@pytest.mark.parametrize(('prepare', 'images', 'message'), [
    (nothing, [], 'no image was given'), (nothing, ['none.png'], 'none.png cannot be read as an image'),
    (empty, ['empty'], 'there are no images in empty'), (text, ['text.png'], 'text.png cannot be read as an image'),
    (other_class, ['eval'], 'eval/pink/0.png is not in a sub-folder with the name of a class: eval/blue|green|red\n'),
    (stray_image, ['eval'], 'eval/0.png is not in a sub-folder with the name of a class'),
    (nothing, ['/dev/null'], '/dev/null cannot be read'), (nothing, [''], '. cannot be read')],
    ids=lambda o: getattr(o, '__name__', None))
def test_bad_images_are_one_line(run, tmp_path, capsys, monkeypatch, prepare, images, message):
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert message in ends(capsys, 2, main, run, *images)
    assert capsys.readouterr().out == ''


def test_stream_of_few_letters_and_of_windows_line_ends(run, folder, tmp_path, monkeypatch):
    """E14: line ends are the stream's; and options may stand between run and images."""
    shutil.copy(folder/'test/red/0.png', tmp_path/'für.png')
    monkeypatch.setattr(os, 'linesep', '\r\n')
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(content := io.BytesIO(), encoding='ascii', newline='\r\n'))
    main([str(run), '--csv', str(tmp_path/'für.png')])
    header, line, end = content.getvalue().split(b'\r\n')
    assert header.startswith(b'file,class,probability')
    assert b'f?r.png' in line
    assert b'\r' not in header + line
    assert end == b''


def test_reader_that_leaves_is_no_error(run, folder, monkeypatch, capsys):
    """As in `predict.py … | head`: what was printed is written before the program's end, not at exit."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, 'w') as pipe, monkeypatch.context() as m:
        m.setattr(sys, 'stdout', pipe)
        with pytest.raises(SystemExit) as e: main(args(run, folder/'test/red', csv=True))
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # for Python's own end of the pipe
    assert (e.value.code, capsys.readouterr().err) == (141, '')


def no_weights(run): (run/'model.pth').unlink()
def interrupted(run): (run/'model.pth').rename(run/'checkpoint.pth')
def no_metrics(run): (run/'metrics.json').unlink()
def odd_metrics(run): (run/'metrics.json').write_text('[]')
def no_options(run): (run/'metrics.json').write_text('{"classes": ["a", "b"], "options": {}}')
def damaged(run): (run/'model.pth').write_bytes((run/'model.pth').read_bytes()[:1000])
def foreign(run): torch.save(dict(a=torch.ones(3)), run/'model.pth')
def malicious(run): torch.save(dict(a=Malicious()), run/'model.pth')
def malicious_pickle(run): (run/'model.pth').write_bytes(pickle.dumps(Malicious()))


@pytest.mark.parametrize(('spoil', 'message'), [
    (no_weights, 'copy is not the folder of a finished run, as docs/cifar10 is'),
    (interrupted, 'is not finished; finish it with: python train_fastai.py --resume'),
    (no_metrics, 'metrics.json cannot be used ([Errno 2] No such file'), (odd_metrics, 'metrics.json'),
    (no_options, "metrics.json cannot be used ('precision'"), (damaged, 'model.pth is damaged'),
    (foreign, 'does not hold the weights of ResNet; load_run(…, model=…) takes another'),
    (malicious, 'it was not opened'), (malicious_pickle, 'model.pth')],
    ids=lambda o: getattr(o, '__name__', None))
def test_bad_run_is_one_line_and_no_code_of_it_runs(copy, folder, tmp_path, capsys, monkeypatch, spoil, message):
    monkeypatch.setenv('MALICIOUS_DIR', str(tmp_path/'was here'))
    spoil(bad := copy())
    assert message in ends(capsys, 2, main, bad, folder/'test/red/0.png')
    assert not (tmp_path/'was here').exists()


def test_an_image_in_place_of_the_run(folder, capsys):
    image = folder/'test/red/0.png'
    assert ends(capsys, 2, main, image) == f'error: {image} is not the folder of a finished run, as docs/cifar10 is\n'
