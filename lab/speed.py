"""What makes training fast: precision, recorded GPU steps, memory layout, side-by-side convolutions, memory kept.

Everything here is in place only during a fit. What a user holds, the model, its weights, a file, stays plain.
"""
import contextlib
import ctypes
import platform
import sys
import warnings

from fastai.vision.all import *

from lab.errors import InputError
from lab.processes import RANKS, ignore_other_launch

PRECISIONS = 'auto', 'fp32', 'bf16', 'fp16'
SMALL_MAP = 8  # pixels: maps up to this width leave most of an AMX tile empty (docs/speed.md)


class Precision(MixedPrecision):
    """fastai's mixed precision, with 'bf16' on a CPU, too, where fastai's own would train in float32.

    `after_loss` is skipped by an error in a forward pass, so the autocast is also left with the learner's
    `during_batch`: if it stayed entered, its cache of cast weights would be what later learners train on.
    """
    name = 'mixed_precision'  # where fastai looks for it

    def before_fit(self):
        device = next(self.model.parameters()).device
        if device.type != 'cpu' or self.amp_mode != AMPMode.BF16:
            super().before_fit()
            return
        self.autocast, self.scales = autocast_for(self, device), L()
        self.learn.scaler = torch.amp.GradScaler('cpu', enabled=False)

    def before_batch(self): self.during_batch.enter_context(self.autocast)

    def after_loss(self): self.during_batch.close()

    def state_dict(self) -> dict: return self.learn.scaler.state_dict()

    def load_state_dict(self, state: dict): self.learn.scaler.load_state_dict(state)


def autocast_for(precision: MixedPrecision | None, device: torch.device) -> torch.autocast:
    """What `precision` means on `device`: float16 on CUDA, bfloat16 there and on a CPU, and nothing elsewhere."""
    half = precision is not None and precision.amp_mode == AMPMode.FP16
    return torch.autocast(device.type, torch.float16 if half else torch.bfloat16,
                          enabled=precision is not None and device.type in ('cuda', *([] if half else ['cpu'])))


class CUDAGraph(Callback):
    """Records the forward and backward pass of a `fast_model` on a GPU once and replays them in every step.

    The kernels and their results are the same; launching them one by one takes a fast GPU longer than computing them.
    All training batches must have one shape, so the loader has to drop the last partial one.
    """
    order = Precision.order + 1  # within its autocast

    def before_batch(self):
        if not self.training or not self.learn.is_training_fast or 'forward' in vars(self.model): return
        # A replay runs no hooks, and overwrites the gradients of the step before.
        hooked = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in self.model.modules())
        whole = getattr(self.dls.train, 'drop_last', False)
        if hooked or not whole or hasattr(self.learn, 'gradient_accumulation'): return
        statistics = [b.clone() for b in self.model.buffers()]  # recording changes them
        images = self.x.as_subclass(Tensor).clone()
        self.learn.loss_grad = None  # what is left of an earlier step would drag its stream into the recording
        enabled, dtype = torch.is_autocast_enabled('cuda'), torch.get_autocast_dtype('cuda')
        with torch.autocast('cuda', dtype, enabled=enabled, cache_enabled=False), warnings.catch_warnings():
            warnings.filterwarnings('ignore', "The AccumulateGrad node's stream does not match")
            torch.cuda.make_graphed_callables(self.model, (images,))  # evaluation stays as it was
        for b, kept in zip(self.model.buffers(), statistics, strict=True): b.copy_(kept)

    def after_fit(self): vars(self.model).pop('forward', None)

    before_fit = after_fit


