"""What makes training fast: `fast(learn)`, which undoes at its end all that it does, and the precision of a learner."""
import contextlib
import ctypes

from fastai.vision.all import *
from torch.utils.checkpoint import checkpoint

from lab.errors import InputError
from lab.optim import match_layout
from lab.processes import replaced
from lab.winograd import MIN_CHANNELS, WinogradConv2d

PRECISIONS = 'auto', 'fp32', 'bf16', 'fp16'
mallopt, malloc_trim = (getattr(ctypes.pythonapi, name, noop) for name in ('mallopt', 'malloc_trim'))  # of glibc
TRIM_EVERY = 50  # batches


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside `torch.compile`, DataParallel and DistributedDataParallel."""
    model = get_model(model)
    return get_model(getattr(model, '_orig_mod', model))


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody looks at what goes through `module`, or has replaced its `forward`."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or 'forward' in vars(module)


class Precision(MixedPrecision):
    """fastai's mixed precision, on every device: its own knows CUDA alone, and would train in float32 on a CPU."""
    name = 'mixed_precision'  # where fastai looks for it

    def before_fit(self):
        device, fp16 = next(self.model.parameters()).device.type, self.amp_mode == AMPMode.FP16
        self.autocast, self.scales = torch.autocast(device, torch.float16 if fp16 else torch.bfloat16), L()
        self.learn.scaler = torch.amp.GradScaler(device, enabled=fp16, **self.kwargs)

    def state_dict(self) -> dict: return self.learn.scaler.state_dict()
    def load_state_dict(self, state: dict): self.learn.scaler.load_state_dict(state)


class SmoothLoss(AvgSmoothLoss):
    """fastai's smoothed loss, kept on the GPU: no batch waits for it."""

    def accumulate(self, learn: Learner):
        self.count += 1
        self.val = torch.lerp(learn.loss.detach().mean(), self.val.to(learn.loss.device, non_blocking=True), self.beta)


