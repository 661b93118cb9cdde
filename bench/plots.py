"""Pictures of a report: the roofline with every problem on it, and bars of the ratio to the fastest peer."""

from pathlib import Path

from .floors import Ceilings

_DIRECTIONS = {"forward": "o", "backward": "s", "input_gradient": "^", "weight_gradient": "v", "train": "D"}
_MARKED = 12  # most bars in one picture


def draw(report, folder):
    """Writes roofline.png and, where there are peers, peers.png into `folder`; returns their paths.

    Needs matplotlib; without it nothing is drawn.
    """
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in report.rows if row.median and not row.problems]
    paths = []
    if rows:
        paths.append(_roofline(rows, report, folder / "roofline.png"))
    if compared := [row for row in rows if row.ratio]:
        paths.append(_bars(compared, report, folder / "peers.png"))
    return paths


def _roofline(rows, report, path):
    import matplotlib.pyplot as plt
    import numpy as np

    ceilings = Ceilings(**report.ceilings)
    figure, axes = plt.subplots(figsize=(10, 6.5), constrained_layout=True)
    lowest = max(min(row.intensity for row in rows) / 2, 0.005)
    highest = max(max(row.intensity for row in rows) * 2, 400)
    intensity = np.geomspace(lowest, highest, 200)
    colours = {}
    for mode in ceilings.matrix:
        if any(row.mode == mode for row in rows):
            roof = np.minimum(intensity * ceilings.copy, ceilings.matrix_rate(mode))
            (line,) = axes.plot(intensity, roof / 1e12, label=f"roof, {mode}")
            colours[mode] = line.get_color()
    for mode, colour in colours.items():
        for direction, marker in _DIRECTIONS.items():
            chosen = [row for row in rows if row.mode == mode and row.direction == direction]
            if chosen:
                speeds = [row.flop / row.median / 1e12 for row in chosen]
                axes.scatter([row.intensity for row in chosen], speeds, color=colour, marker=marker, s=26, alpha=0.7)
    for row in rows:
        is_model = "model" in row.problem and row.op.startswith("conv") and row.direction == "forward"
        if is_model and row.mode == "float32/tf32":
            place = row.intensity, row.flop / row.median / 1e12
            axes.annotate(_short(row), place, fontsize=7, xytext=(4, -8), textcoords="offset points")
    for direction in dict.fromkeys(row.direction for row in rows):
        axes.scatter([], [], color="grey", marker=_DIRECTIONS[direction], label=direction.replace("_", " "))
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="TFLOP/s")
    axes.set_title(f"rawkern on {report.stamp['device']}: every problem under the measured roofs")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _bars(rows, report, path):
    import matplotlib.pyplot as plt

    # One bar for every problem and direction, in the mode that most people use; of many the sweep's are left out.
    rows = [row for row in rows if row.mode in ("float32/tf32", "bfloat16")] or rows
    if len(rows) > 4 * _MARKED:
        rows = [row for row in rows if "sweep" not in row.problem] or rows
    rows = sorted(rows, key=lambda row: row.ratio)
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.26 * len(rows)), constrained_layout=True)
    colours = ["tab:green" if row.ratio >= 1 else "tab:red" for row in rows]
    places = range(len(rows))
    axes.barh(places, [row.ratio for row in rows], color=colours, alpha=0.8)
    for place, row in zip(places, rows, strict=True):
        axes.text(row.ratio, place, f" {row.ratio:.2f} x {row.fastest_peer()[0]}", va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(places, [f"{_short(row)}, {row.direction}, {row.mode}" for row in rows], fontsize=7)
    axes.set(xscale="log", xlabel="times as fast as the fastest of PyTorch's ways (further right is better)")
    axes.set_title(f"rawkern against PyTorch {report.stamp.get('torch')} on {report.stamp['device']}")
    axes.margins(x=0.15, y=0.005)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def _short(row):
    name = row.op.replace("conv_transpose2d", "conv")
    return name if row.problem == "model" else f"{name}/{row.problem}"
