"""The Triton kernels against torch, interpreted on the CPU."""

from pathlib import Path

import pytest

from tests.support.optional import needs_interpreter

pytestmark = needs_interpreter

CHECK = """
import torch
from cce_torchrec.kmeans import PairPoints, TensorPoints, kmeans, triton_search
from cce_torchrec.kmeans.points import Points
from cce_torchrec.kmeans.triton_search import Search

g = torch.Generator().manual_seed(0)

def exact(points, c):
    x = points.integers(slice(None)).double() / points.scale
    scores = x @ c.double().t() - 0.5 * c.double().square().sum(1)
    return scores.argmax(1).int(), scores

def check(points, c):
    got, (expected, scores) = Search(points, c).nearest(0, points.num_points), exact(points, c)
    off = got != expected
    if off.any():  # only where two float64 orders of summation may differ
        at = off.nonzero().view(-1)
        lost = scores[at, expected[at].long()] - scores[at, got[at].long()]
        assert lost.max() < 1e-12 * scores.abs().max(), (lost, off.sum())
    return got

for n, k, dim in [(1, 1, 4), (63, 64, 8), (200, 130, 16), (140, 70, 150), (150, 1, 4)]:
    x, c = torch.randn(n, dim, generator=g), torch.randn(k, dim, generator=g)
    points = TensorPoints(x)
    whole = check(points, c)
    assert torch.equal(Search(points, c).nearest(n // 3, n), whole[n // 3 :])
    few = TensorPoints(x[:20])
    same = c[:1].expand(k, dim).contiguous()
    assert not check(few, same).any(), "ties go to the lowest index"
    check(few, c * 1e-6)
    check(few, c * 1e6)

# Many near ties: centroids in pairs a hair apart, points in the middle between two of them.
c = torch.randn(100, 8, generator=g)
c = torch.cat([c, c * (1 + 2.0**-20), c + 2.0**-12])
x = (c[torch.randint(300, (100,), generator=g)] + c[torch.randint(300, (100,), generator=g)]) / 2
check(TensorPoints(x), c)
outlier = torch.cat([x, torch.full((1, 8), 1e5)])
check(TensorPoints(outlier), c)

# Pairs, in several blocks, and their sums.
a, b = (torch.randint(n, (1000,), generator=g).int() for n in (20, 50))
order = (a.long() * 50 + b).argsort()
a, b = a[order], b[order]
weights = torch.randint(0, 9, (1000,), generator=g)
books = torch.randn(20, 12, generator=g), torch.randn(50, 12, generator=g)
pairs = PairPoints(*books, a=a, b=b, weights=weights, starts=torch.arange(1000))
c = torch.randn(90, 12, generator=g)
triton_search.points_at_once = lambda dim: 384
nearest = check(pairs, c)
stats = [torch.zeros(s, dtype=torch.int64) for s in ((90, 12), (90,), (90,))]
Points.accumulate(pairs, 100, nearest[100:], c, pairs.error_scale, tuple(stats))
x, at = pairs.integers(slice(100, None)), nearest[100:].long()
sums = torch.zeros(90, 12, dtype=torch.int64).index_add_(0, at, x * weights[100:, None])
assert torch.equal(stats[0], sums)
assert torch.equal(stats[1], torch.zeros(90, dtype=torch.int64).index_add_(0, at, weights[100:]))
off = (x.double() / pairs.scale - c[at].double()).square().sum(1) * weights[100:]
torch.testing.assert_close(stats[2].sum() / pairs.error_scale, off.sum().float())

x = torch.randn(300, 8, generator=g)
one, other = (kmeans(x, 7, 5, backend=b) for b in ("triton", "torch"))
torch.testing.assert_close(one.centroids, other.centroids)
assert torch.equal(one.assignment, other.assignment)
"""


