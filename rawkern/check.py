"""`python -m rawkern check`: is every op right on this machine? Forward and backward against PyTorch, as a table."""

import contextlib
import fnmatch
import json
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .check_cases import cases
from .runtime.emulator import workers
from .testing import TF32_ROUNDING, forward_backward, parity


@dataclass(frozen=True)
class Row:
    """The outcome of one case on one device. Errors are relative to the result's scale, of the result judged worst."""

    device: str
    op: str
    dtype: str
    case: str
    result: str
    error: float
    torch_error: float
    allowed: float
    ok: bool
    problems: tuple
    milliseconds: float

    @property
    def verdict(self):
        return "ok" if self.ok else "WRONG"


def add_arguments(parser):
    """The options of `check`."""
    parser.add_argument("--device", choices=("all", "cpu", "cuda"), default="all", help="where to run (default: all)")
    parser.add_argument(
        "--filter",
        metavar="PATTERN",
        default="*",
        help='only cases whose "op dtype case" matches, such as "gelu*" or "*float16*"',
    )
    parser.add_argument("--json", metavar="FILE", help="also write the table to this file")


def main(args):
    """Runs the check. The exit status: 0 if all is right, 1 if not, 2 if there is nothing to run."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    devices = [name for name in ("cpu", "cuda") if args.device in ("all", name)]
    if not torch.cuda.is_available():
        if args.device == "cuda":
            console.print("PyTorch finds no GPU here")
            return 2
        devices = ["cpu"]
    pattern = args.filter if "*" in args.filter else f"*{args.filter}*"
    chosen = [case for case in cases() if fnmatch.fnmatch(f"{case.op} {_short(case.dtype)} {case.name}", pattern)]
    if not chosen:
        console.print(f"no case matches {args.filter!r}")
        return 2
    started = time.perf_counter()
    rows = [row for device in devices for row in _run_all(chosen, device, console)]
    console.print(_table(rows))
    for row in rows:
        for problem in row.problems:
            console.print(f"{row.device} {row.op} {row.dtype} {row.case}: {problem}", style="red", markup=False)
    wrong = sum(not row.ok for row in rows)
    seconds = time.perf_counter() - started
    console.print(
        f"{len(rows)} cases on {' and '.join(devices)} in {seconds:.0f} s: "
        + (f"{wrong} WRONG" if wrong else "all right")
    )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump([asdict(row) for row in rows], file, indent=1)
    return 1 if wrong else 0


def _run_all(chosen, device, console):
    """Rows in the order of the cases. On the CPU several at a time, so that their kernels compile side by side."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"checking on {device}", total=len(chosen))
        with ThreadPoolExecutor(workers() if device == "cpu" else 1) as pool:
            futures = [pool.submit(run, case, device) for case in chosen]
            try:
                for future in as_completed(futures):
                    case = future.result()
                    progress.update(task, advance=1, description=f"{device}: {case.op}")
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise
    return [future.result() for future in futures]


def run(case, device):
    """Runs one case on one device. What it raises becomes part of the row."""
    common = {"device": device, "op": case.op, "dtype": _short(case.dtype), "case": case.name}
    # The CPU's own convolution never rounds to TF32; that of a GPU may be more exact than the mode asks.
    options = {"rounding": TF32_ROUNDING} if case.precision == "tf32" else {}
    try:
        with _torch_precision(case.precision, device):
            compared = parity(
                case.ours,
                case.theirs,
                case.inputs(),
                dtype=case.dtype,
                device=device,
                elementwise=case.elementwise,
                **options,
            )
        milliseconds = _milliseconds(case, device)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        nan = float("nan")
        return Row(
            **common,
            result="",
            error=nan,
            torch_error=nan,
            allowed=nan,
            ok=False,
            problems=(problem,),
            milliseconds=nan,
        )
    name, worst = max(compared.items(), key=_badness)
    return Row(
        **common,
        result=name,
        error=worst.ours.maximum,
        torch_error=worst.theirs.maximum,
        allowed=worst.allowed.maximum,
        ok=all(comparison.ok for comparison in compared.values()),
        problems=tuple(
            f"{name}: {problem}" for name, comparison in compared.items() for problem in comparison.problems
        ),
        milliseconds=milliseconds,
    )


@contextlib.contextmanager
def _torch_precision(precision, device):
    """Sets torch's switch for TF32 in convolutions. It is global, so on the CPU, where cases share it, it stays."""
    if device == "cpu":
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _badness(item):
    comparison = item[1]
    return not comparison.ok, comparison.ours.maximum / max(comparison.allowed.maximum, 1e-300)


def _milliseconds(case, device):
    """Our forward and backward, everything compiled."""
    inputs = case.inputs()
    started = time.perf_counter()
    forward_backward(case.ours, inputs, dtype=case.dtype, device=device)
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def _short(dtype):
    return str(dtype).removeprefix("torch.")


def _table(rows):
    table = Table(title="rawkern against PyTorch: errors against float64, relative to the result's scale")
    for heading in ("device", "op", "dtype", "case", "worst in"):
        table.add_column(heading, overflow="fold")
    for heading in ("error", "PyTorch's", "verdict", "ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        ends_section = i + 1 < len(rows) and (row.device, row.op) != (rows[i + 1].device, rows[i + 1].op)
        numbers = f"{row.error:.1e}", f"{row.torch_error:.1e}", row.verdict, f"{row.milliseconds:.1f}"
        style = None if row.ok else "bold red"
        table.add_row(
            row.device, row.op, row.dtype, row.case, row.result, *numbers, style=style, end_section=ends_section
        )
    return table
