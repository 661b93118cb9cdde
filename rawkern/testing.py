"""The measure of a right answer: error against a float64 oracle, at most twice PyTorch's own.

`assert_parity` runs the same computation three times (ours, torch's, and torch's in float64 on the CPU), forward and
backward, and judges the results by `compare`; `assert_as_accurate_as_torch` judges results that are already there.
"""

from dataclasses import dataclass

import torch

#: Additional error allowed, in units of the dtype's epsilon at the scale of the result, beside twice PyTorch's own
#: error. In float64 torch is its own oracle, so that its error is not seen: the allowance covers both sides' rounding.
ULPS = {torch.float64: 16, torch.float32: 3, torch.float16: 1, torch.bfloat16: 1}

#: What rounding both operands of a product to TF32 does to a sum of products, relative to the result's scale. Counts
#: where a library computes more exactly than the mode asks (cuDNN runs some convolutions in full float32).
TF32_ROUNDING = 2.0**-11

_FACTOR = 2.0
#: Absolute error of the float64 oracle where values of order one cancel, as in 1 + tanh(x) for large negative x.
_ORACLE_ROUNDING = 2.0**-50


@dataclass(frozen=True)
class Error:
    """Distance to the oracle: largest and root mean square, both relative to the oracle's own."""

    maximum: float
    rms: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. `problems` is empty exactly if the result is as accurate as it must be."""

    ours: Error
    theirs: Error
    allowed: Error
    problems: tuple

    @property
    def ok(self):
        return not self.problems


def compare(ours, theirs, oracle, dtype=None, *, ulps=None, rounding=0.0, elementwise=False):
    """Judges `ours` against `oracle` (float64), with `theirs`, torch's own result, as the measure of what is good.

    Args:
        ours, theirs, oracle: tensors of one shape, on any device.
        dtype: the dtype that `ours` and `theirs` must have (default: that of `theirs`).
        ulps: allowed beside twice torch's error, in epsilons of dtype at the result's scale (default: `ULPS`).
        rounding: what the precision mode itself may do to the result, relative to its scale (see TF32_ROUNDING).
        elementwise: judge also the largest error relative to each single element. Right for pointwise functions;
            wrong for sums, whose terms may cancel.

    Infinities and NaN must be where torch has them, or where the oracle rounded to `dtype` has them.
    """
    dtype = dtype or theirs.dtype
    ulps = ULPS[dtype] if ulps is None else ulps
    shapes = {"ours": tuple(ours.shape), "torch's": tuple(theirs.shape), "the oracle's": tuple(oracle.shape)}
    nothing = Error(0.0, 0.0)
    if len(set(shapes.values())) != 1:
        return Comparison(nothing, nothing, nothing, (f"shapes differ: {shapes}",))
    if ours.dtype != dtype or theirs.dtype != dtype:
        return Comparison(
            nothing, nothing, nothing, (f"dtypes: ours {ours.dtype}, torch's {theirs.dtype}, not {dtype}",)
        )
    if ours.numel() == 0:
        return Comparison(nothing, nothing, nothing, ())

    rounded = oracle.detach().cpu().to(dtype)
    ours, theirs, oracle = (tensor.detach().cpu().to(torch.float64) for tensor in (ours, theirs, oracle))
    problems = _different_patterns(ours, theirs, rounded.to(torch.float64))
    valid = ours.isfinite() & oracle.isfinite()
    scale = _largest_and_rms(oracle[oracle.isfinite()])
    unit = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    difference = torch.where(valid, (ours - oracle).abs(), 0.0)
    their_difference = torch.where(theirs.isfinite() & oracle.isfinite(), (theirs - oracle).abs(), 0.0)
    our_error, their_error = _largest_and_rms(difference), _largest_and_rms(their_difference)
    allowed = tuple(
        _FACTOR * theirs + ulps * max(unit[0] * size, unit[1]) + rounding * size
        for theirs, size in zip(their_error, scale, strict=True)
    )
    for name, error, limit, torchs in zip(("largest", "rms"), our_error, allowed, their_error, strict=True):
        if not error <= limit:
            problems.append(
                f"{name} error {error:.3g} is above {limit:.3g} (torch's own is {torchs:.3g})"
                + _where(difference > allowed[0], ours, theirs, oracle)
            )
    if elementwise:
        problems += _elementwise(difference, their_difference, ours, theirs, oracle, unit, ulps)
    return Comparison(
        *(
            Error(*(value / size if size else value for value, size in zip(pair, scale, strict=True)))
            for pair in (our_error, their_error, allowed)
        ),
        tuple(problems),
    )


def assert_as_accurate_as_torch(ours, theirs, oracle, dtype=None, *, name="result", **options):
    """Raises AssertionError, saying what differs how much and where, unless `compare` finds no problem."""
    comparison = compare(ours, theirs, oracle, dtype, **options)
    assert comparison.ok, f"{name}: " + "\n".join(comparison.problems)
    return comparison


def forward_backward(function, inputs, *, dtype=None, device=None, grad=None, backward=True):
    """Runs `function(**inputs)` and its backward pass on detached copies of the inputs.

    Args:
        inputs: by argument name; floating-point tensors are converted to dtype and device, strides and all, and get
            gradients, everything else is passed on as it is.
        grad: the output's gradient (default: drawn centred from a fixed seed, the same for every dtype and device).

    Returns:
        Tensors by name: "output", and "grad <name>" for each tensor of `inputs` that has a gradient.
    """
    copies = {name: _converted(value, dtype, device) for name, value in inputs.items()}
    if backward:
        for value in copies.values():
            if _is_differentiable(value):
                value.requires_grad_()
    output = function(**copies)
    results = {"output": output.detach()}
    if backward:
        if grad is None:
            # Eighths are exact in every dtype, so that all dtypes and devices get the same gradient.
            generator = torch.Generator().manual_seed(1)
            grad = torch.randint(-16, 17, output.shape, generator=generator, dtype=torch.float64) / 8
        output.backward(_converted(grad, output.dtype, output.device))
        for name, value in copies.items():
            if _is_differentiable(value) and value.grad is not None:
                results[f"grad {name}"] = value.grad
    return results


def assert_parity(ours, theirs, inputs, *, dtype=torch.float32, device="cpu", grad=None, backward=True, **options):
    """Asserts that `ours(**inputs)` is as accurate as `theirs(**inputs)`, forward and backward (if `backward`).

    Both get the inputs in `dtype` on `device`; the oracle is `theirs` in float64 on the CPU, on the same values. See
    `forward_backward` for inputs and grad, `compare` for the options.
    """
    judged = parity(ours, theirs, inputs, dtype=dtype, device=device, grad=grad, backward=backward, **options)
    problems = [f"{name}: {problem}" for name, comparison in judged.items() for problem in comparison.problems]
    assert not problems, "\n".join(problems)
    return judged


def parity(ours, theirs, inputs, *, dtype=torch.float32, device="cpu", grad=None, backward=True, **options):
    """What `assert_parity` asserts, as Comparisons by name ("output", "grad <name>")."""
    inputs = {name: _converted(value, dtype, None) for name, value in inputs.items()}
    common = {"grad": grad, "backward": backward}
    mine = forward_backward(ours, inputs, dtype=dtype, device=device, **common)
    torchs = forward_backward(theirs, inputs, dtype=dtype, device=device, **common)
    oracle = forward_backward(theirs, inputs, dtype=torch.float64, device="cpu", **common)
    if mine.keys() != torchs.keys():
        raise AssertionError(f"ours has {sorted(mine)}, torch {sorted(torchs)}")
    return {name: compare(mine[name], torchs[name], oracle[name], dtype, **options) for name in mine}


def _is_differentiable(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _converted(value, dtype, device):
    """A detached copy with the same values and, where it is dense or expanded, the same strides."""
    if not isinstance(value, torch.Tensor):
        return value
    dtype = dtype if dtype is not None and value.is_floating_point() else value.dtype
    device = value.device if device is None else device
    value = value.detach()
    if value.numel() and not value.is_contiguous():
        # Copy the memory the tensor is a view of, not only what it shows, so that holes and repetition stay.
        extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        memory = value.as_strided((extent,), (1,), value.storage_offset())
        return memory.to(device=device, dtype=dtype, copy=True).as_strided(value.shape, value.stride(), 0)
    return value.to(device=device, dtype=dtype, copy=True)


def _largest_and_rms(values):
    if values.numel() == 0:
        return 0.0, 0.0
    return values.abs().max().item(), values.square().mean().sqrt().item()


def _different_patterns(ours, theirs, rounded):
    """NaN, inf and -inf must be torch's, or those of the oracle."""
    kinds = [torch.where(t.isnan(), 2, torch.where(t.isinf(), t.sign(), 0.0)) for t in (ours, theirs, rounded)]
    wrong = (kinds[0] != kinds[1]) & (kinds[0] != kinds[2])
    if not wrong.any():
        return []
    return ["NaN or infinities differ from torch's" + _where(wrong, ours, theirs, rounded)]


