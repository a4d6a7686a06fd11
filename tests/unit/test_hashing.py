"""Hash values are a checkpoint format: golden numbers, ranges, independence."""

import pytest
import torch

from cce_torchrec.hashing import (
    CODE_ROLE,
    HELPER_ROLE,
    code_hash,
    hash_function,
    hash_ids,
    helper_hash,
)

IDS = torch.tensor([0, 1, 2, 3, 1000, 2**31, 2**40 + 7])
GOLDEN = {
    (0, "t", 0, CODE_ROLE, 0): [182, 752, 322, 891, 66, 193, 762],
    (7, "user", 3, HELPER_ROLE, 2): [1, 923, 844, 765, 334, 322, 547],
    (2**63 + 5, "t", 1, CODE_ROLE, 0): [984, 834, 685, 535, 282, 759, 598],
}


@pytest.mark.parametrize("key", GOLDEN)
def test_golden_values(key):
    assert hash_function(*key)(IDS, 1000).tolist() == GOLDEN[key]


@pytest.mark.parametrize("num_rows", [1, 2, 3, 255, 4096, 2**31 - 1])
def test_rows_are_in_range_and_int32_ids_agree(num_rows):
    ids = torch.arange(10_000)
    rows = code_hash(1, "t", 0)(ids, num_rows)
    assert rows.min() >= 0 and rows.max() < num_rows
    assert torch.equal(rows, code_hash(1, "t", 0)(ids.int(), num_rows))


def test_rows_are_even_and_chunks_differ():
    ids = torch.arange(100_000)
    first, second = (helper_hash(0, "t", chunk, 0)(ids, 100) for chunk in (0, 1))
    counts = torch.bincount(first, minlength=100)
    assert counts.min() > 700 and counts.max() < 1300  # mean 1000
    # Independent hashes agree on 1 id in 100; 3 in 100 is far outside chance.
    assert (first == second).double().mean() < 0.03
    assert (first == helper_hash(0, "t", 0, 1)(ids, 100)).double().mean() < 0.03
    assert (first == helper_hash(0, "u", 0, 0)(ids, 100)).double().mean() < 0.03


def test_raw_ids_golden_values():
    """Computed with Python integers from SplitMix64's definition."""
    raw = [0, 1, -1, -(2**63), 2**63 - 1, 123456789012345]
    expected = [230233549, 996321501, 186325290, 886126774, 735781666, 875730154]
    assert hash_ids(torch.tensor(raw), 7, "t", 10**9).tolist() == expected
    expected = [3399400654, 829389145, 2873024075, 8490204374, 8848821938, 7151024223]
    assert hash_ids(torch.tensor(raw), 0, "user", 10**10 + 19).tolist() == expected
    both = [hash_ids(torch.tensor([-1, 5], dtype=d), 7, "t", 99) for d in (torch.int32, torch.long)]
    assert torch.equal(*both)


@pytest.mark.parametrize("step", [1, 1000, 2**20, 2**40])
def test_raw_ids_meet_as_seldom_as_random_ones(step):
    """Time stamps and packed fields: n ids in n places fill 1 - 1/e of them."""
    ids = torch.arange(100_000) * step
    filled = len(hash_ids(ids, 0, "t", 100_000).unique()) / 100_000
    assert abs(filled - 0.632) < 0.01  # standard deviation 0.001
