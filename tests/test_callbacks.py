import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LR_MAX, LR_MIN, fit, one_cycle
from fastai.vision.all import Callback, CancelValidException, SaveModelCallback, accuracy
from torch import nn

from callbacks import SeedEpochs
from lab.errors import RunError
from train_fastai import get_dls, get_learner


@pytest.fixture(scope='module')
def trained(folder, tmp_path_factory):
    """A learner after eight epochs of three batches, with a finder before and predictions after them."""
    learn = get_learner(get_dls(folder, bs=8), precision='fp32', path=tmp_path_factory.mktemp('trained'))
    learn.lr_find(num_it=6, show_plot=False)
    fit(learn, 8)
    learn.get_preds()
    learn.validate()
    return learn


def test_the_schedule_rises_from_lrmin_to_lrmax_at_5_24_and_falls_back(trained):
    rows = trained.history.schedule
    assert [r['batch'] for r in rows] == list(range(1, 25)), 'a row a training batch, and none of the finder'
    assert [r['lr'] for r in rows] == pytest.approx([one_cycle(i, 24, LR_MIN, LR_MAX) for i in range(24)])
    assert rows[0]['lr'] == pytest.approx(LR_MIN)
    assert max(rows, key=lambda r: r['lr'])['batch'] == 6  # batches 1 to 5 are the rise: 5/24 of them
    assert rows[5]['lr'] == pytest.approx(LR_MAX)
    assert rows[-1]['lr'] < LR_MIN + 0.02 * (LR_MAX - LR_MIN)
    assert (rows[0]['momentum'], rows[5]['momentum']) == pytest.approx((0.95, 0.85))


def test_the_rate_falls_to_lr_end(dls, tmp_path):
    learn = fit(get_learner(dls, precision='fp32', path=tmp_path), 4, lr_end=LR_MIN / 100)
    expected = [one_cycle(i, 12, LR_MIN, LR_MAX, LR_MIN / 100) for i in range(12)]
    assert [r['lr'] for r in learn.history.schedule] == pytest.approx(expected)


def test_the_schedule_holds_what_the_optimizer_used(dls, tmp_path):
    class Spy(Callback):
        used = []
        def before_step(self):
            one, other = self.opt.opt.param_groups
            self.used.append((one['lr'], other['betas'][0]))
    learn = fit(get_learner(dls, precision='fp32', path=tmp_path), cbs=(spy := Spy()))
    assert [(r['lr'], r['momentum']) for r in learn.history.schedule] == spy.used


def test_history_has_means_of_the_batches_and_the_test_sets_figures(dls, tmp_path):
    class Spy(Callback):
        losses, right = [], []
        def after_batch(self):
            if self.training:
                self.losses.append(self.loss.item())
                self.right.append((self.pred.argmax(1) == self.y).float().mean().item())
    learn = fit(get_learner(dls, precision='fp32', path=tmp_path), cbs=(spy := Spy()))
    rows = learn.history.rows
    assert [r['epoch'] for r in rows] == [1, 2]
    for i, row in enumerate(rows):
        batches = slice(3 * i, 3 * i + 3)
        assert row['train_loss'] == pytest.approx(sum(spy.losses[batches]) / 3, rel=1e-5)
        assert row['train_accuracy'] == pytest.approx(sum(spy.right[batches]) / 3)
        assert row['seconds'] > 0
    loss, acc = learn.validate()[-2:]
    assert (rows[-1]['test_loss'], rows[-1]['test_accuracy']) == pytest.approx((loss, acc))


class Weights(Callback):
    """The model's state after every step, and the last batch of log-probabilities of every test."""
    def before_fit(self): self.steps, self.tested = [], []
    def after_step(self): self.steps.append({k: v.clone() for k, v in self.model.state_dict().items()})
    def after_validate(self): self.tested.append(self.pred.clone())


def test_the_average_of_the_weights_is_tested_and_kept(dls, tmp_path):
    learn = fit(get_learner(dls, precision='fp32', path=tmp_path, ema=0.5), 4, cbs=(seen := Weights()))
    expected = seen.steps[0]
    for n, weights in enumerate(seen.steps[1:], 1):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = {k: decay * expected[k] + (1 - decay) * weights[k] for k in weights}
    kept = learn.model.state_dict()
    for k in kept:
        if not k.endswith('num_batches_tracked'): torch.testing.assert_close(kept[k], expected[k], rtol=1e-4, atol=1e-6)
    assert not torch.equal(kept['fc.weight'], seen.steps[-1]['fc.weight'])
    assert learn.validate()[-2] == pytest.approx(learn.history.rows[-1]['test_loss'])


