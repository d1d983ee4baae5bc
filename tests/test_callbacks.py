import math
from functools import partial

import pytest
import torch
from conftest import LR_MAX, LR_MIN, Spoil, equal, fit, one_cycle, weights
from fastai.vision import all as fv
from fastai.vision.all import Callback, CancelFitException, SaveModelCallback, accuracy, error_rate

from arch import ResNet
from lab.errors import RunError
from train_fastai import get_learner

make = partial(get_learner, precision='fp32')


def test_the_schedule_holds_what_the_optimizer_used(dls, tmp_path):
    """A rise to LRMAX in 5/24 of the batches, a fall back, and nothing of a finder or of predictions."""
    class Spy(Callback):
        used = []
        def before_step(self):
            one, other = self.opt.opt.param_groups
            self.used.append((one['lr'], other['betas'][0]))
    learn = make(dls, path=tmp_path)
    learn.lr_find(num_it=6, show_plot=False)
    fit(learn, 8, cbs=(spy := Spy()))
    learn.get_preds()
    learn.validate()
    found = learn.history.schedule
    assert [r['batch'] for r in found] == list(range(1, 25))
    assert [(r['lr'], r['momentum']) for r in found] == spy.used
    assert [r['lr'] for r in found] == pytest.approx([one_cycle(i, 24, LR_MIN, LR_MAX) for i in range(24)])
    assert (found[0]['momentum'], found[5]['momentum']) == pytest.approx((0.95, 0.85))
    assert len(learn.history.rows) == 8


@pytest.mark.parametrize(('metrics', 'train_metrics'), [([accuracy], False), ([error_rate], True), ([], True)])
def test_history_has_means_of_batches_and_the_tests_figures(dls, tmp_path, metrics, train_metrics):
    class Spy(Callback):
        losses, right = [], []
        def after_batch(self):
            if self.training:
                self.losses.append(self.loss.item())
                self.right.append((self.pred.argmax(1) == self.y).float().mean().item())
    learn = make(dls, path=tmp_path)
    learn.metrics, learn.recorder.train_metrics = metrics, train_metrics
    fit(learn, cbs=(spy := Spy()))
    assert [r['epoch'] for r in learn.history.rows] == [1, 2]
    for i, row in enumerate(learn.history.rows):
        batches = slice(3 * i, 3 * i + 3)
        assert row['train_loss'] == pytest.approx(sum(spy.losses[batches]) / 3, rel=1e-5)
        assert row['train_accuracy'] == pytest.approx(sum(spy.right[batches]) / 3)
        assert 0 < row['seconds'] < 60
    preds, targets = learn.get_preds()
    assert row['test_accuracy'] == pytest.approx((preds.argmax(1) == targets).float().mean().item())
    assert row['test_loss'] == pytest.approx(-preds[range(12), targets].log().mean().item())


class Weights(Callback):
    """The model's state after every step."""
    def before_fit(self): self.steps = []
    def after_step(self): self.steps.append(weights(self))


def test_the_average_of_the_weights_is_tested_and_kept(dls, tmp_path):
    """While training goes on from the last step's weights, as without an average."""
    plain, learn = make(dls, path=tmp_path, ema=0), make(dls, path=tmp_path, ema=0.5)
    fit(plain, 4, cbs=(alone := Weights()))
    fit(learn, 4, cbs=(seen := Weights()))
    assert equal(weights(plain), alone.steps[-1])
    assert all(equal(one, other) for one, other in zip(alone.steps, seen.steps, strict=True))
    expected = seen.steps[0]
    for n, state in enumerate(seen.steps[1:], 1):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = {k: decay * expected[k] + (1 - decay) * state[k] for k in state}
    kept = weights(learn)
    for k in kept:
        if not k.endswith('num_batches_tracked'): torch.testing.assert_close(kept[k], expected[k], rtol=1e-4, atol=1e-6)
    assert not equal(kept, seen.steps[-1])
    assert learn.validate()[-2] == pytest.approx(learn.history.rows[-1]['test_loss'])


def test_an_interrupted_test_leaves_a_learner_that_trains_on(dls, tmp_path):
    class Stop(Callback):
        def before_batch(self):
            if not self.training: raise KeyboardInterrupt
    learn = make(dls, path=tmp_path)
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=Stop())
    fit(learn, 2, cbs=(seen := Weights()))
    assert not torch.equal(seen.steps[0]['fc.weight'], seen.steps[1]['fc.weight'])
    assert learn.validate()[-2] == pytest.approx(learn.history.rows[-1]['test_loss'])
    learn.model.load_state_dict({k: torch.zeros_like(v) for k, v in weights(learn).items()})
    assert learn.validate()[-2] == pytest.approx(math.log(3)), 'of these weights, not of an average of earlier ones'


@pytest.mark.parametrize(('event', 'error', 'epochs', 'batches'), [
    ('after_pred', fv.CancelTrainException, 3, 7), ('after_batch', CancelFitException, 1, 4),
    ('after_epoch', CancelFitException, 2, 6)])
def test_a_fit_that_is_cancelled_keeps_averages(dls, tmp_path, event, error, epochs, batches):
    def cancel(cb):
        if cb.epoch == 1 and (event == 'after_epoch' or cb.training and cb.iter == 1): raise error
    cancel_cb = type('Cancel', (Callback,), {event: cancel})
    learn = fit(make(dls, path=tmp_path), 3, cbs=[cancel_cb(), seen := Weights()])
    assert not equal(weights(learn), seen.steps[-1])
    assert learn.validate()[-2] < 1.2
    h = learn.history  # the last test is none of a fit
    assert [len(h.rows), len(h.schedule), len(h.checksums)] == [epochs, batches, epochs]
    torch.nn.init.constant_(learn.model.fc.bias, math.nan)
    assert math.isnan(learn.validate()[-2])


