"""`python -m rawkern demo`: trains a super-resolution decoder made of rawkern's layers on two photographs.

It learns what bicubic enlargement by four misses, from the right part of each photograph, and is judged on the left
part, which training has never seen. (The split and the sizes below were picked by looking at the scores there, so they
show that the layers train, not how good the method is.) The same training in plain PyTorch, from the same parameters
and batches, must give the same loss curve. One picture shows it all.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .demo_decoder import SCALE, Decoder, Plain, Rawkern, enlarge, psnr, reduce

#: Columns of each photograph (of 640) that are held out, at the left. A multiple of SCALE.
_HELD_OUT = 256
#: Largest relative difference between the two loss curves. Float32 rounding alone, amplified by hundreds of steps of
#: training, makes a difference; a wrong gradient makes one that is many times this within the first steps.
_CURVES_AGREE = 0.01


@dataclass(frozen=True)
class Size:
    """How much work: the network's width and depth, patches of patch x patch low-resolution pixels."""

    features: int
    blocks: int
    batch: int
    patch: int
    steps: int
    rate: float


SIZES = {
    "small": Size(features=32, blocks=2, batch=8, patch=16, steps=400, rate=2e-3),
    "full": Size(features=48, blocks=4, batch=16, patch=32, steps=400, rate=1e-3),
}


@dataclass(frozen=True)
class Photograph:
    """One photograph: (3, H, W) colours in [0, 1], the part to train on and the part held out, both also reduced."""

    name: str
    train: torch.Tensor
    train_small: torch.Tensor
    held_out: torch.Tensor
    held_out_small: torch.Tensor


@dataclass(frozen=True)
class Result:
    """What a run gives. `images` are those of the held-out parts, one per photograph."""

    photographs: list
    images: list
    losses: list
    plain_losses: list
    seconds: float
    plain_seconds: float

    @property
    def bicubic(self):
        return [enlarge(photograph.held_out_small[None])[0] for photograph in self.photographs]

    @property
    def difference(self):
        """The largest relative difference between the loss curves; NaN if there is one in them."""
        ours, plain = torch.tensor(self.losses), torch.tensor(self.plain_losses)
        return ((ours - plain).abs() / torch.maximum(ours.abs(), plain.abs())).max().item()

    def scores(self):
        """PSNR of bicubic and ours for each photograph."""
        triples = zip(self.photographs, self.bicubic, self.images, strict=True)
        return {p.name: (psnr(bicubic, p.held_out), psnr(ours, p.held_out)) for p, bicubic, ours in triples}

    def failures(self):
        """What did not go as it must, in words."""
        found = [
            f"{name}: ours, {ours:.2f} dB, does not beat bicubic, {bicubic:.2f} dB"
            for name, (bicubic, ours) in self.scores().items()
            if not ours > bicubic
        ]
        if not self.difference <= _CURVES_AGREE:
            found.append(
                f"the loss curves differ by up to {self.difference:.1e} of their value, more than {_CURVES_AGREE}"
            )
        return found


def add_arguments(parser):
    """The options of `demo`."""
    parser.add_argument("--output", metavar="FILE", default="demo.png", help="the picture (default: demo.png)")
    parser.add_argument("--size", choices=tuple(SIZES), help="amount of work (default: full on a GPU, small on a CPU)")
    parser.add_argument("--steps", type=int, help="training steps (default: as the size says)")
    parser.add_argument("--device", help='such as "cuda:0" or "cpu" (default: the GPU if there is one)')
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batches (default: 0)")


def main(args):
    """Runs the demo. The exit status: 0 if ours beats bicubic and the loss curves agree, 1 if not."""
    console = Console()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    size = SIZES[args.size or ("full" if device.type == "cuda" else "small")]
    if args.steps is not None:
        if args.steps < 1:
            console.print("--steps must be at least 1")
            return 2
        size = replace(size, steps=args.steps)
    if not Path(args.output).absolute().parent.is_dir():
        console.print(f"--output {args.output}: there is no such folder", markup=False)
        return 2
    try:
        photographs = load_photographs()
        import matplotlib  # noqa: F401
    except ImportError as error:
        console.print(
            f"the demo needs scikit-learn and matplotlib ({error}): pip install 'rawkern[demo]'", markup=False
        )
        return 2
    result = run(size, device, args.seed, photographs, console)
    from .demo_picture import draw

    draw(result, args.output)
    _report(result, size, device, args.output, console)
    return 1 if result.failures() else 0