def test_training_goes_on_from_the_last_steps_weights_whatever_is_tested(dls, tmp_path):
    runs = []
    for ema in (0, 0.9):
        fit(get_learner(dls, precision='fp32', path=tmp_path, ema=ema), 3, cbs=(seen := Weights()))
        runs.append(seen)
    for one, other in zip(runs[0].steps, runs[1].steps, strict=True):
        assert all(torch.equal(one[k], other[k]) for k in one)
    assert not torch.equal(runs[0].tested[-1], runs[1].tested[-1])


def test_without_averaging_the_last_steps_weights_are_kept(dls, tmp_path):
    learn = fit(get_learner(dls, precision='fp32', path=tmp_path, ema=0), cbs=(seen := Weights()))
    kept = learn.model.state_dict()
    assert all(torch.equal(kept[k], seen.steps[-1][k]) for k in kept)


def test_a_test_that_is_interrupted_leaves_a_learner_that_trains_on(dls, tmp_path):
    class Stop(Callback):
        def before_batch(self):
            if not self.training: raise KeyboardInterrupt
    learn = get_learner(dls, precision='fp32', path=tmp_path)
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=Stop())
    fit(learn, 2, cbs=(seen := Weights()))
    assert not torch.equal(seen.steps[0]['fc.weight'], seen.steps[1]['fc.weight'])
    assert learn.validate()[-2] == pytest.approx(learn.history.rows[-1]['test_loss'])
    weights = {k: torch.zeros_like(v) for k, v in learn.model.state_dict().items()}
    learn.model.load_state_dict(weights)  # what is tested now is this, not an average of earlier weights
    assert learn.validate()[-2] == pytest.approx(math.log(3))


def test_finder_predictions_and_bare_validation_are_no_training(trained):
    assert len(trained.history.rows) == 8
    assert len(trained.history.schedule) == 8 * 3


def test_the_best_model_that_is_saved_and_loaded_is_the_one_that_was_tested(dls, tmp_path):
    for comp, best in ((np.less, min), (np.greater, max)):  # one of them is not the last
        learn = get_learner(dls, precision='fp32', path=tmp_path)
        fit(learn, 3, cbs=SaveModelCallback(monitor='valid_loss', comp=comp))
        losses = [r['test_loss'] for r in learn.history.rows]
        assert learn.validate()[-2] == pytest.approx(best(losses))
        assert min(losses) < 0.9999 * max(losses)


def test_other_metrics_leave_history_as_it_is(dls, tmp_path):
    def wrong(p, y): return 1 - accuracy(p, y)
    learn = fit(get_learner(dls, precision='fp32', path=tmp_path))
    more = get_learner(dls, precision='fp32', path=tmp_path)
    more.metrics = [wrong, accuracy]
    fit(more)
    for one, other in zip(learn.history.rows, more.history.rows, strict=True):
        assert {**one, 'seconds': 0} == {**other, 'seconds': 0}
    more.metrics = [wrong]
    fit(more)
    assert [r['epoch'] for r in more.history.rows] == [1, 2, 3, 4]
    assert [math.isnan(r['test_accuracy']) for r in more.history.rows] == [False, False, True, True]


def test_a_second_fit_goes_on_with_new_randomness(dls, tmp_path):
    learn = get_learner(dls, precision='fp32', path=tmp_path)
    class Spy(Callback):
        labels = []
        def before_batch(self):
            if self.training: self.labels.append(self.y.tolist())
    for _ in range(2): learn.fit(1, 0., cbs=(spy := Spy()))
    learn.lr_find(num_it=6, show_plot=False)
    learn.fit(1, 0., cbs=Spy())
    assert [row['epoch'] for row in learn.history.rows] == [1, 2, 3]
    whole = get_learner(dls, precision='fp32', path=tmp_path)
    first, Spy.labels = [*spy.labels], []
    whole.fit(3, 0., cbs=Spy())
    assert first == Spy.labels
    assert first[:3] != first[3:6] != first[6:]


def test_an_interrupted_finder_hides_nothing_of_the_training_after_it(dls, tmp_path):
    class Interrupt(Callback):
        def before_batch(self): raise KeyboardInterrupt
    learn = get_learner(dls, precision='fp32', path=tmp_path)
    with learn.added_cbs(Interrupt()), pytest.raises(KeyboardInterrupt): learn.lr_find(num_it=6, show_plot=False)
    learn.fit(1, 0.)
    assert len(learn.history.rows) == 1
    assert len(learn.history.schedule) == 3


