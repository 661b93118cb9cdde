"""Minimum over channels, sum over height, GELU, plus bias: the first model's second half on its own."""

from .convolutions import MODEL_MIN_SUM, elements
from .data import Input, to_float64
from .floors import Cost
from .minima import FORWARD_SCALE, expected_minimum, sum_gradient, sum_gradient_checks
from .oracle import gelu, library
from .problems import Operation, Problem
from .windows import image_pick

NAME = "min_sum_gelu_add"

SHAPES = {
    "tiny": (1, 3, 5, 7),
    "model": MODEL_MIN_SUM.output_shape,  # what the first model's convolution gives
    "few-channels": (53, 11, 257, 509),
    "many-channels": (3, 512, 149, 211),
    "wide": (1, 62, 127, 139 * 251),  # few sums of many columns
}


class MinSumGELUAdd(Operation):
    name = NAME
    differentiable = ("input", "bias")
    is_discontinuous = True
    problems = (
        *(Problem(NAME, name, shape) for name, shape in SHAPES.items()),
        Problem(NAME, "quick", (2, 6, 5, 7), tags=("quick",)),
    )

    def inputs(self, problem, direction):
        batch, channels, height, width = problem.size
        if direction == "forward":
            scale = FORWARD_SCALE / height
            return {
                "input": Input(problem.size, scale, -expected_minimum(channels) * scale),
                "bias": Input((1, 1, 1), 0.5),
            }
        return {
            "grad_output": Input((batch, 1, 1, width)),
            "sums": Input((batch, width), dtype="accumulator"),
            "index": Input((batch, height, width), channels, dtype="int32"),
        }

    def cost(self, problem, direction, itemsize):
        batch, _, height, width = problem.size
        size, columns = elements(problem.size), batch * width
        if direction == "forward":
            return Cost.of(
                (size + 1) * itemsize, columns * itemsize, vector=size + batch * height * width + 2 * columns
            )
        sums = 8 if itemsize == 8 else 4
        read = columns * (itemsize + sums) + batch * height * width * 4
        return Cost.of(read, (size + 1) * itemsize, vector=3 * columns)

    def density(self, problem, direction):
        return 1.0 if direction == "forward" else 1 / problem.size[1]

    def output_shape(self, problem):
        return (problem.size[0], 1, 1, problem.size[3])

    def call(self, problem, direction, arrays, precision, out=None):
        from rawkern.launchers.min_sum_gelu_add import bias_gradient as launch_bias_gradient
        from rawkern.launchers.min_sum_gelu_add import input_gradient as launch_input_gradient
        from rawkern.launchers.min_sum_gelu_add import min_sum_gelu_add as launch_min_sum_gelu_add
        from rawkern.launchers.min_sum_gelu_add import sum_gradient as launch_sum_gradient

        if direction == "forward":
            return (launch_min_sum_gelu_add(*arrays.values(), out=out[0] if out else None),)
        grad_input, grad_bias = out or (None, None)
        grad_output, sums, index = arrays.values()
        grad_sum = launch_sum_gradient(grad_output, sums)
        return (
            launch_input_gradient(grad_sum, index, problem.size, grad_output.dtype, out=grad_input),
            launch_bias_gradient(grad_output, (1, 1, 1), out=grad_bias),
        )

    def checks(self, problem, direction, arrays, results, pick):
        for image in image_pick(problem.size[0], pick):
            compute = self._forward if direction == "forward" else self._grad_input
            yield (
                f"image {image}",
                to_float64(results[0][image]),
                lambda rounding, image=image, compute=compute: compute(problem, arrays, image, rounding),
            )
        if direction != "forward":
            yield from sum_gradient_checks(arrays["grad_output"], results[1])

    def _forward(self, problem, arrays, image, rounding):
        x = rounding.computed(to_float64(arrays["input"][image]))
        sums = rounding.computed(x.min(axis=0).sum(axis=0), problem.size[2])
        return (gelu(sums) + to_float64(arrays["bias"]).reshape(1)).reshape(1, 1, -1)

    def _grad_input(self, problem, arrays, image, rounding):
        xp = library(arrays["index"])
        channels = xp.arange(problem.size[1])[:, None, None]
        grad = sum_gradient(arrays, image, rounding)
        return xp.where(channels == arrays["index"][image][None], grad[None, None, :], 0.0)

    def torch(self, problem):
        import torch

        def composed(input, bias):
            y = torch.min(input, dim=1, keepdim=True)[0]
            return torch.nn.functional.gelu(torch.sum(y, dim=2, keepdim=True)) + bias

        return composed

    def rawkern(self, problem, precision, input, bias):
        import rawkern

        return rawkern.min_sum_gelu_add(input, bias)


OPERATION = MinSumGELUAdd()
