"""The emulation itself: what it refuses and what it counts."""

import copy

import pytest
import torch
from torch import nn

from tests.desk.counts import counting
from tests.desk.emulated import CUDA, Emulated, on_cpu


def own(*values):
    return torch.tensor(values, device="cuda")


def test_a_tensor_says_where_it_is():
    for tensor in (own(1.0), torch.zeros(2).cuda(), torch.zeros(2).to("cuda"), own(1)[:1] + 1):
        assert isinstance(tensor, Emulated) and tensor.is_cuda and tensor.device == CUDA
    assert own(1.0).cpu().device == torch.device("cpu")
    assert torch.zeros_like(own(1.0), device="cpu").device == torch.device("cpu")
    assert torch.zeros(3).device == torch.device("cpu")
    assert own(1).new_zeros(3).is_cuda and own(1).new_tensor([1]).is_cuda
    assert torch.empty(3, device=own(1).device).is_cuda


@pytest.mark.parametrize(
    "mixed",
    [
        lambda a, b: a + b,
        lambda a, b: b * a,
        lambda a, b: torch.cat([a, b]),
        lambda a, b: torch.cat([a, b[0].view(1)]),
        lambda a, b: a.index_select(0, b.long()),
        lambda a, b: torch.searchsorted(a, b),
        lambda a, b: a.add_(b),
        lambda a, b: b.add_(a),
        lambda a, b: b[a.long()],
        lambda a, b: a.index_put_((a.long(),), b),
        lambda a, b: torch.mm(a[None], b[:, None]),
        lambda a, b: a.scatter_(0, b.long(), a),
    ],
)
def test_mixing_devices_is_found(mixed):
    with pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
        mixed(own(0.0, 1.0), torch.tensor([0.0, 1.0]))


def test_numbers_and_indices_may_come_from_the_cpu():
    a = own(1.0, 2.0, 3.0)
    assert torch.equal(on_cpu(a * torch.tensor(2.0)), torch.tensor([2.0, 4.0, 6.0]))
    with counting() as counts:
        assert torch.equal(on_cpu(a[torch.tensor([2])]), torch.tensor([3.0]))
    assert counts.num_waits == 1


def test_host_memory_is_refused():
    for refused in (lambda t: t.numpy(), lambda t: t.detach().numpy()):
        with pytest.raises(TypeError, match="convert cuda:0 device type tensor to numpy"):
            refused(own(1.0))
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device="cuda", generator=torch.Generator())


@pytest.mark.parametrize(
    "waits, work",
    [
        (1, lambda t: t[0].item()),
        (1, lambda t: int(t.sum())),
        (1, lambda t: bool((t > 0).any())),
        (1, lambda t: t.tolist()),
        (1, lambda t: t.nonzero()),
        (1, lambda t: t[t > 0]),
        (1, lambda t: torch.unique(t)),
        (1, lambda t: torch.bincount(t)),
        (1, lambda t: torch.equal(t, t + 1)),
        (1, lambda t: t.repeat_interleave(t)),
        (1, lambda t: t.cpu()),
        (1, lambda t: torch.tensor([1], device="cuda")),
        (1, lambda t: t.new_tensor([1])),
        (1, lambda t: torch.ones(2, dtype=torch.int64).to("cuda")),
        (1, lambda t: t.copy_(torch.ones(3, dtype=torch.int64))),
        (1, lambda t: t.to("cuda").to("cpu", torch.float64)),
        (1, lambda t: torch.ones(2).to("cuda", non_blocking=True)),
        (1, lambda t: torch.cuda.synchronize()),
        (1, lambda t: torch.cuda.current_stream().synchronize()),
        (0, lambda t: torch.ones(2).pin_memory().to("cuda", non_blocking=True)),
        (0, lambda t: t.cpu if t.is_cuda else None),
        (0, lambda t: t.to("cpu", non_blocking=True)),
        (0, lambda t: t.repeat_interleave(t, output_size=6)),
        (0, lambda t: t.masked_fill(t > 1, 0).sort().values.cumsum(0)),
        (0, lambda t: t.index_add(0, t - 1, t + 1).clamp(min=0)),
        (0, lambda t: torch.zeros(3, device="cuda", dtype=torch.int64).add_(t)),
    ],
)
def test_waits_are_counted(waits, work):
    tensor = own(1, 2, 3)
    with counting() as counts:
        work(tensor)
    assert counts.num_waits == waits, str(counts)


def test_launches_are_counted_with_their_place():
    tensor = own(1, 2, 3)
    with counting() as counts:
        made = torch.empty(3, device="cuda", dtype=torch.int64)
        made.view(1, 3)[0, 1:].detach()
    assert counts.num_launches == 0
    with counting() as counts:
        (tensor + 1).mul_(2)
        torch.zeros(2, device="cuda")
    assert counts.num_launches == 3
    assert all(place.startswith("test_emulation.py:") for _, place in counts.launches)


def test_a_kernel_is_one_launch_on_the_tensors_memory():
    from cce_torchrec.gpu import probe, usable

    seen = []
    with counting() as counts, pytest.MonkeyPatch.context() as patch:
        inner = probe.launch
        patch.setattr(probe, "launch", lambda k, g, t: (inner(k, g, t), seen.append(t)))
        probe.run(CUDA)
    assert [on_cpu(t).tolist() for t in seen] == [[1]]
    assert counts.num_waits == 1  # for what the kernel wrote, so that one that fails does so here
    assert {what for what, _ in counts.launches} == {"zeros", "Triton's _probe"}
    assert usable.usable(CUDA) and not usable.usable(torch.device("cpu"))
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        probe._probe[(1,)](torch.zeros(1), own(1))


def test_gradients_cross_devices():
    weight = torch.ones(3, requires_grad=True)
    (weight.to("cuda") * own(1.0, 2.0, 3.0)).sum().backward()
    assert torch.equal(weight.grad, torch.tensor([1.0, 2.0, 3.0]))
    there = nn.Parameter(own(1.0, 2.0))
    (there.square().cpu() * torch.tensor([1.0, 2.0])).sum().backward()
    assert there.grad.is_cuda and torch.equal(on_cpu(there.grad), torch.tensor([2.0, 8.0]))


def test_modules_move_and_are_copied():
    module = nn.Linear(2, 2).to("cuda")
    assert all(p.is_cuda and isinstance(p, nn.Parameter) for p in module.parameters())
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.weight.zero_()
    assert on_cpu(module.weight).any() and isinstance(other.weight, nn.Parameter)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 2, device="cuda")).sum().backward()
    before = on_cpu(module.weight).clone()
    optimizer.step()
    assert not torch.equal(before, on_cpu(module.weight))
