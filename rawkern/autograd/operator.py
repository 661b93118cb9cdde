"""How a computation becomes a PyTorch operator: one description, three ways to call it.

An `Operator` is described by its schema, by a body that allocates outputs and calls launchers, and by its derivatives.
Called,
- with ordinary tensors, it runs the body the first time and repeats what was launched from then on, through a bare
  `torch.autograd.Function` if a gradient is needed: PyTorch's dispatcher would cost more than the rest;
- inside torch.func transforms and forward-mode differentiation, it goes through a Function that these can see into;
- under torch.compile, torch.export and for any other kind of tensor (fake, meta, distributed, ...), it goes through the
  dispatcher as `torch.ops.rawkern.<name>`, whose fake implementation is the same body without the launches.
"""

import torch
from torch._C import _are_functorch_transforms_active as functorch_is_active
from torch._C import _dispatch_tls_is_dispatch_key_excluded as is_excluded
from torch._C import _get_tracing_state as tracing_state
from torch._C import _len_torch_dispatch_stack as dispatch_modes
from torch._C._functorch import is_legacy_batchedtensor, unwrap_if_dead
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from ..runtime import ALIGNMENT, Plans
from .dlpack import Recording, to_array
from .precision import default_precision
from .shapes_only import ShapesOnly, check_devices

_LIBRARY = torch.library.Library("rawkern", "DEF")
_OPERATORS = []


