"""The run of TorchRec's tests: what it substitutes, which examples it takes, what it explains."""

import argparse
from pathlib import Path

import pytest

from tests.torchrec_suite.__main__ import Compared, outcomes, table
from tests.torchrec_suite.exceptions import EXCEPTIONS, reason

DOCS = Path(__file__).parents[2] / "docs"

TESTS = """
import unittest
import torch
from hypothesis import assume, given, settings, strategies as st
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


class FakeTest(unittest.TestCase):
    def made(self, size=7):
        table = EmbeddingBagConfig(
            name="t", num_embeddings=size, embedding_dim=8, feature_names=["f"]
        )
        return EmbeddingBagCollection(tables=[table])

    @unittest.skipIf(not torch.cuda.is_available(), "needs a GPU")
    def test_lookup(self):
        ids = KeyedJaggedTensor(["f"], torch.tensor([2, 6]), lengths=torch.tensor([1, 1]))
        rows = self.made()(ids.to("cuda"))["f"]
        assert not torch.equal(rows[0], rows[1])

    @settings(max_examples=1)
    @given(size=st.sampled_from([3, 5]), small=st.booleans())
    def test_examples(self, size, small):
        assume(not small or size == 3)
        assert size == 3 or type(self.made()).__name__ == "EmbeddingBagCollection"

    def test_weight(self):
        assert self.made().embedding_bags["t"].weight.shape == (7, 8)
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The outcomes with TorchRec's collections, and with CCE ones."""
    source = tmp_path_factory.mktemp("tree")
    (source / "torchrec" / "tests").mkdir(parents=True)
    (source / "torchrec" / "tests" / "test_fake.py").write_text(TESTS)
    options = argparse.Namespace(source=source, examples=0, example_seconds=60, file_seconds=300)
    return [outcomes(options, "tests/test_fake.py", substitute) for substitute in (False, True)]


def test_both_sides_run_the_same_examples_and_all_of_them(both):
    plain, cce = ({test.rpartition("FakeTest.")[2]: o for test, o in side.items()} for side in both)
    assert (
        set(plain)
        == set(cce)
        == {
            "test_lookup",
            "test_weight",
            *(
                f"test_examples[size={s}, small={b}]"
                for s, b in [(3, False), (3, True), (5, False)]
            ),
        }
    )
    assert set(plain.values()) == {"passed"}
    assert sorted(test for test, outcome in cce.items() if outcome == "passed") == [
        "test_examples[size=3, small=False]",
        "test_examples[size=3, small=True]",
        "test_lookup",
    ]


def test_a_difference_is_explained_or_told(both):
    found = Compared()
    found.add(*both)
    assert (found.tests, found.plain_passed, found.cce_passed) == (5, 5, 3)
    assert [len(tests) for tests in found.exceptions.values()] == [1]
    assert [test.partition("FakeTest.")[2] for test in found.unexplained] == [
        "test_examples[size=5, small=False]"
    ]
    assert "UNEXPLAINED" in table({"fake": found})


def test_no_reason_is_given_for_another_error():
    assert not reason("a.test_weight", "KeyError: 'table'")
    assert not reason("a.test_load_state_dict", "AssertionError: 1 != 2")


@pytest.mark.parametrize("title", [each.title for each in EXCEPTIONS])
def test_the_documents_name_every_exception(title):
    assert title in (DOCS / "adopt.md").read_text().replace("\n", " ")
