"""torch.compile and torch.export: no graph break, the same results, no more compilations than torch's own functions."""

import pytest
import torch
from public_ops import OPS

import rawkern
import rawkern.nn
from rawkern.epilogue import GELU, Add, Minimum, Mul

SMALL = dict(atol=1e-12, rtol=1e-10)


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def backward(function, tensors):
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*tensors)
    return output.detach(), *torch.autograd.grad(output.square().sum(), tensors)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("name", OPS)
def test_compiled(name, channels_last, dynamic, device):
    op = OPS[name]
    compiled = torch.compile(op.ours, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    tensors = op.inputs(device=device, channels_last=channels_last)
    for ours, eager in zip(backward(compiled, tensors), backward(op.ours, tensors), strict=True):
        assert torch.equal(ours, eager) and ours.stride() == eager.stride()
    assert torch.equal(compiled(*tensors), op.ours(*tensors))


@pytest.mark.parametrize("name", OPS)
def test_sizes_change(name, device):
    """Batch, height and width change: not one compilation more than torch's own functions need."""
    op = OPS[name]
    shapes = [(2, 4, 3, 5), (3, 4, 6, 4), (5, 4, 4, 9), (4, 4, 9, 3)]

    def compilations(function):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, fullgraph=True, backend=counter)
        for shape in shapes:
            tensors = [torch.randn(shape, dtype=torch.float64, device=device), *op.inputs(device=device)[1:]]
            results = backward(compiled, tensors), backward(op.ours, tensors)
            for ours, eager in zip(*results, strict=True):
                torch.testing.assert_close(ours, eager, atol=1e-9, rtol=1e-7)
        return counter.frame_count

    assert compilations(op.ours) <= compilations(op.theirs)


@pytest.mark.parametrize("name", ["conv_transpose2d with an epilogue", "conv_transpose2d_gelu_group_norm"])
def test_inductor(name, device):
    """With the default backend, among operations that it compiles itself."""
    op = OPS[name]

    def function(x, *others):
        return op.ours(x.sin() * 2, *others).cos()

    tensors = op.inputs(device=device)
    compiled = torch.compile(function, fullgraph=True)
    for ours, eager in zip(backward(compiled, tensors), backward(function, tensors), strict=True):
        torch.testing.assert_close(ours, eager, **SMALL)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", OPS)
def test_reduce_overhead(name):
    """CUDA graphs, made by torch.compile."""
    op = OPS[name]
    compiled = torch.compile(op.ours, fullgraph=True, mode="reduce-overhead")
    tensors = op.inputs(device="cuda")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        ours = [tensor.clone() for tensor in backward(compiled, tensors)]
        for result, eager in zip(ours, backward(op.ours, tensors), strict=True):
            torch.testing.assert_close(result, eager, **SMALL)
        tensors = [tensor + 0.125 for tensor in tensors]


def model(device):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        rawkern.nn.ConvTranspose2d(
            3, 8, 4, stride=2, epilogue=(Add(torch.nn.Parameter(torch.randn(8, 1, 1))), Minimum(0.5), GELU(), Mul(2.0))
        ),
        rawkern.nn.GroupNorm(2, 8),
        rawkern.nn.GELU("tanh"),
        rawkern.nn.ConvTranspose2dGELUGroupNorm(8, 4, 3, num_groups=2),
        rawkern.nn.ConvTranspose2dAddMinGELUMul(4, 4, 3, add_value=0.5, multiply_value=2.0),
        rawkern.nn.ConvTranspose2dMinSumGELUAdd(4, 4, 3),
    ).to(device, torch.float64)


def test_modules(device):
    ours, compiled = model(device), model(device)
    program = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, device=device)
    for _ in range(2):
        ours(x).square().sum().backward()
        program(x).square().sum().backward()
    for plain, traced in zip(ours.parameters(), compiled.parameters(), strict=True):
        assert torch.equal(plain.grad, traced.grad)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, device):
    net = model(device)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, device=device)
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(net, (x,), dynamic_shapes=(sizes,), strict=strict)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("rawkern.conv_transpose2d" in name for name in names)
    for shape in ((2, 3, 4, 5), (3, 3, 6, 7)):
        x = torch.randn(shape, dtype=torch.float64, device=device)
        assert torch.equal(program.module()(x), net(x))


def test_the_precision_is_looked_up_when_the_program_runs(monkeypatch, device):
    asked = []
    monkeypatch.setattr(
        "rawkern.autograd.operator.default_precision", lambda tensor: asked.append(tensor.shape) or "tf32"
    )
    x, w, b = OPS["conv_transpose2d"].inputs(torch.float32, device)
    compiled = torch.compile(OPS["conv_transpose2d"].ours, fullgraph=True, backend="aot_eager")
    compiled(x, w, b)
    asked.clear()
    ours = compiled(x, w, b)
    assert len(asked) == 1
    tf32 = OPS["conv_transpose2d"]
    assert torch.equal(ours, tf32.ours(x, w, b))


def test_mistakes_are_named(device):
    """A wrong argument stops the compilation with the message of the eager function."""
    x = torch.randn(2, 4, 3, 5, device=device)
    compiled = torch.compile(lambda x, w: rawkern.conv_transpose2d(x, w), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="to have 5 channels, but got 4"):
        compiled(x, torch.randn(5, 2, 3, 3, device=device))
    with pytest.raises(Exception, match=r"input and weight have different dtypes: torch.float32 and torch.float64"):
        compiled(x, torch.randn(4, 2, 3, 3, device=device, dtype=torch.float64))
    with pytest.raises(Exception, match=f"input and weight are on different devices: {device}.* and meta"):
        compiled(x, torch.randn(4, 2, 3, 3, device="meta"))


@pytest.mark.parametrize("name", OPS)
def test_vmap_inside(name, device):
    op = OPS[name]
    x, *others = op.inputs(device=device)
    batch = torch.stack([x, x.cos(), x.sin()])

    def function(batch, *others):
        return torch.vmap(op.ours, (0, *(None for _ in others)))(batch, *others)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.stack([op.ours(x, *others) for x in batch])
    torch.testing.assert_close(compiled(batch, *others), expected)