class Operator:
    """A computation on tensors, callable as described above.

    Args:
        schema: "name(Tensor a, Tensor? b, Tensor[] more, int n, ...) -> ...": first single tensors, then at most one
            list of them, then what are no tensors. Floating-point results of backward passes that not everybody needs
            are returned as a Tensor[] of those that are needed.
        body: called as body(call, a, b, more, n, ...). It checks its arguments, allocates outputs by `call.empty` and
            launches by `call(launcher, ...)`, see `Recording`; what it does must follow from shapes, strides, dtypes,
            devices and the other arguments, because it is not called again for the same ones. Returns a tensor or a
            tuple of them.
        setup_context: called as setup_context(ctx, tensors, static, outputs), to save what backward and jvp need.
            `tensors` are all tensors in a row, `static` the other arguments. Default: nothing is saved.
        backward: called as backward(ctx, grads) with the gradients of the outputs in a row; returns those of all
            tensors in a row, None where there is none. `ctx.needs` tells which are needed.
        jvp: called as jvp(ctx, tangents) with the tangents of all tensors; returns those of the outputs.
        vmap: called as vmap(batch_size, dims, tensors, static), returns (outputs, their dims), or None for a loop.
        arrange: called as arrange(tensors), returns all tensors in a row as the body would have them: copied to another
            layout, or as they are. A differentiable step before the operator. What it returns as it is must follow
            from shapes, strides and dtypes, because calls of a kind that went before without a copy skip it. Default:
            every layout will do.
    """

    def __init__(self, schema, body, *, setup_context=None, backward=None, jvp=None, vmap=None, arrange=None):
        self.name, _, rest = schema.partition("(")
        kinds, names = zip(*(argument.split() for argument in rest.partition(")")[0].split(", ")), strict=True)
        self._names = names
        self._singles = sum(kind in ("Tensor", "Tensor?") for kind in kinds)
        self._has_list = "Tensor[]" in kinds
        self._has_precision = "precision)" in schema  # the last argument
        self._body, self._setup_context = body, setup_context or _nothing_saved
        self._backward, self._jvp, self._vmap = backward, jvp, vmap
        self._arrange = arrange or _as_they_are
        self._plans = Plans()
        self._function, self._transformable = self._functions()
        self._apply = super(torch.autograd.Function, self._function).apply  # without the checks for transforms
        self._register(schema)
        self.op = getattr(torch.ops.rawkern, self.name).default
        _OPERATORS.append(self)

    def __call__(self, tensors, static=()):
        """The outputs for all tensors in a row, and the other arguments as a tuple of hashable values."""
        if is_dynamo_compiling() or not is_plain(tensors):
            return self._not_plain(self._arrange(tensors), static)
        key, addresses = self._kind(tensors, static)
        plan = self._plans.get(key)
        if plan is None:  # the only calls that may need another layout
            tensors = self._arrange(tensors)
            key, addresses = self._kind(tensors, static)
            if addresses is None:
                return self(_with_memory(self._names_of(tensors), tensors), static)
            plan = self._plans.get(key)
        if needs_gradient(tensors):
            return self._apply(*tensors, (plan, key, addresses))
        return self._decide(key, tensors) if plan is None else plan.repeat(addresses)

    def gradients(self, needs, tensors, static):
        """The gradients that are needed, None for the others, from an operator that returns a list of the former."""
        if all(needs):
            return self(tensors, static)
        return spread(needs, self(tensors, static)) if any(needs) else [None] * len(needs)

    def _not_plain(self, tensors, static):
        """The outputs by way of what PyTorch has for tensors that are not ordinary."""
        if is_transformed() and not is_inside_rule():
            return self._transformable.apply(*tensors, static)
        return self._dispatch(tensors, static)

    def _run(self, tensors, static):
        """On ordinary tensors, without derivatives."""
        key, addresses = self._kind(tensors, static)
        if addresses is None:
            return self._run(_with_memory(self._names_of(tensors), tensors), static)
        plan = self._plans.get(key)
        return self._decide(key, tensors) if plan is None else plan.repeat(addresses)

    def _kind(self, tensors, static):
        """(what a call has in common with all that launch the same, the tensors' addresses).

        The first element of the former are the static arguments with the precision filled in. (None, None) if a tensor
        has no memory of its own.
        """
        if self._has_precision and static[-1] is None:
            static = *static[:-1], default_precision(tensors[0])
        key, addresses = [static], []
        try:
            for tensor in tensors:
                if tensor is None:
                    key.append(None)
                    addresses.append(0)
                else:
                    address = tensor.data_ptr()
                    addresses.append(address)
                    key += (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, address % ALIGNMENT)
        except RuntimeError:
            return None, None
        if len(tensors) > 1 and len(set(addresses)) < len(addresses):
            key.append(tuple(map(addresses.index, addresses)))  # which tensors are one and the same
        return tuple(key), addresses

    def _decide(self, key, tensors):
        """Runs the body, and remembers what it launched for the next call with this key."""
        static = key[0]
        if tensors[0].is_meta:
            return self._fake(*self._arguments(tensors, static))
        names = self._names_of(tensors)
        check_devices(names, tensors)
        recording = Recording(names, tensors)
        outputs = self._body(recording, *self._arguments(tensors, static))
        self._plans.remember(key, recording.plan(outputs))
        return outputs

    def _dispatch(self, tensors, static):
        outputs = self.op(*self._arguments(tensors, static))
        return tuple(outputs) if isinstance(outputs, list) else outputs

    def _arguments(self, tensors, static):
        """The arguments of the operator's schema."""
        if not self._has_list:
            return *tensors, *static
        return *tensors[: self._singles], list(tensors[self._singles :]), *static

    def _parts(self, arguments):
        """(tensors, static) of the operator's arguments."""
        count = self._singles
        tensors, static = tuple(arguments[:count]), arguments[count:]
        if self._has_list:
            tensors, static = (*tensors, *static[0]), static[1:]
        return tensors, tuple(tuple(value) if isinstance(value, (list, tuple)) else value for value in static)

    def _fake(self, *arguments):
        """The outputs' shapes, dtypes and strides."""
        tensors, static = self._parts(arguments)
        return self._body(ShapesOnly(self._names_of(tensors), tensors), *self._arguments(tensors, static))

    def _names_of(self, tensors):
        """The names of all tensors in a row."""
        more = range(len(tensors) - self._singles)
        return *self._names[: self._singles], *(f"{self._names[self._singles]}[{i}]" for i in more)

    def _functions(self):
        operator = self

        class Bare(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *arguments):
                *tensors, (plan, key, addresses) = arguments
                outputs = operator._decide(key, tensors) if plan is None else plan.repeat(addresses)
                ctx.set_materialize_grads(False)
                operator._setup_context(ctx, tensors, key[0], outputs)
                return outputs

            @staticmethod
            def backward(ctx, *grads):
                ctx.needs = ctx.needs_input_grad[:-1]
                return *operator._backward(ctx, grads), None

        class Transformable(torch.autograd.Function):
            @staticmethod
            def forward(*arguments):
                *tensors, static = arguments
                return operator._run(tensors, static) if is_plain(tensors) else operator._dispatch(tensors, static)

            @staticmethod
            def setup_context(ctx, inputs, output):
                *tensors, static = inputs
                ctx.set_materialize_grads(False)
                operator._setup_context(ctx, tensors, static, output)
                ctx.save_for_forward(*(getattr(ctx, "to_save", None) or ()))

            backward = Bare.backward

            @staticmethod
            def jvp(ctx, *tangents):
                if operator._jvp is None:
                    raise NotImplementedError(f"rawkern.{operator.name} has no forward-mode derivative")
                return operator._jvp(ctx, tangents[:-1])

            @staticmethod
            def vmap(info, in_dims, *arguments):
                *tensors, static = arguments
                return operator._batch(info.batch_size, in_dims[:-1], tensors, static)

        for function in (Bare, Transformable):
            function.__name__ = function.__qualname__ = self.name
        return Bare, Transformable

    def _batch(self, batch_size, dims, tensors, static):
        """The batching rule: the operator's own, or one call after the other."""
        result = self._vmap(batch_size, dims, tensors, static) if self._vmap is not None else None
        if result is not None:
            return result
        calls = []
        for i in range(max(1, batch_size)):  # of an empty batch one, of zeros, to learn the shapes
            pairs = zip(tensors, dims, strict=True)
            calls.append(self(tuple(t if dim is None else _item(t, dim, i) for t, dim in pairs), static))
        if isinstance(calls[0], torch.Tensor):
            return torch.stack(calls)[:batch_size], 0
        return tuple(torch.stack(outputs)[:batch_size] for outputs in zip(*calls, strict=True)), (0,) * len(calls[0])

    def _register(self, schema):
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        name = f"rawkern::{self.name}"

        def kernel(*arguments):
            outputs = self._run(*self._parts(arguments))
            return list(outputs) if isinstance(outputs, tuple) and returns_list else outputs

        def fake(*arguments):
            outputs = self._fake(*arguments)
            return list(outputs) if isinstance(outputs, tuple) and returns_list else outputs

        def setup_context(ctx, inputs, output):
            ctx.set_materialize_grads(False)
            # torch takes an empty list of numbers for one of tensors, and wants as many gradients for it.
            ctx.static_grads = [[] if value == [] else None for value in inputs[self._singles + self._has_list :]]
            self._setup_context(ctx, *self._parts(inputs), tuple(output) if returns_list else output)

        def backward(ctx, *grads):
            needs, singles = ctx.needs_input_grad, self._singles
            ctx.needs = (*needs[:singles], *needs[singles]) if self._has_list else needs[:singles]
            grads = self._backward(ctx, tuple(grads[0]) if returns_list else grads)
            return (*self._arguments(grads, ctx.static_grads),)

        def vmap(info, in_dims, *arguments):
            dims = (*in_dims[: self._singles], *in_dims[self._singles]) if self._has_list else in_dims[: self._singles]
            outputs, out_dims = self._batch(info.batch_size, dims, *self._parts(arguments))
            return (list(outputs), list(out_dims)) if returns_list else (outputs, out_dims)

        returns_list = schema.endswith("Tensor[]")
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(self.name, kernel, key)
        torch.library.register_fake(name, fake, lib=_LIBRARY)
        if self._backward is not None:
            torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_LIBRARY)
        torch.library.register_vmap(name, vmap, lib=_LIBRARY)


