"""The machinery behind the experiment. Nobody has to open it to change the recipe; nothing in it imports the recipe.

    errors, processes             a line and an exit code for what goes wrong; several processes, one for each GPU
    sources, loader               where the images come from; files → pixels → whole batches
    optim, speed, winograd        loss and optimizer; `fast`, and precision; 3×3 convolutions in float32 on a CPU
    runs                          the folder of a run: options, lock, atomic writes, checkpoint, resume
    figures, report, gradcam      a function a figure; a run as a page, its errors as another; where the network looked
    results                       what a run writes beside its checkpoint; a network's answers
"""
import warnings

warnings.filterwarnings('ignore', r'`torch\.jit\.script` is ', FutureWarning)  # at fastai's import
warnings.filterwarnings('ignore', module=r'PIL\.')  # about images that can be read anyway