def test_the_same_seed_gives_the_same_run_whatever_drew_before(dls, tmp_path):
    runs = []
    for meddle in (False, True):
        learn = get_learner(dls, precision='fp32', seed=7, path=tmp_path)
        if meddle:
            learn.lr_find(num_it=6, show_plot=False)
            dls.show_batch()
            torch.rand(3)
        fit(learn)
        runs.append((learn.model.state_dict(), [r['train_loss'] for r in learn.history.rows]))
    assert runs[0][1] == runs[1][1]
    for k, v in runs[0][0].items(): assert (v == runs[1][0][k]).all(), k
    assert fit(get_learner(dls, precision='fp32', seed=8, path=tmp_path)).history.rows[0]['train_loss'] != runs[0][1][0]


def test_epochs_differ_in_their_randomness(dls):
    learn = get_learner(dls, precision='fp32')
    seeds = SeedEpochs(3)
    seeds.learn = learn
    draws = []
    for epoch in (0, 1, 0):
        learn.epoch = epoch
        seeds.before_train()
        draws.append((torch.rand(1).item(), dls.train.rng.random()))
    assert draws[0] == draws[2] != draws[1]


def test_a_nan_in_the_first_batch_or_test_stops_the_run_too(dls, tmp_path):
    class Spoil(Callback):
        def __init__(self, training): self.of_training = training
        def before_batch(self):
            if self.training == self.of_training: self.learn.xb = (self.xb[0] * float('nan'),)
    for training, where in ((True, 'batch 1 of 3 of epoch 1'), (False, 'the test after epoch 1')):
        learn = get_learner(dls, precision='fp32', path=tmp_path)
        with pytest.raises(RunError, match=f'not finite at {where}; lower --lr-max'): fit(learn, cbs=Spoil(training))
        assert learn.history.rows == []


def test_a_batch_of_one_image_trains(folder, tmp_path):
    learn = fit(get_learner(get_dls(folder, bs=1), precision='fp32', path=tmp_path), 1)
    assert len(learn.history.schedule) == 24
    assert math.isfinite(learn.history.rows[0]['train_loss'])


def test_a_nan_stops_the_run_and_says_where(dls, tmp_path):
    class Spoil(Callback):
        def before_batch(self):
            if self.training and self.epoch == 1 and self.iter == 2: self.learn.xb = (self.xb[0] * float('nan'),)
    learn = get_learner(dls, precision='fp32', path=tmp_path)
    with pytest.raises(RunError, match='not finite at batch 3 of 3 of epoch 2'): fit(learn, 3, cbs=Spoil())
    learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)  # not to blame for the training before it
    assert len(learn.history.rows) == 1
    assert len(learn.history.schedule) == 5
    with torch.no_grad(): learn.model.fc.bias.fill_(math.nan)
    assert math.isnan(learn.validate()[-2])


def test_on_a_cpu_a_batch_costs_one_look_at_its_own_loss(dls, tmp_path, monkeypatch):
    """Not one at the losses of all batches before it."""
    stack, looks = torch.stack, []
    def counted(tensors, *args, **kwargs):
        if tensors[0].dtype == torch.bool: looks.append(len(tensors))
        return stack(tensors, *args, **kwargs)
    monkeypatch.setattr(torch, 'stack', counted)
    fit(get_learner(dls, precision='fp32', path=tmp_path))
    assert looks == [3, 2, 3, 2]  # after each epoch's three batches, and after its test's two


class SeeTests(Callback):
    """The answers of every test as they come, batch by batch, and what was collected of them by its end."""
    order = 1000

    def before_fit(self): self.answers, self.collected = [], []
    def before_validate(self): self.answers.append([])
    def after_batch(self):
        if not self.training: self.answers[-1].append((self.pred.clone(), self.y.clone()))
    def after_validate(self): self.collected.append((self.misclassified.log_probs, self.misclassified.targets))


