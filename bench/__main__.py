"""`python -m bench`: see --help."""

import argparse
import datetime
import random
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import ahead, ceilings, compare, devices, peers, plots, problems, runner
from .report import PEERS, Report, ceilings_table, result_tables

_DESCRIPTION = """\
Times rawkern's kernels on CuPy arrays, forward and backward, and holds them against floors that are computed from
ceilings measured in the same run. Every result is checked against a float64 oracle after it was timed; the exit status
is 0 only if all are right and none is faster than its floor.
"""
_EPILOG = """\
examples:
  python -m bench                          every op, every mode
  python -m bench model --peers --train    the three models against PyTorch, forward and training steps
  python -m bench 'conv_transpose2d/sweep-*' --dtype bfloat16 --direction forward
  python -m bench --device cpu --quick     the whole path on the emulator; its times mean nothing
  python -m bench --list                   the names of all problems
  python -m bench compare A.json B.json    what got faster and slower between two runs
"""


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["compare"]:
        return compare.main(arguments[1:])
    options = _parser().parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=250)
    chosen = problems.select(options.problems, options.quick)
    if options.list:
        for _, problem in chosen:
            console.print(f"{problem.full_name:60} {problem.size}", highlight=False)
        return 0
    if not chosen:
        console.print(f"no problem matches {' '.join(options.problems)}; --list shows their names")
        return 2
    if (options.peers or options.train) and not peers.available():
        console.print("--peers and --train need torch, which cannot be imported")
        return 2
    try:
        device = devices.device(options.device)
    except RuntimeError as error:
        console.print(str(error), highlight=False)
        return 2
    return _Run(options, device, console, chosen).run()


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("problems", nargs="*", help="names, parts of names, patterns with * and ?, or one of: model, alone, sweep")
    add("--list", action="store_true", help="print the names of the problems and stop")
    add("--dtype", nargs="+", metavar="DTYPE", help="float32, bfloat16, float16 or float64 (default: the first three)")
    add("--precision", choices=("tf32", "ieee"), help="float32 convolutions in this precision only (default: both)")
    add("--direction", nargs="+", metavar="WHICH", help="forward, backward, input_gradient, weight_gradient")
    add(
        "--peers",
        nargs="?",
        const="auto",
        metavar="WHICH",
        help=f"time PyTorch too: 'all', or some of {','.join(PEERS)}; without a value all of them for the models and "
        "the convolution alone, and the eager ones for the forward passes of the rest",
    )
    add("--train", action="store_true", help="time forward+backward steps through torch, too")
    add("--seconds", type=float, default=0.1, help="timing budget of a row (default: %(default)s)")
    add(
        "--minutes",
        type=float,
        help="time limit; rows come before peers, of which the compiled ones come last and may not fit in "
        "(default: 1 for the models alone, otherwise 7.5)",
    )
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="cpu is the emulator (default: the GPU)")
    add("--quick", action="store_true", help="tiny problems, to see that everything works")
    add("--output", metavar="FOLDER", help="where to write results.json and pictures (default: build/bench)")
    add("--commit", help="the commit to note in the results, where git does not know it")
    return parser


