"""FBGEMM's fused Adam (CUDA alone): what clustering and checkpoints do to its state."""

import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.clustering import cluster
from cce_torchrec.clustering.local_chunks import fused_rows
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("one_rank"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
N, K = 5000, 50


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        table = CCEEmbeddingBagConfig(
            name="t", num_embeddings=N, embedding_dim=16, feature_names=["f"], num_rows=K
        )
        self.collection = CCEEmbeddingBagCollection([table])
        parameters = self.collection.parameters()
        apply_optimizer_in_backward(torch.optim.Adam, parameters, {"lr": 0.01})

    def forward(self, features):
        return self.collection(features)


def build(seed):
    torch.manual_seed(seed)
    model, device = Model(), torch.device("cuda", 0)
    plan = make_plan(model, model.collection.embedding_bag_configs(), device, "tw")
    return DistributedModelParallel(
        model, device=device, plan=plan, sharders=get_default_sharders()
    )


def step(model, seed):
    ids = torch.randint(N, (256,), generator=torch.Generator().manual_seed(seed))
    features = KeyedJaggedTensor(["f"], ids, lengths=torch.full((128,), 2)).to("cuda")
    out = model(features).wait().values()
    out.square().sum().backward()
    return out.detach()


def rows_and_state(model):
    """Per chunk: weight and state, on the CPU; codes [N, chunks]."""
    rows = {
        name: {"weight": weight.cpu().clone(), **{k: v.cpu().clone() for k, v in state.items()}}
        for name, (weight, state) in fused_rows(model.module.collection).items()
    }
    return rows, model.module.collection.codes["t"].unpacked.cpu()


def check_followed(before, after, old_codes, new_codes):
    """First moments zero; second: main the mean over its ids, the helper its mean."""
    assert before["exp_avg"].any() and not after["exp_avg"].any()
    old, new = before["exp_avg_sq"].double(), after["exp_avg_sq"].double()
    sums = torch.zeros(K, old.shape[1], dtype=torch.double)
    sums.index_add_(0, new_codes, old[:K][old_codes])
    sizes = torch.bincount(new_codes, minlength=K)
    full = sizes > 0
    means = (sums / sizes.clamp(min=1)[:, None])[full]
    torch.testing.assert_close(new[:K][full], means, rtol=1e-4, atol=1e-12)
    helper = old[K:].mean(0).expand_as(new[K:])
    torch.testing.assert_close(new[K:], helper, rtol=1e-4, atol=1e-12)


def test_state_follows_a_clustering():
    model = build(0)
    for seed in range(3):
        step(model, seed)
    before, old_codes = rows_and_state(model)
    assert set(before["t#0"]) == {"weight", "exp_avg", "exp_avg_sq"}
    cluster(model)
    after, new_codes = rows_and_state(model)
    for j in range(4):
        chunks = before[f"t#{j}"], after[f"t#{j}"]
        check_followed(*chunks, old_codes[:, j], new_codes[:, j])
    step(model, 3)
    moved, _ = rows_and_state(model)
    for j in range(4):  # no step of several times lr, as from second moments of zero
        by = (moved[f"t#{j}"]["weight"] - after[f"t#{j}"]["weight"]).abs().max()
        assert 0 < by <= 2 * 0.01


def test_checkpoint_keeps_moments_and_steps(tmp_path):
    model, other = build(0), build(1)
    for seed in range(3):
        step(model, seed)
    cluster(model)
    step(model, 3)
    save_checkpoint(tmp_path, model, step=4)
    assert load_checkpoint(tmp_path, other).dropped == []
    for seed in (4, 5):
        torch.testing.assert_close(step(other, seed), step(model, seed))
