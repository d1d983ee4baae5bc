import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import fit
from torch import nn

from lab.report import list_confusions, per_class_scores
from lab.results import get_log_probs
from train_fastai import get_learner

COUNTS, VOCAB = np.array([[7, 2, 1], [0, 10, 0], [4, 1, 0]]), ['cat', 'd|g', 'eel']


def rows(table): return list(table.itertuples(index=False, name=None))


def answers(counts) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and targets that were confused as `counts` says."""
    pairs = [(i, j) for i, row in enumerate(counts) for j, n in enumerate(row) for _ in range(n)]
    targets, predicted = torch.tensor(pairs).T
    return nn.functional.one_hot(predicted, len(counts)).float().log_softmax(1), targets


def test_class_scores():
    scores = per_class_scores(*answers(COUNTS), VOCAB)
    assert list(scores) == ['class', 'images', 'recall', 'precision']
    assert rows(scores) == [('cat', 10, 7 / 10, 7 / 11), ('d|g', 10, 1, 10 / 13), ('eel', 5, 0, 0)]
    assert per_class_scores(*answers([[3, 0], [0, 0]]), ['a', 'b']).loc[1, ['recall', 'precision']].isna().all()


def test_most_confused():
    log_probs, targets = answers(COUNTS)
    actual, predicted = (np.array(VOCAB)[o] for o in (targets, log_probs.argmax(1)))
    confused = list_confusions(pd.DataFrame(dict(actual=actual, predicted=predicted)))
    assert list(confused) == ['actual', 'predicted', 'images']
    assert rows(confused) == [('eel', 'cat', 4), ('cat', 'd|g', 2), ('cat', 'eel', 1), ('eel', 'd|g', 1)]
    assert rows(list_confusions(pd.DataFrame(dict(actual=actual, predicted=actual)))) == []


def test_misclassified_against_a_count_by_hand(dls, folder):
    torch.manual_seed(0)
    log_probs, expected = torch.randn(12, 3).log_softmax(1), []
    for i, (file, p) in enumerate(zip(dls.valid_ds.items, log_probs.tolist(), strict=True)):
        actual, predicted = file.parent.name, dls.vocab[p.index(max(p))]
        if actual != predicted:
            expected.append((-p[dls.vocab.o2i[actual]], i, file, actual, predicted, math.exp(max(p))))
    answers = get_learner(dls).misclassified
    answers.log_probs, answers.targets = log_probs, dls.valid_ds.labels
    wrong = answers.table()
    assert list(wrong) == ['file', 'actual', 'predicted', 'probability', 'loss']
    assert 0 < len(wrong) < 12
    for row, (loss, *same, probability) in zip(wrong.itertuples(), sorted(expected, reverse=True), strict=True):
        assert [row.Index, folder/row.file, row.actual, row.predicted] == same
        assert (row.loss, row.probability) == pytest.approx((loss, probability))


@pytest.mark.parametrize(('precision', 'atol'), [('fp32', 1e-6), ('bf16', 0.01)])
def test_log_probabilities_are_those_of_get_preds(dls, precision, atol):
    learn, close = fit(get_learner(dls, precision=precision), 3), dict(atol=atol, rtol=0)
    log_probs, targets = get_log_probs(learn)
    assert torch.equal(targets, dls.valid_ds.labels)
    assert (log_probs.shape, log_probs.dtype, type(log_probs)) == ((12, 3), torch.float32, torch.Tensor)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(12))
    torch.testing.assert_close(log_probs.exp(), learn.get_preds()[0], **close)
    torch.testing.assert_close(log_probs, learn.misclassified.log_probs, **close)
    learn.model.softmax = nn.Identity()  # logits have the same log-probabilities
    torch.testing.assert_close(get_log_probs(learn, dls.test_dl(dls.valid_ds.items))[0], log_probs, **close)
