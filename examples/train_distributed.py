"""Trains a decoder made of rawkern's modules on several GPUs, or on the emulator, and checks it against plain PyTorch.

    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py                # DistributedDataParallel
    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py --wrap fsdp    # FSDP2, fully_shard
    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py --measure      # images per second, too

Every process takes its part of the batch. The gradients of the first step must be those of the plain PyTorch model, on
one process, for the whole batch; the losses of all steps likewise. Without GPUs it runs over gloo at a small size.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import rawkern.nn

STEPS = 5


def decoder(library, channels):
    """To four times the height and width; `library` is torch.nn or rawkern.nn, whose parameters have the same names."""
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in ((4, channels), (channels, channels)):
        layers += [
            library.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1),
            library.GELU(),
            library.GroupNorm(4, outputs),
        ]
    return torch.nn.Sequential(*layers, library.ConvTranspose2d(channels, 3, 3, padding=1))


def data(count, size):
    """Inputs and targets, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((count, 4, size, size), generator=generator)
    return x, F.interpolate(x[:, :3], scale_factor=4).sin()


def train(model, x, target, average):
    """The gradients of the first step, and the losses of all of them."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        if step == 0:
            grads = [whole(parameter.grad).clone() for parameter in model.parameters()]
        optimizer.step()
        losses.append(average(loss.detach()))
    return grads, torch.stack(losses)


def whole(tensor):
    """All of a tensor of which FSDP keeps a part in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def wrapped(model, kind, device):
    if kind == "ddp":
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def images_per_second(model, x, target):
    """Of a training step, the median of some."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    seconds = []
    for _ in range(30):
        torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return len(x) / sorted(seconds)[len(seconds) // 2]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wrap", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--measure", action="store_true", help="also how many images a second one and all GPUs train")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # gradients are compared
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    world = dist.get_world_size()

    def average(loss):
        dist.all_reduce(loss)
        return loss / world

    channels, size, count = (64, 32, 16) if on_gpu else (8, 3, 4)
    count = -(-count // world) * world  # as many for each, whose average of means is then the mean
    x, target = (tensor.to(device) for tensor in data(count, size))
    part = slice(dist.get_rank() * count // world, (dist.get_rank() + 1) * count // world)
    model = wrapped(decoder(rawkern.nn, channels).to(device), arguments.wrap, device)
    grads, losses = train(model, x[part], target[part], average)
    plain_grads, plain_losses = train(decoder(torch.nn, channels).to(device), x, target, lambda loss: loss)
    for ours, theirs in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    torch.testing.assert_close(losses, plain_losses, rtol=1e-4, atol=0)
    report = f"{arguments.wrap}, {world} x {device.type}: gradients and losses are those of plain PyTorch"
    if arguments.measure and on_gpu:
        report += "; " + measured(model, channels, size, device, world)
    if dist.get_rank() == 0:
        print(report)
    dist.destroy_process_group()


def measured(model, channels, size, device, world):
    """Images per second on one GPU and on all, with the same number for each GPU."""
    x, target = (tensor.to(device) for tensor in data(64, size))
    alone = images_per_second(decoder(rawkern.nn, channels).to(device), x, target)
    dist.barrier()
    together = images_per_second(model, x, target) * world
    return f"{alone:.0f} images/s on one GPU, {together:.0f} on {world}: {together / alone / world:.0%} of linear"


if __name__ == "__main__":
    main()
