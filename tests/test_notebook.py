import nbformat
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT/'experiment.ipynb'


def test_it_runs_from_top_to_bottom_and_shows_its_figures(folder, tmp_path, monkeypatch):
    monkeypatch.delenv('MPLBACKEND')  # the kernel has one of its own
    for file in (*ROOT.glob('*.py'), ROOT/'lab'): (tmp_path/file.name).symlink_to(file)
    nb = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in nb.cells if cell.cell_type == 'code']
    small = ('import lab.sources; from functools import partialmethod; from pathlib import Path\n'
             'from arch import ResNet; ResNet.__init__ = partialmethod(ResNet.__init__, width=8)\n'
             f'lab.sources.get_sample = lambda: Path({str(folder)!r})\nepochs, bs = 1, 6')
    nb.cells.insert(nb.cells.index(code[0]) + 1, nbformat.v4.new_code_cell(small))
    nb.cells.append(nbformat.v4.new_code_cell(
        f'%run predict.py {ROOT}/docs/cifar10 {folder}/test/red/0.png\n'
        'import signal; assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL'))
    NotebookClient(nb, timeout=300, resources=dict(metadata=dict(path=str(tmp_path))),
                   shutdown_kernel='immediate').execute()
    images = sum('image/png' in o.data for cell in code for o in cell.outputs if o.output_type != 'stream')
    assert images == 7  # the batch, the finder, history and schedule, misclassified, top losses, confusions
    printed = '\n'.join(o.text for cell in nb.cells for o in cell.get('outputs', []) if o.output_type == 'stream')
    for part in ('103,499 parameters', 'LRMIN', 'LRMAX', 'test/red/0.png'): assert part in printed


def test_it_is_committed_as_it_ran():
    """With the outputs of a run from top to bottom in which nothing failed."""
    nb = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(nb)
    code = [cell for cell in nb.cells if cell.cell_type == 'code']
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    outputs = [o for cell in code for o in cell.outputs]
    assert {o.output_type for o in outputs} <= {'stream', 'display_data', 'execute_result'}
    assert sum('image/png' in o.get('data', {}) for o in outputs) >= 7
