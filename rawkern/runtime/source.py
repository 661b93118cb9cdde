"""Find the device code and flatten it into one string.

Flattening puts every header's text into what is hashed and compiled, so an edited header is always noticed (CuPy's
own cache hashes only the top file), and `#line` makes compilers speak of our files and lines.
"""

import functools
import importlib.resources
import os
import re
from pathlib import Path

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"')
_CHECKOUT = Path(__file__).resolve().parents[2] / "cuda"


@functools.cache
def root():
    """The folder of device code: inside the package in an installed wheel, beside it in a checkout.

    The package comes first: beside an installed one may lie a `cuda` folder of somebody else's.
    """
    installed = Path(str(importlib.resources.files("rawkern"))) / "_cuda"
    return installed if (installed / "include" / "platform.cuh").is_file() else _CHECKOUT


def flatten(name, folder=None):
    """The text of `folder/name` (default: our device code) with every quoted include replaced by its text, once.

    An include is looked for beside the file that includes it, then in `folder`, then in our device code, in the last
    two also under `include`. Raises FileNotFoundError for what is nowhere.
    """
    bases = [(root(), "cuda")]
    if folder is not None:
        bases.insert(0, (Path(folder), Path(folder).name))
    lines, seen = [], set()

    def locate(include, base, beside):
        tries = [(base, beside / include)] if base else []
        for base in bases:
            tries += [(base, base[0] / include), (base, base[0] / "include" / include)]
        for base, file in tries:
            file = Path(os.path.normpath(file))
            if file.is_file():
                return file, base
        raise FileNotFoundError(f"{include}, included from {beside}, is not part of rawkern's device code")

    def add(file, base):
        if file in seen:
            return
        seen.add(file)
        shown = f"{base[1]}/{file.relative_to(base[0]).as_posix()}"
        lines.append(f'#line 1 "{shown}"')
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if match := _INCLUDE.match(line):
                add(*locate(match[1], base, file.parent))
                lines.append(f'#line {number + 1} "{shown}"')
            else:
                lines.append("" if line.strip() == "#pragma once" else line)

    add(*locate(name, None, bases[0][0]))
    return "\n".join(lines) + "\n"
