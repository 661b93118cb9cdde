"""Rows of results, the JSON file they go to, and the tables that are printed."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich import box
from rich.table import Table

#: Order of peers in tables.
PEERS = ("eager", "channels-last", "cudnn.benchmark", "compile", "max-autotune")


@dataclass
class Peer:
    """The same computation by PyTorch. Seconds and bytes; `difference` is relative to rawkern's result.

    `note` says why there is no time, or what its precision switches were.
    """

    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    host: float | None = None
    peak_memory: int | None = None
    difference: float | None = None
    note: str = ""


@dataclass
class Row:
    """One problem in one direction and mode. Seconds, bytes, FLOP."""

    op: str
    problem: str
    size: str
    direction: str
    mode: str
    bytes: int
    flop: int
    floor: float
    bound: str
    intensity: float
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    host: float | None = None
    samples: int = 0
    calls: int = 0
    peak_memory: int | None = None
    error: float | None = None
    allowed_error: float | None = None
    precision: str = ""
    problems: list = field(default_factory=list)
    peers: dict = field(default_factory=dict)

    @property
    def key(self):
        return f"{self.op}/{self.problem} {self.direction} {self.mode}"

    @property
    def fraction(self):
        """Share of the floor that was reached."""
        return self.floor / self.median if self.median else None

    def fastest_peer(self):
        """(name, Peer) of the fastest, or None."""
        timed = [(name, peer) for name, peer in self.peers.items() if peer.median]
        return min(timed, key=lambda pair: pair[1].median, default=None)

    @property
    def ratio(self):
        """How many times as fast as the fastest peer; None without one."""
        fastest = self.fastest_peer()
        return fastest[1].median / self.median if fastest and self.median else None


@dataclass
class Report:
    """Everything a run found."""

    stamp: dict
    ceilings: dict
    rows: list = field(default_factory=list)
    complete: bool = False

    def save(self, path):
        """Writes the JSON file, aside first, so that there is always a whole one."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".writing")
        aside.write_text(json.dumps(_rounded(asdict(self)), separators=(",", ":")) + "\n", encoding="utf-8")
        os.replace(aside, path)

    @classmethod
    def load(cls, path):
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = data.pop("rows")
        for row in rows:
            row["peers"] = {name: Peer(**peer) for name, peer in row["peers"].items()}
        return cls(rows=[Row(**row) for row in rows], **data)


def time_text(seconds):
    """Three digits and a unit: 81.3 us, 0.448 ms."""
    if seconds is None:
        return "-"
    value, unit = (seconds * 1e6, "us") if seconds < 1e-4 else (seconds * 1e3, "ms")
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:#.3g} {unit}"


def size_text(count):
    """A count in the largest unit that leaves digits before the point: 67.1 M."""
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.3g} "


def ceilings_table(ceilings):
    table = Table(title="Ceilings, measured in this run", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("what", "measured", "by"):
        table.add_column(column, justify="right" if column == "measured" else "left")
    for name in ("copy", "read", "write"):
        table.add_row(
            f"device memory, {name}", f"{getattr(ceilings, name) / 1e12:.3g} TB/s", ceilings.how.get(name, "")
        )
    for mode, rate in ceilings.matrix.items():
        table.add_row(f"products, {mode}", f"{rate / 1e12:.3g} TFLOP/s", ceilings.how.get(f"matrix {mode}", ""))
    for dtype, rate in ceilings.vector.items():
        table.add_row(f"multiply-adds, {dtype}", f"{rate / 1e12:.3g} TFLOP/s", ceilings.how.get(f"vector {dtype}", ""))
    return table


def result_tables(rows):
    """One table for each op, what rawkern does; and one for all ops with the peers, if there are any."""
    for op in dict.fromkeys(row.op for row in rows):
        yield _op_table(op, [row for row in rows if row.op == op])
    if any(row.peers for row in rows):
        yield _peer_table([row for row in rows if row.peers])


def _op_table(op, rows):
    table = Table(title=op, box=box.SIMPLE_HEAD, title_justify="left")
    left = ("problem", "direction", "mode")
    numbers = (
        "median",
        "p20 .. p80",
        "moves",
        "FLOP",
        "GB/s",
        "TFLOP/s",
        "floor",
        "reached",
        "memory",
        "host",
        "error",
    )
    for column in left:
        table.add_column(column, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict")
    for row in rows:
        done = row.median is not None
        table.add_row(
            row.problem,
            row.direction,
            row.precision or row.mode,
            time_text(row.median),
            f"{time_text(row.p20)} .. {time_text(row.p80)}" if done else "-",
            f"{size_text(row.bytes)}B",
            size_text(row.flop),
            f"{row.bytes / row.median / 1e9:.0f}" if done else "-",
            f"{row.flop / row.median / 1e12:.3g}" if done else "-",
            f"{time_text(row.floor)} {row.bound[:3]}",
            f"{row.fraction:.0%}" if done else "-",
            f"{size_text(row.peak_memory)}B" if row.peak_memory else "-",
            f"{row.host * 1e6:.0f} us" if done else "-",
            f"{row.error:.1e}" if row.error is not None else "-",
            "[red]" + "; ".join(row.problems) + "[/red]" if row.problems else "[green]ok[/green]",
        )
    return table


def _peer_table(rows):
    present = [name for name in PEERS if any(name in row.peers for row in rows)]
    table = Table(title="PyTorch on the same data", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("problem", "direction", "mode"):
        table.add_column(column, no_wrap=True)
    for column in ("rawkern", *present, "faster than the fastest", "memory: rawkern, least peer"):
        table.add_column(column, justify="right")
    for row in rows:
        least = min((peer.peak_memory for peer in row.peers.values() if peer.peak_memory), default=None)
        memory = f"{size_text(row.peak_memory)}B, {size_text(least)}B" if least and row.peak_memory else "-"
        cells = [_peer_text(row.peers.get(name)) for name in present]
        ratio = f"{row.ratio:.2f} x" if row.ratio else "-"
        table.add_row(f"{row.op}/{row.problem}", row.direction, row.mode, time_text(row.median), *cells, ratio, memory)
    return table


def _peer_text(peer):
    if peer is None:
        return ""
    return time_text(peer.median) if peer.median else f"[dim]{peer.note or '-'}[/dim]"


def _rounded(value):
    """Five digits of every number: more than a measurement has, and files stay small."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