def test_misclassified_images_are_those_of_every_test(dls, tmp_path):
    learn = fit(get_learner(dls, precision='fp32', path=tmp_path), 3, cbs=(seen := SeeTests()))
    assert len(seen.collected) == 3
    for test, collected in zip(seen.answers, seen.collected, strict=True):
        answers, targets = (torch.cat(o).as_subclass(torch.Tensor) for o in zip(*test, strict=True))
        torch.testing.assert_close(collected[0], answers, atol=1e-6, rtol=0)  # log-softmax twice, to rounding
        assert torch.equal(collected[1], targets)
        assert {type(o) for o in collected} == {torch.Tensor}
    log_probs, targets = seen.collected[-1]
    assert (log_probs.dtype, targets.dtype) == (torch.float32, torch.int64)
    table, expected = learn.misclassified.table(), []
    for i, (file, p) in enumerate(zip(dls.valid_ds.items, log_probs.tolist(), strict=True)):
        if (named := dls.vocab[int(np.argmax(p))]) != file.parent.name:
            actual = dls.vocab.o2i[file.parent.name]
            expected.append((-p[actual], i, f'test/{file.parent.name}/{file.name}', file.parent.name, named, max(p)))
    assert 0 < len(expected) < 12
    for row, (loss, i, file, actual, named, p) in zip(table.itertuples(), sorted(expected, reverse=True), strict=True):
        assert tuple(row)[:4] == (i, file, actual, named)
        assert (row.probability, row.loss) == pytest.approx((math.exp(p), loss))
    assert len(table) == round(12 * (1 - learn.history.rows[-1]['test_accuracy']))


def test_misclassified_images_are_not_those_of_predictions_or_a_finder(dls, tmp_path):
    learn = fit(get_learner(dls, precision='fp32', path=tmp_path))
    log_probs, targets = learn.misclassified.log_probs, learn.misclassified.targets
    with torch.no_grad(): learn.model.fc.bias.add_(torch.tensor([9., 0., 0.]))
    learn.lr_find(num_it=6, show_plot=False)
    learn.get_preds()
    learn.validate()
    learn.predict(dls.valid_ds.items[0])
    assert learn.misclassified.log_probs is log_probs
    assert learn.misclassified.targets is targets
    learn.fit(1, 0.)
    assert learn.misclassified.log_probs.argmax(1).eq(0).all(), 'a test of a fit counts'


def test_misclassified_images_are_kept_with_a_checkpoint(dls, tmp_path):
    learn = fit(get_learner(dls, precision='fp32', path=tmp_path))
    again = get_learner(dls, precision='fp32', path=tmp_path)
    assert again.misclassified.log_probs is None
    again.misclassified.load_state_dict(learn.misclassified.state_dict())
    pd.testing.assert_frame_equal(again.misclassified.table(), learn.misclassified.table())


def test_a_network_that_ends_in_logits_has_the_same_errors(dls, tmp_path):
    tables = []
    for stage in (None, nn.Identity()):
        learn = get_learner(dls, precision='fp32', path=tmp_path)
        if stage: learn.model.softmax = stage
        fit(learn, 3)
        tables.append(learn.misclassified.table())
    ours, theirs = tables
    assert 0 < len(ours) < 12
    names = ['file', 'actual', 'predicted']
    pd.testing.assert_frame_equal(ours[names], theirs[names])
    for name in ('probability', 'loss'): assert theirs[name].tolist() == pytest.approx(ours[name].tolist(), abs=1e-5)
    assert theirs.probability.between(1 / 3, 1).all()


def test_a_nan_before_the_first_best_epoch_is_reported_whatever_another_callback_makes_of_it(dls, tmp_path):
    class Spoil(Callback):
        def before_batch(self): self.learn.xb = (self.xb[0] * float('nan'),)
    learn = get_learner(dls, precision='fp32', path=tmp_path)
    with pytest.raises(RunError, match='not finite at batch 1 of 3 of epoch 1'):  # not that there is no file to load
        fit(learn, cbs=[SaveModelCallback(), Spoil()])
    assert not learn.fitting


@pytest.mark.parametrize('order', [-100, 100])
@pytest.mark.parametrize('event', ['before_validate', 'after_batch'])
def test_a_test_that_is_skipped_or_cut_short_keeps_the_answers_of_the_last_whole_one(dls, tmp_path, order, event):
    class Skip(Callback):
        def __call__(self, event_name):
            if event_name == event and not (event == 'after_batch' and self.training): raise CancelValidException
    learn = fit(get_learner(dls, precision='fp32', ema=0, path=tmp_path), 1)
    before = learn.misclassified.log_probs.clone()
    skip = Skip()
    skip.order = order
    fit(learn, 2, cbs=skip)
    assert torch.equal(learn.misclassified.log_probs, before)
    fit(learn, 1)
    assert not torch.equal(learn.misclassified.log_probs, before)
