import io
import json
import os
import pickle
import re
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Malicious, args, ends, read_metrics
from fastai.vision.all import ClassificationInterpretation, PILImage
from PIL import Image

from lab.errors import InputError
from lab.loader import decode_images
from predict import load_run, main


def show(capsys, *given, **options) -> str:
    """What `main` prints."""
    capsys.readouterr()
    main(args(*given, **options))
    return capsys.readouterr().out


def read_csv(capsys, *given): return pd.read_csv(io.StringIO(show(capsys, *given, csv=True)))


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
    learn.show_results()
    (interp := ClassificationInterpretation.from_learner(learn)).plot_top_losses(4)
    assert interp.confusion_matrix().trace() == 12 - len(pd.read_csv(run/'misclassified.csv'))


def test_loaded_learner_has_the_recipe_of_the_run(copy, folder):
    """C10: to train on as the run was trained, not as the defaults say."""
    out = copy(dict(wd=0.01, label_smoothing=0.05, ema=0.9, seed=7, bs=2, quick=True), precision='fp32')
    learn = load_run(out, folder)
    assert (learn.wd, learn.loss_func.label_smoothing, learn.weight_average.decay) == (0.01, 0.05, 0.9)
    assert (learn.seed_epochs.seed, learn.path, learn.dls.bs) == (7, out/'learner', 2)
    assert [len(ds) for ds in (learn.dls.train_ds, learn.dls.valid_ds)] == [3, 3], 'of each class one in ten'
    assert not hasattr(learn, 'precision')


def test_without_its_images_it_predicts_the_same(copy, folder, monkeypatch):
    monkeypatch.setattr('lab.sources.fastai_path', None)  # there is no home for data either
    learn, with_data = load_run(out := copy(dict(data='gone'))), load_run(out, folder)
    files = sorted((folder/'test').rglob('*.png'))
    preds, targets = learn.get_preds(dl=learn.dls.test_dl(files, with_labels=True))
    assert [learn.dls.vocab[i] for i in targets] == [f.parent.name for f in files]
    torch.testing.assert_close(preds, with_data.get_preds()[0])


def test_other_classes_than_those_of_the_run_are_refused(run, folder, tmp_path):
    shutil.copytree(folder, other := tmp_path/'other')
    for split in ('train', 'test'): (other/split/'red').rename(other/split/'pink')
    with pytest.raises(InputError, match=f'{other} has other classes than {run}: blue, green, pink'):
        load_run(run, other)


def test_table_is_that_of_learn_predict(run, folder, tmp_path, capsys):
    """Of small images, of a large one that lies on its side, and of one with 16 bits a pixel."""
    pixels, exif = np.random.default_rng(0).integers(0, 255, (90, 50, 3), 'uint8'), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path/'x.png', exif=exif)
    Image.fromarray(pixels[:, :, 0].astype('uint16') * 257).save(tmp_path/'y.png')
    files = [*sorted((folder/'test/green').iterdir()), tmp_path/'x.png', tmp_path/'y.png']
    table, learn = read_csv(capsys, run, *files), load_run(run)
    assert list(table) == ['file', 'class', 'probability', 'class_2', 'probability_2', 'class_3', 'probability_3']
    assert list(table.file) == list(map(str, files))
    *lines, _, note = show(capsys, run, *files).splitlines()
    assert len({len(line.rstrip()) for line in lines[1:]}) == 1, 'not aligned'
    assert 'always names one of its 3 classes' in note
    for line, row in zip(lines[1:], table.itertuples(), strict=True):
        name, _, probabilities = learn.predict(row.file)
        assert line.split()[:4] == [row.file, name, f'{100 * row[3]:.1f}', '%']
        assert [row[3], row[5], row[7]] == pytest.approx(sorted(probabilities.tolist(), reverse=True), rel=0.01)
        assert [row[2], {row[2], row[4], row[6]}] == [name, {'blue', 'green', 'red'}]
    assert learn.predict(PILImage.create(pixels))[0] in learn.dls.vocab


def test_what_counts_as_an_image_is_the_same_everywhere(run, tmp_path, capsys, monkeypatch):
    """E12: whatever the machine's mimetypes say; and hidden files are no images."""
    monkeypatch.setattr('fastai.data.transforms.image_extensions', set())
    for name in ('one/a.webp', 'one/b.jfif', 'one/c.JPG', 'eval/red/d.webp', 'eval/blue/e.bmp'):
        (file := tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (32, 32)).save(file, format='jpeg' if file.suffix == '.jfif' else None)
    for name in ('labels.csv', 'x.svg', '._c.JPG'): (tmp_path/'one'/name).touch()
    assert [f[-4:] for f in read_csv(capsys, run, tmp_path/'one').file] == ['webp', 'jfif', '.JPG']
    assert list(read_csv(capsys, run, tmp_path/'eval').actual) == ['blue', 'red']
    assert 'actual' not in read_csv(capsys, run, tmp_path/'eval/red', tmp_path/'eval/blue')


