"""What a problem and an op are to the harness, the registry of all of them, and the selection by name."""

import fnmatch
import importlib
import pkgutil
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Problem:
    """One problem of an op.

    Attributes:
        op: the op's name; name: the problem's own; `full_name` joins them.
        size: what the op's file needs to know about it (a Convolution, a shape, ...).
        options: further parameters by name, such as the epilogue or the number of groups.
        tags: "model" for the three models, "alone" for the convolution alone, "layout" for the same on channels-last
            input, "sweep", "quick".
    """

    op: str
    name: str
    size: object
    options: dict = field(default_factory=dict, hash=False)
    tags: tuple = ()

    @property
    def full_name(self):
        return f"{self.op}/{self.name}"

    def __getitem__(self, option):
        return self.options[option]

    @property
    def channels_last(self):
        """Whether images lie in memory as (N, H, W, C)."""
        return "layout" in self.tags


class Operation:
    """What the harness must know about an op. Subclasses say it in `bench_<op>.py`.

    Attributes:
        name: the op's name, as everywhere in the repository.
        has_precision: whether float32 has two modes, tf32 and ieee.
        problems: Problem objects.
        differentiable: names of the forward inputs that a training step wants gradients for.
        is_discontinuous: whether gradients may jump with the last bit of the data, as that of a minimum does.
    """

    name = ""
    has_precision = False
    problems = ()
    differentiable = ("input",)
    is_discontinuous = False

    def directions(self, problem):
        """What can be timed: "forward", and the gradients."""
        return ("forward",) if problem.channels_last else ("forward", "backward")

    def inputs(self, problem, direction):
        """The arrays a call takes, by name: data.Input. Forward inputs are the arguments of `torch`'s function."""
        raise NotImplementedError

    def cost(self, problem, direction, itemsize):
        """floors.Cost: what must move and be computed, whatever the implementation."""
        raise NotImplementedError

    def call(self, problem, direction, arrays, precision, out=None):
        """Calls the launcher; returns a tuple of arrays. `out`: as many arrays to compute into, or None."""
        raise NotImplementedError

    def checks(self, problem, direction, arrays, results, pick):
        """Yields (what, result, oracle): a part of the results in float64, and a function of a Rounding: its twin.

        Args:
            pick: random.Random, for slices nobody can know beforehand; the last rows of the last image always belong.
        """
        raise NotImplementedError

    def torch(self, problem):
        """A function of the forward inputs, as tensors by name: the same computation in plain torch."""
        raise NotImplementedError

    def rawkern(self, problem, precision, **tensors):
        """The same computation by rawkern's functions for torch tensors, for training steps."""
        raise NotImplementedError

    def wanted(self, direction):
        """Names of the forward inputs whose gradients a backward direction computes."""
        return self.differentiable

    def density(self, problem, direction):
        """The share of the results that can be other than zero."""
        return 1.0

    def output_shape(self, problem):
        """The shape of the forward pass's result."""
        return self.inputs(problem, "forward")["input"].shape

    def modes(self):
        """Names of data.MODES that mean something for this op."""
        return ("float32/tf32", "float32/ieee", "bfloat16", "float16") if self.has_precision else (
            "float32/ieee", "bfloat16", "float16",
        )  # fmt: skip


def operations():
    """All ops: the OPERATION of every bench_<op>.py, the models' ops first."""
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    found = [importlib.import_module(f"bench.{name}").OPERATION for name in names if name.startswith("bench_")]
    return sorted(found, key=lambda operation: (not any("model" in p.tags for p in operation.problems), operation.name))


def select(patterns, quick=False):
    """(operation, problem) pairs whose full name or tag matches one of the patterns; all of them without patterns.

    A tag stands for what it is on, whatever else has that word in its name: "model" is the three models. Any other
    pattern without wildcards matches anywhere in the name. Models come first, then the convolution alone. The quick
    problems are for the emulator and are taken only, and alone, if `quick`.
    """
    pairs = [(operation, problem) for operation in operations() for problem in operation.problems]
    tags = {tag for _, problem in pairs for tag in problem.tags}
    chosen = [pair for pair in pairs if ("quick" in pair[1].tags) == quick and _matches(pair[1], patterns, tags)]
    order = {"model": 0, "alone": 1, "sweep": 3}
    return sorted(chosen, key=lambda pair: min([order[t] for t in pair[1].tags if t in order], default=2))


def _matches(problem, patterns, tags):
    if not patterns:
        return True
    for pattern in patterns:
        if pattern in problem.tags or fnmatch.fnmatchcase(problem.full_name, pattern):
            return True
        if pattern not in tags and not set(pattern) & set("*?[") and pattern in problem.full_name:
            return True
    return False
