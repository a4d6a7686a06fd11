"""The health of a table as loops over its ids and rows give it."""

import math
from collections import Counter


def plain_chunk(codes, helper_codes, main, helper):
    """Of one chunk: lists of the rows that ids read, and of rows of numbers."""
    used, hashed, ids = Counter(codes), Counter(helper_codes), len(codes)
    squares = {"main": [sum(x * x for x in row) for row in main]}
    squares["helper"] = [sum(x * x for x in row) for row in helper]
    energy = {
        "main": sum(count * squares["main"][row] for row, count in used.items()),
        "helper": sum(count * squares["helper"][row] for row, count in hashed.items()),
    }
    both = energy["main"] + energy["helper"]
    entropy = -sum(count / ids * math.log(count / ids) for count in used.values())
    return {
        "ids": ids,
        "empty_codes": sum(row not in used for row in range(len(main))),
        "dead_helper_rows": sum(row not in hashed for row in range(len(helper))),
        "imbalance": len(main) * sum(count**2 for count in used.values()) / ids**2,
        "perplexity": math.exp(entropy),
        "largest": max(used.values()),
        "helper_energy": energy["helper"] / both if both else 0.0,
        "norms": {kind: [math.sqrt(x) for x in own] for kind, own in squares.items()},
        "usage": [used[row] for row in range(len(main))],
    }


def in_bins(values, edges):
    """How many of `values` are in each bin; the last edge is in the last bin."""
    counts = [0] * max(0, len(edges) - 1)
    for value in values:
        at = max((i for i in range(len(counts)) if edges[i] <= value), default=0)
        counts[at] += 1
    return counts


def assert_chunk(found, expected):
    """A CHUNK of health.py is what the loops gave."""
    for name in ("ids", "empty_codes", "dead_helper_rows", "largest"):
        assert found[name] == expected[name], name
    for name in ("imbalance", "perplexity", "helper_energy"):
        # Six digits are kept.
        assert math.isclose(found[name], expected[name], rel_tol=1e-5, abs_tol=1e-9), name
    usage = found["usage"]
    assert usage["counts"] == in_bins(expected["usage"], usage["edges"])
    for kind, norms in expected["norms"].items():
        if not norms:
            assert found[kind] is None
            continue
        assert_rows(found[kind], norms)


def assert_rows(found, norms):
    """A ROWS of health.py is that of rows of these norms."""
    assert found["rows"] == found["looked_at"] == len(norms)
    assert found["zero"] == sum(norm == 0 for norm in norms)
    assert_distribution(found["norms"], norms)


def assert_distribution(found, values):
    """Mean, median, ends and number are those of `values`."""
    values, quantiles = sorted(values), found["quantiles"]
    middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
    expected = {"min": values[0], "p50": middle, "max": values[-1]}
    for name, value in expected.items():
        assert math.isclose(quantiles[name], value, rel_tol=1e-5, abs_tol=1e-12), name
    assert math.isclose(found["mean"], sum(values) / len(values), rel_tol=1e-5, abs_tol=1e-12)
    assert sum(found["counts"]) == len(values)
    assert len(found["counts"]) + 1 == len(found["edges"]) or not found["edges"]