CLUSTER = """
import torch
from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.clustering import cluster, finalize, id_passes, pairs
from cce_torchrec.kmeans import native, points

points.usable = lambda device: False  # sums are tested above
native.available = lambda: False  # neither C++ nor torch, but the kernels for GPUs

def tables():
    torch.manual_seed(0)
    return CCEEmbeddingBagCollection([
        CCEEmbeddingBagConfig(name=name, num_embeddings=n, embedding_dim=24, num_chunks=2,
            feature_names=[name], num_rows=k, num_helper_rows=h, track_seen=True)
        for name, n, k, h in (("byte", 1200, 20, 30), ("short", 700, 300, 40), ("few", 40, 3, 2))
    ])

def seen(module):
    for codes in module.codes.values():
        codes.seen[:-2] = 0b01010101

def run(step, usable, **options):
    id_passes.usable = lambda device: usable
    module = tables()
    seen(module)
    report = step(module, backend="torch", iterations=3, **options)
    return report, module.state_dict()

weights = {"byte": torch.arange(1200) % 4, "short": torch.arange(700) % 3}
sampled = {"weights": weights, "samples_per_centroid": 5}
ways = ({}, {"samples_per_centroid": 5}, {"weights": weights}, {"weights": "seen"}, sampled,
        {"memory_limit": 46_000_000})
for step, tried in ((cluster, ways), (finalize, ({}, sampled))):
    for options in tried:
        print(step, options)
        (one, a), (other, b) = (run(step, on, **options) for on in (True, False))
        assert one.chunks and [r.changed for r in one.chunks] == [r.changed for r in other.chunks]
        assert [r.objective_after for r in one.chunks] == [r.objective_after for r in other.chunks]
        for key in a:
            assert torch.equal(a[key], b[key]), (step, options, key)

# A sample larger than the room that was made for it is drawn once more.
pairs.sample_room = lambda ids, share: 7
(_, a), (_, b) = (run(cluster, on, samples_per_centroid=5) for on in (True, False))
assert all(torch.equal(a[key], b[key]) for key in a)
"""


