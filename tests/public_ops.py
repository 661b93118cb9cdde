"""Every public function on small inputs, beside what torch computes: for the tests of what all functions promise."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import rawkern
from rawkern.epilogue import GELU, Add, Clamp, Mul, Softplus, Tanh

CONV = dict(stride=(2, 1), padding=1, output_padding=(1, 0), groups=2)


@dataclass(frozen=True)
class PublicOp:
    """A function of tensors, torch's, and the shapes of the tensors; `last`: how often it can be differentiated."""

    name: str
    ours: object
    theirs: object
    shapes: tuple
    last: int = 2

    def inputs(self, dtype=torch.float64, device="cpu", requires_grad=False, channels_last=False):
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.shapes]
        tensors = [tensor.to(dtype).to(device) for tensor in tensors]
        if channels_last:
            tensors[0] = tensors[0].to(memory_format=torch.channels_last)
        return [tensor.requires_grad_(requires_grad) for tensor in tensors]


def _min_sum_gelu_add(x, bias):
    return F.gelu(x.min(dim=1, keepdim=True)[0].sum(dim=2, keepdim=True)) + bias


_X, _W, _C = (2, 4, 3, 5), (4, 2, 3, 2), (4,)

OPS = {
    op.name: op
    for op in (
        PublicOp(
            "conv_transpose2d",
            lambda x, w, b: rawkern.conv_transpose2d(x, w, b, **CONV),
            lambda x, w, b: F.conv_transpose2d(x, w, b, **CONV),
            (_X, _W, _C),
        ),
        PublicOp(
            "conv_transpose2d with an epilogue",
            lambda x, w, b, o: rawkern.conv_transpose2d(
                x, w, b, **CONV, epilogue=(Add(o), Clamp(-2, 2), Tanh(), Mul(o))
            ),
            lambda x, w, b, o: torch.tanh((F.conv_transpose2d(x, w, b, **CONV) + o).clamp(-2, 2)) * o,
            (_X, _W, _C, (4, 1, 1)),
        ),
        PublicOp("gelu", rawkern.gelu, F.gelu, (_X,)),
        PublicOp(
            "pointwise",
            lambda x, o: rawkern.pointwise(x, (Mul(o), Softplus(), Add(0.5), GELU("tanh"))),
            lambda x, o: F.gelu(F.softplus(x * o) + 0.5, approximate="tanh"),
            (_X, (4, 1, 1)),
        ),
        PublicOp(
            "group_norm",
            lambda x, w, b: rawkern.group_norm(x, 2, w, b),
            lambda x, w, b: F.group_norm(x, 2, w, b),
            (_X, _C, _C),
        ),
        PublicOp(
            "gelu_group_norm",
            lambda x, w, b: rawkern.gelu_group_norm(x, 2, w, b),
            lambda x, w, b: F.group_norm(F.gelu(x), 2, w, b),
            (_X, _C, _C),
        ),
        PublicOp(
            "conv_transpose2d_gelu_group_norm",
            lambda x, w, c, nw, nb: rawkern.conv_transpose2d_gelu_group_norm(x, w, c, 2, nw, nb, **CONV),
            lambda x, w, c, nw, nb: F.group_norm(F.gelu(F.conv_transpose2d(x, w, c, **CONV)), 2, nw, nb),
            (_X, _W, _C, _C, _C),
        ),
        PublicOp("min_sum_gelu_add", rawkern.min_sum_gelu_add, _min_sum_gelu_add, (_X, (3, 1, 1)), last=1),
        PublicOp(
            "conv_transpose2d_min_sum_gelu_add",
            lambda x, w, c, b: rawkern.conv_transpose2d_min_sum_gelu_add(x, w, c, b, **CONV),
            lambda x, w, c, b: _min_sum_gelu_add(F.conv_transpose2d(x, w, c, **CONV), b),
            (_X, _W, _C, (3, 1, 1)),
            last=1,
        ),
    )
}
