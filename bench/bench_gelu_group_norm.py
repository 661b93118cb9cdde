"""Group normalisation of GELU of the input, in which GELU's output is never stored."""

from .normalization import EPS, GroupNorm


class WithGELU(GroupNorm):
    name = "gelu_group_norm"
    problems = GroupNorm.problems_of(name)
    with_gelu = True

    def call(self, problem, direction, arrays, precision, out=None):
        from rawkern.launchers.gelu_group_norm import gelu_group_norm as launch_gelu_group_norm
        from rawkern.launchers.gelu_group_norm import gelu_group_norm_backward as launch_gelu_group_norm_backward

        a = arrays
        if direction == "forward":
            return (
                launch_gelu_group_norm(
                    a["input"], problem["groups"], a["weight"], a["bias"], EPS, out=out[0] if out else None
                ),
            )
        outs = dict(zip(("grad_input", "grad_weight", "grad_bias"), out or (), strict=False))
        return launch_gelu_group_norm_backward(a["grad_output"], a["input"], a["mean"], a["rstd"], a["weight"], **outs)

    def torch(self, problem):
        import torch

        functional, groups = torch.nn.functional, problem["groups"]

        def composed(input, weight, bias):
            return functional.group_norm(functional.gelu(input), groups, weight, bias, EPS)

        return composed

    def rawkern(self, problem, precision, input, weight, bias):
        import rawkern

        return rawkern.gelu_group_norm(input, problem["groups"], weight, bias, EPS)


OPERATION = WithGELU()
