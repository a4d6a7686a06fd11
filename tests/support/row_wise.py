"""Tables and models whose codes are spread over ranks by ids."""

from cce_torchrec import CCEEmbeddingBagConfig
from tests.support.models import SUM, Model, collection, shard
from tests.support.models import tables as usual_tables


def tables(num_embeddings=300):
    """As usual, with bits of seen ids; one table takes raw ids."""
    raw = CCEEmbeddingBagConfig(
        name="raw", num_embeddings=90, embedding_dim=8, feature_names=["f"], num_rows=7,
        num_chunks=2, hash_ids=True,
    )  # fmt: skip
    out = [*usual_tables(SUM), raw]
    out[0].num_embeddings = num_embeddings
    out[0].track_seen = True
    return out


def sharded_model(kind="rw", configs=None, **kwargs):
    """A model of a kind of plan, ROW_WISE unless it says otherwise."""
    configs = configs or tables()
    model = Model(collection(configs, **kwargs))
    by_rows = ["p"] if kind == "rw, plain ones too" else []
    return shard(model, configs, kind[:2], row_wise=by_rows)
