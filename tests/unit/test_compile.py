"""torch.compile of a model that holds the collection."""

import torch
from torch import nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        tables = [
            CCEEmbeddingBagConfig(
                name="t", num_embeddings=500, embedding_dim=16, feature_names=["f"], num_rows=9
            ),
            EmbeddingBagConfig(name="p", num_embeddings=50, embedding_dim=8, feature_names=["g"]),
        ]
        self.collection = CCEEmbeddingBagCollection(tables=tables)
        self.over = nn.Linear(24, 1)

    def forward(self, features):
        return self.over(self.collection(features).values()).sigmoid()


def test_compiled_model_trains_as_the_eager_one():
    models, outputs = [], []
    features = KeyedJaggedTensor(
        ["f", "g"], torch.arange(24) % 50, lengths=torch.tensor([3, 0, 5, 4, 6, 6])
    )
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Model()
        models.append(model)
        # No code generation: graph capture, and falling back where it fails, is what is tested.
        called = torch.compile(model, backend="eager") if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            out = called(features)
            out.sum().backward()
            optimizer.step()
        outputs.append(out.detach())
    torch.testing.assert_close(*outputs)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)
