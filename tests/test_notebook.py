import nbformat
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT/'experiment.ipynb'


def test_it_runs_from_top_to_bottom_on_a_small_folder_and_shows_its_figures(folder, tmp_path, monkeypatch):
    monkeypatch.delenv('MPLBACKEND')  # the kernel has one of its own
    for file in (*ROOT.glob('*.py'), ROOT/'lab'): (tmp_path/file.name).symlink_to(file)
    nb = nbformat.read(NOTEBOOK, as_version=4)
    settings, = (cell for cell in nb.cells if 'parameters' in cell.metadata.get('tags', []))  # papermill's
    narrow = ('from functools import partialmethod; from arch import ResNet\n'
              'ResNet.__init__ = partialmethod(ResNet.__init__, width=8)')
    nb.cells[2].source = nb.cells[2].source.replace('from lab import figures', f'{narrow}\nfrom lab import figures')
    for old, new in (('data = None', f'data = {str(folder)!r}'), ('epochs = 24', 'epochs = 3'),
                     ('bs = 512', 'bs = 6')):
        assert settings.source.count(old) == 1
        settings.source = settings.source.replace(old, new)
    ways_to_run = nbformat.v4.new_code_cell(
        f'%run train_fastai.py --data {folder} --out run --epochs 1 --bs 6 --lr-min 1e-4 --lr-max 1e-3\n'
        f'%run predict.py run {folder}/test/red/0.png\n'
        'import signal; assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL')
    nb.cells.append(ways_to_run)
    NotebookClient(nb, timeout=300, resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    shown = [[o for o in cell.outputs if o.output_type != 'stream' and 'image/png' in o.data]
             for cell in nb.cells if cell.cell_type == 'code']
    assert [len(images) for images in shown] == [0, 0, 1, 1, 0, 2, 1, 2, 0, 0]  # batch, LRs, curves, errors
    printed = '\n'.join(o.text for cell in nb.cells for o in cell.get('outputs', []) if o.output_type == 'stream')
    for part in ('103,499 parameters', 'LRMIN', 'LRMAX', 'run finished', 'test/red/0.png'): assert part in printed


def test_it_is_committed_without_outputs():
    nb = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(nb)
    assert 8 <= len([c for c in nb.cells if c.cell_type == 'code']) <= 12
    for cell in nb.cells:
        if cell.cell_type == 'code': assert (cell.outputs, cell.execution_count) == ([], None)
