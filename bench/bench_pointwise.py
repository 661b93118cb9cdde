"""A chain of pointwise functions in one kernel: add, clamp, SiLU, multiply, tanh."""

from .elementwise import Elementwise


class Pointwise(Elementwise):
    name = "pointwise"
    problems = Elementwise.problems_of(name)

    def chain(self):
        from rawkern.epilogue import Add, Clamp, Mul, SiLU, Tanh

        return Add(0.5), Clamp(-3.0, 3.0), SiLU(), Mul(0.25), Tanh()

    def call(self, problem, direction, arrays, precision, out=None):
        from rawkern.launchers.pointwise import pointwise as launch_pointwise
        from rawkern.launchers.pointwise import pointwise_backward as launch_pointwise_backward

        if direction == "forward":
            return (launch_pointwise(arrays["input"], self.chain(), out=out[0] if out else None),)
        return launch_pointwise_backward(*arrays.values(), self.chain(), out=tuple(out) if out else None)

    def torch(self, problem):
        import torch

        def chain(input):
            return torch.tanh(torch.nn.functional.silu(torch.clamp(input + 0.5, -3.0, 3.0)) * 0.25)

        return chain

    def rawkern(self, problem, precision, input):
        import rawkern

        return rawkern.pointwise(input, self.chain())


OPERATION = Pointwise()
