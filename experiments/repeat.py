#!/usr/bin/env python
"""Repeat the experiment under several seeds, or with one thing changed and all else equal.

    python -m experiments.repeat seeds --seeds 42,43              # train_fastai.py as it is
    python -m experiments.repeat ingredients --arms wd-0.2        # recipes, on a held-out tenth of the training images
    python -m experiments.repeat test --arms default              # the same, trained on all of them, on the test set
    python -m experiments.repeat seeds --table --out experiments  # the table of the published runs

Every finished run adds a row to `results.csv` in the folder --out, and a run that has a row is not repeated. If
interrupted, `seeds` resumes its run and a recipe starts again. No decision is based on the test set.
"""
import lab  # isort: skip  # noqa: F401, silences a warning of fastai's import

from typing import Annotated

import fastai
from fastai.vision.all import *

import train_fastai
from arch import ResNet
from lab.errors import InputError, one_line_errors
from lab.optim import FusedAdam
from lab.processes import replaced
from lab.results import TARGET, find_commit, get_log_probs
from lab.runs import CHECKPOINT, TrainingCallback
from lab.sources import get_data
from lab.speed import device_name, fast, resolve_precision
from predict import load_run
from train_fastai import MEAN_COLOUR, Cutout, FlipLR, Options, PadCrop, find_lrs, get_dls, get_learner

# What an arm can change. `lr_max` replaces the LRMAX found, `lr_max_factor` multiplies it, `div_final` is fastai's.
RECIPE = dict(wd=Options.wd, label_smoothing=Options.label_smoothing, ema=Options.ema, padding='reflect', eps=1e-5,
              lr_max=None, lr_max_factor=1., div_final=None, whiten=False, identity=False, alternate=False)
HALF, QUARTER, WD, MEAN = dict(lr_max_factor=1/2), dict(lr_max_factor=1/4), dict(wd=0.2), dict(padding='mean-colour')
PLAIN = MEAN | dict(wd=0.01, label_smoothing=0., ema=0.)
ARMS = {
    'default': {}, 'wd-0.2': WD,
    'lr-max-half': HALF, 'lr-max-half-wd-0.2': HALF | WD, 'lr-max-half-wd-0.4': HALF | dict(wd=0.4),
    'lr-max-quarter': QUARTER, 'lr-max-quarter-wd-0.2': QUARTER | WD,
    'lr-max-quarter-eps-1e-8': QUARTER | dict(eps=1e-8),
    **{f'lr-max-quarter-smoothing-{e:g}': QUARTER | dict(label_smoothing=e) for e in (0., 0.2)},
    'lr-max-quarter-pad-mean-colour': QUARTER | MEAN, 'lr-max-quarter-plain': QUARTER | PLAIN,
    'ends-at-lrmin': PLAIN, 'div-final-1-holds-lrmax': PLAIN | dict(div_final=1.),
    'div-final-1e5-annihilates': PLAIN | dict(div_final=1e5)}
# Each is an arm alone, together with all others, and left out of these, since one is known to hurt alone.
LEVERS = {
    'smoothing-0.2': dict(label_smoothing=0.2), 'lr-max-fixed': dict(lr_max=7e-3), 'lr-max-half-wd-0.2': HALF | WD,
    'alternating-flips': dict(alternate=True), 'whitened-prep': dict(whiten=True), 'identity': dict(identity=True)}
ALL = functools.reduce(operator.or_, LEVERS.values())
ARMS |= LEVERS | {'all-levers': ALL} | {
    f'all-but-{name}': {k: v for k, v in ALL.items() if k not in lever} for name, lever in LEVERS.items()}
KEY = ['table', 'arm', 'seed', 'epochs', 'batch_size', 'every']
COLUMNS = [*KEY, 'train_images', 'test_images', 'lr_min', 'lr_max', 'div_final', 'minimum', 'wd', 'label_smoothing',
           'padding', 'eps', 'ema', 'accuracy', 'accuracy_flip', 'test_loss', 'train_accuracy', 'first_epoch_over_90',
           'seconds_training', 'seconds_total', 'precision', 'device', 'torch', 'fastai', 'commit']