EXPAND = """
import pytest, torch
torch.use_deterministic_algorithms(True)  # what is not written is seen
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torchrec import KeyedJaggedTensor
from cce_torchrec.lookup.bounds import BoundsCheck
from cce_torchrec.lookup.expansion import Expansion
from cce_torchrec.lookup.table_lookup import TableLookup
from cce_torchrec.lookup import device, native, triton_expand
from cce_torchrec.table import TableFeature
from tests.unit.test_expand import batch, blocks, made_codes

WARNING, IGNORE, FATAL = (getattr(BoundsCheckMode, m) for m in ("WARNING", "IGNORE", "FATAL"))
kernel, native.takes = device.takes, lambda ids: False

def all_blocks():
    out, slots, keys = blocks()
    for name, settings in {
        "raw": {"hash_ids": True, "num_rows": 30},
        "seen": {"track_seen": True, "num_rows": 30, "num_embeddings": 90},
        "both": {"hash_ids": True, "track_seen": True, "num_rows": 50_000, "seed": 7},
    }.items():
        config, codes = made_codes(name, **settings)
        out.append(TableLookup(codes.table, [len(slots)], codes, list(range(4))))
        slots.append(TableFeature(name, "f"))
        keys += [f"{name}#{j}" for j in range(4)]
    return out, slots, keys

def tracked(expansion):
    codes = [lookup.codes for lookup in expansion.table_lookups]
    return [c for c in codes if c is not None and c.seen is not None]

def seen(expansion):
    return [codes.seen[:-1].clone() for codes in tracked(expansion)]

def both_ways(expansion, features, mode):
    found, bits = [], []
    for takes in (kernel, lambda ids: False):
        device.takes = takes
        check, expansion._described, expansion._invalid = BoundsCheck(mode), None, {}
        for codes in tracked(expansion):
            codes.seen.zero_()
        found.append((expansion(features, check), check.num_invalid))
        bits.append(seen(expansion))
    assert all(torch.equal(a, b) for a, b in zip(*bits))
    return found, bits[0]

def equal(one, other):
    end = int(other.offsets()[-1])
    assert torch.equal(one.values()[:end].long(), other.values())
    assert torch.equal(one.lengths().long(), other.lengths().long())
    assert torch.equal(one.offsets().long(), other.offsets().long())
    if other.weights_or_none() is not None:
        assert torch.equal(one.weights()[:end], other.weights())
    assert one.keys() == other.keys()

mixed = Expansion(*all_blocks())
own = mixed.slots
for bad, dtype, weighted in ((None, torch.int64, False), (-1, torch.int32, True)):
    for round_ in (0, 1):
        # Many ids for a program: it looks up the table of each; few: it goes table by table.
        triton_expand._VALUES = (256, 64)[round_]
        features = batch(own, bad, dtype, 3, weighted)
        before = features.values().clone()
        for known in (False, True):
            if known:
                features.length_per_key()
            ((one, count), (other, other_count)), bits = both_ways(mixed, features, WARNING)
            equal(one, other)
            assert bits[0].any() and bits[1].any()
            assert count == other_count and (count > 0) == (bad is not None)
            assert torch.equal(features.values(), before)
        for block in mixed.table_lookups:
            if block.codes is not None:
                block.codes.set_clusterings(block.codes.num_clusterings + 1)

# Tables of as many rows per id need one launch, and others two; int32 rows where they may be.
parts, slots, keys = all_blocks()
four = [b for b in parts if b.copies == 4 and b.rows_per_id == 2 and len(b.slots) == 1]
for i, block in enumerate(four):
    block.slots = [i]
alike = Expansion(four, slots[: len(four)], [str(i) for i in range(4 * len(four))])
launched, usual = [], triton_expand.launch
triton_expand.launch = lambda kernel, *rest, **named: (launched.append(kernel),
                                                       usual(kernel, *rest, **named))
def one_table(chunks, rows):
    config, codes = made_codes("one", num_chunks=chunks, num_rows=rows)
    block = TableLookup(codes.table, [0], codes, list(range(chunks)))
    return Expansion([block], [TableFeature("one", "f")], [str(i) for i in range(chunks)])

# Codes of an id of 8, 4 and 2 bytes, which are read at once, and of 16 and 1.
several = [one_table(*s) for s in ((4, 50_000), (4, 200), (2, 200), (8, 50_000), (1, 200))]
# A program of 2 bags writes offsets of one feature only, and not of all three of its bags.
for expansion, count in ((alike, 1), *((one, 1) for one in several), (mixed, 2)):
    for narrow in (False, True):
        expansion.narrow, triton_expand._VALUES = narrow, 64 if narrow else 256
        triton_expand._BAGS = 1024 if expansion is mixed else 2
        features = batch(expansion.slots, -1, torch.int64, 3, True)
        launched.clear()
        ((one, _), (other, _)), _ = both_ways(expansion, features, WARNING)
        for kind in (one.values(), one.offsets()):
            assert kind.dtype == (torch.int32 if narrow else torch.int64)
        equal(one, other)
        assert len(launched) == count
    expansion.narrow = False

# Values beyond the last bag belong to nobody, whether the lengths of the keys are known or not.
features = batch(own, -1, torch.int64, 3, True)
((_, _), (other, other_count)), _ = both_ways(mixed, features, WARNING)
beyond = KeyedJaggedTensor(features.keys(),
    torch.cat([features.values(), torch.full((300,), -5)]),
    torch.cat([features.weights(), torch.ones(300)]), lengths=features.lengths())
for known in (False, True):
    if known:
        beyond.length_per_key()
    ((one, count), _), _ = both_ways(mixed, beyond, WARNING)
    equal(one, other)
    assert count == other_count
    assert not known or len(one.values()) == len(other.values())

# A batch size per feature, empty ones and one without any bag among them.
g = torch.Generator().manual_seed(2)
bags = [[int(b)] for b in torch.randint(0, 4, (len(own),), generator=g)]
lengths = torch.randint(0, 5, (sum(b for b, in bags),), generator=g)
ids = torch.randint(90, (int(lengths.sum()),), generator=g)
variable = KeyedJaggedTensor(features.keys(), ids, lengths=lengths, stride_per_key_per_rank=bags)
((one, _), (other, _)), _ = both_ways(mixed, variable, IGNORE)
equal(one, other)
assert one.stride_per_key() == other.stride_per_key()

# FATAL names table, feature and id; without bad ids it says nothing; IGNORE counts nothing.
device.takes = kernel
mixed._described, mixed._invalid = None, {}
mixed(batch(own, None, torch.int64, 3), BoundsCheck(FATAL))
with pytest.raises(ValueError, match="table 'byte', feature 'f0': id -1 is outside"):
    mixed(batch(own, -1, torch.int64, 3), BoundsCheck(FATAL))
triton_expand._VALUES = 256  # fewer programs, each of which takes its time to interpret
mixed(batch(own, -1, torch.int64, 3), BoundsCheck(IGNORE))
assert not mixed._invalid

# Counters survive a new description, and codes that are evaluated are not marked.
check = BoundsCheck(WARNING)
features = batch(own, -1, torch.int64, 3)
mixed(features, check)
each, described = check.num_invalid, mixed._described
mixed(features, check)
assert each > 0 and check.num_invalid == 2 * each and mixed._described is described
mixed.table_lookups[0].codes.set_clusterings(9)
for codes in tracked(mixed):
    codes.eval().seen.zero_()
mixed(features, check)
assert mixed._described is not described and check.num_invalid == 3 * each
assert not any(bits.any() for bits in seen(mixed))

# A copy has codes and bits of its own, whatever becomes of what it was copied from.
import copy
for codes in tracked(mixed):
    codes.train()
features.length_per_key()  # then there are no rows of no bag
before, other = mixed(features, check).values(), copy.deepcopy(mixed)
for block in mixed.table_lookups:
    if block.codes is not None and block.codes.codes is not None:
        block.codes.codes.zero_()
    if block.codes is not None and block.codes.seen is not None:
        block.codes.seen.zero_()
assert torch.equal(other(features, check).values(), before)
assert not any(bits.any() for bits in seen(mixed)) and all(bits.any() for bits in seen(other))

# Weights with a gradient take the torch form, which has one.
weighted = batch(own, None, torch.int64, 3, True)
weights = weighted.weights().requires_grad_()
out = mixed(KeyedJaggedTensor(weighted.keys(), weighted.values(), weights,
    lengths=weighted.lengths()), check).weights()
out.sum().backward()
assert weights.grad.min() >= 1
"""


