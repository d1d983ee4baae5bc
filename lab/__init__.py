"""The machinery behind the experiment. Nobody has to open it to change the recipe.

    errors      one line and an exit code when something goes wrong
    loader      files → pixels → whole batches
    sources     where the images come from
    optim       loss and optimizer
    winograd    3×3 convolutions in float32 on a CPU
    speed       `fast`, and precision
    processes   several processes, one for each GPU
    runs        the folder of a run: options, lock, atomic writes, checkpoint, resume
    evaluate    predictions, confusion matrix, scores of the classes, misclassified images
    figures     one function per figure
    gradcam     where the network looked
    report      a run as one page of Markdown (report.md)
    page        every misclassified image on one page of HTML (page.html)
    results     what a run writes beside its checkpoint

Imports go one way: nothing here imports the experiment, its callbacks or its network.
"""
import warnings

warnings.filterwarnings('ignore', r'`torch\.jit\.script` is ', FutureWarning)  # at fastai's import
warnings.filterwarnings('ignore', module=r'PIL\.')  # about images that can be read anyway