def load_photographs():
    """The photographs inside scikit-learn (CC BY 2.0, danielbuechele and vultilion on Flickr), each in two parts."""
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    names = [filename.replace("\\", "/").rpartition("/")[2].partition(".")[0] for filename in samples.filenames]
    return [_photograph(name, image) for name, image in zip(names, samples.images, strict=True)]


def _photograph(name, image):
    image = torch.tensor(image).permute(2, 0, 1).float() / 255
    image = image[:, : image.shape[1] // SCALE * SCALE, : image.shape[2] // SCALE * SCALE]
    # Each part is reduced by itself, so that nothing of the held-out part leaks into the other.
    held_out, train = image[:, :, :_HELD_OUT].contiguous(), image[:, :, _HELD_OUT:].contiguous()
    return Photograph(name, train, reduce(train[None])[0], held_out, reduce(held_out[None])[0])


def run(size, device, seed, photographs, console=None):
    """Trains both decoders and returns a Result."""
    torch.backends.cudnn.allow_tf32 = False  # on both sides: TF32's rounding would pull the loss curves apart
    torch.manual_seed(seed)
    plain = Decoder(Plain, size.features, size.blocks)
    ours = Decoder(Rawkern, size.features, size.blocks)
    ours.load_state_dict(plain.state_dict(), strict=True)
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn())
    columns += (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console or Console(quiet=True), transient=True) as progress:
        losses, seconds = _train(ours, "rawkern", size, device, seed, photographs, progress)
        plain_losses, plain_seconds = _train(plain, "plain PyTorch", size, device, seed, photographs, progress)
    with torch.no_grad():
        images = [ours(photograph.held_out_small[None].to(device))[0].cpu() for photograph in photographs]
    return Result(photographs, images, losses, plain_losses, seconds, plain_seconds)


def _train(decoder, name, size, device, seed, photographs, progress):
    """Trains in place. Returns the losses and the seconds it took without the first step, in which kernels compile."""
    decoder.to(device)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=size.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, size.steps)
    generator = torch.Generator().manual_seed(seed)
    task = progress.add_task(name, total=size.steps)
    losses = []
    for step in range(size.steps):
        small, large = (batch.to(device) for batch in _batch(photographs, size, generator))
        loss = (decoder(small) - large).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        # Shown as a fraction of bicubic's error, which evens out easy and difficult batches.
        losses.append(loss.detach() / (enlarge(small) - large).square().mean())
        if step == 0:
            losses[0].item()
            started = time.perf_counter()
        if step % 20 == 0:
            progress.update(task, completed=step + 1, description=f"{name}, loss {losses[-1].item():.3f}")
    losses = torch.stack(losses).tolist()
    progress.update(task, completed=size.steps)
    return losses, time.perf_counter() - started


def _batch(photographs, size, generator):
    """Random patches of the training parts, flipped and turned: (N, 3, p, p) and (N, 3, 4p, 4p)."""

    def draw(limit):
        return torch.randint(limit, (), generator=generator).item()

    small, large = [], []
    for index in range(size.batch):
        photograph = photographs[index % len(photographs)]
        _, height, width = photograph.train_small.shape
        top, left, flips = draw(height - size.patch + 1), draw(width - size.patch + 1), draw(8)
        small.append(_patch(photograph.train_small, top, left, size.patch, flips))
        large.append(_patch(photograph.train, SCALE * top, SCALE * left, SCALE * size.patch, flips))
    return torch.stack(small), torch.stack(large)


def _patch(image, top, left, size, flips):
    patch = image[:, top : top + size, left : left + size]
    patch = patch.flip([axis for axis in (1, 2) if flips & axis])
    return patch.transpose(1, 2) if flips & 4 else patch


def _report(result, size, device, output, console):
    table = Table(title=f"Held-out parts, enlarged {SCALE} times")
    for heading in ("photograph", "bicubic", "ours", "gain"):
        table.add_column(heading, justify="left" if heading == "photograph" else "right")
    for name, (bicubic, ours) in result.scores().items():
        table.add_row(name, f"{bicubic:.2f} dB", f"{ours:.2f} dB", f"{ours - bicubic:+.2f} dB")
    console.print(table)
    console.print(
        f"{size.steps} steps on {device}: {result.seconds:.1f} s with rawkern, {result.plain_seconds:.1f} s with plain "
        f"PyTorch (without the first step); loss curves differ by at most {result.difference:.1e} of their value; "
        f"{output} is written"
    )
    for failure in result.failures():
        console.print(failure, style="bold red", markup=False)