UNSOUND = """
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.lookup import triton_expand
from cce_torchrec.lookup.bounds import BoundsCheck

WARNING, FATAL = BoundsCheckMode.WARNING, BoundsCheckMode.FATAL
B, KEYS, UNTOUCHED, ROOM = 3, ["a", "b", "c"], -777, 200
LENGTHS = torch.tensor([2, 0, 1, 3, 1, 0, 2, 2, 1])
OFFSETS = torch.nn.functional.pad(LENGTHS.cumsum(0), (1, 0))
IDS = torch.arange(12)

def table(name, **settings):
    return CCEEmbeddingBagConfig(name=name, num_embeddings=90, embedding_dim=8, num_chunks=2,
                                 feature_names=[name], num_rows=5, **settings)

plain = EmbeddingBagConfig(name="c", num_embeddings=90, embedding_dim=8, feature_names=["c"])
ALIKE = [table("a"), table("b"), table("c")]
MIXED = [table("a"), table("b", num_helper_rows=0), plain]

def changed(values, **at):
    values = values.clone()
    for place, value in at.items():
        values[int(place[1:])] = value
    return values

def batches(known):
    def made(**parts):
        return KeyedJaggedTensor(KEYS, IDS, torch.ones(12), stride=B, length_per_key=known, **parts)
    yield made(lengths=LENGTHS), known in (None, [3, 4, 5])
    yield made(lengths=changed(LENGTHS, _0=100_000)), False
    yield made(lengths=changed(LENGTHS, _0=-9)), False
    yield made(lengths=changed(LENGTHS, _0=2**62, _1=2**62, _2=2**62, _3=2**62)), False
    yield made(offsets=changed(OFFSETS, _3=9, _6=2)), False
    yield made(offsets=OFFSETS + 2), False
    yield made(offsets=changed(OFFSETS, _9=500)), False
    for value in (9, -9, 2**40):  # inside of a feature
        yield made(offsets=changed(OFFSETS, _1=value)), False

written = []
usual = torch.Tensor.new_empty

def guarded(self, count, **settings):
    values = torch.full((count + 2 * ROOM,), UNTOUCHED, dtype=settings.get("dtype", self.dtype))
    written.append(values)
    return values[ROOM : ROOM + count]

def expanded(module, features, check):
    written.clear()
    torch.Tensor.new_empty = guarded
    try:
        return module.expansion(features, check)
    finally:
        torch.Tensor.new_empty = usual

for tables in (ALIKE, MIXED):
    module = CCEEmbeddingBagCollection(tables)
    rows_of = [len(codebook) for codebook in module.parameters()]
    for sizes in ((16, 8), (16, 2)):  # the second: all bags of a program are of one feature
        triton_expand._VALUES, triton_expand._BAGS = sizes
        for known in (None, [3, 4, 5], [10, 1, 1]):
            for features, sound in batches(known):
                check = BoundsCheck(WARNING)
                module.expansion._invalid = {}
                out = expanded(module, features, check)
                for values in written:
                    around = torch.cat([values[:ROOM], values[-ROOM:]])
                    assert (around == UNTOUCHED).all()
                rows, offsets = out.values(), out.offsets()
                assert 0 <= offsets.min() and offsets.max() <= len(rows)
                for bag, (start, end) in enumerate(zip(offsets[:-1], offsets[1:])):
                    own = rows[start:end]
                    assert ((own >= 0) & (own < rows_of[bag // B])).all()
                if known is not None:
                    assert offsets[-1] == len(rows)  # FBGEMM's backward reads each of them
                # With tables alike, other lengths of features than the host knows do no harm.
                assert (check.num_invalid == 0) == sound or (tables is ALIKE and sum(known) == 12)

fatal = CCEEmbeddingBagCollection(ALIKE, bounds_check_mode=FATAL)
for features, sound in batches([3, 4, 5]):
    try:
        fatal.expansion(features, BoundsCheck(FATAL))
        assert sound
    except ValueError as error:
        assert not sound and "the lengths of the batch do not add up" in str(error)
"""


BESIDE = {
    "unsound batches": ["-c", UNSOUND],
    "kernel": ["-c", CHECK],
    "clustering": ["-c", CLUSTER],
    "expansion": ["-c", EXPAND],
    "compiled model": ["-m", "pytest", "-q", str(Path(__file__).with_name("test_compile.py"))],
}


@pytest.mark.parametrize("beside_name", BESIDE)
def test_interpreted(beside, beside_name):
    """Kernels equal torch; a compiled model falls back to torch at the kernel."""
    status, said = beside.end_of(beside_name)
    assert status == 0, said[-3000:]
