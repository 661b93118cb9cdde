"""`python -m bench compare A.json B.json`: what got faster and what slower, and whether more than the noise."""

import argparse

from rich import box
from rich.console import Console
from rich.table import Table

from .report import Report, time_text


def change(before, after):
    """(ratio of medians, after / before; verdict): "same" where the two spreads, p20 to p80, overlap."""
    ratio = after.median / before.median
    if before.p20 <= after.p80 and after.p20 <= before.p80:
        return ratio, "same"
    return ratio, "faster" if ratio < 1 else "slower"


def spread(row):
    """Half the distance of the percentiles, as a share of the median."""
    return (row.p80 - row.p20) / 2 / row.median


def changes(before, after):
    """[(key, row before, row after)] of what both reports timed, and the keys that only one did."""
    rows = {row.key: row for row in before.rows if row.median}, {row.key: row for row in after.rows if row.median}
    common = [(key, rows[0][key], rows[1][key]) for key in rows[0] if key in rows[1]]
    return common, sorted(set(rows[0]) ^ set(rows[1]))


def main(arguments=None):
    """Prints the comparison; returns 1 if something got slower by more than --tolerance, else 0."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.add_argument("before", help="JSON file of an earlier run")
    parser.add_argument("after", help="JSON file of a later run")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.03,
        help="changes up to this share count as the same (default: %(default)s)",
    )
    parser.add_argument("--all", action="store_true", help="list also what stayed the same")
    options = parser.parse_args(arguments)
    before, after = Report.load(options.before), Report.load(options.after)
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    for name, report in (("before", before), ("after", after)):
        stamp = report.stamp
        console.print(f"{name}: {stamp['device']}, commit {stamp.get('commit')}, {stamp.get('date')}", highlight=False)
    if before.stamp["device"] != after.stamp["device"]:
        console.print("[yellow]The devices differ: compare fractions of the floor rather than times.[/yellow]")
    common, alone = changes(before, after)
    counts = _print(console, common, options)
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if alone:
        console.print(f"{len(alone)} in one file only, such as {alone[0]}", highlight=False)
    return 1 if counts["slower"] else 0


def _print(console, common, options):
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("problem", "before", "spread", "after", "spread", "time", "floor reached", "verdict"):
        table.add_column(column, justify="left" if column in ("problem", "verdict") else "right", no_wrap=True)
    counts = {"faster": 0, "same": 0, "slower": 0}
    judged = []
    for key, old, new in common:
        ratio, verdict = change(old, new)
        if abs(ratio - 1) <= options.tolerance:
            verdict = "same"
        counts[verdict] += 1
        judged.append((ratio, verdict, key, old, new))
    colours = {"faster": "green", "same": "dim", "slower": "red"}
    for ratio, verdict, key, old, new in sorted(judged, key=lambda item: item[0]):
        if verdict == "same" and not options.all:
            continue
        table.add_row(
            key, time_text(old.median), f"±{spread(old):.1%}", time_text(new.median), f"±{spread(new):.1%}",
            f"x {ratio:.3f}", f"{old.fraction:.0%} -> {new.fraction:.0%}", f"[{colours[verdict]}]{verdict}[/]",
        )  # fmt: skip
    if table.row_count:
        console.print(table)
    return counts
