"""Changed experiments of the kinds that used to end with wrong numbers in a finished report."""
import errno
import functools
from functools import partial

import pandas as pd
import pytest
import torch
from conftest import SIX_EPOCHS, Spoil, args, disturbed, interrupt, read_metrics
from fastai.vision import all as fv
from fastai.vision.all import Callback, CancelFitException, CSVLogger, SaveModelCallback, error_rate
from kill import differences
from torch import nn

import predict
from lab.errors import RunError
from lab.optim import TorchOptimizer
from lab.results import save_results
from lab.runs import Run
from lab.speed import fast
from predict import load_run
from train_fastai import Options, get_dls, get_learner, main

pytestmark = pytest.mark.usefixtures('no_pictures')
# Of a monitored loss, no epoch is an improvement by 10
Plateau = partial(fv.ReduceLROnPlateau, min_delta=10., patience=2)
Stop = partial(fv.EarlyStoppingCallback, min_delta=10., patience=4)
BestTraining = partial(SaveModelCallback, monitor='train_loss')


def experiment(fit, change=lambda learn: None, **options):
    """Somebody's own experiment: a run whose training is `fit(learn, checkpoint)` with a learner that is changed."""
    with Run(Options(**options)) as run:
        dls = get_dls(**run.locate_images())
        run.claim_folder(dls)
        learn = get_learner(dls, precision=run.precision, path=run.folder/'learner')
        change(learn)
        fit(learn, lambda: run.checkpoint(*run.lrs))
        save_results(run, learn)
    return learn


def one_cycle(*cbs):
    """A fit that ends at a rate of 0.2, so that its last epoch spoils the network."""
    return lambda learn, checkpoint: learn.fit_one_cycle(6, 1e-2, div_final=.05,
                                                         cbs=[checkpoint(), *(cb() for cb in cbs)])


@pytest.fixture
def options(folder, tmp_path): return dict(data=folder, out=tmp_path/'run', precision='fp32', **SIX_EPOCHS)


def check_results(out, folder, capsys) -> dict:
    """Every result must be that of the weights that are written, as predict.py and fastai compute it from them."""
    m, learn = read_metrics(out), load_run(out, folder)
    assert list(learn.validate()) == pytest.approx([m['test_loss'], m['test_accuracy']], rel=1e-5)
    capsys.readouterr()
    predict.main(args(out, folder/'test', csv=True))
    predicted = pd.read_csv(pd.io.common.StringIO(capsys.readouterr().out))
    predicted['file'] = [f.removeprefix(f'{folder}/') for f in predicted.file]
    wrong = pd.read_csv(out/'misclassified.csv').set_index('file').probability
    theirs = predicted[predicted['class'] != predicted.actual].set_index('file').probability
    assert dict(wrong) == pytest.approx(dict(theirs), abs=1e-5)
    assert (predicted['class'] == predicted.actual).mean() == pytest.approx(m['test_accuracy'])
    for text in ((out/'report.md').read_text(), (out/'errors.html').read_text()):
        assert f'{100 * m["test_accuracy"]:.2f} %' in text
    return m


def test_weights_that_were_loaded_back_are_those_reported(options, folder, capsys):
    """A1: the best epoch's weights, not those of the last test."""
    learn = experiment(one_cycle(SaveModelCallback), **options)
    losses = [row['test_loss'] for row in learn.history.rows]
    m, best = check_results(options['out'], folder, capsys), losses.index(min(losses)) + 1
    assert m['weights_of_epoch'] == best < 6
    assert m['test_loss'] == pytest.approx(min(losses), abs=1e-5)
    assert f'tested after epoch {best}' in (options['out']/'report.md').read_text()


def test_weights_that_were_changed_after_the_last_test(options, folder, capsys):
    def fit(learn, checkpoint):
        learn.fit_one_cycle(6, 1e-3, wd=0.3, cbs=checkpoint())
        with torch.no_grad(): learn.model.fc.weight.neg_()
    experiment(fit, **options)
    m = check_results(options['out'], folder, capsys)
    assert (m['weights_of_epoch'], m['recipe']['wd']) == (None, 0.3), 'not those of an option'
    assert 'changed after the last test' in (options['out']/'report.md').read_text()