class _Run:
    """One run: its rows in order, the progress bar, the report."""

    def __init__(self, options, device, console, chosen):
        self.options, self.device, self.console = options, device, console
        self.jobs = list(_jobs(chosen, options))
        self.folder = Path(options.output or "build/bench")
        only_models = all("model" in problem.tags for _, problem in chosen)
        minutes = options.minutes or (1 if only_models else 7.5)
        seconds = options.seconds if device.kind == "cuda" else min(options.seconds, 0.02)
        self.context = runner.Context(
            device, None, row_seconds=seconds, deadline=time.monotonic() + 60 * minutes, pick=random.Random()
        )
        self.report, self.saved = None, time.monotonic()

    def run(self):
        status = 0
        stamp = {"date": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
        stamp |= self.device.stamp() | devices.versions(self.options.commit)
        with self._progress() as progress:
            task = progress.add_task("kernels", total=len(self.jobs))
            try:
                self._compile(lambda text: progress.update(task, description=text))
                self.context.ceilings = ceilings.measure(
                    self.device, lambda what: progress.update(task, description=f"ceilings: {what}")
                )
                self.report = Report(stamp, self.context.ceilings.as_dict())
                self._rows(progress, task)
                self.report.complete = True
            except KeyboardInterrupt:
                status = 130
        if self.report is None:
            return status or 1
        self._finish()
        if status:
            self.console.print("stopped; the results so far are above")
        return status or (1 if any(row.problems for row in self.report.rows) else 0)

    def _compile(self, say):
        if self.device.kind == "cuda":
            jobs = [job[:4] for job in self.jobs]
            capability, multiprocessors = self.device.compute_capability, self.device.multiprocessors
            ahead.compile_all(jobs, capability, multiprocessors, lambda done, known: say(f"kernels: {done} of {known}"))

    def _progress(self):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)

    def _rows(self, progress, task):
        """All rows with the peers that need no compiler; then the compiled peers, the most wanted first."""
        rows = []
        for number, job in enumerate(self.jobs, 1):
            if self.context.seconds_left() < 0:
                break
            self.context.rows_left = len(self.jobs) - number
            operation, problem, direction, mode, names = job
            progress.update(task, description=f"{problem.full_name} {direction} {mode}")
            self.context.peers = [name for name in names if name in peers.EAGER]
            if direction == "train":
                row = runner.run_training(self.context, operation, problem, mode)
            else:
                row = runner.run_row(self.context, operation, problem, direction, mode)
            self.report.rows.append(row)
            rows.append((job, row))
            progress.advance(task)
            self._save()
        self.context.rows_left = 0
        for (operation, problem, direction, mode, names), row in sorted(rows, key=lambda pair: _urgency(pair[0])):
            compiled = [name for name in names if name in peers.COMPILED]
            if compiled and direction in ("forward", "train"):
                progress.update(task, description=f"{problem.full_name} {direction} {mode}: {', '.join(compiled)}")
                self.context.peers = compiled
                runner.add_peers(self.context, operation, problem, direction, mode, row)
                self._save()

    def _save(self):
        """Now and then: whatever happens, most of it is on disk."""
        if time.monotonic() - self.saved > 5:
            self.report.save(self.folder / "results.json")
            self.saved = time.monotonic()

    def _finish(self):
        report, out = self.report, self.console.print
        stamp = report.stamp
        out(f"{stamp['device']}, driver {stamp['driver']}, CUDA {stamp['cuda']}, CuPy {stamp['cupy']}, "
            f"torch {stamp['torch']}, commit {stamp['commit']}", highlight=False)  # fmt: skip
        out(ceilings_table(self.context.ceilings))
        for table in result_tables(report.rows):
            out(table)
        notes = sorted({peer.note for row in report.rows for peer in row.peers.values() if peer.note})
        for note in notes:
            out(f"PyTorch: {note}", highlight=False)
        report.save(self.folder / "results.json")
        pictures = plots.draw(report, self.folder)
        out("written: " + ", ".join(str(path) for path in (self.folder / "results.json", *pictures)), highlight=False)
        wrong = [row for row in report.rows if row.problems]
        for row in wrong:
            out(f"[red]{row.key}[/red]: " + "; ".join(row.problems), highlight=False)
        out(f"{len(report.rows)} of {len(self.jobs)} rows, {len(wrong)} with problems")
        if len(report.rows) < len(self.jobs) and report.complete:
            out("The time limit left out the rest: raise it by --minutes, or choose problems.")


def _jobs(chosen, options):
    """(operation, problem, direction, mode, peers) of every row, the models first, each mode after the other."""
    for operation, problem in chosen:
        for mode in _modes(operation, options):
            for direction in operation.directions(problem):
                if not options.direction or direction in options.direction:
                    yield operation, problem, direction, mode, _peers(problem, direction, options)
            if options.train and not problem.channels_last and ("sweep" not in problem.tags or options.problems):
                yield operation, problem, "train", mode, _peers(problem, "train", options)


def _modes(operation, options):
    modes = (*operation.modes(), "float64") if options.dtype and "float64" in options.dtype else operation.modes()
    for mode in modes:
        dtype, _, precision = mode.partition("/")
        if options.dtype and dtype not in options.dtype:
            continue
        if options.precision and operation.has_precision and precision and precision != options.precision:
            continue
        yield mode


def _peers(problem, direction, options):
    if not options.peers:
        return ()
    if options.peers == "all":
        return PEERS
    if options.peers != "auto":
        return tuple(name.strip() for name in options.peers.split(","))
    if {"model", "alone"} & set(problem.tags):
        return PEERS
    return peers.EAGER if direction in ("forward", "train") else ()


def _urgency(job):
    """Compiled peers of the models come first, since a compiler has nothing to fuse in a convolution alone. Those in
    TF32 and bfloat16 are what most people compare with; forward passes come before training."""
    _, problem, direction, mode, _ = job
    modes = ("float32/tf32", "bfloat16", "float32/ieee", "float16", "float64")
    return "model" not in problem.tags, modes.index(mode), direction == "train"


if __name__ == "__main__":
    sys.exit(main())
