"""Checks that a timed result is what it claims to be. Each returns or raises; none changes what is measured."""

from dataclasses import dataclass, field

import numpy as np

from .data import count_poison, to_float64
from .oracle import EXACT, modelled

#: A result may be this many times as far from the exact one as an honest computation in its mode (root mean square).
RMS_FACTOR = 2.0
#: One element may be this many times as far away as the farthest element of an honest computation.
ELEMENT_FACTOR = 4.0
#: At least this share of the output must change when an input does.
DEPENDENCE = 0.1


@dataclass
class Accuracy:
    """What `check_results` found: errors relative to the oracle's root mean square, the worst over all checked parts.

    `allowed` belongs to the part where `error` is closest to its limit.
    """

    error: float = 0.0
    allowed: float = 0.0
    problems: list = field(default_factory=list)


def check_results(device, operation, problem, direction, mode, arrays, results, pick):
    """Whether every element was written, and whether the parts that the op names agree with the oracle."""
    accuracy, rounding, worst = Accuracy(), modelled(mode), -1.0
    for i, result in enumerate(results):
        if missing := count_poison(device.xp, result):
            accuracy.problems.append(f"{missing} of {result.size} elements of result {i} were not written (or are NaN)")
    for what, result, oracle in operation.checks(problem, direction, arrays, results, pick):
        exact = oracle(EXACT)
        honest = device.xp.abs(rounding.stored(rounding.computed(oracle(rounding))) - exact)
        scale = rms(device.xp, exact)
        difference = device.xp.abs(result - exact)
        error, allowed = rms(device.xp, difference), _allowed(device.xp, honest, scale, rounding)
        bound = ELEMENT_FACTOR * honest.max() + abs(exact) * 2.0**-rounding.store_bits
        far = int(device.xp.count_nonzero(~(difference <= bound)))
        if not error <= allowed:
            found = f"error {error / scale:.2g} of the result's size, allowed {allowed / scale:.2g}"
            accuracy.problems.append(f"{what}: {found}")
        elif far:
            accuracy.problems.append(f"{what}: {far} of {result.size} elements are wrong, the rest is not")
        closeness = error / allowed if allowed else float(error > 0)
        if not closeness <= worst:
            worst = closeness
            accuracy.error, accuracy.allowed = (float(value / scale) if scale else 0.0 for value in (error, allowed))
    return accuracy


def _allowed(xp, honest, scale, rounding):
    """The limit for the root mean square: few elements scatter around it, and storing alone costs half a unit."""
    least = 0.4 * 2.0**-rounding.store_bits * scale
    return RMS_FACTOR * max(rms(xp, honest), least) * (1 + 3 / honest.size**0.5)


def rms(xp, values):
    """Root mean square as a Python float; NaN if there is one among the values."""
    return float(xp.sqrt(xp.mean(xp.square(values)))) if values.size else 0.0


def check_dependence(device, arrays, other, call, density=1.0):
    """Problems with inputs on which the output hardly depends: each is replaced by other values, one at a time.

    Args:
        arrays, other: two sets of inputs.
        call: computes the results (a tuple of arrays) from a set of inputs.
        density: the share of the results that can be other than zero.
    """
    xp, problems = device.xp, []
    before = [_sample(result) for result in call(arrays)]
    for name in arrays:
        after = [_sample(result) for result in call({**arrays, name: other[name]})]
        # An input of one result of several (a bias and its gradient) need not matter to the others.
        changed = max(float(xp.mean((a != b).astype(np.float64))) for a, b in zip(after, before, strict=True))
        if not changed >= DEPENDENCE * density:
            problems.append(
                f"{name} changes only {changed:.1%} of the output: a constant could pass for a right answer"
            )
    return problems


def _sample(result, most=1 << 20):
    """A copy of the values (of a part of a large array, spread over it)."""
    step = result.size // most | 1  # odd, so that it does not visit the same columns only
    return to_float64(result.reshape(-1)[::step])
