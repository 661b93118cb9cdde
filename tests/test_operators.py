"""The operators behind the public functions: torch.library's own checks, fakes, repeated launches, other tensors."""

import dataclasses
import gc
import threading

import numpy as np
import pytest
import sweep
import torch
from public_ops import OPS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import rawkern
from rawkern.autograd import conv_transpose2d, conv_transpose2d_gelu_group_norm, dlpack
from rawkern.autograd.operator import Operator, forget_plans, operators
from rawkern.epilogue import GELU, Add, Div, Mul
from rawkern.runtime import Kernel, Tape, pointer

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def dispatched(monkeypatch):
    """(name, arguments) of every operator that is called, as the dispatcher would get them."""
    calls = []
    kind = Operator._kind

    def note(operator, tensors, static):
        key, addresses = kind(operator, tensors, static)
        calls.append((operator.name, operator.op, operator._arguments(tensors, key[0])))
        return key, addresses

    monkeypatch.setattr(Operator, "_kind", note)
    return calls


def differentiate(op, tensors):
    """The op's output and its gradients, as often as it can be differentiated."""
    output = op.ours(*tensors)
    grads = torch.autograd.grad(output.square().sum(), tensors, create_graph=op.last > 1)
    if op.last > 1:
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors)
    return output, *grads


def calls_of(op, dispatched, **options):
    """Every operator call of forward and backward passes, with and without gradients."""
    differentiate(op, op.inputs(requires_grad=True, **options))
    op.ours(*op.inputs(**options))
    return {name: (overload, arguments) for name, overload, arguments in dispatched}


def detached(arguments, requires_grad=False):
    """The arguments with new tensors."""

    def new(value):
        if isinstance(value, torch.Tensor):
            value = value.detach().clone()
            return value.requires_grad_(requires_grad and value.is_floating_point())
        return [new(item) for item in value] if isinstance(value, (list, tuple)) else value

    return tuple(new(value) for value in arguments)


def test_every_operator_is_reached(dispatched):
    names = set()
    for op in OPS.values():
        names |= calls_of(op, dispatched).keys()
    assert names == {operator.name for operator in operators()}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, channels_last, device, dispatched):
    for overload, arguments in calls_of(OPS[name], dispatched, device=device, channels_last=channels_last).values():
        torch.library.opcheck(overload, detached(arguments))


@pytest.mark.parametrize("name", OPS)
def test_opcheck_of_what_is_differentiated(name, device, dispatched):
    """The operators that a public function may call itself: their derivatives under compilation, dynamic shapes too."""
    op = OPS[name]
    for requires_grad in (True, False):
        dispatched.clear()
        op.ours(*op.inputs(device=device, requires_grad=requires_grad))
        assert len({name for name, _, _ in dispatched}) == 1
        _, overload, arguments = dispatched[-1]
        torch.library.opcheck(overload, detached(arguments, requires_grad=True))


@pytest.mark.parametrize("batched", ["the first tensor", "all tensors"])
@pytest.mark.parametrize("name", OPS)
def test_operators_in_vmap(name, batched, device, dispatched):
    """The operators themselves, as compiled programs call them, in one vmap and in two."""
    calls = calls_of(OPS[name], dispatched, device=device)
    for overload, arguments in calls.values():
        leaves, spec = tree_flatten(list(detached(arguments)))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        if batched == "the first tensor":
            places = places[:1]

        def function(*tensors, overload=overload, leaves=leaves, spec=spec, places=places):
            given = dict(zip(places, tensors, strict=True))
            return overload(*tree_unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)], spec))

        halved = [leaves[i] / 2 if leaves[i].is_floating_point() else leaves[i] for i in places]
        batches = [torch.stack([leaves[i], half]) for i, half in zip(places, halved, strict=True)]
        expected = [function(*(leaves[i] for i in places)), function(*halved)]
        expected = tree_map(lambda *items: torch.stack(items), *expected)
        torch.testing.assert_close(torch.vmap(function)(*batches), expected)
        twice = torch.vmap(torch.vmap(function))(*(batch.unsqueeze(1) for batch in batches))
        torch.testing.assert_close(twice, tree_map(lambda batch: batch.unsqueeze(1), expected))