def _elementwise(difference, their_difference, ours, theirs, oracle, unit, ulps):
    """Errors relative to each element, less what the oracle itself may be wrong by where it cancels."""
    size = torch.where(oracle.isfinite(), oracle.abs(), torch.inf).clamp_min(unit[1] / unit[0])
    relative, their_relative = (
        (values - _ORACLE_ROUNDING).clamp_min(0) / size for values in (difference, their_difference)
    )
    worst = their_relative.max().item()
    limit = _FACTOR * worst + ulps * unit[0]
    if relative.max().item() <= limit:
        return []
    found = f"largest error relative to one element {relative.max().item():.3g} is above {limit:.3g}"
    return [f"{found} (torch's own is {worst:.3g})" + _where(relative > limit, ours, theirs, oracle)]


def _where(wrong, ours, theirs, oracle, shown=4):
    """How many elements are wrong and the first few of them."""
    places = wrong.nonzero()
    if len(places) == 0:
        return ""
    lines = [f"; {len(places)} of {wrong.numel()} elements, the first at:"]
    for place in places[:shown]:
        at = tuple(place.tolist())
        lines.append(f"  {at}: ours {ours[at]:.9g}, torch's {theirs[at]:.9g}, oracle {oracle[at]:.9g}")
    return "\n".join(lines)