def load_results(folder: Path) -> pd.DataFrame:
    """The rows of `results.csv` in `folder`. Raises `InputError` for a table with other columns."""
    file = folder/'results.csv'
    results = pd.read_csv(file, dtype=dict(torch=str, commit=str)) if file.exists() else pd.DataFrame(columns=COLUMNS)
    if [*results.columns] != COLUMNS: raise InputError(f'{file} has other columns than this version writes')
    return results


def add_row(folder: Path, row: dict):
    """Append to `results.csv` in `folder`, which other processes may be writing to."""
    load_results(folder)
    line = pd.DataFrame([row], columns=COLUMNS).to_csv(index=False, header=not (folder/'results.csv').exists())
    with (folder/'results.csv').open('a') as f: f.write(line)


def hold_out(path: Path, to: Path, every: int = 10) -> Path:
    """Make the data folder `to` of links to the training images in `path`, one in `every` of a class for testing."""
    for folder in (path/'train').ls():
        for split in ('train', 'test'): (to/split/folder.name).mkdir(parents=True)
        for i, file in enumerate(folder.ls().sorted()):
            (to/('train' if i % every else 'test')/folder.name/file.name).symlink_to(file.resolve())
    return to


def score(learn: Learner) -> dict[str, float]:
    """Accuracy, plain and by flip averaging, and loss on the test images of `learn`."""
    ds, (plain, targets) = learn.dls.valid_ds, get_log_probs(learn)
    with replaced(ds, 'images', ds.images.flip(-1)): flipped, _ = get_log_probs(learn)
    return dict(accuracy=accuracy(plain, targets).item(), accuracy_flip=accuracy(plain + flipped, targets).item(),
                test_loss=F.nll_loss(plain, targets).item())


def read_run(folder: Path, data: str | Path | None) -> dict:
    """The row of a finished run of train_fastai.py on the images in `data`; its arm names the options that differ."""
    m, learn = json.loads((folder/'metrics.json').read_bytes()), load_run(folder, data=get_data(data))
    o, free = m['options'], ('data', 'out', 'resume', 'seed', 'epochs', 'bs', 'precision')
    changed = [f'{k}={v}' for k, v in o.items() if k not in free and v != getattr(Options, k, v)]
    padding = 'reflect' if 'reflect' in str(m['recipe']['augmentation']) else 'mean-colour'
    return RECIPE | o | m['versions'] | m | dict(
        table='seeds', arm=' '.join(['experiment', *changed]), every=10 if o['quick'] else 1, padding=padding,
        div_final=m['lr_max'] / (o['lr_end'] or m['lr_min']), accuracy=m['test_accuracy'],
        accuracy_flip=score(learn)['accuracy_flip'])


class AlternateFlips(TrainingCallback):
    """Mirrors a random half of the images before the first epoch, and all before every other (arXiv:2404.00498)."""

    def before_fit(self): self.images = self.dls.train_ds.images

    def before_train(self):
        images = self.dls.train_ds.images
        mirrored = (torch.rand(len(images)) < (1 if self.epoch else 1/2)).to(images.device)
        self.dls.train_ds.images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)

    def after_fit(self): self.dls.train_ds.images = self.images