def _nothing_saved(ctx, tensors, static, outputs):
    pass


def _as_they_are(tensors):
    return tensors


def release_saved(ctx):
    """Lets go of what `ctx` has saved, within a backward pass that will not look at it again.

    PyTorch does so when the function returns that calls this, and until then its results lie in memory beside it. Where
    the graph is kept for another pass nothing happens.
    """
    if not torch.compiler.is_compiling():
        ctx.maybe_clear_saved_tensors()


def spread(needs, found):
    """`found` on the places where `needs` is true, None elsewhere."""
    found = iter(found)
    return [next(found) if need else None for need in needs]


def refused(message):
    """A `backward` for what has no derivative: RuntimeError with this message."""

    def backward(ctx, grads):
        raise RuntimeError(message)

    return backward


def _item(tensor, dim, i):
    """The i-th tensor of a batch along `dim`; zeros if the batch is empty."""
    if tensor.shape[dim] == 0:
        return tensor.new_zeros([size for axis, size in enumerate(tensor.shape) if axis != dim])
    return tensor.select(dim, i)


def operators():
    """Every operator there is."""
    return tuple(_OPERATORS)


def forget_plans():
    """Makes every operator decide anew what to launch: for tests that change what is decided by."""
    for operator in _OPERATORS:
        operator._plans.clear()


def needs_gradient(tensors):
    """Whether autograd will want to differentiate what is computed from these tensors (None is skipped)."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def is_transformed():
    """Whether a transform of torch.func or forward-mode differentiation is at work."""
    return not torch.compiler.is_compiling() and (functorch_is_active() or forward_ad._current_level >= 0)


def is_inside_rule():
    """Whether a transform has called a rule that torch.library knows for it, such as that of `register_vmap`.

    The transform is active all the while, to pass operators on to the next one; a Function it does not take there.
    """
    return is_excluded(torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode)


def _with_memory(names, tensors):
    """The tensors, of which one has no memory of its own, without what wraps them. Raises if that is not the reason."""
    inner = unwrapped(tensors)
    if any(new is not old for new, old in zip(inner, tensors, strict=True)):
        return inner
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and is_legacy_batchedtensor(tensor):
            raise RuntimeError(
                "rawkern's functions are batched by torch.vmap and torch.func, not by is_grads_batched=True or "
                "torch.autograd.functional's vectorize=True"
            )
        to_array(tensor, name)  # says what kind of tensor this is
    raise RuntimeError("rawkern takes tensors that have memory")


def unwrapped(tensors):
    """The tensors that a finished transform of torch.func has left wrapped, without the wrapping."""
    return [tensor if tensor is None else unwrap_if_dead(tensor) for tensor in tensors]


def is_plain(tensors):
    """Whether nothing but the values of these tensors matters: no subclass, transform, mode or tracing is involved."""
    if functorch_is_active() or forward_ad._current_level >= 0 or dispatch_modes() or tracing_state() is not None:
        return False
    for tensor in tensors:  # noqa: SIM110  a generator would double the time
        if tensor is not None and (type(tensor) not in _ORDINARY or tensor.is_neg()):
            return False
    return True


_ORDINARY = (torch.Tensor, torch.nn.Parameter)
