import errno
import math
import os
import pickle
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import Malicious, make_folder, one_cycle
from fastai.vision.all import (
    Adam,
    Callback,
    EarlyStoppingCallback,
    F,
    Learner,
    ProgressCallback,
    SaveModelCallback,
    Tensor,
    accuracy,
    set_seed,
)

from arch import ResNet
from callbacks import (
    SeedEpochs,
    best_precision,
    is_training_run,
    load_state,
    save_csv,
    save_state,
    write_whole,
)
from data import InputError, get_dls
from report import confusion_matrix
from train_fastai import PCT_START, get_learner, weight_decay_groups

LR_MIN, LR_MAX = 1e-4, 1e-3


@pytest.fixture
def dls(folder): return get_dls(folder, bs=8)


def fit(learn, epochs=2, final_div=1., **kwargs):
    div = LR_MAX / LR_MIN
    learn.fit_one_cycle(epochs, LR_MAX, div=div, div_final=div * final_div, pct_start=PCT_START, **kwargs)
    return learn


@pytest.fixture(scope='module')
def trained(folder, tmp_path_factory):
    """A learner after eight epochs of three batches, with a finder before and predictions after them."""
    learn = get_learner(get_dls(folder, bs=8), 'fp32', path=tmp_path_factory.mktemp('trained'))
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


def test_final_div_is_relative_to_lrmin(dls, tmp_path):
    learn = fit(get_learner(dls, 'fp32', path=tmp_path), 4, final_div=100)
    expected = [one_cycle(i, 12, LR_MIN, LR_MAX, 100) for i in range(12)]
    assert [r['lr'] for r in learn.history.schedule] == pytest.approx(expected)


def test_the_schedule_holds_what_the_optimizer_used(dls, tmp_path):
    class Spy(Callback):
        used = []
        def before_step(self):
            one, other = self.opt.opt.param_groups
            self.used.append((one['lr'], other['betas'][0]))
    learn = fit(get_learner(dls, 'fp32', path=tmp_path), cbs=(spy := Spy()))
    assert [(r['lr'], r['momentum']) for r in learn.history.schedule] == spy.used


def test_history_has_means_of_the_batches_and_the_test_sets_figures(dls, tmp_path):
    class Spy(Callback):
        losses, right = [], []
        def after_batch(self):
            if self.training:
                self.losses.append(self.loss.item())
                self.right.append((self.pred.argmax(1) == self.y).float().mean().item())
    learn = fit(get_learner(dls, 'fp32', path=tmp_path), cbs=(spy := Spy()))
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
    learn = fit(get_learner(dls, 'fp32', path=tmp_path, ema=0.5), 4, cbs=(seen := Weights()))
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
        fit(get_learner(dls, 'fp32', path=tmp_path, ema=ema), 3, cbs=(seen := Weights()))
        runs.append(seen)
    for one, other in zip(runs[0].steps, runs[1].steps, strict=True):
        assert all(torch.equal(one[k], other[k]) for k in one)
    assert not torch.equal(runs[0].tested[-1], runs[1].tested[-1])


def test_without_averaging_the_last_steps_weights_are_kept(dls, tmp_path):
    learn = fit(get_learner(dls, 'fp32', path=tmp_path, ema=0), cbs=(seen := Weights()))
    kept = learn.model.state_dict()
    assert all(torch.equal(kept[k], seen.steps[-1][k]) for k in kept)


def test_a_test_that_is_interrupted_leaves_a_learner_that_trains_on(dls, tmp_path):
    class Stop(Callback):
        def before_batch(self):
            if not self.training: raise KeyboardInterrupt
    learn = get_learner(dls, 'fp32', path=tmp_path)
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=Stop())
    fit(learn, 2, cbs=(seen := Weights()))
    assert not torch.equal(seen.steps[0]['fc.weight'], seen.steps[1]['fc.weight'])
    assert learn.validate()[-2] == pytest.approx(learn.history.rows[-1]['test_loss'])
    weights = {k: torch.zeros_like(v) for k, v in learn.model.state_dict().items()}
    learn.model.load_state_dict(weights)  # what is tested now is this, not an average of earlier weights
    assert learn.validate()[-2] == pytest.approx(math.log(3))


def test_finder_predictions_and_bare_validation_are_no_training(trained):
    assert len(trained.history.rows) == 8
    assert is_training_run(trained)