def test_another_callbacks_test_costs_no_epoch(dls, tmp_path):
    class Test(Callback):
        order = 70
        def after_train(self): self.learn.validate()
    learn = make(dls, path=tmp_path, ema=0)
    assert math.isfinite(learn.validate()[-2]), 'before any fit'
    fit(learn, 2, cbs=Test())
    assert len(learn.history.rows) == len(learn.history.checksums) == 2


class Labels(Callback):
    """The labels of every training batch, which tell of its images."""
    def __init__(self): self.labels = []
    def before_batch(self):
        if self.training: self.labels.append(self.y.tolist())


def test_an_epoch_draws_what_it_would_draw_in_any_fit(dls, tmp_path):
    """In a second fit, after a finder, or where a fit starts late."""
    learn, spy, whole, rest = make(dls, path=tmp_path), Labels(), Labels(), Labels()
    for _ in range(2): learn.fit(1, 0., cbs=spy)
    learn.lr_find(num_it=6, show_plot=False)
    learn.fit(1, 0., cbs=spy)
    assert [row['epoch'] for row in learn.history.rows] == [1, 2, 3]
    make(dls, path=tmp_path).fit(3, 0., cbs=whole)
    make(dls, path=tmp_path).fit(3, 0., cbs=rest, start_epoch=1)
    assert spy.labels == whole.labels
    assert rest.labels == whole.labels[3:]
    assert spy.labels[:3] != spy.labels[3:6] != spy.labels[6:]


def test_the_same_seed_gives_the_same_run_whatever_drew_before(dls, tmp_path):
    runs, network = [], partial(ResNet, n_out=3)  # a function, which get_learner calls
    for meddle in (False, True):
        learn = make(dls, network, seed=7, path=tmp_path)
        if meddle:
            learn.lr_find(num_it=6, show_plot=False)
            dls.show_batch()
            torch.rand(3)
        fit(learn)
        runs.append(learn)
    assert runs[0].recorder.values == runs[1].recorder.values
    assert equal(*map(weights, runs))
    one, other = (make(dls, network, seed=seed, path=tmp_path) for seed in (7, 8))
    assert not equal(weights(one), weights(other))
    assert fit(other).recorder.values != runs[0].recorder.values


@pytest.mark.parametrize('epoch', [0, 1])
def test_a_nan_stops_the_run_and_says_where(dls, tmp_path, epoch):
    learn = make(dls, path=tmp_path)
    with pytest.raises(RunError, match=f'not finite in epoch {epoch + 1}; lower --lr-max .the rate is .*e-0'):
        fit(learn, 3, cbs=[SaveModelCallback(), Spoil(True, epoch, 2)])  # not that there is no best model to load
    assert len(learn.history.rows) == epoch
    learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)  # not to blame for the training before it


class SeeTests(Callback):
    """The answers of every test as they come, batch by batch, and what was collected of them by its end."""
    order = 1000
    def before_fit(self): self.answers, self.collected = [], []
    def before_validate(self): self.answers.append([])
    def after_batch(self):
        if not self.training: self.answers[-1].append((self.pred.clone(), self.y.clone()))
    def after_validate(self): self.collected.append((self.misclassified.log_probs, self.misclassified.targets))


def test_misclassified_images_are_those_of_every_test(dls, tmp_path):
    learn = fit(make(dls, path=tmp_path), 3, cbs=(seen := SeeTests()))
    assert len(seen.collected) == 3
    for test, (log_probs, targets) in zip(seen.answers, seen.collected, strict=True):
        answers, labels = (torch.cat(o).as_subclass(torch.Tensor) for o in zip(*test, strict=True))
        torch.testing.assert_close(log_probs, answers, atol=1e-6, rtol=0)  # log-softmax twice, to rounding
        assert torch.equal(targets, labels)
        assert {type(log_probs), type(targets)} == {torch.Tensor}
    table, named = learn.misclassified.table(), [dls.vocab[o] for o in log_probs.argmax(1)]
    assert 0 < len(table) < 12
    wrong = {(f, o) for f, o in zip(dls.valid_ds.items, named, strict=True) if f.parent.name != o}
    assert {(dls.path/f, o) for f, o in zip(table.file, table.predicted, strict=True)} == wrong


def test_predictions_and_a_finder_misclassify_nothing(dls, tmp_path):
    learn = fit(make(dls, path=tmp_path))
    log_probs = learn.misclassified.log_probs
    with torch.no_grad(): learn.model.fc.bias.add_(torch.tensor([9., 0., 0.]))
    learn.lr_find(num_it=6, show_plot=False)
    learn.predict(dls.valid_ds.items[0])
    learn.validate(0)
    assert learn.misclassified.log_probs is log_probs
    learn.validate()
    assert learn.misclassified.log_probs.argmax(1).eq(0).all(), 'a test of the test images counts'


@pytest.mark.parametrize(('event', 'order'), [('before_validate', -100), ('after_batch', 100)])
def test_an_epoch_whose_test_was_cut_short_is_recorded(dls, tmp_path, event, order):
    class Skip(Callback):
        def __call__(self, event_name):
            if event_name == event and not (event == 'after_batch' and self.training): raise fv.CancelValidException
    learn, skip = fit(make(dls, ema=0, path=tmp_path), 1), Skip()
    skip.order = order
    fit(learn, 2, cbs=skip)
    assert [row['epoch'] for row in learn.history.rows] == [1, 2, 3]
    fit(learn, 1)
    assert learn.misclassified.log_probs.shape == (12, 3)