class SideBySideConv2d(nn.Conv2d):
    """A 3×3 convolution that lays small maps side by side, in rows of 32: (N, C, H, W) → (N, C', H, W), as `nn.Conv2d`.

    oneDNN's AMX convolutions fill their tiles along the width of a map, and small maps leave most of a tile empty. A
    column of zeros keeps neighbours apart, as padding does. The result is in channels-last memory: with any other
    strides a batch norm of bfloat16 values takes ten times as long.
    """

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if w > SMALL_MAP: return super().forward(x)
        k = 32 if n % 32 == 0 else n
        rows = x.permute(0, 2, 3, 1).reshape(n // k, k, h, w, c).transpose(1, 2)
        wide = F.pad(rows, (0, 0, 0, 1)).reshape(n // k, h, k * (w + 1), c)
        out = super().forward(wide.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        maps = out.reshape(n // k, h, k, w + 1, -1)[:, :, :, :w].transpose(1, 2)
        return maps.reshape(n, h, w, -1).contiguous().permute(0, 3, 1, 2)


def fits_side_by_side(module: nn.Module) -> bool:
    """Whether `SideBySideConv2d` computes what the convolution `module` does."""
    return type(module) is nn.Conv2d and (
        (module.kernel_size, module.stride, module.padding, module.dilation, module.groups, module.padding_mode)
        == ((3, 3), (1, 1), (1, 1), (1, 1), 1, 'zeros'))


def set_layout(model: nn.Module, opt, memory_format: torch.memory_format):
    """Bring the 4-d weights of `model` to `memory_format`, and with them their gradients and moments.

    A fused optimizer on a CPU pairs weights and moments by memory, not by index: with another layout on one side it
    would step wrongly, without an error.
    """
    model.to(memory_format=memory_format)
    if opt is not None: match_layout(opt)


def in_fast_layout(learn: Learner, x: Tensor) -> Tensor:
    """`x` in channels-last memory if the network is a `fast_model`, which then predicts a third faster."""
    fast = isinstance(get_model(learn.model), getattr(learn, 'fast_model', ())) and x.device.type in ('cpu', 'cuda')
    return x.contiguous(memory_format=torch.channels_last) if fast else x


def match_layout(opt):
    """Give every moment in the state of `opt` the memory layout of its weight."""
    for p, state in getattr(opt, 'opt', opt).state.items():
        for k, v in state.items():
            if isinstance(v, Tensor) and v.shape == p.shape and v.stride() != p.stride():
                state[k] = torch.empty_like(p).copy_(v)


def make_contiguous(module: nn.Module, state: dict, prefix: str, metadata: dict):
    """State-dict hook that makes tensors contiguous, so that files written during a fit are plain."""
    for k, v in state.items():
        if k.startswith(prefix) and isinstance(v, Tensor): state[k] = v.contiguous()


@contextlib.contextmanager
def fast_layout(learn: Learner):
    """Context manager for a fit: weights in channels-last memory, and small maps side by side on a CPU with AMX."""
    model, device = get_model(learn.model), learn.device
    if not learn.is_training_fast or device.type not in ('cpu', 'cuda'):
        yield
        return
    amx = device.type == 'cpu' and hasattr(learn, 'mixed_precision') and cpu_capabilities().get('amx_bf16')
    convs = [m for m in model.modules() if fits_side_by_side(m)] if amx else []
    plain = all(p.is_contiguous() for p in model.parameters())  # else somebody chose channels-last
    hook = model.register_state_dict_post_hook(make_contiguous)
    try:
        for conv in convs: conv.__class__ = SideBySideConv2d
        set_layout(model, learn.opt, torch.channels_last)
        yield
    finally:
        for conv in convs: conv.__class__ = nn.Conv2d
        if plain: set_layout(model, learn.opt, torch.contiguous_format)
        hook.remove()


@contextlib.contextmanager
def keep_freed_memory():
    """Context manager that keeps the memory of freed tensors: returning it and asking again costs an eighth of a step.

    For a CPU on Linux with glibc. Afterwards the memory is returned, and glibc's thresholds are close to what its own
    dynamic rule arrives at, which is switched off for good once `mallopt` was called.
    """
    libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
    if not hasattr(libc, 'mallopt'):
        yield
        return
    m_trim_threshold, m_mmap_threshold, m_mmap_max = -1, -3, -4
    try:
        libc.mallopt(m_mmap_max, 0)  # no mapping of its own for a large tensor
        libc.mallopt(m_trim_threshold, -1)  # never shrink the heap
        yield
    finally:
        libc.mallopt(m_mmap_max, 65536)
        libc.mallopt(m_mmap_threshold, 32 * 2**20)
        libc.mallopt(m_trim_threshold, 64 * 2**20)
        libc.malloc_trim(0)


@contextlib.contextmanager
def keep_random_state(device: torch.device):
    """Context manager after which the caller's random generators and `cudnn.benchmark` are as they were."""
    python, numpy, benchmark = random.getstate(), np.random.get_state(), torch.backends.cudnn.benchmark
    mps = torch.mps.get_rng_state() if device.type == 'mps' else None
    gpus = []
    if device.type == 'cuda' or torch.cuda.is_initialized():  # one of several processes leaves the others' GPUs alone
        gpus = [*range(torch.cuda.device_count())] if RANKS == 1 else [torch.cuda.current_device()]
    with torch.random.fork_rng(gpus):
        try: yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.backends.cudnn.benchmark = benchmark
            if mps is not None: torch.mps.set_rng_state(mps)


@contextlib.contextmanager
def train_fast(learn: Learner):
    """Context manager for a fit of `learn`: all that makes it fast, gone without a trace at its end."""
    memory = keep_freed_memory() if learn.device.type == 'cpu' else contextlib.nullcontext()
    with ignore_other_launch(), keep_random_state(learn.device), memory, fast_layout(learn):
        torch.backends.cudnn.benchmark = True
        yield


def cpu_capabilities() -> dict: return getattr(torch.cpu, 'get_capabilities', dict)()  # earlier versions have none


def best_precision(device: torch.device) -> str:
    """'bf16' where the hardware is made for it, 'fp16' on older CUDA GPUs, else 'fp32'."""
    if device.type == 'cuda': return 'bf16' if torch.cuda.get_device_capability(device) >= (8, 0) else 'fp16'
    if device.type != 'cpu' or not torch.backends.mkldnn.is_available(): return 'fp32'
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported(): return 'fp32'  # ONEDNN_MAX_CPU_ISA may forbid it
    has = cpu_capabilities()
    return 'bf16' if has.get('amx_bf16') or has.get('avx512_bf16') else 'fp32'


def resolve_precision(precision: str, device: torch.device) -> str:
    """`precision`, with 'auto' resolved for `device`. Raises `InputError` for one that does not exist there."""
    if precision not in PRECISIONS: raise InputError(f'--precision {precision} is not one of {", ".join(PRECISIONS)}')
    if precision == 'fp16' and device.type != 'cuda':
        raise InputError(f'--precision fp16 needs a CUDA GPU, not "{device.type}"; use bf16 or fp32')
    if precision == 'bf16' and device.type not in ('cpu', 'cuda'):
        raise InputError(f'--precision bf16 needs a CUDA GPU or a CPU, not "{device.type}"; use fp32')
    return best_precision(device) if precision == 'auto' else precision


def device_name(device: torch.device) -> str:
    """The processor in words."""
    several = f'{RANKS} × ' if RANKS > 1 else ''
    if device.type == 'cuda': return several + torch.cuda.get_device_name(device)
    name = cpu_capabilities().get('cpu_name') or platform.machine()
    threads = torch.get_num_threads()
    return f'{several}{device.type}, {name}, {threads} thread{"s" * (threads > 1)}'