def test_evaluation_is_that_of_the_run_and_of_a_count_by_hand(run, folder, capsys):
    table, m = read_csv(capsys, run, folder/'test'), read_metrics(run)
    right = table.actual == table['class']
    assert right.mean() == pytest.approx(m['test_accuracy'])
    lines = [line.split() for line in show(capsys, run, folder/'test').splitlines()]
    assert lines[0] == ['12', 'images,', 'accuracy', f'{100 * m["test_accuracy"]:.2f}', '%']
    def shown(share): return [f'{100 * share:.1f}', '%']
    for c in ('blue', 'green', 'red'):
        named = table['class'] == c
        assert [c, '4', *shown(right[table.actual == c].mean()),
                *(shown(right[named].mean()) if named.any() else '–')] in lines


def test_centre_square_of_a_larger_image(tmp_path):
    """On an image whose green tells the row and whose blue the column."""
    pixels = np.stack(np.broadcast_arrays(0, np.arange(64)[:, None], np.arange(128)), -1).astype('uint8')
    Image.fromarray(pixels).save(tmp_path/'x.png')
    Image.fromarray(pixels[::2, ::2]).save(tmp_path/'y.png')
    large, small = decode_images([tmp_path/'x.png', tmp_path/'y.png'], resize=True).permute(0, 2, 3, 1).numpy()
    assert np.abs(large - pixels[::2, 32:96:2].astype('float32')).max() <= 1
    assert (small == pixels[::2, 32:96:2]).all(), 'a crop of the right size is not resampled'


@pytest.mark.parametrize(('images', 'message'), [
    ([], 'no image was given'), (['empty'], 'there are no images in empty'), (['none.png'], 'none.png cannot be read'),
    (['text.png'], 'text.png cannot be read as an image'),
    (['eval'], 'eval/pink/0.png is not in a sub-folder with the name of a class: eval/blue|green|red\n'),
    (['d'], 'with the name of a class: d/blue|green|red; the test images are in d/test\n')])
def test_bad_images_are_one_line(run, tmp_path, capsys, monkeypatch, images, message):
    for name in ('eval/red/0.png', 'eval/pink/0.png', 'd/test/red/0.png', 'text.png'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text('hello')
    (tmp_path/'empty').mkdir()
    monkeypatch.chdir(tmp_path)
    assert message in ends(capsys, 2, main, run, *images)
    assert capsys.readouterr().out == ''


def test_stream_of_few_letters_and_of_windows_line_ends(run, folder, tmp_path, monkeypatch):
    """E14: line ends are the stream's; and options may stand between run and images."""
    shutil.copy(folder/'test/red/0.png', tmp_path/'für.png')
    monkeypatch.setattr(os, 'linesep', '\r\n')
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(content := io.BytesIO(), encoding='ascii', newline='\r\n'))
    main([str(run), '--csv', str(tmp_path/'für.png')])
    assert re.fullmatch(rb'file,class,probability[^\r\n]*\r\n[^\r\n]*f\?r.png[^\r\n]*\r\n', content.getvalue())


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
def no_options(run): (run/'metrics.json').write_text('{"classes": ["a", "b"], "options": {}}')
def damaged(run): (run/'model.pth').write_bytes((run/'model.pth').read_bytes()[:1000])
def foreign(run): torch.save(dict(a=torch.ones(3)), run/'model.pth')
def malicious(run): torch.save(dict(a=Malicious()), run/'model.pth')
def malicious_pickle(run): (run/'model.pth').write_bytes(pickle.dumps(Malicious()))


@pytest.mark.parametrize(('spoil', 'message'), [
    (no_weights, 'copy is not the folder of a finished run, as docs/cifar10 is'),
    (interrupted, 'is not finished; finish it with: python train_fastai.py --resume'),
    (no_metrics, 'copy cannot be used ([Errno 2] No such file'),
    (no_options, "copy cannot be used ('precision'); copy all of the run"), (damaged, 'model.pth is damaged'),
    (foreign, 'load_run(…, model=…) takes another network than ResNet'),
    (malicious, 'it was not opened'), (malicious_pickle, 'model.pth')],
    ids=lambda o: getattr(o, '__name__', None))
def test_bad_run_is_one_line_and_no_code_of_it_runs(copy, folder, tmp_path, capsys, monkeypatch, spoil, message):
    monkeypatch.setenv('MALICIOUS_DIR', str(tmp_path/'was here'))
    spoil(bad := copy())
    assert message in ends(capsys, 2, main, bad, folder/'test/red/0.png')
    assert not (tmp_path/'was here').exists()