def test_misclassified_against_a_count_by_hand(tmp_path):
    path = make_folder(tmp_path/'d')
    for i in (1, 2): (path/f'test/red/{i}.png').rename(path/f'test/blue/red{i}.png')  # to be got wrong
    dls = get_dls(path, bs=8)
    learn = fit(get_learner(dls, 'fp32', path=tmp_path), 2)
    net = learn.model.eval()
    expected = []
    for file in dls.valid_ds.items:
        x, = dls.test_dl([file]).one_batch()
        with torch.no_grad(): log_probs = net(x.as_subclass(Tensor))[0]
        actual, predicted = file.parent.name, dls.vocab[log_probs.argmax()]
        if actual != predicted:
            expected.append(dict(file=file.relative_to(dls.path).as_posix(), actual=actual, predicted=predicted,
                                 probability=log_probs.max().exp().item(),
                                 loss=-log_probs[dls.vocab.o2i[actual]].item()))
    expected.sort(key=lambda r: -r['loss'])
    found = learn.final_predictions.misclassified()
    assert 0 < len(found) < 12
    assert [r['file'] for r in found] == [r['file'] for r in expected]
    for f, e in zip(found, expected, strict=True):
        assert (f['actual'], f['predicted']) == (e['actual'], e['predicted'])
        assert (f['probability'], f['loss']) == pytest.approx((e['probability'], e['loss']), rel=1e-3)
    final = learn.final_predictions
    counts = confusion_matrix(final.log_probs, final.targets)
    assert counts.sum(1).tolist() == [6, 4, 2]
    assert counts[0, 2] == sum(r['actual'] == 'blue' and r['predicted'] == 'red' for r in found) > 0
    assert counts.sum() - counts.trace() == len(found)
    assert learn.history.rows[-1]['test_accuracy'] == pytest.approx(1 - len(found) / 12)


def test_fastais_own_callbacks_and_views_find_what_they_look_for(dls, tmp_path):
    learn = get_learner(dls, 'fp32', path=tmp_path)
    learn.fit(1, cbs=[SaveModelCallback(), EarlyStoppingCallback(monitor='valid_accuracy')])
    assert (tmp_path/'models/model.pth').exists()
    learn.recorder.plot_loss()
    assert '6,569,539' in learn.summary()


def test_the_best_model_that_is_saved_and_loaded_is_the_one_that_was_tested(dls, tmp_path):
    for comp, best in ((np.less, min), (np.greater, max)):  # one of them is not the last
        learn = get_learner(dls, 'fp32', path=tmp_path)
        fit(learn, 3, cbs=SaveModelCallback(monitor='valid_loss', comp=comp))
        losses = [r['test_loss'] for r in learn.history.rows]
        assert learn.validate()[-2] == pytest.approx(best(losses))
        assert min(losses) < 0.99 * max(losses)


def test_other_metrics_leave_history_as_it_is(dls, tmp_path):
    def wrong(p, y): return 1 - accuracy(p, y)
    learn = fit(get_learner(dls, 'fp32', path=tmp_path))
    more = get_learner(dls, 'fp32', path=tmp_path)
    more.metrics = [wrong, accuracy]
    fit(more)
    for one, other in zip(learn.history.rows, more.history.rows, strict=True):
        assert {**one, 'seconds': 0} == {**other, 'seconds': 0}
    more.metrics = [wrong]
    fit(more)
    assert [r['epoch'] for r in more.history.rows] == [1, 2, 3, 4]
    assert [math.isnan(r['test_accuracy']) for r in more.history.rows] == [False, False, True, True]


def test_a_second_fit_goes_on_with_new_randomness(dls, tmp_path):
    learn = get_learner(dls, 'fp32', path=tmp_path)
    class Spy(Callback):
        labels = []
        def before_batch(self):
            if self.training: self.labels.append(self.y.tolist())
    for _ in range(2): learn.fit(1, 0., cbs=(spy := Spy()))
    learn.lr_find(num_it=6, show_plot=False)
    learn.fit(1, 0., cbs=Spy())
    assert [row['epoch'] for row in learn.history.rows] == [1, 2, 3]
    whole = get_learner(dls, 'fp32', path=tmp_path)
    first, Spy.labels = [*spy.labels], []
    whole.fit(3, 0., cbs=Spy())
    assert first == Spy.labels
    assert first[:3] != first[3:6] != first[6:]


def test_an_interrupted_finder_hides_nothing_of_the_training_after_it(dls, tmp_path):
    class Interrupt(Callback):
        def before_batch(self): raise KeyboardInterrupt
    learn = get_learner(dls, 'fp32', path=tmp_path)
    with learn.added_cbs(Interrupt()), pytest.raises(KeyboardInterrupt): learn.lr_find(num_it=6, show_plot=False)
    learn.fit(1, 0.)
    assert len(learn.history.rows) == 1
    assert len(learn.history.schedule) == 3


