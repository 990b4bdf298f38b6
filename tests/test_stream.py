"""StreamPacker: exactly once, bounded, resumable."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packops import StreamPacker


def documents(lengths):
    """Document i is [i, i, ...]: a pack says by itself where its tokens come from."""
    return [[i] * length for i, length in enumerate(lengths)]


def test_by_hand():
    packer = StreamPacker(10, open_packs=2)
    # 0 opens A | 1 opens B | 2 fits B only and fills it: B leaves | 3 to A | 4 opens C | 5 opens D: A, the oldest, leaves
    packs = packer.pack(documents([7, 6, 4, 2, 9, 5]))
    assert [sorted({d[0] for d in p}) for p in packs] == [[1, 2], [0, 3], [4], [5]]


@given(
    st.lists(st.integers(0, 40), max_size=80),
    st.integers(1, 5),
    st.sampled_from(["truncate", "split", "drop"]),
    st.one_of(st.none(), st.integers(1, 3)),
    st.sampled_from([1, 4]),
)
def test_exactly_once_and_never_full_beyond_capacity(lengths, open_packs, overlong, max_docs, multiple):
    packer = StreamPacker(
        16, open_packs=open_packs, overlong=overlong, max_docs_per_pack=max_docs, pad_doc_to_multiple_of=multiple
    )
    tokens = np.zeros(len(lengths), int)
    for pack in packer.pack(documents(lengths)):
        assert pack
        assert sum(-(-len(d) // multiple) * multiple for d in pack) <= 16
        assert len(pack) <= (max_docs or 99)
        assert len(packer._open) <= open_packs
        for document in pack:
            tokens[document[0]] += len(document)
    kept = {"truncate": lambda n: min(n, 16), "split": lambda n: n, "drop": lambda n: n if n <= 16 else 0}[overlong]
    assert tokens.tolist() == [kept(n) for n in lengths]
    assert packer.num_documents == len(lengths)
    assert packer.num_empty == lengths.count(0)
    assert packer.num_overlong == sum(n > 16 for n in lengths)


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(0, 40))
def test_resume_continues_the_same_packs(lengths, stop_after):
    make = lambda: StreamPacker(16, open_packs=3, overlong="split")  # noqa: E731
    expected = list(make().pack(documents(lengths)))
    first = make()
    packs = first.pack(iter(documents(lengths)))
    done = list(itertools.islice(packs, stop_after))
    second = make()
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    if len(done) < stop_after:  # the stream had ended, and its packs are flushed
        assert done == expected
        return
    rest = list(second.pack(itertools.islice(documents(lengths), second.num_documents, None)))
    assert done + rest == expected


def test_as_full_as_a_plan():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.6, 0.9, 20_000), 8, 4096).astype(int)
    packer = StreamPacker(4096, length=int, cut=None)
    packs = list(packer.pack(lengths.tolist()))
    assert lengths.sum() / (len(packs) * 4096) > 0.995


def test_mappings_are_cut_in_every_column():
    document = {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, 3, 4, 5], "source": "a.txt", "weight": 2.0, "pair": [7, 8]}
    first, second = StreamPacker(3, overlong="split").pack([document])
    assert first == [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "source": "a.txt", "weight": 2.0, "pair": [7, 8]}]
    assert second[0]["labels"] == [4, 5]


def test_bad_arguments():
    with pytest.raises(ValueError, match="document 1 has 9 tokens, more than max_length = 8"):
        list(StreamPacker(8).pack(documents([1, 9])))
    with pytest.raises(ValueError, match="open_packs must be positive, got 0"):
        StreamPacker(8, open_packs=0)
    with pytest.raises(ValueError, match="pad_doc_to_multiple_of must divide max_length = 8, got 3"):
        StreamPacker(8, pad_doc_to_multiple_of=3)
    with pytest.raises(ValueError, match=r"overlong must be .* got 'keep'"):
        StreamPacker(8, overlong="keep")
    with pytest.raises(KeyError, match=r"a document must have 'input_ids', found \['text'\]"):
        StreamPacker(8).add({"text": "abc"})
    with pytest.raises(ValueError, match="packs of 8 tokens, this packer makes 9"):
        StreamPacker(9).load_state_dict(StreamPacker(8).state_dict())
