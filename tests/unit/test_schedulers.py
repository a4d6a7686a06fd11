"""Schedulers of learning rates in a checkpoint: they go on as if nothing had been between."""

import json

import pytest
import torch
from torch.optim import lr_scheduler as torch_schedulers
from torch.optim.swa_utils import SWALR

from cce_torchrec.checkpoint.schedulers import loader, saved_schedulers


class Halves:
    """A function of the epoch that has a state, which LambdaLR saves."""

    def __init__(self):
        self.calls = 0

    def __call__(self, epoch):
        self.calls += 1
        return 0.5**self.calls


def nested(optimizer):
    parts = [torch_schedulers.MultiStepLR(optimizer, [2]), torch_schedulers.LinearLR(optimizer)]
    return torch_schedulers.SequentialLR(optimizer, parts, [4])


MADE = {
    "MultiStepLR": lambda o: torch_schedulers.MultiStepLR(o, [2, 5, 5]),
    "SequentialLR": nested,
    "OneCycleLR": lambda o: torch_schedulers.OneCycleLR(o, 1.0, total_steps=20),
    "CyclicLR": lambda o: torch_schedulers.CyclicLR(o, 0.1, 1.0, step_size_up=3),
    "LambdaLR": lambda o: torch_schedulers.LambdaLR(o, Halves()),
    "CosineAnnealingWarmRestarts": lambda o: torch_schedulers.CosineAnnealingWarmRestarts(o, 3),
    "ReduceLROnPlateau": lambda o: torch_schedulers.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: SWALR(o, 0.01),
}


def made(name, lr):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=lr, momentum=0.9)
    return optimizer, MADE[name](optimizer)


def step(name, optimizer, scheduler):
    optimizer.step()
    scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))


RATES = [*((name, 0.5) for name in MADE), ("MultiStepLR", torch.tensor(0.5)),
         ("SequentialLR", torch.tensor(0.5)), ("LambdaLR", torch.tensor(0.5))]  # fmt: skip


@pytest.mark.parametrize(("name", "lr"), RATES)
def test_a_scheduler_goes_on_where_it_was(name, lr):
    optimizer, scheduler = made(name, lr)
    for _ in range(3):
        step(name, optimizer, scheduler)
    saved = json.loads(json.dumps(saved_schedulers([scheduler])))
    groups = optimizer.state_dict()
    other, resumed = made(name, lr)
    other.load_state_dict(groups)  # as load_checkpoint does
    loader([resumed], saved)()
    for _ in range(4):
        step(name, optimizer, scheduler)
        step(name, other, resumed)
        assert float(other.param_groups[0]["lr"]) == float(optimizer.param_groups[0]["lr"])


def test_other_schedulers_are_refused():
    saved = saved_schedulers([made("MultiStepLR", 0.1)[1]])
    for given in ([], ["OneCycleLR"], ["MultiStepLR", "CyclicLR"]):
        with pytest.raises(ValueError, match=r"has the schedulers \['MultiStepLR'\], and the job"):
            loader([made(name, 0.1)[1] for name in given], saved)


@pytest.mark.parametrize("value", [object(), torch.zeros(3), {1, 2}, lambda: 0])
def test_what_json_does_not_hold_is_refused_by_its_name(value):
    scheduler = made("LambdaLR", 0.1)[1]
    scheduler.lr_lambdas[0].calls = value
    with pytest.raises(ValueError, match=r"schedulers\[0\], a LambdaLR, keeps 'lr_lambdas'"):
        saved_schedulers([scheduler])
