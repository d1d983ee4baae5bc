"""A network's predictions and how accurate they are: log-probabilities, scores of the classes, frequent errors."""
from fastai.vision.all import *
from sklearn.metrics import precision_recall_fscore_support

from lab.processes import alone


@alone()
def get_log_probs(learn: Learner, images: Tensor) -> Tensor:
    """The log-probabilities (N, classes), float32 on the CPU, for uint8 images (N, 3, 32, 32).

    A network may end in logits or in log-probabilities, which log-softmax leaves as they are.
    """
    device, after_batch = next(learn.model.parameters()).device, learn.dls.valid.after_batch
    batches = L(images.split(512)).map(lambda x: after_batch((TensorImage(x.to(device).contiguous()),)))
    return learn.get_preds(dl=batches, act=partial(F.log_softmax, dim=1, dtype=torch.float32))[0].as_subclass(Tensor)


def per_class_scores(log_probs: Tensor, targets: Tensor, vocab: list[str]) -> pd.DataFrame:
    """`class, images, recall, precision` from `log_probs` (N, classes) and `targets` (N,); a share of none is NaN."""
    precision, recall, _, images = precision_recall_fscore_support(
        targets, log_probs.argmax(1), labels=range(len(vocab)), zero_division=np.nan)
    return pd.DataFrame({'class': list(vocab), 'images': images.astype(int), 'recall': recall, 'precision': precision})


def list_confusions(answers: pd.DataFrame, n: int = 10) -> pd.DataFrame:
    """The at most `n` most frequent errors in `answers` (`actual, predicted`), each with its number of `images`."""
    wrong = answers[answers.actual != answers.predicted]
    return wrong.groupby(['actual', 'predicted']).size().reset_index(name='images').nlargest(n, 'images')