class SideBySideConv2d(nn.Conv2d):
    """A 3×3 convolution that lays small maps side by side, in rows of 32: (N, C, H, W) → (N, C', H, W), as `nn.Conv2d`.

    oneDNN's AMX convolutions fill their tiles along the width of a map. A column of zeros keeps neighbours apart. The
    result is in channels-last memory: with other strides a batch norm of bfloat16 values takes ten times as long.
    """

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if w > 8: return super().forward(x)  # smaller maps leave most of an AMX tile empty (docs/speed.md)
        k = 32 if n % 32 == 0 else n
        rows = x.permute(0, 2, 3, 1).reshape(n // k, k, h, w, c).transpose(1, 2)
        wide = F.pad(rows, (0, 0, 0, 1)).reshape(n // k, h, k * (w + 1), c)
        out = super().forward(wide.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        maps = out.reshape(n // k, h, k, w + 1, -1)[:, :, :, :w].transpose(1, 2)
        return maps.reshape(n, h, w, -1).contiguous().permute(0, 3, 1, 2)


class LeanSequential(nn.Sequential):
    """An `nn.Sequential` that takes a sixth less memory, where no hook sees it, and computes the same.

    ReLUs overwrite what a batch norm has computed for them. (In bfloat16 on a CPU that would take twice as long.) The
    places of a pool's maxima, eight bytes each, are not kept, but found again in the backward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        for before, m in itertools.pairwise([nn.Identity(), *self]):
            unseen = not (is_hooked(before) or is_hooked(m))
            if unseen and (type(before), type(m)) == (nn.BatchNorm2d, nn.ReLU): x = x.relu_()
            elif unseen and type(m) is nn.MaxPool2d: x = checkpoint(m, x, use_reentrant=False, preserve_rng_state=False)
            else: x = m(x)
        return x


def faster_class(m: nn.Module, mixed: bool) -> type:
    """What computes on this CPU the same as the module `m` in less time or memory, or else its class."""
    if type(m) is nn.Sequential and not mixed: return LeanSequential
    plain = dict(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, padding_mode='zeros')
    if type(m) is not nn.Conv2d or m.bias is not None or not plain.items() <= vars(m).items(): return type(m)
    if mixed: return SideBySideConv2d if torch.cpu.get_capabilities().get('amx_bf16') else nn.Conv2d
    return WinogradConv2d if min(m.weight.shape[:2]) >= MIN_CHANNELS else nn.Conv2d


@contextlib.contextmanager
def keep_freed_memory():
    """Context manager that keeps freed memory, with glibc: returning it and asking again costs an eighth of a step."""
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # in malloc.h with an M_ in front
    mallopt(mmap_max, 0)  # no mapping of its own for a large tensor
    mallopt(trim_threshold, -1)  # never shrink the heap
    try: yield
    finally:  # close to what glibc's own rule, now switched off, arrives at
        for o, value in ((mmap_max, 65536), (mmap_threshold, 2**25), (trim_threshold, 2**26)): mallopt(o, value)
        malloc_trim(0)


class FastFit(Callback):
    """What `fast` does in a fit. After an error it cleans up what fastai leaves; see docs/findings/README.md.

    On a GPU it can `record` the forward and backward pass once and replay them in every step: the same kernels, but a
    fast GPU takes longer to launch them than to run them. The loader has to drop the last partial batch.
    """
    order, finder, autocast, recorded = MixedPrecision.order + 1, None, None, None  # within its autocast

    def __init__(self, record: bool): self.record = record
    def before_train(self): match_layout(self.opt)  # a callback may have loaded a state

    def before_fit(self):
        self.finder, self.autocast = getattr(self, 'lr_finder', None), nested_attr(self, 'mixed_precision.autocast')

    def before_batch(self):
        if not self.record or not self.training or 'forward' in vars(self.model): return  # recorded, or somebody's own
        # A replay runs no hooks, and overwrites the gradients of the step before.
        if any(map(is_hooked, self.model.modules())) or hasattr(self.learn, 'gradient_accumulation'): return
        if self.model is not unwrap(self.model) or not getattr(self.dls.train, 'drop_last', False): return
        statistics = [b.clone() for b in self.model.buffers()]  # recording changes them
        images = self.x.as_subclass(Tensor).clone()
        self.learn.loss_grad = None  # what is left of an earlier step would drag its stream into the recording
        enabled = torch.is_autocast_enabled('cuda')
        with torch.autocast('cuda', enabled=enabled, cache_enabled=False), warnings.catch_warnings():
            warnings.filterwarnings('ignore', "The AccumulateGrad node's stream does not match")
            torch.cuda.make_graphed_callables(self.model, (images,))  # evaluation stays as it was
        self.recorded = vars(self.model).get('forward')
        for b, kept in zip(self.model.buffers(), statistics, strict=True): b.copy_(kept)

    def after_batch(self):
        # What stays, as the recorder's losses, may lie where a large tensor was, which no longer fits there. Without
        # this, a heap that keeps freed memory grows by 600 MB in an epoch of CIFAR-10.
        if self.training and self.train_iter % TRIM_EVERY == 0 and not one_param(self.model).is_cuda: malloc_trim(0)

    def after_fit(self):
        if self.recorded and vars(self.model).get('forward') is self.recorded: del self.model.forward
        self.recorded = self.finder = None
        if losses := nested_attr(self.learn, 'recorder.losses'): self.recorder.losses = [o.cpu() for o in losses]

    def clean_up(self, error: type | None, *_):
        if not error: return
        if self.autocast and torch.is_autocast_enabled(self.autocast.device): self.autocast.__exit__(None, None, None)
        if self.opt: self.opt.zero_grad()
        if self.finder:
            self.finder.learn = self.learn
            self.finder.after_fit()
        self.after_fit()


@contextlib.contextmanager
def fast(learn: Learner):
    """Context manager in which `learn` trains and predicts fast; undone at its end, also after an error or Ctrl-C.

    Numbers are the same, to rounding. A network whose class names a `memory_format`, as `ResNet` does, is brought into
    that layout, with faster modules on a CPU and a recorded training step on a GPU. Any other may use `view`, say.
    """
    model, gpu = unwrap(learn.model), one_param(learn.model).is_cuda
    layout, device = getattr(model, 'memory_format', None), one_param(model).device.type
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(torch.backends.cudnn, 'benchmark', True))
        if not gpu: stack.enter_context(keep_freed_memory())
        elif recorder := getattr(learn, 'recorder', None):
            stack.enter_context(replaced(recorder.smooth_loss, '__class__', SmoothLoss))
            if progress := getattr(learn, 'progress', None):  # its bar would show the loss, and so wait for it
                vars(progress)['after_batch'] = lambda: progress.pbar.update(learn.iter + 1)
                stack.callback(vars(progress).pop, 'after_batch', None)
        stack.callback(lambda: match_layout(learn.opt))
        for m in model.modules() if layout and device == 'cpu' else ():
            stack.enter_context(replaced(m, '__class__', faster_class(m, hasattr(learn, 'mixed_precision'))))
        rounded = torch.get_float32_matmul_precision() != 'highest'
        if rounded and any(isinstance(m, WinogradConv2d) for m in model.modules()):
            print('Convolutions stay direct: torch.get_float32_matmul_precision() is not "highest".')
        if layout and device in ('cpu', 'cuda'):
            stack.callback(model.to, memory_format=torch.contiguous_format)
            model.to(memory_format=layout)
        stack.enter_context(learn.added_cbs(fast_fit := FastFit(record=gpu and layout and num_distrib() < 2)))
        stack.push(fast_fit.clean_up)
        yield learn


def resolve_precision(precision: str, device: torch.device) -> str:
    """`precision`, or for 'auto' the fastest that `device` has in hardware. Raises `InputError` for one it has not."""
    devices = dict(fp16=['cuda'], bf16=['cuda', 'cpu']).get(precision, [device.type])
    if device.type not in devices:
        raise InputError(f'--precision {precision} needs {" or ".join(devices)}, not "{device.type}"')
    if precision != 'auto': return precision
    if device.type == 'cuda': return 'bf16' if torch.cuda.get_device_capability(device) >= (8, 0) else 'fp16'
    native = torch.cpu.get_capabilities().get('amx_bf16') or torch.cpu.get_capabilities().get('avx512_bf16')
    allowed = device.type == 'cpu' and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # ONEDNN_MAX_CPU_ISA may forbid it
    return 'bf16' if native and allowed else 'fp32'


def device_name(device: torch.device) -> str:
    """The processor in words."""
    several, threads = f'{num_distrib()} × ' if num_distrib() > 1 else '', torch.get_num_threads()
    if device.type == 'cuda': return several + torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get('cpu_name') or platform.machine()
    return f'{several}{device.type}, {name}, {threads} thread{"s" * (threads > 1)}'
