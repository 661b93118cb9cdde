"""Autocast and GradScaler: dtypes are those of torch's functions, errors at most twice theirs."""

import pytest
import torch
import torch.nn.functional as F
from public_ops import OPS

import rawkern
import rawkern.nn
from rawkern.epilogue import Add, Softplus
from rawkern.testing import assert_as_accurate_as_torch

LOW = [torch.bfloat16, torch.float16]


def run(function, tensors, device, dtype):
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    with torch.autocast(device, dtype):
        output = function(*tensors)
    return output, *torch.autograd.grad(output.float().square().sum(), tensors)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_autocast(name, dtype, compiled, device):
    op = OPS[name]
    # Half as large: sums of minima are otherwise so far down GELU's tail that only their rounding is compared.
    tensors = [tensor.detach().mul(0.5).requires_grad_() for tensor in op.inputs(torch.float32, device)]
    ours = torch.compile(op.ours, fullgraph=True, backend="aot_eager") if compiled else op.ours
    results = run(ours, tensors, device, dtype)
    theirs = run(op.theirs, tensors, device, dtype)
    doubles = [tensor.cpu().double().requires_grad_() for tensor in tensors]
    oracle = op.theirs(*doubles)
    oracle = oracle, *torch.autograd.grad(oracle.square().sum(), doubles)
    # A fused step runs in one dtype: parameters of what follows a convolution are rounded, where torch leaves them.
    rounding = torch.finfo(dtype).eps / 2
    for i, (mine, torchs, exact) in enumerate(zip(results, theirs, oracle, strict=True)):
        assert mine.dtype is torchs.dtype, i
        assert_as_accurate_as_torch(mine, torchs, exact, name=f"result {i}", rounding=rounding)


@pytest.mark.parametrize("name", OPS)
def test_float64_stays(name, device):
    op = OPS[name]
    tensors = op.inputs(device=device)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(op.ours(*tensors), op.ours(*tensors)) and op.ours(*tensors).dtype is torch.float64


def test_nothing_is_cast_without_autocast(device):
    x, w, b = OPS["conv_transpose2d"].inputs(torch.float32, device)
    with pytest.raises(RuntimeError, match="different dtypes"):
        rawkern.conv_transpose2d(x.bfloat16(), w, b)
    with torch.autocast(device, torch.bfloat16), torch.autocast(device, enabled=False):
        assert rawkern.conv_transpose2d(x, w).dtype is torch.float32


def test_meta_tensors_have_no_autocast():
    """As for torch's own functions, autocast for another device does not concern them."""
    with torch.autocast("cpu", torch.bfloat16):
        for op in OPS.values():
            tensors = op.inputs(torch.float32, "meta")
            ours, theirs = op.ours(*tensors), op.theirs(*tensors)
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)


def test_chains_promote(device):
    x, o = torch.randn(2, 4, 3, 3, device=device, dtype=torch.bfloat16), torch.randn(4, 1, 1, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert rawkern.pointwise(x, Add(o)).dtype is (x + o).dtype
        assert rawkern.pointwise(x, Softplus()).dtype is F.softplus(x).dtype
        assert rawkern.group_norm(x, 2, o.flatten()).dtype is F.group_norm(x, 2, o.flatten()).dtype


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_training_with_a_scaler(dtype, device):
    """The loss curve of the same model in torch's modules, and overflows that the scaler has to notice."""

    def model(library):
        torch.manual_seed(0)
        return torch.nn.Sequential(
            library.ConvTranspose2d(4, 8, 3, stride=2), library.GELU(), library.GroupNorm(2, 8),
            library.ConvTranspose2d(8, 2, 3),
        ).to(device)  # fmt: skip

    def losses(net):
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**40)  # too much at first
        generator = torch.Generator().manual_seed(1)
        x, target = (torch.randn(shape, generator=generator).to(device) for shape in ((4, 4, 5, 5), (4, 2, 13, 13)))
        for _ in range(40):
            optimizer.zero_grad()
            with torch.autocast(device, dtype):
                loss = F.mse_loss(net(x).float(), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            yield loss.item()
        scales.append(scaler.get_scale())

    scales = []
    ours, theirs = list(losses(model(rawkern.nn))), list(losses(model(torch.nn)))
    assert ours[-1] < ours[0] * 0.98
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 0.02 * theirs[0]
    assert dtype is torch.bfloat16 or max(scales) < 2.0**40
