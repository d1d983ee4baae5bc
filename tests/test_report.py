import torch
from conftest import one_cycle

from report import class_accuracies, most_confused, percent, run_report

COUNTS, VOCAB = torch.tensor([[7, 2, 1], [0, 10, 0], [4, 1, 0]]), ['cat', 'd|g', 'eel']
OPTIONS = dict(lr_min=None, final_div=1, ema=0.995, taste=False)
METRICS = dict(parameters=6_573_130, lr_min=1.6e-4, lr_max=2.3e-3, epochs=24, batch_size=512, precision='bf16',
               device='cpu', train_accuracy=0.98, test_accuracy=0.9273, test_loss=0.24, first_epoch_over_90=16,
               seconds_training=3000.4, seconds_total=3600., train_images=50_000, test_images=10_000, classes=VOCAB,
               versions=dict(torch='2.14.1'), options=OPTIONS)
HISTORY = [dict(train_loss=1.5, test_loss=1.25), dict(train_loss=0.05, test_loss=0.25)]
SCHEDULE = [dict(batch=i + 1, lr=one_cycle(i, 24 * 97, 1.6e-4, 2.3e-3)) for i in range(24 * 97)]


def report(**changes):
    return run_report(METRICS | changes, 'python train_fastai.py', HISTORY, SCHEDULE, [{}] * 8, COUNTS)


def test_class_accuracies():
    assert class_accuracies(COUNTS, VOCAB) == {
        'cat': (10, torch.tensor(7 / 10).item(), torch.tensor(7 / 11).item()),
        'd|g': (10, 1, torch.tensor(10 / 13).item()), 'eel': (5, 0, 0)}
    n, *shares = class_accuracies(torch.tensor([[3, 0], [0, 0]]), ['a', 'b'])['b']
    assert (n, [percent(share) for share in shares]) == (0, ['–', '–'])
    assert percent(2 / 3) == '66.7%'


def test_most_confused():
    assert most_confused(COUNTS, VOCAB) == [('eel', 'cat', 4), ('cat', 'd|g', 2), ('cat', 'eel', 1), ('eel', 'd|g', 1)]
    assert most_confused(COUNTS, VOCAB, 1) == [('eel', 'cat', 4)]
    assert most_confused(COUNTS.diag().diag(), VOCAB) == []


def test_it_sets_what_was_done_beside_what_was_asked():
    text = report()
    for part in ('| parameters | 6,573,130 | 6,573,130 |', '| test accuracy, last epoch | 92.73% | 93.07% |',
                 '| training accuracy, last epoch | 98.00% | 98.60% |',
                 '| first epoch over 90% test accuracy | 16 | 19 |',
                 '| epochs | 24 | 24 |', 'moving average, decay 0.995 a step |',
                 'come after the epoch, from the average of the weights.',
                 '| batch size | 512 | 512 |', '| test accuracy | 90% | 92.73% |',
                 '1.60·10⁻⁴ → 2.30·10⁻³ at epoch 5 of 24 → 1.60·10⁻⁴',
                 'peak at training batch 486', 'no annihilation', 'by `learn.lr_find`',
                 r'| d\|g | 10 | 100.0% | 76.9% |', 'eel → cat (4)', '8 of 10,000 test images', 'torch 2.14.1',
                 '1.500 to 0.050', '5.3 points above', '    python train_fastai.py\n'):
        assert part in text, part
    assert 'taste' not in text


def test_it_says_what_was_different():
    text = report(first_epoch_over_90=None, train_accuracy=0.5,
                  options=dict(lr_min=1.6e-4, final_div=100, ema=0, taste=True))
    for part in ('90% were asked, and not reached', '| first epoch over 90% test accuracy | none |', 'by hand',
                 'A taste', '42.7 points below', '| those of the last step |', 'come after the epoch.'):
        assert part in text, part
    assert 'lr_find.png' not in text
    assert 'no annihilation' not in text
