"""Hash values are a checkpoint format: golden numbers, ranges, and rows as good as random ones."""

import math
import zlib

import pytest
import torch

from cce_torchrec.codes.hashing import (
    CODE_ROLE,
    HELPER_ROLE,
    code_hash,
    hash_function,
    hash_ids,
    helper_hash,
    helper_hashes,
    mix,
    raw_id_key,
)

WORD = 2**64
RAW = [0, 1, 2, 3, 1000, 2**31, 2**40 + 7, 2**63 - 1, -(2**63), -1, 123456789012345]
GOLDEN = {
    (0, "t", 0, CODE_ROLE, 0): [182, 3, 65, 968, 216, 428, 494, 791, 545, 970, 794],
    (7, "user", 3, HELPER_ROLE, 2): [1, 354, 587, 183, 126, 296, 364, 24, 955, 968, 828],
    (2**63 + 5, "t", 1, CODE_ROLE, 0): [984, 314, 280, 365, 241, 186, 215, 234, 621, 334, 834],
}


def mixed(z):
    """SplitMix64's finalizer in Python's unbounded integers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def after(state):
    """SplitMix64's output for a state."""
    return mixed((state + 0x9E3779B97F4A7C15) % WORD)


def parameters(seed, table, *parts):
    """Multiplier and addend, in [0, 2^64), of the hash function of (chunk, role, round)."""
    state = after(seed % WORD ^ zlib.crc32(table.encode()))
    for part in parts:
        state = after(state ^ part)
    return after(state) | 1, after(state ^ 0xADD)


def reference_rows(ids, num_rows, seed, table, *parts):
    multiplier, addend = parameters(seed, table, *parts)
    products = ((multiplier * mixed(x % WORD) + addend) % WORD for x in ids)
    return [(product >> 33) * num_rows >> 31 for product in products]


def test_mix_is_splitmix64():
    """Outputs published for seed 1234567 (Rosetta Code, Pseudo-random numbers/Splitmix64)."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    states = [(1234567 + i * 0x9E3779B97F4A7C15) % WORD for i in (1, 2, 3)]
    found = mix(torch.tensor([s - WORD if s >= 2**63 else s for s in states]))
    assert [x % WORD for x in found.tolist()] == published == [mixed(s) for s in states]


@pytest.mark.parametrize("key", GOLDEN)
def test_golden_values(key):
    seed, table, chunk, role, round_ = key
    hash_ = hash_function(seed, table, chunk, role=role, round_=round_)
    assert hash_(torch.tensor(RAW), 1000).tolist() == GOLDEN[key]
    assert reference_rows(RAW, 1000, *key) == GOLDEN[key]


@pytest.mark.parametrize("num_rows", [1, 2, 3, 255, 4096, 2**31 - 1])
def test_rows_are_in_range_and_int32_ids_agree(num_rows):
    ids = torch.arange(10_000)
    rows = code_hash(1, "t", 0)(ids, num_rows)
    assert rows.min() >= 0 and rows.max() < num_rows
    assert torch.equal(rows, code_hash(1, "t", 0)(ids.int(), num_rows))
    assert torch.equal(ids, torch.arange(10_000))
    assert rows[:100].tolist() == reference_rows(range(100), num_rows, 1, "t", 0, CODE_ROLE, 0)


N, ROWS = 100_000, 1000
COUNTED = torch.arange(N)
IDS = {
    "consecutive": COUNTED,
    "every eighth": COUNTED * 8,
    "every thousandth": COUNTED * 1000,
    "multiples of 2^20": COUNTED << 20,
    "multiples of 2^40": COUNTED << 40,
    "packed": ((COUNTED % 317) << 32) + COUNTED // 317,
    "negative": COUNTED - 2**63,
}
HASHES = [(code_hash(seed, "t", 0), helper_hash(seed, "t", 0, 0)) for seed in range(20)]


def deviations(counts):
    """Chi-square of `counts` against equal ones, in standard deviations from its expectation."""
    expected, free = counts.sum() / len(counts), len(counts) - 1
    return float(((counts - expected) ** 2 / expected).sum() - free) / math.sqrt(2 * free)


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_rows_are_as_even_as_random_ones(ids):
    """Of 20 functions each: chi-square neither too high nor, as on a lattice, too low.

    The mean of 20 has standard deviation 0.22; one beyond 5 has a probability of about 1e-6.
    """
    found = [deviations(torch.bincount(main(ids, ROWS), minlength=ROWS)) for main, _ in HASHES]
    assert abs(sum(found)) / len(found) < 1 and max(map(abs, found)) < 5


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_code_and_helper_row_meet_as_random_ones_do(ids):
    """n ids in m = k k' places fill m (1 - exp(-n / m)) of them, each function within 5 sigma."""
    helper_rows = 3 * ROWS
    places = ROWS * helper_rows
    load = N / places
    expected = places * -math.expm1(-load)
    sigma = math.sqrt(places * math.exp(-load) * (1 - (1 + load) * math.exp(-load)))
    for main, helper in HASHES:
        pairs = main(ids, ROWS) * helper_rows + helper(ids, helper_rows)
        assert abs(len(pairs.unique()) - expected) < 5 * sigma


