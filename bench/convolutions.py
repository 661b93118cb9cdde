"""Sizes of a transposed convolution, exact counts of what it multiplies and moves, and the problems that use one."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Axis:
    """One dimension of a transposed convolution."""

    size: int
    kernel: int
    stride: int
    padding: int
    output_padding: int
    dilation: int

    @property
    def out_size(self):
        spread = (self.size - 1) * self.stride + self.dilation * (self.kernel - 1)
        return spread - 2 * self.padding + self.output_padding + 1

    @property
    def products(self):
        """Pairs of an input position and a tap whose output position exists."""
        outputs = np.arange(self.size)[:, None] * self.stride + np.arange(self.kernel) * self.dilation - self.padding
        return int(np.count_nonzero((outputs >= 0) & (outputs < self.out_size)))


@dataclass(frozen=True)
class Convolution:
    """Sizes and parameters; pairs are (height, width), and an int stands for both."""

    batch: int
    in_channels: int
    size: tuple
    out_channels: int
    kernel: tuple
    stride: tuple = 1
    padding: tuple = 0
    output_padding: tuple = 0
    dilation: tuple = 1
    groups: int = 1

    def __post_init__(self):
        for name in ("size", "kernel", "stride", "padding", "output_padding", "dilation"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value, value) if isinstance(value, int) else tuple(value))

    @property
    def axes(self):
        fields = (self.size, self.kernel, self.stride, self.padding, self.output_padding, self.dilation)
        return tuple(Axis(*values) for values in zip(*fields, strict=True))

    @property
    def out_size(self):
        return tuple(axis.out_size for axis in self.axes)

    @property
    def input_shape(self):
        return (self.batch, self.in_channels, *self.size)

    @property
    def weight_shape(self):
        return (self.in_channels, self.out_channels // self.groups, *self.kernel)

    @property
    def output_shape(self):
        return (self.batch, self.out_channels, *self.out_size)

    @property
    def flop(self):
        """Two per multiply-add; products with taps that fall outside the output are not counted, zeros never are.

        The same for the forward pass and for each of its two gradients, which connect the same triples.
        """
        pairs = math.prod(axis.products for axis in self.axes)
        return 2 * self.batch * self.in_channels * (self.out_channels // self.groups) * pairs

    @property
    def taps_per_output(self):
        """Average number of taps that reach an output."""
        return math.prod(axis.products / axis.out_size for axis in self.axes)

    @property
    def weight_scale(self):
        """Standard deviation of the weights for which centred inputs of deviation 1 give outputs of about 1."""
        return (self.in_channels // self.groups * self.taps_per_output) ** -0.5

    @property
    def arguments(self):
        """stride, padding, output_padding, groups, dilation: what follows the bias in conv_transpose2d."""
        return (self.stride, self.padding, self.output_padding, self.groups, self.dilation)

    def __str__(self):
        text = f"{self.batch}x{self.in_channels}x{_pair(self.size)} -> {self.out_channels}, k{_pair(self.kernel)}"
        for letter, name, plain in (
            ("s", "stride", 1),
            ("p", "padding", 0),
            ("op", "output_padding", 0),
            ("d", "dilation", 1),
        ):
            value = getattr(self, name)
            text += f" {letter}{_pair(value)}" if value != (plain, plain) else ""
        return text + (f" g{self.groups}" if self.groups > 1 else "")


def _pair(values):
    return str(values[0]) if values[0] == values[1] else f"{values[0]}x{values[1]}"


def elements(*shapes):
    """The total number of elements."""
    return sum(math.prod(shape) for shape in shapes)


# The three models at their full sizes, and the convolution alone ------------------------------------------------------

MODEL_MIN_SUM = Convolution(16, 64, 128, 128, 3, stride=2, padding=1, output_padding=1)
MODEL_GROUP_NORM = Convolution(128, 64, 256, 64, 3)
MODEL_ADD_MIN = Convolution(128, 64, 64, 128, 4, stride=2)
ALONE_LARGE = Convolution(8, 64, 1024, 64, 3)
ALONE_GROUPED = Convolution(16, 32, (128, 256), 64, (3, 5), stride=(2, 3), padding=(1, 2), dilation=(2, 1), groups=4)

#: A size that the emulator computes in no time, still with a stride, a padding and edges in both directions.
QUICK = Convolution(2, 6, (5, 7), 8, (3, 2), stride=(2, 1), padding=(1, 0), output_padding=(1, 0), groups=2)

#: No extent, and no number of channels, is a multiple of another one (a test holds this), so that no kernel is
#: measured only where its tiles happen to fit. Every line says what it is there for.
SWEEP = {
    "tiny": Convolution(1, 3, (5, 7), 11, 3),  # nothing but launch cost
    "rgb-up2": Convolution(17, 3, (149, 211), 26, 4, stride=2, padding=1),  # few input channels, exact doubling
    "to-rgb": Convolution(13, 80, (127, 137), 3, 5, stride=2, padding=2, output_padding=1),  # few output channels
    "k1": Convolution(11, 244, (89, 83), 236, 1),  # a matrix product
    "k1-s3": Convolution(7, 58, (79, 73), 94, 1, stride=3),  # most phases have no tap
    "k2-s2": Convolution(19, 268, (67, 71), 86, 2, stride=2),  # one tap for each phase
    "k3-wide": Convolution(5, 212, (53, 59), 302, 3, padding=1),  # bound by arithmetic
    "k5-s2": Convolution(9, 236, (61, 47), 82, 5, stride=2, padding=2, output_padding=1),
    "k7": Convolution(6, 46, (103, 97), 34, 7, padding=3),  # many taps
    "k7-s5": Convolution(4, 58, (43, 41), 74, 7, stride=5, padding=(3, 1), output_padding=4),
    "k1x7": Convolution(10, 74, (107, 109), 62, (1, 7), padding=(0, 3)),
    "k6x2-s3x1": Convolution(6, 62, (37, 113), 94, (6, 2), stride=(3, 1), padding=(2, 0), output_padding=(1, 0)),
    "dilated": Convolution(8, 86, (101, 131), 28, 3, padding=4, dilation=4),
    "dilated-s4": Convolution(3, 94, (29, 31), 46, (5, 3), stride=4, padding=3, dilation=(3, 5), output_padding=3),
    "groups-2": Convolution(14, 212, (23, 139), 254, 3, padding=1, groups=2),
    "groups-4": Convolution(15, 244, (19, 151), 212, 3, stride=2, padding=1, output_padding=1, groups=4),
    "depthwise-k3": Convolution(21, 302, (157, 163), 302, 3, padding=1, groups=302),
    "depthwise-k7-s2": Convolution(12, 388, (167, 173), 388, 7, stride=2, padding=3, output_padding=1, groups=388),
    "wide-512": Convolution(2, 512, (13, 17), 388, 4, stride=2, padding=1),  # the weights outweigh the images
    "gigabyte": Convolution(31, 26, (509, 521), 38, 3, padding=1),
}
