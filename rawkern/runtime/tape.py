"""The launches of one call of a launcher, written down so that they can be repeated with other addresses.

What a launcher launches follows from shapes, strides, element types, devices, the alignment of addresses and its other
arguments. For a call in which all of these are as before, there is nothing left to decide: the same kernels run with
the same parameters but for the addresses in them. Repeating them takes a few microseconds, where deciding takes a
hundred. Launchers know nothing of this: a `Recorder` stands in for the stream that they are given, sees every launch
and every workspace, and makes a `Tape` of them.
"""

import ctypes
import math
import threading

import numpy as np

#: Launchers may decide by addresses modulo this. New memory is aligned to it on every device, given memory may not be.
ALIGNMENT = 16
#: Where pieces of the one workspace of a tape begin.
_WORKSPACE_ALIGNMENT = 256


class Plans(dict):
    """What calls of one function do, by their kind; of more kinds than MOST the oldest are forgotten."""

    MOST = 4096
    _remembering = threading.Lock()

    def remember(self, kind, plan):
        """Keeps a plan, unless it is None: what cannot be repeated is decided in every call."""
        if plan is not None:
            with self._remembering:
                if len(self) >= self.MOST:
                    del self[next(iter(self))]
                self[kind] = plan


class Recorder:
    """A stream that writes down what a launcher does with it.

    Args:
        pointer: of the CUDA stream that the work goes to, 0 on a CPU.
        allocate: function of shape and dtype for new arrays.
        arguments: arrays that launchers will be given, or None; more are announced by `add`. Their order is that of the
            addresses that `Tape.play` gets. They must stay where they are while the launchers run.
    """

    def __init__(self, pointer, allocate, arguments=()):
        self.ptr = pointer
        self._allocate = allocate
        self._arguments = [_extent(array) for array in arguments]
        self._workspaces = []  # arrays, kept alive so that no address is used twice
        self._handed_out = []  # likewise
        self._launches = []
        self._device = None
        self._repeatable = True

    def add(self, array):
        """Announces one more array that launchers will be given; returns it."""
        self._arguments.append(_extent(array))
        return array

    def hand_out(self, array):
        """Says that a dense array is no workspace, though it was made by `empty`: its address is one more argument, the
        next one. Returns whether it is that, and the only array in its memory."""
        begin, end = _extent(array)
        if begin:
            extents = [_extent(workspace) for workspace in self._workspaces]
            found = [i for i, extent in enumerate(extents) if extent == (begin, end)]
            if len(found) != 1 or end - begin != array.nbytes:
                return False
            self._handed_out.append(self._workspaces.pop(found[0]))
        self._arguments.append((begin, end))
        return True

    def empty(self, shape, dtype):
        """A workspace; see `Queue.empty`."""
        array = self._allocate(shape, dtype)
        self._workspaces.append(array)
        return array

    def launched(self, device, kernel, grid, params):
        """Called by `Queue.launch` for every launch."""
        self._device = device
        self._launches.append((kernel, grid, params))

    def uses_library(self):
        """Called by `device.on` where an array library works on the stream: that cannot be repeated by a tape."""
        self._repeatable = False

    def tape(self):
        """The Tape; None if what happened cannot be repeated from addresses alone.

        That is so where an array library copied, and where an address in a launch is not that of exactly one argument
        or workspace. Arguments that begin at one address count as one: a tape is to be played only for calls in which
        they do so again.
        """
        if not self._repeatable:
            return None
        offsets, size = [], 0
        for array in self._workspaces:
            offsets.append(size)
            size += -(-array.nbytes // _WORKSPACE_ALIGNMENT) * _WORKSPACE_ALIGNMENT
        sources = [(begin, end, slot, 0) for slot, (begin, end) in enumerate(self._arguments) if begin]
        sources += [
            (*_extent(array), len(self._arguments), offset)
            for array, offset in zip(self._workspaces, offsets, strict=True)
        ]
        words, patches, calls = [], [], []
        for kernel, grid, params in self._launches:
            calls.append((kernel, grid, 8 * len(words)))
            for place in _addresses(params.dtype):
                address = int.from_bytes(params.tobytes()[place : place + 8], "little")
                if address:
                    origin = _origin(address, sources)
                    if origin is None:
                        return None
                    patches.append((len(words) + place // 8, *origin))
            raw = params.tobytes()
            words += np.frombuffer(raw + bytes(-len(raw) % 8), np.uint64).tolist()
        return Tape(self._device, words, patches, calls, size)


class Tape:
    """Launches that can be repeated.

    Attributes:
        workspace_bytes: size of the memory that a repetition needs, aligned to ALIGNMENT.
    """

    def __init__(self, device, words, patches, calls, workspace_bytes):
        self.workspace_bytes = workspace_bytes
        self._device = device
        self._words = words
        self._patches = patches
        self._calls = calls
        self._free = []  # parameters that no thread is using

    def play(self, addresses, stream):
        """Launches everything.

        Args:
            addresses: those of the recorded arguments, then that of the workspace, if there is one.
            stream: pointer of the CUDA stream, 0 on a CPU.
        """
        if not self._calls:
            return
        try:
            words, calls = self._free.pop()
        except IndexError:
            words, calls = self._parameters()
        for place, slot, offset in self._patches:
            words[place] = addresses[slot] + offset
        self._device.repeat(calls, stream)
        self._free.append((words, calls))

    def _parameters(self):
        """Memory for all parameters, and the launches that read it. Several threads may play one tape at once."""
        words = (ctypes.c_uint64 * len(self._words))(*self._words)
        base = ctypes.addressof(words)
        return words, [self._device.prepare(kernel, grid, base + place) for kernel, grid, place in self._calls]


def _extent(array):
    """The addresses from the array's first byte to behind its last; strides are not negative. (0, 0) for None."""
    if array is None or array.size == 0:
        return 0, 0
    begin = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
    steps = zip(array.shape, array.strides, strict=True)
    return begin, begin + sum((size - 1) * step for size, step in steps) + array.itemsize


def _origin(address, sources):
    """(slot, offset) of the source that the address belongs to; None if that is not exactly one.

    A source that begins at the address comes before those that merely reach over it: channels of one tensor, say.
    """
    begins = [source for source in sources if source[0] == address]
    found = begins[:1] or [source for source in sources if source[0] < address < source[1]]
    if len(found) != 1:
        return None
    begin, _, slot, offset = found[0]
    return slot, offset + address - begin


def _addresses(dtype, base=0):
    """Places of all addresses in a struct of parameters: its fields of type u8, also in nested structs and arrays."""
    places = []
    for field, offset, *_ in (dtype.fields[name] for name in dtype.names):
        count = math.prod(field.shape)
        for i in range(count):
            place = base + offset + i * field.base.itemsize
            if field.base.names:
                places += _addresses(field.base, place)
            elif field.base == np.uint64:
                places.append(place)
    return places
