"""Documents that share prefixes: the forest of their segments, and packs of groups. tests/cpp/test_prefix_forest.cpp has more."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import packops

documents_of = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=9)


@given(documents_of, st.integers(1, 5))
def test_every_document_is_a_path(documents, min_shared):
    forest = packops.prefix_forest(documents, min_shared=min_shared)
    for number, document in enumerate(documents):
        tokens = [
            documents[forest.document[s]][i]
            for s in forest.path(number)
            for i in range(forest.start[s], forest.start[s] + forest.length[s])
        ]
        assert tokens == document


@given(documents_of, st.integers(1, 5), st.randoms())
def test_no_part_of_a_group_needs_more_than_its_lengths_promise(documents, min_shared, random):
    shared = packops.shared_prefixes(documents, min_shared=min_shared)
    begin = random.randint(0, len(documents))
    end = random.randint(begin, len(documents))
    part = documents[begin:end]
    promised = sum(map(len, part)) - int(shared[begin:end][1:].sum())
    assert packops.prefix_forest(part, min_shared=min_shared).num_tokens <= promised


def test_what_a_prompt_saves():
    prompt, responses = list(range(100)), [[7, 8, 9], [4], [7, 8, 1, 1]]
    documents = [prompt + response for response in responses]
    assert packops.shared_prefixes(documents).tolist() == [0, 99, 99]
    assert packops.prefix_forest(documents).num_tokens == 103 + 2 + 5 - 2  # the branches at 100 and at 102
    assert packops.shared_prefixes(documents, min_shared=100).tolist() == [0, 0, 0]
    assert packops.shared_prefixes(documents, groups=[0, 1, 0]).tolist() == [0, 0, 101]


def test_equal_documents_share_all():
    """However short they are: no token of theirs has two successors."""
    assert packops.shared_prefixes([[1, 2, 3], [1, 2, 3], [1, 2, 3, 4]], min_shared=2).tolist() == [0, 3, 2]
    assert packops.shared_prefixes([[1, 2, 3], [1, 2, 3]]).tolist() == [0, 3]
    assert packops.prefix_forest([[1, 2, 3], [1, 2, 3]]).num_tokens == 3


@given(st.data())
def test_packs_of_groups(data):
    count = data.draw(st.integers(0, 30))
    lengths = np.array(data.draw(st.lists(st.integers(0, 40), min_size=count, max_size=count)), np.int64)
    groups = np.array(data.draw(st.lists(st.integers(0, 6), min_size=count, max_size=count)), np.int64)
    shared, last = np.zeros(count, np.int64), {}
    for i, (length, group) in enumerate(zip(lengths.tolist(), groups.tolist(), strict=True)):
        shared[i] = data.draw(st.integers(0, min(length, last.get(group, length))))
        last[group] = length
    max_docs = data.draw(st.sampled_from([None, 1, 2, 5]))
    strategy = data.draw(st.sampled_from(["best_fit", "bfd", "ffd", "next_fit", "sequential"]))
    plan = packops.pack(lengths, 50, groups=groups, shared=shared, max_docs_per_pack=max_docs, strategy=strategy)
    assert sorted(plan.indices.tolist()) == np.flatnonzero(lengths).tolist()
    assert plan.num_empty == (lengths == 0).sum()
    assert (plan.tokens_per_pack <= 50).all()
    assert (max_docs is None) or (plan.docs_per_pack <= max_docs).all()
    for pack, offset in zip(plan, plan.offsets, strict=False):
        before = {}
        for document, common in zip(pack, plan.shared[offset:], strict=False):
            if common:  # only with the document just before it in its group
                assert common == shared[document]
                between = range(before[groups[document]] + 1, document)
                assert not any(lengths[other] for other in between if groups[other] == groups[document])
            before[groups[document]] = document


def test_groups_are_in_the_order_of_their_first_documents():
    plan = packops.pack([3] * 5, 6, groups=[9, 2, 9, 2, 1], strategy="sequential")
    assert [pack.tolist() for pack in plan] == [[0, 2], [1, 3], [4]]


def test_a_group_is_cut_only_where_it_must_be():
    plan = packops.pack([10] * 8, 26, groups=[0] * 8, shared=[6] * 8, seed=None)
    assert [pack.tolist() for pack in plan] == [[0, 1, 2, 3, 4], [5, 6, 7]]
    assert plan.shared.tolist() == [0, 6, 6, 6, 6, 0, 6, 6]
    assert plan.tokens_per_pack.tolist() == [26, 18]
    assert plan.hash() != packops.pack([10] * 8, 26, groups=[0] * 8, shared=[5] * 8, seed=None).hash()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": None}, "shared needs groups"),
        ({"groups": [0, 0]}, "groups must have one number per document"),
        ({"shared": [0, 0, 11]}, r"shared\[2\] must be between 0 and lengths\[2\] = 10, got 11"),
        ({"shared": [0, -1, 0]}, r"shared\[1\]"),
        ({"strategy": "wrapped"}, "groups keep their documents whole"),
        ({"overlong": "split"}, "groups keep their documents whole"),
        ({"lengths": [10, 10, 99]}, r'lengths\[2\] = 99 is longer than max_length = 32; overlong="drop" accepts it'),
        ({"lengths": [10, -1, 9]}, r"lengths\[1\] = -1 is negative"),
    ],
)
def test_what_groups_refuse(change, message):
    arguments = {"lengths": [10, 10, 10], "max_length": 32, "groups": [0, 0, 0], "shared": [0, 5, 5]} | change
    with pytest.raises(ValueError, match=message):
        packops.pack(arguments.pop("lengths"), arguments.pop("max_length"), **arguments)


@pytest.mark.parametrize("name", ["groups", "shared"])
@pytest.mark.parametrize("values", [["0", "0"], [0.0, 0.0], [False, True], [[0, 0]], 0])
def test_groups_and_shared_are_sequences_of_integers(name, values):
    with pytest.raises(TypeError, match=f"^{name} must be a sequence of integers"):
        packops.pack([10, 10], 32, **{"groups": [0, 0], name: values})


@pytest.mark.parametrize("documents", [[[1.5]], [[[1]]], ["ab"]])
def test_documents_are_sequences_of_integers(documents):
    with pytest.raises(TypeError, match="document 0 must be a sequence of integers"):
        packops.prefix_forest(documents)
