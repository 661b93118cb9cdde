"""What the benchmarks of group normalisation share, with or without GELU before it."""

from .convolutions import elements
from .data import Input, to_float64
from .floors import Cost
from .oracle import gelu, gelu_derivative, group_norm_image, group_norm_image_gradient, library
from .problems import Operation, Problem
from .windows import channel_pick, image_pick

EPS = 1e-5

SHAPES = {
    # name: (shape, groups). Group sizes from a few elements to half a megabyte.
    "tiny": ((1, 6, 5, 7), 3),
    "model": ((128, 64, 258, 258), 8),  # what the second model normalises
    "many-groups": ((59, 512, 13, 11), 128),
    "wide-groups": ((17, 302, 89, 83), 2),
    "two-axes": ((4099, 388), 4),
}


class GroupNorm(Operation):
    """Subclasses give `name`, `with_gelu`, `call`, and the torch functions."""

    differentiable = ("input", "weight", "bias")
    with_gelu = False

    @staticmethod
    def problems_of(op):
        sizes = [Problem(op, name, shape, {"groups": groups}) for name, (shape, groups) in SHAPES.items()]
        return (*sizes, Problem(op, "quick", (3, 6, 5, 7), {"groups": 2}, ("quick",)))

    def inputs(self, problem, direction):
        batch, channels = problem.size[:2]
        arrays = {"input": Input(problem.size), "weight": Input((channels,), 0.5, 1.0)}
        if direction == "forward":
            return {**arrays, "bias": Input((channels,), 0.5)}
        return {
            "grad_output": Input(problem.size),
            **arrays,
            **statistics_inputs(batch, problem["groups"], self.with_gelu),
        }

    def cost(self, problem, direction, itemsize):
        """One group's elements fit on the chip, so each element is read once; five operations to normalise it."""
        size, channels = elements(problem.size), problem.size[1]
        gelu_flop = 1 if self.with_gelu else 0
        if direction == "forward":
            return Cost.of((size + 2 * channels) * itemsize, size * itemsize, vector=size * (5 + gelu_flop))
        read = (2 * size + channels) * itemsize + 16 * problem.size[0] * problem["groups"]
        return Cost.of(read, (size + 2 * channels) * itemsize, vector=size * (9 + 2 * gelu_flop))

    def checks(self, problem, direction, arrays, results, pick):
        images = image_pick(problem.size[0], pick)
        if direction == "forward":
            for image in images:
                yield f"image {image}", to_float64(results[0][image]), self._forward(problem, arrays, image)
            return
        for image in images:
            yield f"image {image}", to_float64(results[0][image]), self._backward(arrays, image)
        yield from affine_checks(
            problem["groups"], arrays["grad_output"], arrays["input"], arrays["mean"], arrays["rstd"], self.with_gelu,
            results[1], results[2], pick,
        )  # fmt: skip

    def _forward(self, problem, arrays, image):
        def oracle(rounding):
            x = rounding.computed(to_float64(arrays["input"][image]))
            x = gelu(x) if self.with_gelu else x
            affine = (to_float64(arrays[name]) for name in ("weight", "bias"))
            return group_norm_image(x, problem["groups"], *affine, EPS)

        return oracle

    def _backward(self, arrays, image):
        def oracle(rounding):
            x = rounding.computed(to_float64(arrays["input"][image]))
            statistics = (arrays[name][image] for name in ("mean", "rstd"))
            grad = group_norm_image_gradient(
                to_float64(arrays["grad_output"][image]),
                gelu(x) if self.with_gelu else x,
                *statistics,
                to_float64(arrays["weight"]),
            )
            return grad * gelu_derivative(x) if self.with_gelu else grad

        return oracle


def statistics_inputs(batch, groups, with_gelu):
    """mean and rstd as data: near those of centred values (of GELU of them), and the oracle takes them as they are."""
    mean, rstd = (0.282, 1.7) if with_gelu else (0.0, 1.0)
    return {
        "mean": Input((batch, groups), 0.02, mean, "float64"),
        "rstd": Input((batch, groups), 0.02, rstd, "float64"),
    }


def affine_checks(groups, grad_output, input, mean, rstd, with_gelu, grad_weight, grad_bias, pick):
    """Checks of the gradients of weight and bias at a few channels, all of them in one comparison each."""
    channels = input.shape[1]
    chosen = channel_pick(channels, pick)
    terms, xp = elements(input.shape) // channels, library(input)

    def weight_oracle(rounding):
        sums = []
        for channel in chosen:
            group = channel * groups // channels
            x = rounding.computed(to_float64(input[:, channel]).reshape(input.shape[0], -1))
            x = gelu(x) if with_gelu else x
            normal = (x - mean[:, group, None]) * rstd[:, group, None]
            sums.append((to_float64(grad_output[:, channel]).reshape(x.shape) * normal).sum())
        return rounding.computed(xp.stack(sums), terms)

    def bias_oracle(rounding):
        return rounding.computed(xp.stack([to_float64(grad_output[:, channel]).sum() for channel in chosen]), terms)

    yield f"grad_weight{chosen}", to_float64(grad_weight)[xp.asarray(chosen)], weight_oracle
    yield f"grad_bias{chosen}", to_float64(grad_bias)[xp.asarray(chosen)], bias_oracle
