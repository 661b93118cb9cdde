"""Errors of the runtime itself; wrong arguments raise what torch raises for the same mistake."""


class CompileError(RuntimeError):
    """A kernel did not compile. The message holds the compiler's output, which names our file and line."""


class EmulatorError(RuntimeError):
    """A kernel broke a rule of CUDA while running on the emulator (barrier divergence, shared memory, ...)."""


class CacheError(RuntimeError):
    """The cache directory cannot be trusted or used."""
