"""CUDA graphs, streams, threads and several GPUs. All of it needs a GPU, some of it two."""

import threading

import pytest
import torch
from public_ops import OPS

import rawkern
import rawkern.nn

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def step(op, tensors):
    output = op.ours(*tensors)
    return output, *torch.autograd.grad(output.square().sum(), tensors)


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        rawkern.nn.ConvTranspose2dGELUGroupNorm(4, 8, 3, stride=2, num_groups=2),
        rawkern.nn.ConvTranspose2dAddMinGELUMul(8, 8, 3, add_value=0.5, multiply_value=2.0),
        rawkern.nn.GroupNorm(2, 8),
        rawkern.nn.ConvTranspose2dMinSumGELUAdd(8, 4, 3),
    )


@gpu
@pytest.mark.parametrize("name", OPS)
def test_a_captured_step(name):
    """Forward and backward in one graph, replayed on other values."""
    op = OPS[name]
    static = op.inputs(torch.float32, "cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(op, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(op, static)
    for factor in (1.0, 0.5, -1.0):
        with torch.no_grad():
            for tensor, value in zip(static, op.inputs(torch.float32, "cuda"), strict=True):
                tensor.copy_(value * factor)
        graph.replay()
        results = [tensor.clone() for tensor in captured]
        assert all(map(torch.equal, results, step(op, [tensor.detach().requires_grad_() for tensor in static])))


@gpu
def test_a_captured_training_step():
    """The whole step, optimizer included, gives the losses of the same training without a graph."""

    def training(captured):
        net = model().cuda()
        optimizer = torch.optim.Adam(net.parameters(), 1e-2, capturable=True)
        x = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(2)).cuda()

        def train():
            optimizer.zero_grad(set_to_none=True)
            loss = net(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                train()
        torch.cuda.current_stream().wait_stream(stream)
        if not captured:
            return [train().item() for _ in range(5)]
        graph = torch.cuda.CUDAGraph()
        optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            loss = train()
        losses = []
        for _ in range(5):
            graph.replay()
            losses.append(loss.item())
        return losses

    assert training(captured=True) == training(captured=False)


@gpu
def test_graphed_callables():
    net = model().cuda()
    plain = model().cuda()
    x = torch.randn(4, 4, 6, 6, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(net, (x,))
    y = torch.randn(4, 4, 6, 6, device="cuda", requires_grad=True)
    graphed(y).square().sum().backward()
    plain(y).square().sum().backward()
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@gpu
@pytest.mark.parametrize("name", OPS)
def test_streams(name):
    """Work goes on the current stream and is ordered there, with nothing else waiting for it."""
    op = OPS[name]
    expected = [tensor.clone() for tensor in step(op, op.inputs(torch.float32, "cuda", requires_grad=True))]
    streams = [torch.cuda.Stream() for _ in range(3)]
    values = op.inputs(torch.float32, "cuda")
    torch.cuda.synchronize()
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # the inputs are wrong until long after the launch
            tensors = [torch.full_like(value, torch.nan) for value in values]
            torch.cuda._sleep(10_000_000)
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
            results.append(step(op, [tensor.requires_grad_() for tensor in tensors]))
    torch.cuda.synchronize()
    for result in results:
        assert all(map(torch.equal, result, expected))


@gpu
def test_memory_freed_while_in_use():
    """Workspaces and inputs go back to the allocator at once: what it gives away next is used later, on that stream."""
    x = torch.randn(8, 16, 64, 64, device="cuda")
    w = torch.randn(16, 16, 3, 3, device="cuda")
    expected = rawkern.conv_transpose2d(x, w)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(50):
            torch.cuda._sleep(100_000)
            copy = x.clone()
            result = rawkern.conv_transpose2d(copy, w)
            del copy
            torch.full((8, 16, 64, 64), torch.nan, device="cuda")  # likely in the memory of the copy
        other = torch.cuda.Stream()
        other.wait_stream(stream)
        with torch.cuda.stream(other):
            doubled = rawkern.pointwise(result, rawkern.epilogue.Mul(2.0))
        result.record_stream(other)
        del result
        torch.full_like(doubled, torch.nan)
    torch.cuda.synchronize()
    assert torch.equal(doubled, expected * 2)


@gpu
def test_threads_with_streams_of_their_own():
    op = OPS["conv_transpose2d_gelu_group_norm"]
    expected = [tensor.clone() for tensor in step(op, op.inputs(torch.float32, "cuda", requires_grad=True))]
    torch.cuda.synchronize()
    wrong = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                results = step(op, op.inputs(torch.float32, "cuda", requires_grad=True))
                torch.cuda.current_stream().synchronize()
                wrong.extend(1 for ours, other in zip(results, expected, strict=True) if not torch.equal(ours, other))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@gpu
def test_a_thread_that_never_used_the_gpu():
    """Its first CUDA call is the repetition of a launch that another thread decided on."""
    x = torch.randn(100, device="cuda")
    expected = rawkern.gelu(x)
    result = []
    thread = threading.Thread(target=lambda: result.append(rawkern.gelu(x)))
    thread.start()
    thread.join()
    assert torch.equal(result[0], expected)


@gpu
def test_mixed_devices():
    x, w = torch.randn(2, 4, 5, 5, device="cuda"), torch.randn(4, 4, 3, 3)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"different devices: cuda:0 and cpu"):
            rawkern.conv_transpose2d(x, w)
    with pytest.raises(RuntimeError, match=r"different devices: cuda:0 and cpu"):
        rawkern.group_norm(x, 2, torch.ones(4), torch.ones(4))


@two_gpus
@pytest.mark.parametrize("name", OPS)
def test_another_gpu_than_the_current_one(name):
    op = OPS[name]
    with torch.cuda.device(0):
        expected = step(op, op.inputs(torch.float32, "cuda:0", requires_grad=True))
        for _ in range(2):
            results = step(op, op.inputs(torch.float32, "cuda:1", requires_grad=True))
            assert torch.cuda.current_device() == 0
        for ours, other in zip(results, expected, strict=True):
            assert ours.device == torch.device("cuda:1") and torch.equal(ours.cpu(), other.cpu())
        with torch.cuda.device(1):
            again = step(op, op.inputs(torch.float32, "cuda:0", requires_grad=True))
    assert all(map(torch.equal, again, expected))


@two_gpus
def test_two_gpus_are_named():
    x, w = torch.randn(2, 4, 5, 5, device="cuda:0"), torch.randn(4, 4, 3, 3, device="cuda:1")
    with pytest.raises(RuntimeError, match="different devices: cuda:0 and cuda:1"):
        rawkern.conv_transpose2d(x, w)