def make_network(dls: DataLoaders, whiten: bool, identity: bool) -> ResNet:
    """The network; its first filters `whiten` patches of 3×3 pixels, its other convolutions start as `identity`."""
    model = ResNet(3, len(dls.vocab))
    prep, *others = (m.weight.data for m in model.modules() if isinstance(m, nn.Conv2d))
    if whiten:
        x, = dls.train.after_batch((TensorImage(dls.train_ds.images[::max(1, len(dls.train_ds) // 5000)]),))
        values, vectors = torch.linalg.eigh(F.unfold(x.as_subclass(Tensor), 3).transpose(0, 1).flatten(1).cov())
        filters = (vectors / (values + 1e-3).sqrt()).T.reshape(-1, 3, 3, 3).cpu()
        filters = torch.cat([filters, -filters])[:len(prep)]
        prep[:len(filters)] = filters
    for weight in others if identity else (): nn.init.dirac_(weight[:weight.shape[1]])
    return model


def train(dls: DataLoaders, recipe: dict, seed: int, epochs: int, folder: str, lr_min: float, lr_max: float) -> dict:
    """Train by `recipe`, with the rates that were found, and return the row."""
    lr_max = recipe['lr_max_factor'] * (recipe['lr_max'] or lr_max)
    div_final = recipe['div_final'] or lr_max / lr_min
    model = partial(make_network, dls, recipe['whiten'], recipe['identity'])
    learn = get_learner(dls, model, partial(FusedAdam, eps=recipe['eps']), seed=seed, path=folder,
                        **{k: recipe[k] for k in ('wd', 'label_smoothing', 'ema')})
    if recipe['alternate']: learn.add_cb(AlternateFlips())
    with fast(learn):
        learn.fit_one_cycle(epochs, lr_max, div=lr_max / lr_min, div_final=div_final, pct_start=5/24)
    h = learn.history
    return recipe | score(learn) | dict(
        train_images=len(dls.train_ds), test_images=len(dls.valid_ds), device=device_name(dls.device),
        precision=resolve_precision('auto', dls.device), torch=torch.__version__, fastai=fastai.__version__,
        commit=find_commit(), lr_min=lr_min, lr_max=lr_max, div_final=div_final, seconds_training=h.seconds_training,
        train_accuracy=h.rows[-1]['train_accuracy'],
        first_epoch_over_90=first(o['epoch'] for o in h.rows if o['test_accuracy'] > TARGET))


def format_percent(shares: pd.Series, unit: str = ' %') -> str:
    """Mean ± standard deviation of shares between 0 and 1, as 92.73 ± 0.15 %; a single one has no deviation."""
    return f'{100 * shares.mean():.2f}' + (f' ± {100 * shares.std():.2f}' if len(shares) > 1 else '') + unit


def make_table(columns: str, rows: list[tuple]) -> str:
    """A table in Markdown; `columns` are separated by |."""
    return '\n'.join([f'| {columns} |', '|' + columns.count('|') * '---|' + '---|',
                      *(f'| {" | ".join(map(str, row))} |' for row in rows), ''])


def tabulate_seeds(runs: pd.DataFrame) -> str:
    """A row per run, then mean ± standard deviation, and how many runs reach 94 %."""
    shares = ['train_accuracy', 'accuracy', 'accuracy_flip']
    rows = [(r.seed, f'{r.lr_min:.2e}', f'{r.lr_max:.2e}', *(f'{100 * r[k]:.2f} %' for k in shares),
             'none' if pd.isna(r.first_epoch_over_90) else int(r.first_epoch_over_90), r.commit)
            for _, r in runs.iterrows()]
    rows.append((f'mean ± sd, n = {len(runs)}', '', '', *(format_percent(runs[k]) for k in shares), '', ''))
    table = make_table('seed | LRMIN | LRMAX | training | test | flip averaging | first epoch over 90 % | commit', rows)
    return f'{table}\nAt least 94 %: {(runs.accuracy.round(4) >= 0.94).sum()} of {len(runs)}.\n'


def tabulate_arms(runs: pd.DataFrame) -> str:
    """A row per arm and kind of weights; the gain in points is over the first row, on the seeds that both have."""
    rows, runs = [], runs.set_index('seed')
    for (arm, ema), group in runs.groupby(['arm', 'ema'], sort=False):
        if not rows: base = group.accuracy
        gains = (group.accuracy - base).dropna() if rows else []
        rows.append((arm, f'average, decay {ema:g}' if ema else 'last step', ', '.join(map(str, group.index)),
                     ' to '.join(dict.fromkeys(f'{o:.2e}' for o in (group.lr_max.min(), group.lr_max.max()))),
                     format_percent(group.train_accuracy), format_percent(group.accuracy),
                     format_percent(gains, '') if len(gains) else '', format_percent(group.accuracy_flip)))
    return make_table('recipe | weights | seeds | LRMAX | training | accuracy | gain | flip averaging', rows)


def tabulate(results: pd.DataFrame, name: str) -> str:
    """What `results` has of the table `name`, in Markdown, by size, processor and version of torch."""
    runs, tabulate_runs = results[results.table == name].copy(), tabulate_seeds if name == 'seeds' else tabulate_arms
    version = ('torch ' + runs.torch.astype('string').str.split('+').str[0]).fillna('torch not recorded')
    runs['processor'] = runs.device.str.replace(r', \d+ threads?$', '', regex=True) + ', ' + version
    by = ['epochs', 'train_images', 'batch_size', 'processor'] + (['arm'] if name == 'seeds' else [])
    return '\n'.join(f'{", ".join(f"{k} {o}" for k, o in zip(by, group, strict=True))}\n\n{tabulate_runs(rows)}'
                     for group, rows in runs.groupby(by, sort=False))


@call_parse
@one_line_errors('repeat.py')
def main(
    what: Annotated[str, dict(choices=['seeds', 'ingredients', 'test'])],  # what to repeat
    arms: str = 'default',  # recipes of `ingredients` and `test`, separated by commas
    seeds: str = '42',  # separated by commas
    epochs: int = 24,  # passes over the training images
    bs: int = 512,  # batch size
    every: int = 1,  # use one image in this many of each class; not for `seeds`
    data: str = None,  # folder of images, as for train_fastai.py; default: CIFAR-10
    out: str = 'runs/experiments',  # folder of results.csv and of the runs
    add: str = None,  # for `seeds`: add the row of the finished run in this folder, and train nothing
    table: bool = False,  # print what results.csv has, and train nothing
):
    "Train with every seed and add the results to results.csv, or print its table."
    out, names = Path(out), arms.split(',') if what != 'seeds' else ['experiment']
    if what != 'seeds' and (unknown := {*names} - {*ARMS}): raise InputError(f'--arms: no {", ".join(unknown)}')
    if what == 'seeds' and every > 1: raise InputError('--every: `seeds` runs train_fastai.py, on all images')
    if table: print(tabulate(load_results(out), what))
    if add: add_row(out, read_run(Path(add), data))
    if table or add: return
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        path = get_data(data)
        if what == 'ingredients': path = hold_out(path, Path(tmp)/'data')

        @functools.cache
        def load(padding: str = 'reflect', alternate: bool = False) -> DataLoaders:
            pad = PadCrop(4) if padding == 'reflect' else PadCrop(4, 'constant', MEAN_COLOUR)
            return get_dls(path, bs, every, [pad, *([] if alternate else [FlipLR()]), Cutout(8)])

        @functools.cache
        def find_rates(seed: int) -> tuple[float, float]:  # of the default recipe, for all arms
            with fast(get_learner(load(), seed=seed, path=tmp)) as learn: return find_lrs(learn)

        for seed, arm in itertools.product(map(int, seeds.split(',')), names):
            key = dict(zip(KEY, (what, arm, seed, epochs, bs, every), strict=True))
            if (load_results(out)[KEY] == [*key.values()]).all(axis=1).any(): continue
            print(folder := out/'-'.join(map(str, key.values())), flush=True)
            if what == 'seeds':
                options = dict(out=folder, seed=seed, epochs=epochs, bs=bs) | (dict(data=data) if data else {})
                if (folder/CHECKPOINT).exists(): options = dict(resume=folder)
                if not (folder/'model.pth').exists(): train_fastai.main([f'--{k}={v}' for k, v in options.items()])
                row = read_run(folder, data)
            else:
                recipe = RECIPE | ARMS[arm]
                row = train(load(recipe['padding'], recipe['alternate']), recipe, seed, epochs, tmp, *find_rates(seed))
            add_row(out, row | key)