def test_predictions_of_other_images_do_not_replace_the_final_ones(trained):
    before = trained.final_predictions.losses.clone()
    trained.get_preds(dl=trained.dls.test_dl(trained.dls.valid_ds.items[:2], with_labels=True))
    trained.predict(trained.dls.valid_ds.items[0])
    trained.validate(ds_idx=0)
    assert (trained.final_predictions.losses == before).all()


def test_fused_adamw_steps_like_fastais_adam(dls):
    xs, ys = [], []
    for x, y in dls.train:
        xs.append(x.as_subclass(Tensor))
        ys.append(y.as_subclass(Tensor))
    nets = []
    for fused in (True, False):
        adam = get_learner(dls, 'fp32').opt_func if fused else partial(Adam, wd=0.01, sqr_mom=0.99, eps=1e-5)
        set_seed(0)
        groups = {'splitter': weight_decay_groups} if fused else {}
        learn = Learner(dls, ResNet(n_out=3), opt_func=adam, **groups)
        learn.create_opt()
        for i in range(6):
            learn.opt.set_hypers(lr=1e-3, mom=0.95 - 0.01 * i)
            F.cross_entropy(learn.model(xs[i % 3]), ys[i % 3]).backward()
            learn.opt.step()
            learn.opt.zero_grad()
        nets.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    set_seed(0)
    start = torch.cat([p.detach().flatten() for p in ResNet(n_out=3).parameters()])
    assert (nets[0] - nets[1]).norm() < 1e-3 * (nets[0] - start).norm()


@pytest.mark.skipif(sys.platform != 'linux', reason='a matter of glibc')
def test_on_a_cpu_the_process_keeps_what_tensors_free(folder):
    import resource  # which Windows lacks
    get_learner(get_dls(folder, bs=8, device=torch.device('cpu')), 'fp32')

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 16,384 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    # Small things settle beside the first few places and make them too small; memory that was returned is never reused.
    assert any(faults() < 1000 for _ in range(25))


def test_weight_decay_spares_batch_norm_and_biases():
    decayed, plain = weight_decay_groups(net := ResNet())
    assert (decayed['weight_decay'], plain['weight_decay']) == (0.01, 0)
    names = {id(p): name for name, p in net.named_parameters()}
    weights = {f'{n}.weight' for n, m in net.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))}
    assert {names[id(p)] for p in decayed['params']} == weights
    assert len(decayed['params']) + len(plain['params']) == len(names)


def test_the_same_seed_gives_the_same_run_whatever_drew_before(dls, tmp_path):
    runs = []
    for meddle in (False, True):
        learn = get_learner(dls, 'fp32', seed=7, path=tmp_path)
        if meddle:
            learn.lr_find(num_it=6, show_plot=False)
            dls.show_batch()
            torch.rand(3)
        fit(learn)
        runs.append((learn.model.state_dict(), [r['train_loss'] for r in learn.history.rows]))
    assert runs[0][1] == runs[1][1]
    for k, v in runs[0][0].items(): assert (v == runs[1][0][k]).all(), k
    assert fit(get_learner(dls, 'fp32', seed=8, path=tmp_path)).history.rows[0]['train_loss'] != runs[0][1][0]


def test_epochs_differ_in_their_randomness(dls):
    learn = get_learner(dls, 'fp32')
    seeds = SeedEpochs(3)
    seeds.learn = learn
    draws = []
    for epoch in (0, 1, 0):
        learn.epoch = epoch
        seeds.before_train()
        draws.append((torch.rand(1).item(), dls.train.rng.random()))
    assert draws[0] == draws[2] != draws[1]


def test_bfloat16_on_a_cpu_computes_in_bfloat16_and_follows_float32(dls, tmp_path):
    losses, dtypes = [], []
    for precision in ('fp32', 'bf16'):
        learn = get_learner(dls, precision, path=tmp_path)
        hook = learn.model.prep[0].register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
        fit(learn, 1)
        hook.remove()
        losses.append(torch.tensor([float(o) for o in learn.recorder.losses]))
        assert {p.dtype for p in learn.model.parameters()} == {torch.float32}
    assert dtypes[0] == torch.float32
    assert dtypes[-1] == torch.bfloat16
    assert not torch.equal(*losses)
    torch.testing.assert_close(losses[1], losses[0], rtol=0.1, atol=0.05)


@pytest.mark.parametrize(('flags', 'expected'), [({}, 'fp32'), ({'avx512_f': True}, 'fp32'),
                                                 ({'avx512_bf16': True}, 'bf16'), ({'amx_bf16': True}, 'bf16')])
