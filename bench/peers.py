"""The same computation by PyTorch, on the same data and in the same run.

    eager               plain PyTorch
    channels-last       the same on inputs and weights stored channels-last
    cudnn.benchmark     eager with cuDNN choosing among its algorithms by trying them
    compile             torch.compile with default settings
    max-autotune        torch.compile(mode="max-autotune"); without CUDA graphs for all but small inputs, because a
                        graph copies each new input into its own buffer first, which would count against it

Nobody's shapes are dynamic, and every compilation starts from a clean slate, so that no peer runs code that was made
for several shapes. The module can be imported without torch; everything in it needs torch.
"""

import contextlib
import time
import warnings
from dataclasses import dataclass

from .report import PEERS, Peer
from .timing import MeasuringError, Turn, measure

EAGER = ("eager", "channels-last", "cudnn.benchmark")
COMPILED = ("compile", "max-autotune")
_GRAPH_BYTES = 4 << 20
#: Seconds a compilation is expected to take before one was seen.
_FIRST_GUESS = {"compile": 8.0, "max-autotune": 20.0}
#: A peer whose result is further from ours than this share of its size computes something else; so much, or so many
#: epsilons of the dtype, because sums of rounded values may cancel (the third model's gradients in bfloat16 do).
_SAME, _SAME_EPSILONS = 0.05, 32


def available():
    """Whether torch can be imported."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


@contextlib.contextmanager
def float32_precision(precision):
    """Lets torch's convolutions and matrix products use TF32 ("tf32") or not ("ieee") inside the block.

    Through the older switches: those who read them fail where the newer ones were set.
    """
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    warnings.filterwarnings(
        "ignore", message=".*TF32.*", category=UserWarning
    )  # that these switches are the older ones
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def read_precision(mode):
    """What torch says about its own switches, in words; empty for 16-bit types, which they do not concern."""
    import torch

    if not mode.startswith("float32"):
        return ""
    on = [torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32]
    return f"cuDNN TF32 {'on' if on[0] else 'off'}, matmul TF32 {'on' if on[1] else 'off'}"


@dataclass
class Compilations:
    """How long compilations took so far, to foresee whether another one fits."""

    longest: dict

    def expected(self, name):
        return self.longest.get(name, _FIRST_GUESS.get(name, 0.0))

    def record(self, name, seconds):
        self.longest[name] = max(self.longest.get(name, 0.0), seconds)


COMPILATIONS = Compilations({})


def to_tensor(array):
    """A torch tensor on the memory of a NumPy or CuPy array."""
    import torch

    from rawkern.runtime import bfloat16

    if array.dtype == bfloat16:
        return torch.from_dlpack(array.view("int16")).view(torch.bfloat16)
    return torch.from_dlpack(array)


def applicable(names, operation, problem, device_kind):
    """Those of the named peers that differ from others for this problem."""
    four_axes = len(operation.inputs(problem, "forward")["input"].shape) == 4
    skipped = set()
    if not four_axes:
        skipped.add("channels-last")
    if "conv_transpose2d" not in operation.name or device_kind == "cpu":
        skipped.add("cudnn.benchmark")
    return [name for name in PEERS if name in names and name not in skipped]


@dataclass
class Trial:
    """What peers are timed on.

    Attributes:
        function: the forward pass, taking tensors by name.
        arrays: inputs of each set; grads: grad_output of each set, or None.
        wanted: names of the inputs whose gradients are wanted, unless the direction is "forward".
        direction: "forward", "train" (forward and backward), or "backward" (of graphs built beforehand).
        mode: of data.MODES.
        reference: rawkern's results for set 0 as float64 tensors, or None.
    """

    function: object
    arrays: list
    grads: list | None
    wanted: tuple
    direction: str
    mode: str
    reference: list | None


class Step:
    """Calls of one peer, or of rawkern's own torch functions: step(number of the set) returns a tuple of tensors."""

    def __init__(self, trial, function=None, channels_last=False):
        import torch

        self.trial, self.function = trial, function or trial.function
        self.channels_last = channels_last
        self.tensors = [self._tensors(values) for values in trial.arrays]
        self.grads = [self._tensor(grad) for grad in trial.grads or ()]
        self.wanted = [[tensors[name] for name in trial.wanted] for tensors in self.tensors]
        self.grad_mode = torch.no_grad if trial.direction == "forward" else torch.enable_grad
        if trial.direction == "backward":
            self.graphs = [self.function(**tensors) for tensors in self.tensors]

    def _tensors(self, values):
        tensors = {name: self._tensor(array) for name, array in values.items()}
        for name in self.trial.wanted:
            tensors[name] = tensors[name].detach().requires_grad_()
        return tensors

    def _tensor(self, array):
        import torch

        tensor = to_tensor(array)
        if self.channels_last and tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    def __call__(self, number):
        import torch

        if self.trial.direction == "backward":
            return torch.autograd.grad(self.graphs[number], self.wanted[number], self.grads[number], retain_graph=True)
        with self.grad_mode():
            output = self.function(**self.tensors[number])
        if self.trial.direction == "forward":
            return (output,)
        return (output.detach(), *torch.autograd.grad(output, self.wanted[number], self.grads[number]))

    @property
    def input_bytes(self):
        """Of the arrays of one set."""
        return sum(tensor.nbytes for tensor in (*self.tensors[0].values(), *self.grads[:1]))


