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
    with pytest.raises(ValueError, match="max_length = 8, this one has 9"):
        StreamPacker(9).load_state_dict(StreamPacker(8).state_dict())


# ---- settings, states and lengths that break packs ---------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, -1])
def test_a_limit_of_no_document_is_refused(most):
    with pytest.raises(ValueError, match=f"max_docs_per_pack must be positive or None, got {most}"):
        StreamPacker(8, max_docs_per_pack=most)


@pytest.mark.parametrize(
    ("document", "got"),
    [
        ("some text", "text"),
        ({"input_ids": "some text"}, "text"),
        (np.zeros((1, 5), int), "one of 2 dimensions"),
        ({"input_ids": [[1, 2, 3], [4]]}, "one of 2 dimensions"),
    ],
)
def test_only_tokens_are_counted(document, got):
    """Not characters, and not the documents of a batch."""
    with pytest.raises(TypeError, match=f"a document must be a sequence of token ids, got {got}"):
        StreamPacker(8).add(document)
    packer = StreamPacker(8, length=lambda document: 5)
    assert [len(pack) for pack in packer.pack([document])] == [1]


def test_lengths_that_are_none_are_refused():
    packer = StreamPacker(8, length=lambda document: document)
    packer.add(6)
    with pytest.raises(ValueError, match="document 1 has a negative length, -4"):
        packer.add(-4)
    with pytest.raises(TypeError):
        packer.add(1.5)
    assert list(packer.pack([2])) == [[6, 2]]
    assert packer.num_documents == 2


SETTINGS = {"open_packs": 2, "max_docs_per_pack": 4, "overlong": "split", "pad_doc_to_multiple_of": 2}
OTHERS = {"max_length": 32, "open_packs": 3, "max_docs_per_pack": None, "overlong": "drop", "pad_doc_to_multiple_of": 1}


@pytest.mark.parametrize("name", OTHERS)
def test_a_state_of_other_settings_is_refused_and_changes_nothing(name):
    settings = {"max_length": 16, **SETTINGS}
    first, second = StreamPacker(**settings), StreamPacker(**{**settings, name: OTHERS[name]})
    for packer in (first, second):
        for document in documents([5, 9, 3]):
            packer.add(document)
    first.add([7, 7])
    own = second.state_dict()
    with pytest.raises(ValueError, match=f"the state is of a packer with {name} = "):
        second.load_state_dict(first.state_dict())
    assert second.state_dict() == own
    for missing in own:
        incomplete = {key: value for key, value in own.items() if key != missing}
        with pytest.raises(ValueError, match=f"not the state of a StreamPacker: it has no '{missing}'"):
            second.load_state_dict(incomplete)
        assert second.state_dict() == own
    first.load_state_dict(first.state_dict())


def test_a_state_measured_in_another_way_is_refused():
    first = StreamPacker(16)
    first.add([1, 2, 3])
    with pytest.raises(ValueError, match="the state says that documents take 3 tokens, they take 6"):
        StreamPacker(16, length=lambda document: 2 * len(document)).load_state_dict(first.state_dict())


def test_a_state_is_not_the_packers_own_memory():
    packer = StreamPacker(16)
    packer.add([1] * 5)
    state = packer.state_dict()
    packer.add([2] * 5)
    other = StreamPacker(16)
    other.load_state_dict(state)
    other.add([3] * 6)
    assert list(packer.pack([])) == [[[1] * 5, [2] * 5]]
    assert [[len(d) for d in pack] for _, pack in state["open"]] == [[5]]
    assert list(other.pack([])) == [[[1] * 5, [3] * 6]]


def test_exactly_the_open_packs_that_are_allowed():
    """The pack that would be one too many closes the oldest, and not one before."""
    packer = StreamPacker(8, open_packs=2)
    packer.add([1] * 5)
    packer.add([2] * 5)
    assert not list(packer._take_ready())
    packer.add([3] * 5)
    assert list(packer._take_ready()) == [[[1] * 5]]
    # One that fills its pack at once is never open, and closes no other.
    packer.add([4] * 8)
    assert list(packer._take_ready()) == [[[4] * 8]]
    packer.add([5] * 3)  # fills the older one, as both have as much room
    assert list(packer._take_ready()) == [[[2] * 5, [5] * 3]]
    one = StreamPacker(8, open_packs=1)
    assert list(one.pack(documents([5, 5, 3]))) == [[[0] * 5], [[1] * 5, [2] * 3]]


@pytest.mark.parametrize(
    "length, overlong, parts", [(8, "error", [8]), (9, "split", [8, 1]), (16, "split", [8, 8]), (9, "drop", [])]
)
def test_documents_at_the_capacity(length, overlong, parts):
    packer = StreamPacker(8, overlong=overlong)
    assert [len(d) for pack in packer.pack([[1] * length]) for d in pack] == parts
    assert packer.num_overlong == (length > 8)


@pytest.mark.parametrize("length, fits", [(4, True), (5, False)])
def test_padding_of_documents_counts_at_the_capacity(length, fits):
    """1 takes 4 tokens of 8, so that 4 are left."""
    packs = list(StreamPacker(8, pad_doc_to_multiple_of=4).pack([[1], [2] * length]))
    assert len(packs) == (1 if fits else 2)


def test_padding_that_documents_bring_along_takes_no_room():
    padded = {"input_ids": [0, 0, 0, 5], "attention_mask": [0, 0, 0, 1]}
    assert len(list(StreamPacker(2).pack([padded, padded]))) == 1
    long = {"input_ids": [0, 1, 2, 3, 4, 5], "attention_mask": [0, 1, 1, 1, 1, 1]}
    assert [d["input_ids"] for pack in StreamPacker(3, overlong="split").pack([long]) for d in pack] == [[1, 2, 3], [4, 5]]