def layout(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("arrangement", ["contiguous", "channels-last", "permuted", "strided"])
def test_fakes_are_exact(name, arrangement, device, dispatched):
    """Shape, dtype and strides of every result, also where the inputs lie in memory in unusual ways."""

    def arranged(tensors):
        x = tensors[0].detach()
        if arrangement == "channels-last":
            x = x.to(memory_format=torch.channels_last)
        elif arrangement == "permuted":
            x = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
        elif arrangement == "strided":
            x = x.repeat_interleave(2, dim=-1)[..., ::2]
        return [x.requires_grad_(), *tensors[1:]]

    from torch._subclasses.fake_tensor import FakeTensorMode

    op = OPS[name]
    real = differentiate(op, arranged(op.inputs(device=device, requires_grad=True)))
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(tensor) for tensor in arranged(op.inputs(device=device, requires_grad=True))]
    with mode:
        faked = differentiate(op, fakes)
    assert [layout(tensor) for tensor in faked] == [layout(tensor) for tensor in real]


@pytest.mark.parametrize("name", OPS)
def test_meta_tensors(name):
    op = OPS[name]
    output = op.ours(*op.inputs(device="meta"))
    assert output.is_meta and output.shape == op.ours(*op.inputs()).shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_repeated_calls(name, dtype, device, monkeypatch):
    """The second call of a kind decides nothing, and is right: for other values, in other memory."""
    check_repeated_calls(OPS[name], dtype, device, monkeypatch)


#: Channels enough for tensor cores, whose kernels have workspaces of their own.
OF_MANY_CHANNELS = {
    name: dataclasses.replace(OPS[name], shapes=((2, 40, 3, 5), (40, 24, 3, 2), *others))
    for name, others in (
        ("conv_transpose2d", ((48,),)),
        ("conv_transpose2d with an epilogue", ((48,), (48, 1, 1))),
        ("conv_transpose2d_gelu_group_norm", ((48,), (48,), (48,))),
        ("conv_transpose2d_min_sum_gelu_add", ((48,), (3, 1, 1))),
    )
}


@pytest.mark.parametrize("arch", ["sm_90a", "sm_80"])
@pytest.mark.parametrize("name", OF_MANY_CHANNELS)
def test_repeated_calls_on_tensor_cores(name, arch, device, monkeypatch):
    with sweep.architecture(arch):
        check_repeated_calls(OF_MANY_CHANNELS[name], torch.float16, device, monkeypatch)


def check_repeated_calls(op, dtype, device, monkeypatch):
    def results(tensors):
        return [tensor.detach().clone() for tensor in differentiate(op, tensors)]

    first = results(op.inputs(dtype, device, requires_grad=True))
    other = [(tensor * 1.5 + 0.25).detach() for tensor in op.inputs(dtype, device)]
    expected = results([tensor.requires_grad_() for tensor in other])
    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "launch", lambda *_, **__: pytest.fail("decided again"))
        again = results([tensor.detach().clone().requires_grad_() for tensor in other])
        back = results(op.inputs(dtype, device, requires_grad=True))
    assert all(map(torch.equal, again, expected)) and all(map(torch.equal, back, first))
    forget_plans()
    assert all(map(torch.equal, results([tensor.detach().requires_grad_() for tensor in other]), expected))


def test_arguments_in_one_tensor(device):
    """Slices of one tensor are told apart, and one tensor in two places from two."""
    both = torch.arange(1.0, 9.0, device=device)
    x = torch.randn(2, 4, 6, device=device)
    for weight, bias in ((both[:4], both[4:]), (both[4:], both[:4]), (both[:4], both[:4]), (both[1:5], both[2:6])):
        for _ in range(2):
            expected = torch.nn.functional.group_norm(x, 2, weight, bias)
            torch.testing.assert_close(rawkern.group_norm(x, 2, weight, bias), expected)


@pytest.mark.parametrize("name", ["gelu", "pointwise", "group_norm", "gelu_group_norm"])
def test_what_is_copied_first(name, device, monkeypatch):
    """Inputs and gradients in layouts that the kernels do not know are copied in every call; nothing else is new."""
    op = OPS[name]

    def results(x, others):
        x.requires_grad_()
        output = op.ours(x, *others)
        return output.detach().clone(), *torch.autograd.grad(output, x, torch.ones((), device=device).expand(x.shape))

    forget_plans()
    _, *others = op.inputs(torch.float32, device)
    for turn in range(3):
        x = torch.randn(2, 4, 3, 10, device=device)[..., ::2]
        got, expected = results(x, others), results(x.detach().clone(), others)
        assert all(map(torch.equal, got, expected))
        if turn == 0:
            monkeypatch.setattr(Kernel, "launch", lambda *_, **__: pytest.fail("decided again"))
    monkeypatch.undo()
    for shape, strides in (((0, 4, 3, 5), (7, 1, 2, 9)), ((2, 4, 0, 5), (1, 3, 3, 3))):
        x = torch.empty_strided(shape, strides, device=device)
        assert all(result.shape == shape for result in results(x, others))