def test_auto_takes_what_a_processor_is_made_for(monkeypatch, flags, expected):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: flags)
    assert best_precision(torch.device('cpu')) == expected


@pytest.mark.parametrize(('capability', 'expected'), [((7, 5), 'fp16'), ((8, 0), 'bf16'), ((9, 0), 'bf16')])
def test_auto_takes_what_a_gpu_is_made_for(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: capability)
    assert best_precision(torch.device('cuda')) == expected


def test_a_nan_in_the_first_batch_or_test_stops_the_run_too(dls, tmp_path):
    class Spoil(Callback):
        def __init__(self, training): self.of_training = training
        def before_batch(self):
            if self.training == self.of_training: self.learn.xb = (self.xb[0] * float('nan'),)
    for training, where in ((True, 'batch 1 of 3 of epoch 1'), (False, 'the test after epoch 1')):
        learn = fit(get_learner(dls, 'fp32', path=tmp_path), cbs=Spoil(training))
        assert learn.stop_on_na_n.where == where
        assert learn.history.rows == []


def test_a_batch_of_one_image_trains(folder, tmp_path):
    learn = fit(get_learner(get_dls(folder, bs=1), 'fp32', path=tmp_path), 1)
    assert len(learn.history.schedule) == 24
    assert math.isfinite(learn.history.rows[0]['train_loss'])


def test_a_nan_stops_the_run_and_says_where(dls, tmp_path):
    class Spoil(Callback):
        def before_batch(self):
            if self.training and self.epoch == 1 and self.iter == 2: self.learn.xb = (self.xb[0] * float('nan'),)
    learn = fit(get_learner(dls, 'fp32', path=tmp_path), 3, cbs=Spoil())
    assert learn.stop_on_na_n.where == 'batch 3 of 3 of epoch 2'
    assert len(learn.history.rows) == 1
    assert len(learn.history.schedule) == 5
    with torch.no_grad(): learn.model.fc.bias.fill_(math.nan)
    assert math.isnan(learn.validate()[-2])


def test_plain_lines_where_there_is_no_terminal(trained, dls, tmp_path, capsys):
    assert not any(isinstance(cb, ProgressCallback) for cb in trained.cbs)
    fit(get_learner(dls, 'fp32', path=tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ['epoch', '1', '2']
    assert lines[0].split() == ['epoch', 'train_loss', 'train_accuracy', 'test_loss', 'test_accuracy', 'time']
    assert not any('\r' in line or '█' in line for line in lines)


def test_a_failed_write_keeps_the_old_file_and_leaves_no_rest(tmp_path, monkeypatch):
    file = tmp_path/'x.pth'
    save_state(file, dict(a=torch.ones(3)))
    def full(_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left on device: .*x.pth'): save_state(file, dict(a=1))
    assert (load_state(file)['a'] == 1).all()
    assert list(tmp_path.iterdir()) == [file]


def test_damage_anywhere_in_a_checkpoint_is_noticed(tmp_path):
    save_state(tmp_path/'whole.pth', dict(a=torch.arange(5000.), b=dict(c=1, d='text')))
    whole = (tmp_path/'whole.pth').read_bytes()
    good = load_state(tmp_path/'whole.pth')
    bad = tmp_path/'bad.pth'
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:size])
        with pytest.raises(InputError, match='bad.pth is damaged'): load_state(bad)
    noticed = 0
    for at in range(0, len(whole), 251):
        bad.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1:])
        try: state = load_state(bad)
        except InputError: noticed += 1
        else:  # in padding or a time stamp
            assert (state['a'] == good['a']).all()
            assert state['b'] == good['b']
    assert noticed > 70  # of 84


@pytest.mark.parametrize('zipped', [False, True])
def test_a_malicious_file_is_refused_and_its_code_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.setenv('MALICIOUS_DIR', str(tmp_path/'was here'))
    file = tmp_path/'model.pth'
    if zipped: torch.save(dict(a=Malicious()), file)
    else: file.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(InputError, match='model.pth'): load_state(file)
    assert not (tmp_path/'was here').exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match='none.pth does not exist'): load_state(tmp_path/'none.pth')
    with pytest.raises(FileNotFoundError, match='no/x'): write_whole(tmp_path/'no'/'x', b'')


def test_csv_without_rows_has_its_header(tmp_path):
    save_csv(tmp_path/'x.csv', [], ['a', 'b'])
    assert (tmp_path/'x.csv').read_text() == 'a,b\n'
