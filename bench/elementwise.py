"""What the benchmarks of all pointwise ops share: a chain of functions on arrays of any shape."""

from .convolutions import elements
from .data import Input, to_float64
from .floors import Cost
from .oracle import chain_derivative, chain_value
from .problems import Operation, Problem

_WINDOW = 1 << 18

SHAPES = {
    "tiny": (3, 5, 7),  # nothing but launch cost
    "odd": (13, 103, 149, 211),  # 168 MB in float32, no extent a power of two
    "gigabyte": (31, 67, 257, 509),
}


class Elementwise(Operation):
    """Subclasses give `name`, `chain()`, `launch(...)`, and the torch functions."""

    @staticmethod
    def problems_of(op):
        sizes = [Problem(op, name, shape) for name, shape in SHAPES.items()]
        return (*sizes, Problem(op, "quick", (7, 13, 19), tags=("quick",)))

    def chain(self):
        """Functions of rawkern.epilogue."""
        raise NotImplementedError

    def inputs(self, problem, direction):
        # Twice the deviation, so that limits and tails of the functions are reached.
        value, grad = Input(problem.size, 2.0), Input(problem.size)
        return {"input": value} if direction == "forward" else {"grad_output": grad, "input": value}

    def cost(self, problem, direction, itemsize):
        size, functions = elements(problem.size), len(self.chain())
        if direction == "forward":
            return Cost.of(size * itemsize, size * itemsize, vector=size * functions)
        return Cost.of(2 * size * itemsize, size * itemsize, vector=size * (2 * functions + 1))

    def checks(self, problem, direction, arrays, results, pick):
        flat, total = results[0].reshape(-1), elements(problem.size)
        starts = {0, max(0, total - _WINDOW), pick.randint(0, max(0, total - _WINDOW))}
        for start in sorted(starts):
            part = slice(start, start + _WINDOW)

            def oracle(rounding, part=part):
                x = rounding.computed(to_float64(arrays["input"].reshape(-1)[part]))
                if direction == "forward":
                    return chain_value(self.chain(), x, rounding)
                grad = to_float64(arrays["grad_output"].reshape(-1)[part])
                return grad * chain_derivative(self.chain(), x, rounding)

            yield f"elements from {start}", to_float64(flat[part]), oracle