def test_addresses_without_alignment(device):
    memory = torch.randn(4 * 6 * 8 + 3, device=device)
    for offset in (0, 1, 2, 3, 0, 1):
        x = memory[offset : offset + 192].view(4, 6, 8)
        torch.testing.assert_close(rawkern.gelu(x), torch.nn.functional.gelu(x))


def test_other_numbers_are_other_calls(device):
    x = torch.randn(5, device=device)
    for value in (1.0, 2.0, 1.0):
        assert torch.equal(rawkern.pointwise(x, Add(value)), x + value)


def test_zero_has_two_signs(device):
    x = torch.tensor([1.0, -0.0], device=device)
    for _ in range(2):
        for zero in (0.0, -0.0):
            for ours, theirs in (
                (rawkern.pointwise(x, Div(zero)), x / zero),
                (rawkern.pointwise(x, (Add(zero), Mul(2.0))), (x + zero) * 2),
            ):
                assert torch.equal(ours.signbit(), theirs.signbit()), zero


def test_numbers_that_are_not_numbers(device):
    x = torch.randn(3, device=device)
    for _ in range(2):
        assert rawkern.pointwise(x, Add(float("nan"))).isnan().all()


def test_jit_trace(device):
    x = torch.randn(3, 4, device=device)
    traced = torch.jit.trace(lambda x: rawkern.gelu(x) * 2, (x,))
    torch.testing.assert_close(traced(x + 1), rawkern.gelu(x + 1) * 2)


def test_threads(device):
    """Many threads call one function at once, on tensors of their own."""
    op = OPS["conv_transpose2d_gelu_group_norm"]
    inputs = [[tensor * (i + 1) for tensor in op.inputs(torch.float32, device)] for i in range(8)]
    expected = [op.ours(*tensors) for tensors in inputs]
    wrong = []

    def work(i):
        for _ in range(20):
            if not torch.equal(op.ours(*inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_parameters_are_used_again(device, monkeypatch):
    made = []
    parameters = Tape._parameters
    monkeypatch.setattr(Tape, "_parameters", lambda tape: made.append(tape) or parameters(tape))
    x = torch.randn(4, device=device)
    for _ in range(5):
        rawkern.gelu(x)
    assert len(made) == 1


def test_only_so_many_calls_are_remembered(monkeypatch):
    monkeypatch.setattr("rawkern.runtime.Plans.MOST", 3)
    plans = next(operator for operator in operators() if operator.name == "pointwise")._plans
    for size in (1, 2, 3, 4, 5, 1):
        x = torch.randn(size)
        torch.testing.assert_close(rawkern.gelu(x), torch.nn.functional.gelu(x))
    assert len(plans) == 3


@pytest.fixture
def no_garbage_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", OPS)
def test_memory_is_freed_at_once(name, compiled, device, no_garbage_collection, monkeypatch):
    """Inputs, outputs, what is saved and what is computed with: none waits for a garbage collection.

    The CUDA graphs of torch.compile fail where memory that a backward pass was the last to need outlives it.
    """
    crossed, to_array = [], dlpack.to_array

    def noted(tensor, *name):
        if tensor is not None:
            crossed.append(StorageWeakRef(tensor.untyped_storage()))
        return to_array(tensor, *name)

    monkeypatch.setattr(dlpack, "to_array", noted)
    torch._dynamo.reset()
    function = torch.compile(OPS[name].ours, backend="aot_eager") if compiled else OPS[name].ours
    tensors = OPS[name].inputs(device=device, requires_grad=True)
    output = function(*tensors)
    grads = torch.autograd.grad(output.square().sum(), tensors)
    held = {tensor.untyped_storage()._cdata for tensor in (*tensors, output, *grads)}
    assert len(crossed) > len(tensors)
    assert {storage.cdata for storage in crossed if not storage.expired()} <= held
    torch._dynamo.reset()


SAVING = {
    "chain": lambda x, weight: rawkern.conv_transpose2d(x, weight, epilogue=(Mul(2.0), GELU())),
    "normalisation": lambda x, weight: rawkern.conv_transpose2d_gelu_group_norm(x, weight, None, 2),
}


@pytest.mark.parametrize("keeps_graph", [False, True])
@pytest.mark.parametrize("name", SAVING)
def test_what_was_saved_makes_room_for_gradients(name, keeps_graph, device, monkeypatch):
    """The convolution's output is gone before its gradients, of the same size, are allocated."""
    x, weight = (torch.randn(shape, device=device, requires_grad=True) for shape in ((2, 3, 5, 4), (3, 4, 3, 3)))
    output = SAVING[name](x, weight)
    (storage,) = (
        StorageWeakRef(tensor.untyped_storage())
        for tensor in output.grad_fn.saved_tensors
        if tensor is not None and tensor.shape == output.shape
    )
    freed = []
    for module in (conv_transpose2d, conv_transpose2d_gelu_group_norm):

        def gradients(*arguments, gradients=module.convolution_gradients):
            freed.append(storage.expired())
            return gradients(*arguments)

        monkeypatch.setattr(module, "convolution_gradients", gradients)
    grads = torch.autograd.grad(output.sum(), (x, weight), retain_graph=keeps_graph)
    assert freed == [not keeps_graph]
    if keeps_graph:
        again = torch.autograd.grad(output.sum(), (x, weight))
        assert all(torch.equal(one, other) for one, other in zip(grads, again, strict=True))


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.ones(2, 2).to_sparse(), "strided"),
        (torch.ones(2, 2, dtype=torch.int32), "int32"),
        (torch.ones(2, 2, dtype=torch.complex64), "complex64"),
    ],
    ids=["sparse", "integers", "complex"],
)
def test_errors(tensor, text):
    for _ in range(2):
        with pytest.raises(RuntimeError, match=text):
            rawkern.gelu(tensor)


