"""The table of what `fuse` did to a model, and why it left transposed convolutions alone."""

import operator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from .calls import usual_call
from .forward import FusedForward
from .patterns import constant_of
from .steps import refusal
from .tracing import has_hooks
from .views import is_opaque


@dataclass(frozen=True)
class Row:
    """One chain, or one convolution that is in none.

    Attributes:
        module: the path of the module in whose forward it is; "" for the model itself.
        chain: what is computed, in order.
        layers: the paths of the modules that this is in.
        result: the function of rawkern that computes it, or why there is none.
        fused: whether there is one.
    """

    module: str
    chain: tuple
    layers: tuple
    result: str
    fused: bool


def rows_of(model):
    """The rows for a model that `fuse` returned, in the mode in which it is.

    They are those of the calls that were made; of a module that was not called, those of a call with one tensor for
    each argument without a default.
    """
    rows, reasons = _visit(model, "")
    fused = {path for row in rows for path in row.layers}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ConvTranspose2d) and path not in fused:
            parent = path.rpartition(".")[0]
            rows.append(Row(parent, (_layer(path, module),), (path,), _why_not(module, parent, reasons), False))
    return rows


def print_report(model):
    """Prints the table of `rows_of(model)`."""
    table = Table(title=f"rawkern.fuse({type(model).__name__})", title_justify="left")
    for heading in ("module", "chain", "becomes"):
        table.add_column(heading, overflow="fold")
    for row in rows_of(model):
        result = f"rawkern.{row.result}" if row.fused else f"unchanged: {row.result}"
        table.add_row(row.module or "(the model)", " → ".join(row.chain), result)
    if not table.rows:
        table.add_row("(the model)", "", "unchanged: nothing to fuse was found")
    Console(soft_wrap=True).print(table)


def _visit(module, path, inlined=frozenset()):
    """(rows, reasons): of this module and those in it; a reason for each that could not be traced, by path."""
    rows, reasons = [], {}
    forward = module.__dict__.get("forward")
    if module not in inlined and isinstance(forward, FusedForward):
        usual = forward.plan(usual_call(forward.__wrapped__))
        plan = next(iter(forward.plans()), usual)
        inlined = plan.modules
        rows += [_row(chain, module, path) for chain in plan.chains]
        if plan.reason:
            reasons[path] = plan.reason
    for name, child in module.named_children():
        more, why = _visit(child, f"{path}.{name}" if path else name, inlined)
        rows += more
        reasons.update(why)
    return rows, reasons


def _row(chain, module, path):
    names, layers = [], [path]
    paths = {part: name for name, part in module.named_modules(prefix=path)}
    for node in chain.nodes:
        if node.op == "call_module":
            layer = module.get_submodule(node.target)
            names.append(_layer(paths[layer], layer))
            layers.append(paths[layer])
        elif node.target not in (operator.getitem, getattr) and constant_of(node) is None:
            names.append(node.target if node.op == "call_method" else node.target.__name__)
        layers += [paths[part] for part, _ in node.meta["calls"]]
    return Row(path, tuple(names), tuple(layers), chain.kind.function, True)


def _layer(path, module):
    return f"{type(module).__name__} {path}" if path else type(module).__name__


def _why_not(module, parent, reasons):
    if type(module) is not torch.nn.ConvTranspose2d:
        return f"it is a {type(module).__name__}, a class of its own"
    if has_hooks(module):
        return "it has hooks"
    if is_opaque(module):
        return "its forward was replaced"
    if refusal(module):
        return refusal(module)
    if parent in reasons:
        return f"its module cannot be traced ({reasons[parent]})"
    return "nothing that can be fused follows it alone"
