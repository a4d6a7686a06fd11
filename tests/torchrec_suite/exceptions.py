"""Why a test of TorchRec's that passes with its own collections does not with CCE ones.

docs/adopt.md has the same reasons, and no test is left alone without one of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """One reason.

    Args:
        title: in a few words, as docs/adopt.md has it.
        outcome: pattern of what the test ends with.
        test: pattern of the tests that it is for.
    """

    title: str
    outcome: str
    test: str = ""

    def explains(self, test: str, outcome: str) -> bool:
        """Whether it is the reason of `outcome` of `test`."""
        return bool(re.search(self.test, test) and re.search(self.outcome, outcome))


EXCEPTIONS = [
    Difference(
        "TABLE_ROW_WISE and GRID_SHARD are refused",
        "sharding_type '(table_row_wise|grid_shard)' is not for the tables of a CCE collection",
    ),
    Difference(
        "plain tables of sequences are not ROW_WISE",
        "plain tables of sequence embeddings cannot be ROW_WISE",
    ),
    Difference(
        "a compressed table has no weight [num_embeddings, embedding_dim]",
        r"""table '\w+' is compressed, and has no|KeyError: '(embeddings|embedding_bags)\.|"""
        r"""Unexpected key\(s\) in state_dict: "(embedding_bags|embeddings)\.""",
    ),
    Difference(
        "a table is a tensor a chunk, and its codes",
        "AssertionError: 1 != ",
        "test_load_state_dict_cw_multiple_shards",
    ),
    Difference(
        "a table is a tensor a chunk, and its codes",
        r"gather|KeyError: '.*\.momentum1'|attribute 'gather'",
        r"test_opt_state_correct|test_embeddingbag\..*test_sharding_ebc",
    ),
    Difference("names of parameters", "t1#0.weight", "test_in_backward_optimizer_filter"),
    Difference(
        "TorchRec's IR serializers do not know CCE collections",
        "RuntimeError",
        "test_export_serialization",
    ),
    Difference(
        "on CPUs, the tables of sequences on a rank share one kernel",
        "CPU kernels take sequences in one kernel only",
    ),
    Difference(
        "Private functions of TorchRec's sharded collection are not there",
        "ShardedCCEEmbeddingBagCollection'> does not have the attribute '_",
    ),
    Difference(
        "inside, chunks are sharded TABLE_WISE whatever the plan of their table",
        "Could not find awaitable for sharding type",
        "test_backward_injection",
    ),
    Difference(
        "every batch is checked, and none is said to be",
        "no logs of level INFO or higher triggered on torchrec.distributed.embeddingbag",
    ),
]


def reason(test: str, outcome: str) -> str:
    """The title of the exception that explains `outcome`, empty where none does."""
    return next((each.title for each in EXCEPTIONS if each.explains(test, outcome)), "")
