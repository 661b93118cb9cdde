"""A kernel: which struct of which .cu file, how many threads, and the layout of its parameters."""

import functools
from dataclasses import dataclass

import numpy as np

from . import source


@dataclass(frozen=True)
class Kernel:
    """One instantiation of a kernel template.

    Attributes:
        name: the function's name in profilers and error messages.
        file: the .cu file, relative to the folder of device code.
        type: the C++ struct with its template arguments, without the namespace.
        threads: threads per block; checked against the struct's `kThreads` at compile time.
        params: NumPy structured dtype, the twin of the struct's `Params`; checked field by field at compile time.
        shared_bytes: dynamic shared memory per block.
        folder: where `file` is, if not in rawkern's own device code (used by tests).
    """

    name: str
    file: str
    type: str
    threads: int
    params: np.dtype
    shared_bytes: int = 0
    folder: object = None

    @functools.cached_property
    def source(self):
        """The complete translation unit: flattened file, layout assertions, entry point."""
        lines = [
            f'#line 1 "entry of {self.name}"',
            "namespace rawkern { namespace entry {",
            f"using Entry = rawkern::{self.type};",
            f'static_assert(Entry::kThreads == {self.threads}, "threads per block differ from the launcher\'s");',
            *_IS_FLOAT.strip().splitlines(),
            *layout_assertions("Entry::Params", self.params),
            "} }",
            f"RAWKERN_KERNEL({self.name}, rawkern::entry::Entry)",
        ]
        return source.flatten(self.file, self.folder) + "\n".join(lines) + "\n"

    def launch(self, queue, blocks, **fields):
        """Runs `blocks` blocks on `queue` (see arrays.Queue); nothing happens if there are none."""
        if blocks:
            queue.launch(self, linear_grid(blocks), pack(self.params, fields))

    def __hash__(self):
        return hash((self.name, self.file, self.type))


_IS_FLOAT = """
template <bool kValue> struct Answer { static constexpr bool value = kValue; };
template <class T> struct IsFloat : Answer<false> {};
template <> struct IsFloat<float> : Answer<true> {};
template <> struct IsFloat<double> : Answer<true> {};
template <class T, decltype(sizeof 0) n> struct IsFloat<T[n]> : IsFloat<T> {};"""


def layout_assertions(struct, dtype, name="fields_of"):
    """C++ that does not compile unless `struct` has the fields of `dtype`, no others, in the same places.

    Compared are the number of fields and each one's name, offset, size and kind (integer or float); nested structs too.
    """
    names = ", ".join(f"field{index}" for index in range(len(dtype.names)))
    lines = [
        f'static_assert(sizeof({struct}) == {dtype.itemsize}, "size of {struct} differs from the launcher\'s");',
        f"__device__ inline void {name}(const {struct}& params) {{ const auto& [{names}] = params; (void)field0; }}",
    ]
    for field_name in dtype.names:
        field, offset = dtype.fields[field_name][:2]
        place, text = f"{struct}::{field_name}", f"{struct}::{field_name} differs from the launcher's"
        lines += [
            # NVRTC before 13.4 does not know offsetof; the emulator checks the same struct.
            "#if !RAWKERN_GPU",
            f'static_assert(__builtin_offsetof({struct}, {field_name}) == {offset}, "place of {text}");',
            "#endif",
            f'static_assert(sizeof({place}) == {field.itemsize}, "size of {text}");',
        ]
        if field.names:
            lines += layout_assertions(f"decltype({place})", field, f"{name}_{field_name}")
        else:
            is_float = str(field.base.kind == "f").lower()
            lines.append(f'static_assert(IsFloat<decltype({place})>::value == {is_float}, "type of {text}");')
    return lines


def linear_grid(blocks):
    """A grid of at least `blocks` blocks, numbered by `linear_block()`; kernels return where there are too many."""
    x = min(blocks, 2**31 - 1)
    y = -(-blocks // x)
    if y > 65535:
        raise ValueError(f"a launch of {blocks} blocks is beyond what a grid can hold")
    return x, y, 1


def pack(dtype, fields):
    """A structured scalar with these fields; every field must be given, and no other."""
    if len(fields) != len(dtype.names):
        raise TypeError(f"a launch needs the fields {', '.join(dtype.names)}; given are {', '.join(fields)}")
    return np.array(tuple([fields[name] for name in dtype.names]), dtype)[()]


def params(*fields):
    """The dtype of a kernel's Params, laid out as C++ lays out the struct: ("n", "i8"), ("shape", "i4", 4), ..."""
    return np.dtype(list(fields), align=True)