def test_negated_views(device):
    x = torch.randn(3, 4, dtype=torch.complex64, device=device).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(rawkern.gelu(x), torch.nn.functional.gelu(x))


def test_a_subclass_of_tensor(device):
    class Tagged(torch.Tensor):
        pass

    x = torch.randn(3, 4, device=device)
    result = rawkern.gelu(x.as_subclass(Tagged))
    torch.testing.assert_close(result.as_subclass(torch.Tensor), torch.nn.functional.gelu(x))


def test_inference_mode(device):
    x = torch.randn(3, 4, device=device)
    with torch.inference_mode():
        y = rawkern.gelu(x)
    assert y.is_inference()
    torch.testing.assert_close(y, torch.nn.functional.gelu(x))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_mistakes_name_the_tensor(requires_grad):
    """Devices, layouts and dtypes that the kernels do not know."""
    x, w = torch.randn(2, 4, 3, 3, requires_grad=requires_grad), torch.randn(4, 4, 2, 2)
    with pytest.raises(RuntimeError, match="input and weight are on different devices: cpu and meta"):
        rawkern.group_norm(x, 2, torch.ones(4, device="meta"))
    with pytest.raises(RuntimeError, match=r"input and operands\[1\] are on different devices: cpu and meta"):
        rawkern.conv_transpose2d(x, w, epilogue=(Add(torch.ones(1)), Mul(torch.ones(1, device="meta"))))
    with pytest.raises(RuntimeError, match=r"rawkern takes strided tensors; weight is torch\.sparse_coo"):
        rawkern.conv_transpose2d(x, w.to_sparse())
    with pytest.raises(RuntimeError, match=r"weight has dtype torch\.float8_e4m3fn; rawkern's kernels take float64"):
        rawkern.conv_transpose2d(x, w.to(torch.float8_e4m3fn))


def test_storages_stay_resizable():
    """As FSDP needs them; and they can be written, also where NumPy is given a view that is read-only."""
    tensors = (
        torch.arange(6.0).view(2, 3).T,
        torch.ones(2, 1).expand(2, 4),
        torch.ones(0, 3),
        torch.ones(2, dtype=torch.int16),
    )
    for tensor in tensors:
        array = dlpack.to_array(tensor)
        memory = np.asarray(dlpack._Memory(tensor, array))
        for view in (array, memory):
            assert view.shape == tensor.shape and view.dtype == array.dtype and view.flags.writeable
            assert view.strides == array.strides and (view == array).all()
            assert not view.size or pointer(view) == tensor.data_ptr()
        tensor.untyped_storage().resize_(64)