@pytest.mark.parametrize("gap", [1, 2, 1000])
def test_an_ids_row_does_not_tell_its_neighbours(gap):
    """The way from one id's row to another's takes every length equally often."""
    for main, _ in HASHES[:5]:
        ways = (main(COUNTED + gap, ROWS) - main(COUNTED, ROWS)) % ROWS
        assert abs(deviations(torch.bincount(ways, minlength=ROWS))) < 5


def test_functions_differ():
    """By chunk, clustering and table; independent ones agree on 0.0100 (0.0003) of the ids."""
    first = helper_hash(0, "t", 0, 0)(COUNTED, 100)
    for other in (helper_hash(0, "t", 1, 0), helper_hash(0, "t", 0, 1), helper_hash(0, "u", 0, 0)):
        assert abs(float((first == other(COUNTED, 100)).double().mean()) - 0.01) < 0.002


def test_raw_ids_golden_values():
    """The upper 63 bits of the mix of id xor addend, modulo the number of ids."""
    raw = [0, 1, -1, -(2**63), 2**63 - 1, 123456789012345]
    expected = [230233549, 996321501, 186325290, 886126774, 735781666, 875730154]
    _, key = parameters(7, "t", 0, 3, 0)
    assert hash_ids(torch.tensor(raw), raw_id_key(7, "t"), 10**9).tolist() == expected
    assert [(mixed(x % WORD ^ key) >> 1) % 10**9 for x in raw] == expected
    expected = [3399400654, 829389145, 2873024075, 8490204374, 8848821938, 7151024223]
    assert hash_ids(torch.tensor(raw), raw_id_key(0, "user"), 10**10 + 19).tolist() == expected
    key = raw_id_key(7, "t")
    both = [hash_ids(torch.tensor([-1, 5], dtype=d), key, 99) for d in (torch.int32, torch.long)]
    assert torch.equal(*both)


@pytest.mark.parametrize("step", [1, 1000, 2**20, 2**40])
def test_raw_ids_meet_as_seldom_as_random_ones(step):
    """Time stamps and packed fields: n ids in n places fill 1 - 1/e of them."""
    ids = torch.arange(100_000) * step
    filled = len(hash_ids(ids, raw_id_key(0, "t"), 100_000).unique()) / 100_000
    assert abs(filled - 0.632) < 0.01  # standard deviation 0.001


@pytest.mark.parametrize("seed", [0, 7, 2**63 + 5])
def test_helper_hashes_of_a_tensor_are_those_of_its_value(seed):
    chunks = [0, 3, 5]
    for clusterings in (0, 1, 2, 1000):
        found = helper_hashes(seed, "user", chunks, torch.tensor(clusterings)).tolist()
        expected = [helper_hash(seed, "user", chunk, clusterings) for chunk in chunks]
        assert found == [[one.multiplier, one.addend] for one in expected]