def time_peer(name, trial, context):
    """Times one peer on a Trial; never raises for what goes wrong in PyTorch, but says so in the Peer's note."""
    import torch

    if context.seconds_for_peers() < COMPILATIONS.expected(name) * 1.2:
        return Peer(note="no time left")
    benchmark = torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.benchmark = name == "cudnn.benchmark"
        with float32_precision(trial.mode.partition("/")[2] or "ieee"):
            return _time(name, trial, context)
    except MeasuringError as error:
        return Peer(note=f"measuring error: {error}")
    except Exception as error:  # whatever a compiler may raise: a missing peer must not end the run
        first_line = str(error).strip().partition("\n")[0]
        return Peer(note=f"{name} failed: {type(error).__name__}: {first_line[:120]}")
    finally:
        torch.backends.cudnn.benchmark = benchmark
        if name in COMPILED:
            torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _time(name, trial, context):
    import torch

    device, begin = context.device, time.perf_counter()
    function, how = _compiled(name, trial)
    step = Step(trial, function, name == "channels-last")
    results = step(0)  # compiles, chooses algorithms
    device.synchronize()
    if name in COMPILED:
        COMPILATIONS.record(name, time.perf_counter() - begin)
    difference = None if trial.reference is None else largest_difference(results, trial.reference)
    epsilon = torch.finfo(results[0].dtype).eps
    del results
    peak = torch_peak_memory(device, step)
    same = max(_SAME, _SAME_EPSILONS * epsilon)
    if difference is not None and not difference < same:
        return Peer(difference=difference, note=f"{name} computes something else (differs by {difference:.2g})")
    timing, _ = measure(device, step, Turn(len(trial.arrays)), budget=context.budget() / 2, least=3)
    note = ", ".join(filter(None, (read_precision(trial.mode), how)))
    return Peer(timing.median, timing.p20, timing.p80, timing.host, peak, difference, note)


def _compiled(name, trial):
    """(function, remark)"""
    import torch

    if name not in COMPILED:
        return trial.function, ""
    torch._dynamo.reset()
    if name == "compile":
        return torch.compile(trial.function, dynamic=False, fullgraph=True), ""
    small = sum(array.nbytes for array in trial.arrays[0].values()) <= _GRAPH_BYTES
    mode = "max-autotune" if small else "max-autotune-no-cudagraphs"
    function = torch.compile(trial.function, dynamic=False, fullgraph=True, mode=mode)
    return function, "max-autotune with CUDA graph" if small else ""


def largest_difference(results, reference):
    """The largest difference of the results, each relative to the reference's root mean square."""
    worst = 0.0
    for result, expected in zip(results, reference, strict=False):
        scale = expected.square().mean().sqrt().clamp_min(1e-30)
        worst = max(worst, ((result.double() - expected).square().mean().sqrt() / scale).item())
    return worst


def torch_peak_memory(device, step):
    """Most bytes in use during one step: its inputs, and what PyTorch's allocator hands out. None on the emulator."""
    import torch

    if device.kind != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = step(0)
    device.synchronize()
    del result
    return step.input_bytes + torch.cuda.max_memory_allocated() - before
