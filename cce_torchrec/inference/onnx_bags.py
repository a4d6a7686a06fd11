"""Bags in operators of ONNX: in which one each id is, and the sum of its vectors.

`ScatterND` that adds would do it in one operator, and loses summands where several threads add to a
bag (ONNX Runtime 1.32: 112,500 of 200,000); `ScatterElements` adds them all, in 45 times the time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cce_torchrec.inference.onnx_nodes import Graph, column
from cce_torchrec.inference.packed_tables import PackedTables


class Batch:
    """What is known of a batch: the ids of each input, and in which bags these are.

    A batch whose lengths do not fit its values makes a node fail.
    """

    def __init__(self, graph: Graph, packed: PackedTables) -> None:
        self.graph = graph
        add, number = graph.add, graph.number
        count = len(packed.inputs)
        # There is no operator that raises, but one that reads beyond its data does.
        negative = graph.cast(add("Less", "lengths", number(0)), "INT64")
        zeros = add("Gather", number([0]), negative, name="lengths that are negative")
        lengths = add("Add", "lengths", zeros)
        ends = add("CumSum", lengths, number(0))
        shaped = add("Reshape", lengths, number([count, -1]), name=f"lengths of {count} features")
        ids = add("Squeeze", add("Shape", "values"), number([0]))
        # The bag of an id is how many bags end before it or at it.
        size = add("Unsqueeze", add("Add", ids, number(1)), number([0]))
        zero = graph.onnx.numpy_helper.from_array(np.zeros(1, np.int64))
        ended = add("ConstantOfShape", size, value=zero)
        ones = add("Expand", number(1), add("Shape", lengths))
        ended = add("ScatterElements", ended, ends, ones, reduction="add", axis=0)
        bags = add("Slice", add("CumSum", ended, number(0)), number([0]), number([-1]))
        starts = add("Sub", ends, lengths)
        ranks = add("Range", number(0), ids, number(1))
        ranks = add("Sub", ranks, add("Gather", starts, bags))
        counts = add("ReduceSum", shaped, number([1]), keepdims=0)

        def split(value: str, what: str) -> list[str]:
            # Fails unless the counts add up to as many as there are.
            name = f"{what} of {count} features, which lengths count"
            return graph.add_all("Split", value, counts, outputs=count, axis=0, name=name)

        self.size = add("Gather", add("Shape", shaped), number([1]))
        self.ids = split("values", "values")
        self.ranks = split(ranks, "places in bags")
        self.bags = [
            add("Sub", own, add("Mul", self.size, number(i)))
            for i, own in enumerate(split(bags, "bags"))
        ]
        self.lengths = [add("Gather", shaped, number(i)) for i in range(count)]
        self.weights = split("weights", "weights") if packed.is_weighted else []
        self.body = _halving(graph)

    def pooled(self, vectors: str, number: int, dim: int, mean: bool) -> str:
        """The sums, or means, [B, D] of the bags of `vectors` [ids, D] of an input."""
        graph = self.graph
        add, const = graph.add, graph.number
        if self.weights:
            vectors = add("Mul", vectors, add("Unsqueeze", self.weights[number], const([1])))
        longest = add("Concat", const([1]), self.lengths[number], axis=0)  # which are none at times
        longest = add("ReduceMax", longest, keepdims=0)
        state = [vectors, self.ranks[number], self.bags[number], longest]
        more = add("Greater", longest, const(1))
        # Bags of one id, as most are, enter the loop never.
        vectors, _, bags, _ = graph.add_all("Loop", "", more, *state, outputs=4, body=self.body)
        shape = add("Concat", self.size, const([dim]), axis=0)
        # Each bag that has ids is there once, so that threads do not meet.
        out = add("ScatterND", add("ConstantOfShape", shape), column(graph, bags), vectors)
        if mean:
            sizes = add("Max", graph.cast(self.lengths[number], "FLOAT"), const(1, np.float32))
            out = add("Div", out, column(graph, sizes))
        return out


def _halving(outer: Graph) -> Any:
    """The body of a loop that adds each second vector of a bag to the one before it.

    So a bag of n ids is added up in log2(n) rounds, all of which take twice the time of the first.
    Its state are vectors [V, D], their places in their bags [V], their bags [V], and the largest
    number of vectors in a bag.
    """
    graph = Graph(outer)
    add, number = graph.add, graph.number
    ranks, longest = "ranks", "longest"
    even = add("Equal", add("BitwiseAnd", ranks, number(1)), number(0))
    kept = add("Squeeze", add("NonZero", even), number([0]))
    last = add("Sub", add("Squeeze", add("Shape", ranks), number([0])), number(1))
    after = add("Min", add("Add", kept, number(1)), last)
    # What comes after the last vector of a bag is the first of another, whose place is even.
    odd = graph.cast(add("BitwiseAnd", add("Gather", ranks, after), number(1)), "BOOL")
    pairs = add("Squeeze", add("NonZero", odd), number([0]))
    seconds = add("Gather", "vectors", add("Gather", after, pairs))
    # Each at a place of its own, so that threads do not meet.
    firsts = add("Gather", "vectors", kept)
    vectors = add("ScatterND", firsts, column(graph, pairs), seconds, reduction="add")
    longest = add("Div", add("Add", longest, number(1)), number(2))
    outputs = {
        add("Greater", longest, number(1)): (graph.types.BOOL, []),
        vectors: (graph.types.FLOAT, [None, None]),
        add("Div", add("Gather", ranks, kept), number(2)): (graph.types.INT64, [None]),
        add("Gather", "bags", kept): (graph.types.INT64, [None]),
        longest: (graph.types.INT64, []),
    }
    names = ["going_on", "vectors", "ranks", "bags", "longest"]
    return graph.onnx.helper.make_graph(
        graph.nodes,
        "halving",
        [
            graph.value_info("round", graph.types.INT64, []),
            *(graph.value_info(n, *o) for n, o in zip(names, outputs.values(), strict=True)),
        ],
        [graph.value_info(name, *own) for name, own in outputs.items()],
    )
