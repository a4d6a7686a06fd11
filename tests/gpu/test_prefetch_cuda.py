"""The prefetch pipeline over tables in unified memory, clustering between its steps."""

import pytest
import torch
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist
from torchrec.modules.embedding_configs import PoolingType

from cce_torchrec.clustering import cluster
from cce_torchrec.clustering.local_chunks import fused_rows, uncached
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan
from tests.support.models import Batch, Loss, batch, tables

STEPS = 7

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("one_rank"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def run(prefetching, kernel):
    """Outputs of every step, and the tables at the end."""
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    model = Loss()
    plan = make_plan(model, tables(PoolingType.MEAN), device, "tw")
    for sharding in plan.plan["collection"].values():
        sharding.compute_kernel = kernel
    torch.manual_seed(1)
    sharders = get_default_sharders({"prefetch_pipeline": prefetching})
    model = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders)
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "over" in n], lr=0.1)
    source = iter([Batch(batch(10 * step, False)) for step in range(STEPS)])
    pipeline = PrefetchTrainPipelineSparseDist(model, optimizer, device) if prefetching else None
    outputs = []
    for step in range(STEPS):
        if pipeline:
            out = pipeline.progress(source)
        else:
            optimizer.zero_grad()
            loss, out = model(next(source).to(device))
            loss.backward()
            optimizer.step()
        outputs.append(out.cpu())
        if step in (2, 4):
            cluster(model)
    with uncached(model):
        rows = {n: w.clone().cpu() for n, (w, _) in fused_rows(model.module.collection).items()}
    return outputs, rows


@pytest.mark.parametrize("kernel", ["fused", "fused_uvm_caching"])
def test_prefetch_pipeline_equals_the_plain_loop(kernel):
    outputs, rows = run(False, "fused")
    piped, piped_rows = run(True, kernel)
    for step, (a, b) in enumerate(zip(outputs, piped, strict=True)):
        torch.testing.assert_close(a, b, msg=f"step {step}")
    for name in rows:
        torch.testing.assert_close(rows[name], piped_rows[name], msg=name)
