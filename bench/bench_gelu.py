"""GELU in its exact form, by erf."""

from .elementwise import Elementwise


class GELU(Elementwise):
    name = "gelu"
    problems = Elementwise.problems_of(name)

    def chain(self):
        from rawkern.epilogue import GELU

        return (GELU(),)

    def call(self, problem, direction, arrays, precision, out=None):
        from rawkern.launchers.gelu import gelu as launch_gelu
        from rawkern.launchers.gelu import gelu_backward as launch_gelu_backward

        (out,) = out or (None,)
        function = launch_gelu if direction == "forward" else launch_gelu_backward
        return (function(*arrays.values(), out=out),)

    def torch(self, problem):
        import torch

        def gelu(input):
            return torch.nn.functional.gelu(input)

        return gelu

    def rawkern(self, problem, precision, input):
        import rawkern

        return rawkern.gelu(input)


OPERATION = GELU()