def other_metrics(learn): learn.metrics, learn.recorder.train_metrics = [error_rate, fv.RocAuc()], True
def other_loss(learn): learn.loss_func = fv.FocalLossFlat()
def shuffled_tests(learn): learn.dls.loaders[1] = learn.dls.valid.new(shuffle=True)


@pytest.mark.parametrize('change', [other_metrics, other_loss, shuffled_tests])
def test_accuracy_is_computed_not_looked_up(options, folder, capsys, change):
    """A2."""
    rows = experiment(one_cycle(), change, **options).history.rows
    m = check_results(options['out'], folder, capsys)
    assert (m['test_accuracy'], m['weights_of_epoch']) == (rows[-1]['test_accuracy'], 6)


def cancel_fit(): raise CancelFitException


@pytest.mark.parametrize(('cbs', 'batches'), [((Stop,), 15), ((), 10)])
def test_a_fit_that_ends_early(options, folder, capsys, cbs, batches):
    """A4: what is reported is what was recorded."""
    with disturbed(cancel_fit, 3 if not cbs else 99): experiment(one_cycle(*cbs), **options)
    m, out = check_results(options['out'], folder, capsys), options['out']
    history, schedule = pd.read_csv(out/'history.csv'), pd.read_csv(out/'schedule.csv')
    epochs = batches // 3
    assert (m['epochs'], len(history), len(schedule)) == (epochs, epochs, batches)
    assert m['train_accuracy'] == pytest.approx(history.train_accuracy.iloc[-1])
    report = (out/'report.md').read_text()
    assert f'The run ended after {epochs} epochs; 6 were planned.' in report
    assert 'no annihilation' not in report


def test_a_fit_that_ends_before_its_first_epoch(options):
    with disturbed(cancel_fit, 0), pytest.raises(RunError, match='before its first epoch'):
        experiment(one_cycle(), **options)


def test_a_fit_that_a_callback_ends_for_its_loss(options):
    cbs = partial(Spoil, True, 3, 1), fv.TerminateOnNaNCallback
    with pytest.raises(RunError, match='gives no numbers; lower --lr-max'): experiment(one_cycle(*cbs), **options)
    assert not (options['out']/'model.pth').exists()


def find_between(learn, checkpoint):
    learn.fit(2, 1e-3, cbs=checkpoint())
    learn.fit_one_cycle(3, learn.lr_find(num_it=30, show_plot=False).valley, cbs=checkpoint())


def one_checkpoint_for_all(learn, checkpoint):
    learn.add_cb(checkpoint())
    learn.lr_find(num_it=6, show_plot=False)
    learn.fit(2, 1e-3)
    learn.fit_one_cycle(2, 1e-2, reset_opt=True)


class Seen(Callback):
    """Remembers the batches, and leaves their number in the network."""
    order = 60
    def before_fit(self): self.batches = set()
    def after_batch(self): self.batches.add(self.train_iter)
    def after_fit(self): self.learn.model.fc.bias.data.fill_(len(self.batches))


def fine_tune(learn, checkpoint): learn.fine_tune(2, 1e-2, freeze_epochs=3, cbs=checkpoint())
def restarts(learn, checkpoint): learn.fit_sgdr(2, 2, lr_max=1e-3, cbs=checkpoint())


def trackers(learn, checkpoint):
    learn.opt_func = fv.Adam  # whose `hypers` Plateau may write to
    learn.fit(6, 1e-2, cbs=[checkpoint(), Plateau(), Stop(), BestTraining()])


def other_network(learn, checkpoint):
    fv.set_seed(0)
    learn.model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveMaxPool2d(2),
                                nn.Flatten(), nn.Linear(32, 3))  # it ends in logits
    learn.opt_func = fv.ranger
    with fast(learn): one_cycle()(learn, checkpoint)


