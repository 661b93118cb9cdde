"""Transposed convolution: alone, with its two gradients, and with the third model's epilogue, forward and backward."""

from .convolutions import ALONE_GROUPED, ALONE_LARGE, MODEL_ADD_MIN, QUICK, SWEEP, elements
from .data import Input, to_float64
from .floors import Cost
from .oracle import (
    chain_derivative,
    chain_value,
    convolution_rows,
    input_gradient_rows,
    library,
    weight_gradient_rows,
)
from .problems import Operation, Problem
from .windows import channel_pick, row_windows

NAME = "conv_transpose2d"


def add_min_gelu_mul():
    """The third model: add 0.5, take the minimum with 0, GELU, multiply by 2."""
    from rawkern.epilogue import GELU, Add, Minimum, Mul

    return Add(0.5), Minimum(0.0), GELU(), Mul(2.0)


def nothing():
    return ()


class ConvTranspose2d(Operation):
    name = NAME
    has_precision = True
    differentiable = ("input", "weight", "bias")
    problems = (
        Problem(NAME, "model-add-min-gelu-mul", MODEL_ADD_MIN, {"epilogue": add_min_gelu_mul}, ("model",)),
        Problem(NAME, "alone-1024", ALONE_LARGE, {"epilogue": nothing}, ("alone",)),
        Problem(NAME, "alone-grouped-dilated", ALONE_GROUPED, {"epilogue": nothing}, ("alone",)),
        Problem(NAME, "channels-last-add-min-gelu-mul", MODEL_ADD_MIN, {"epilogue": add_min_gelu_mul}, ("layout",)),
        Problem(NAME, "channels-last-1024", ALONE_LARGE, {"epilogue": nothing}, ("layout",)),
        *(Problem(NAME, f"sweep-{key}", size, {"epilogue": nothing}, ("sweep",)) for key, size in SWEEP.items()),
        Problem(NAME, "quick", QUICK, {"epilogue": nothing}, ("quick",)),
        Problem(NAME, "quick-add-min-gelu-mul", QUICK, {"epilogue": add_min_gelu_mul}, ("quick",)),
        Problem(NAME, "quick-channels-last", QUICK, {"epilogue": nothing}, ("quick", "layout")),
    )

    def directions(self, problem):
        """The two gradients one by one; behind an epilogue, all that a backward pass does (direction "backward")."""
        if problem["epilogue"] is nothing and not problem.channels_last:
            return "forward", "input_gradient", "weight_gradient"
        return super().directions(problem)

    def inputs(self, problem, direction):
        conv = problem.size
        image, weight, grad = (
            Input(conv.input_shape, channels_last=problem.channels_last),
            Input(conv.weight_shape, conv.weight_scale),
            Input(conv.output_shape),
        )
        return {
            "forward": {"input": image, "weight": weight, "bias": Input((conv.out_channels,), 0.5)},
            "input_gradient": {"grad_output": grad, "weight": weight},
            "weight_gradient": {"input": image, "grad_output": grad},
            # saved: the convolution before the epilogue.
            "backward": {"grad_output": grad, "saved": grad, "input": image, "weight": weight},
        }[direction]

    def cost(self, problem, direction, itemsize):
        conv, functions = problem.size, len(problem["epilogue"]())
        image, weight, output = elements(conv.input_shape), elements(conv.weight_shape), elements(conv.output_shape)
        read, written, products, vector = {
            "forward": (image + weight + conv.out_channels, output, 1, output * (1 + functions)),
            "input_gradient": (output + weight, image, 1, 0),
            "weight_gradient": (image + output, weight, 1, 0),
            "backward": (
                2 * output + image + weight,
                image + weight + conv.out_channels,
                2,
                output * (2 + 2 * functions),
            ),
        }[direction]
        return Cost.of(read * itemsize, written * itemsize, products * conv.flop, vector)

    def wanted(self, direction):
        return self.differentiable if direction == "backward" else (direction.removesuffix("_gradient"),)

    def output_shape(self, problem):
        return problem.size.output_shape

    def call(self, problem, direction, arrays, precision, out=None):
        from rawkern.launchers.channel_sum import channel_sum
        from rawkern.launchers.conv_transpose2d import conv_transpose2d, input_gradient, weight_gradient
        from rawkern.launchers.geometry import Geometry
        from rawkern.launchers.pointwise import pointwise_backward

        conv, out = problem.size, out or (None,) * 3
        if direction == "forward":
            epilogue = problem["epilogue"]()
            options = {"epilogue": epilogue, "precision": precision, "out": out[0]}
            return (conv_transpose2d(*arrays.values(), *conv.arguments, **options),)
        geometry = Geometry.of(conv.input_shape, conv.weight_shape, *conv.arguments)
        if direction != "backward":
            gradient = {"input_gradient": input_gradient, "weight_gradient": weight_gradient}[direction]
            return (gradient(*arrays.values(), geometry, precision=precision, out=out[0]),)
        grad_output, saved, input, weight = arrays.values()
        (grad,) = pointwise_backward(grad_output, saved, problem["epilogue"]())
        return (
            input_gradient(grad, weight, geometry, precision=precision, out=out[0]),
            weight_gradient(input, grad, geometry, precision=precision, out=out[1]),
            channel_sum(grad, out=out[2]),
        )

    def checks(self, problem, direction, arrays, results, pick):
        if direction == "forward":
            yield from self._check_output(problem, arrays, results[0], pick)
        if direction in ("input_gradient", "backward"):
            yield from self._check_grad_input(problem, arrays, results[0], pick)
        if direction in ("weight_gradient", "backward"):
            yield from self._check_grad_weight(problem, arrays, results[direction == "backward"], pick)
        if direction == "backward":
            yield from self._check_grad_bias(problem, arrays, results[2], pick)

    def _check_output(self, problem, arrays, result, pick):
        conv, a = problem.size, arrays
        for image, rows in row_windows(conv.batch, conv.out_size[0], conv.out_channels * conv.out_size[1], pick):

            def oracle(rounding, image=image, rows=rows):
                values = convolution_rows(conv, a["input"][image], a["weight"], a["bias"], rows, rounding)
                return chain_value(problem["epilogue"](), values, rounding)

            yield _window(image, rows), to_float64(result[image, :, rows.start : rows.stop]), oracle

    def _check_grad_input(self, problem, arrays, result, pick):
        conv = problem.size
        for image, rows in row_windows(conv.batch, conv.size[0], conv.in_channels * conv.size[1], pick):

            def oracle(rounding, image=image, rows=rows):
                grad = _grad_convolved(problem, arrays, (image,), rounding)
                return input_gradient_rows(conv, grad, arrays["weight"], rows, rounding)

            yield f"grad_input, {_window(image, rows)}", to_float64(result[image, :, rows.start : rows.stop]), oracle

    def _check_grad_weight(self, problem, arrays, result, pick):
        conv = problem.size
        per_group = conv.out_channels // conv.groups
        for channel in channel_pick(conv.in_channels, pick):
            columns = channel_pick(per_group, pick)

            def oracle(rounding, channel=channel, columns=columns):
                first = channel // (conv.in_channels // conv.groups) * per_group
                grads = {
                    first + column: _grad_convolved(problem, arrays, (slice(None), first + column), rounding)
                    for column in columns
                }
                return weight_gradient_rows(conv, arrays["input"], grads, channel, columns, rounding)

            yield f"grad_weight[{channel}, {columns}]", to_float64(result[channel])[columns], oracle

    def _check_grad_bias(self, problem, arrays, result, pick):
        conv, xp = problem.size, library(result)
        chosen = channel_pick(conv.out_channels, pick)

        def oracle(rounding):
            sums = [_grad_convolved(problem, arrays, (slice(None), channel), rounding).sum() for channel in chosen]
            return rounding.computed(xp.stack(sums), elements(conv.output_shape) // conv.out_channels)

        yield f"grad_bias{chosen}", to_float64(result)[chosen], oracle

    def torch(self, problem):
        import torch

        functional, arguments = torch.nn.functional, problem.size.arguments

        def alone(input, weight, bias):
            return functional.conv_transpose2d(input, weight, bias, *arguments)

        def model(input, weight, bias):  # clamp is faster than a minimum of two tensors
            return functional.gelu(torch.clamp(alone(input, weight, bias) + 0.5, max=0.0)) * 2.0

        return alone if problem["epilogue"] is nothing else model

    def rawkern(self, problem, precision, input, weight, bias):
        import rawkern

        return rawkern.conv_transpose2d(
            input, weight, bias, *problem.size.arguments, epilogue=problem["epilogue"](), precision=precision
        )


def _window(image, rows):
    return f"image {image}, rows {rows.start}:{rows.stop}"


def _grad_convolved(problem, arrays, part, rounding):
    """A part of the gradient of the convolution's output: grad_output times the epilogue's derivative, as stored."""
    grad = to_float64(arrays["grad_output"][part])
    if problem["epilogue"] is nothing:
        return grad
    saved = to_float64(arrays["saved"][part])
    return rounding.stored(grad * chain_derivative(problem["epilogue"](), saved, rounding))


OPERATION = ConvTranspose2d()
