"""The demo's picture: what went in, what came out, and both loss curves."""

import io

from matplotlib.figure import Figure
from PIL import Image
from torch.nn import functional

from .demo_decoder import SCALE, psnr

_HEIGHT, _WIDTH = 192, 240  # of what is shown of each held-out part


def draw(result, output):
    """Writes the picture as a PNG of 256 colours, which is a third of the size of the full one."""
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    rows = len(result.photographs)
    grid = figure.add_gridspec(rows + 1, 4, height_ratios=[1] * rows + [0.8])
    for row, (photograph, bicubic, ours) in enumerate(
        zip(result.photographs, result.bicubic, result.images, strict=True)
    ):
        nearest = functional.interpolate(photograph.held_out_small[None], scale_factor=SCALE)[0]
        for column, (name, image) in enumerate(
            {"low resolution": nearest, "bicubic": bicubic, "ours": ours, "original": photograph.held_out}.items()
        ):
            score = "" if name == "original" else f"  {psnr(image, photograph.held_out):.2f} dB"
            _show(figure.add_subplot(grid[row, column]), image, name + score)
    _curves(figure.add_subplot(grid[rows, :]), result)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(output, format="PNG", optimize=True)


def _show(axes, image, title):
    height, width = image.shape[1:]
    top, left = max(0, (height - _HEIGHT) // 2), max(0, width - _WIDTH)
    axes.imshow(image[:, top : top + _HEIGHT, left : left + _WIDTH].clamp(0, 1).permute(1, 2, 0).numpy())
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()


def _curves(axes, result):
    axes.plot(result.plain_losses, color="0.75", linewidth=3, label="plain PyTorch")
    axes.plot(result.losses, color="tab:blue", linewidth=0.8, label="rawkern, same parameters and batches")
    axes.set_xlabel("step")
    axes.set_ylabel("squared error / bicubic's")
    axes.set_title(f"the loss curves differ by at most {result.difference:.1e} of their value", fontsize=10)
    axes.legend()
