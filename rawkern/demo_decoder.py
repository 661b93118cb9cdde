"""The demo's network, built once from rawkern's modules and once from plain PyTorch's, with the same state_dict."""

import torch
from torch import nn
from torch.nn import functional

from . import nn as rawkern_nn
from .epilogue import GELU

SCALE = 4
_GROUPS = 4


class Decoder(nn.Module):
    """(N, 3, H, W) colours in [0, 1] to (N, 3, 4H, 4W): bicubic enlargement plus a learned residual.

    parts: `Rawkern` or `Plain`, which make the layers.
    """

    def __init__(self, parts, features, blocks):
        super().__init__()
        self.head = parts.convolution(3, features, 3, padding=1)
        self.body = nn.ModuleList(parts.block(features) for _ in range(blocks))
        self.up = parts.convolution(features, features // 2, 4, stride=2, padding=1)
        self.tail = parts.convolution(features // 2, 3, 4, stride=2, padding=1, activated=False)
        nn.init.zeros_(self.tail.weight)  # training starts at bicubic
        nn.init.zeros_(self.tail.bias)

    def forward(self, small):
        x = self.head(small - 0.5)
        for block in self.body:
            x = x + block(x)
        return enlarge(small) + self.tail(self.up(x))


class Rawkern:
    """Layers of which each is one call of a fused function of rawkern."""

    @staticmethod
    def convolution(*arguments, activated=True, **options):
        return rawkern_nn.ConvTranspose2d(*arguments, **options, epilogue=(GELU(),) if activated else ())

    @staticmethod
    def block(features):
        return rawkern_nn.ConvTranspose2dGELUGroupNorm(features, features, 3, padding=1, num_groups=_GROUPS)


class Plain:
    """The same layers of plain PyTorch."""

    @staticmethod
    def convolution(*arguments, activated=True, **options):
        return (_ActivatedConvolution if activated else nn.ConvTranspose2d)(*arguments, **options)

    @staticmethod
    def block(features):
        return _Block(features)


class _ActivatedConvolution(nn.ConvTranspose2d):
    def forward(self, x):
        return functional.gelu(super().forward(x))


class _Block(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.conv_transpose = nn.ConvTranspose2d(features, features, 3, padding=1)
        self.group_norm = nn.GroupNorm(_GROUPS, features)

    def forward(self, x):
        return self.group_norm(functional.gelu(self.conv_transpose(x)))


def reduce(images):
    """The degradation: (N, 3, 4H, 4W) to (N, 3, H, W), antialiased bicubic, rounded to 8 bits as a saved image is."""
    small = functional.interpolate(images, scale_factor=1 / SCALE, mode="bicubic", antialias=True)
    return (small * 255).round().clamp(0, 255) / 255


def enlarge(images):
    """The baseline: bicubic enlargement."""
    return functional.interpolate(images, scale_factor=SCALE, mode="bicubic")


def psnr(images, originals):
    """Peak signal-to-noise ratio in dB of colours in [0, 1]."""
    return -10 * torch.log10((images.clamp(0, 1) - originals).square().mean()).item()
