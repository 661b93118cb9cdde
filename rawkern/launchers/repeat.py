"""Calls of launchers that repeat what was launched before.

Deciding what to launch takes a hundred microseconds, and follows from shapes, strides, element types, alignment and the
arguments that are no arrays. A `repeatable` launcher decides once for each kind of call; later ones play the tape of
the first (see runtime/tape.py) with new outputs.
"""

import functools

import numpy as np

from .. import runtime
from ..epilogue import Function
from ..runtime import ALIGNMENT, Plans, Recorder
from .chain import Chain

_plans = []  # of all launchers


def repeatable(launcher):
    """Makes a launcher, whose keyword `stream` may be None, repeat the launches of calls of a kind seen before."""
    plans = Plans()
    _plans.append(plans)

    @functools.wraps(launcher)
    def call(*arguments, stream=None, **options):
        if hasattr(stream, "launched"):  # somebody else writes down what is launched
            return launcher(*arguments, stream=stream, **options)
        key, arrays = [], []
        try:
            _describe((arguments, tuple(options), tuple(options.values())), key, arrays)
            addresses = [runtime.pointer(array) for array in arrays]
            key += [address % ALIGNMENT for address in addresses]
            if len(set(addresses)) < len(addresses):
                key.append(tuple(map(addresses.index, addresses)))  # which arrays are one and the same
            key = tuple(key)
            plan = plans.get(key)
        except _NotRepeatableError:
            return launcher(*arguments, stream=stream, **options)
        if plan is not None:
            return plan.repeat(arrays, addresses, stream)
        plan, results = _record(launcher, arguments, options, arrays, stream)
        plans.remember(key, plan)
        return results

    return call


def forget_plans():
    """Makes every launcher decide anew: for tests that change what is decided by."""
    for plans in _plans:
        plans.clear()


class _NotRepeatableError(Exception):
    """Something that a launcher was given cannot be part of a key."""


def _describe(value, key, arrays):
    """Appends to `key` what decisions about `value` may follow from, and to `arrays` the arrays within."""
    kind = type(value)
    if kind is tuple or kind is list:
        key += (kind, len(value))
        for item in value:
            _describe(item, key, arrays)
    elif kind is np.ndarray or runtime.is_cupy(kind):
        if value.strides and min(value.strides) < 0:
            raise _NotRepeatableError
        place = value.flags.writeable if kind is np.ndarray else value.data.device_id
        key += (kind, value.shape, value.strides, value.dtype, place)
        arrays.append(value)
    elif isinstance(value, Function):
        key += (kind, value.signature, value.numbers)
        _describe(value.tensor, key, arrays)
    elif kind is Chain:
        key += (kind, value.signature, value.numbers)
        _describe(value.tensors, key, arrays)
    else:
        try:
            hash(value)
        except TypeError:
            raise _NotRepeatableError from None
        key += (kind, value)


def _record(launcher, arguments, options, arrays, stream):
    """(Plan or None, the launcher's results), from running it."""
    if not arrays:
        return None, launcher(*arguments, stream=stream, **options)
    try:
        device = runtime.device_of(arrays[0])
    except TypeError:
        return None, launcher(*arguments, stream=stream, **options)  # says what is wrong
    recorder = Recorder(device.stream_pointer(stream), lambda shape, dtype: device.empty(shape, dtype, stream), arrays)
    results = launcher(*arguments, stream=recorder, **options)
    single = not isinstance(results, (tuple, list))
    outputs = [_Result(result, arrays, recorder) for result in ((results,) if single else results)]
    tape = recorder.tape() if all(output.known for output in outputs) else None
    return (None if tape is None else _Plan(device, tape, outputs, None if single else type(results))), results


class _Result:
    """What is to be known of an array that a launcher returned: an argument, None, or a new array."""

    def __init__(self, result, arrays, recorder):
        self.argument = self.shape = None
        self.is_none = result is None
        for i, array in enumerate(arrays):
            if result is array:
                self.argument = i
        self.known = self.is_none or self.argument is not None or recorder.hand_out(result)
        if self.known and self.argument is None and not self.is_none:
            self.shape, self.strides, self.dtype, self.bytes = result.shape, result.strides, result.dtype, result.nbytes


class _Plan:
    """What to allocate and to launch for one kind of call."""

    def __init__(self, device, tape, results, container):
        self._device, self._tape = device, tape
        self._results, self._container = results, container

    def repeat(self, arrays, addresses, stream):
        device, outputs = self._device, []
        for result in self._results:
            if result.shape is not None:
                memory = device.empty((result.bytes,), np.uint8, stream)
                addresses.append(runtime.pointer(memory))
                output = device.view(memory, result.shape, result.dtype, result.strides)
            else:
                output = None if result.is_none else arrays[result.argument]
            outputs.append(output)
        if self._tape.workspace_bytes:
            # Freed on return: memory pools give it away only to work that comes later on the same stream.
            workspace = device.empty((self._tape.workspace_bytes,), np.uint8, stream)
            addresses.append(runtime.pointer(workspace))
        self._tape.play(addresses, device.stream_pointer(stream))
        return outputs[0] if self._container is None else self._container(outputs)