def torch_optimizer(learn, checkpoint):
    learn.opt_func = partial(TorchOptimizer, opt=torch.optim.SGD, momentum=0.9)
    with fast(learn): one_cycle()(learn, checkpoint)


FITS = dict(find_between=find_between, one_checkpoint_for_all=one_checkpoint_for_all, fine_tune=fine_tune,
            restarts=restarts, trackers=trackers, plain=one_cycle(), other_network=other_network,
            torch_optimizer=torch_optimizer,
            callbacks=one_cycle(partial(fv.GradientAccumulation, n_acc=20), fv.MixUp, Seen))


@pytest.fixture(scope='module')
def whole(folder, tmp_path_factory):
    """The folder and the learner of a run by one of `FITS` that nothing interrupts."""
    @functools.cache
    def run(name):
        out = tmp_path_factory.mktemp(name)/'whole'
        return out, experiment(FITS[name], data=folder, out=out, precision='fp32', **SIX_EPOCHS)
    return run


def compiled(learn): learn.model = torch.compile(learn.model)
def in_parallel(learn): learn.model = nn.DataParallel(learn.model)


@pytest.mark.parametrize('change', [compiled, in_parallel])
def test_a_network_inside_another_is_written_plain(options, whole, change):
    """A3; the plain network's run has the same numbers, and a run that was killed is resumed."""
    with torch.compiler.set_stance('force_eager'):  # without a wait for the compiler
        with disturbed(interrupt), pytest.raises(KeyboardInterrupt): experiment(FITS['plain'], change, **options)
        experiment(FITS['plain'], change, resume=options['out'])
    assert differences(whole('plain')[0], options['out']) == []
    assert read_metrics(options['out'])['recipe']['network'] == 'ResNet'


@pytest.mark.parametrize(('name', 'epoch'), [
    ('find_between', 1), ('find_between', 3), ('one_checkpoint_for_all', 3), ('fine_tune', 1), ('fine_tune', 3),
    ('restarts', 3), ('trackers', 3), ('callbacks', 3), ('other_network', 3), ('torch_optimizer', 3)])
def test_a_resumed_run_ends_like_the_whole(options, whole, name, epoch):
    """B5 and B6: several fits, of which either is interrupted, callbacks with a state, and other optimizers."""
    out = options['out']
    with disturbed(interrupt, epoch), pytest.raises(KeyboardInterrupt): experiment(FITS[name], **options)
    if name == 'find_between' and epoch == 3:
        with pytest.raises(RunError, match='epochs or rates'): experiment(FITS[name], resume=out)
        return
    (expected, one), other = whole(name), experiment(FITS[name], resume=out)
    assert differences(expected, out) == []
    assert other.opt.hypers[0]['lr'] == one.opt.hypers[0]['lr']
    ours, theirs = ({f.relative_to(o): f.read_bytes() for f in o.rglob('*') if 'learner' in f.parts and f.is_file()}
                    for o in (out, expected))
    assert ours == theirs


def test_what_fastai_saves_by_default_is_no_file_of_the_run(options, folder, tmp_path):
    """D11: neither in a run nor in the learner of a finished one, which writes over nothing."""
    experiment(one_cycle(CSVLogger, SaveModelCallback), **options)
    out = options['out']
    assert len(pd.read_csv(out/'history.csv')) == 6
    assert list(pd.read_csv(out/'learner/history.csv').epoch) == list(range(6))
    before = {f: f.read_bytes() for f in out.iterdir() if f.is_file()}
    learn = load_run(out, folder)
    learn.fit(1, 1e-4, cbs=[CSVLogger(), SaveModelCallback(fname='../model')])
    learn.export()
    learn.save('model')
    assert {f: f.read_bytes() for f in out.iterdir() if f.is_file()} == before


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(options, monkeypatch, capsys, number):
    """E13."""
    def refuse(*_): raise OSError(number, 'no locks')
    monkeypatch.setattr('fcntl.flock', refuse)
    main(args(**options | dict(epochs=1)))
    assert 'cannot be locked' in capsys.readouterr().err
    assert (options['out']/'model.pth').exists()
