"""Group normalisation."""

from .normalization import EPS, GroupNorm


class Plain(GroupNorm):
    name = "group_norm"
    problems = GroupNorm.problems_of(name)

    def call(self, problem, direction, arrays, precision, out=None):
        from rawkern.launchers.group_norm import group_norm as launch_group_norm
        from rawkern.launchers.group_norm import group_norm_backward as launch_group_norm_backward

        a = arrays
        if direction == "forward":
            return (
                launch_group_norm(
                    a["input"], problem["groups"], a["weight"], a["bias"], EPS, out=out[0] if out else None
                ),
            )
        outs = dict(zip(("grad_input", "grad_weight", "grad_bias"), out or (), strict=False))
        return launch_group_norm_backward(a["grad_output"], a["input"], a["mean"], a["rstd"], a["weight"], **outs)

    def torch(self, problem):
        import torch

        groups = problem["groups"]

        def group_norm(input, weight, bias):
            return torch.nn.functional.group_norm(input, groups, weight, bias, EPS)

        return group_norm

    def rawkern(self, problem, precision, input, weight, bias):
        import rawkern

        return rawkern.group_norm(input, problem["groups"], weight, bias, EPS)


OPERATION = Plain()
