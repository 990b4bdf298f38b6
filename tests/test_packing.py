"""The packers: by hand, against brute force, and on whatever hypothesis thinks of."""

from __future__ import annotations

import json
import math
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import packops
from packops import _C, pack
from packops.data.packing import STRATEGIES

WHOLE = [s for s in STRATEGIES if s != "wrapped"]


def packs_of(plan):
    return [documents.tolist() for documents in plan]


def check_plan(plan, lengths):
    """Exactly once, and never over capacity."""
    lengths = np.asarray(lengths, dtype=np.int64)
    assert plan.offsets[0] == 0
    assert plan.offsets[-1] == len(plan.indices)
    assert (plan.docs_per_pack > 0).all()
    assert (plan.lengths > 0).all()
    assert plan.per_pack(plan.padded_lengths).max(initial=0) <= plan.max_length
    covered = [[] for _ in lengths]
    for index, start, length in zip(plan.indices, plan.starts, plan.lengths, strict=True):
        covered[index].append((int(start), int(length)))
    for document, parts in enumerate(covered):
        end = 0
        for start, length in sorted(parts):
            assert start == end, f"document {document} is cut with a gap or twice: {sorted(parts)}"
            end += length
        yield document, end


# ---- by hand ---------------------------------------------------------------------------------------------------------------


def test_by_hand():
    lengths = [6, 5, 3, 2, 4]
    assert packs_of(pack(lengths, 10, strategy="sequential")) == [[0], [1, 2, 3], [4]]
    assert packs_of(pack(lengths, 10, strategy="next_fit", seed=None)) == [[0], [1, 2, 3], [4]]
    # 6 | 5 | 3 goes to the fuller pack 0 | 2 to pack 1, as pack 0 has one left | 4 to a new one
    assert packs_of(pack(lengths, 10, strategy="best_fit", seed=None)) == [[0, 2], [1, 3], [4]]
    # 6 | 5 | 4 fills pack 0 | 3 to pack 1 | 2 fills it
    assert packs_of(pack(lengths, 10, strategy="bfd", seed=None)) == [[0, 4], [1, 2, 3]]
    assert packs_of(pack(lengths, 10, strategy="ffd", seed=None)) == [[0, 4], [1, 2, 3]]
    wrapped = pack(lengths, 8, strategy="wrapped", seed=None)
    assert [[tuple(piece) for piece in wrapped.slices(p)] for p in range(3)] == [
        [(0, 0, 6), (1, 0, 2)],
        [(1, 2, 3), (2, 0, 3), (3, 0, 2)],
        [(4, 0, 4)],
    ]


def test_pieces_take_their_rounded_length():
    # 3 takes 4 tokens of pack 0, so that 4 are left for the next document, and 2 of its 6 go to pack 1
    plan = pack([3, 6], 8, strategy="wrapped", seed=None, pad_doc_to_multiple_of=4)
    assert [[tuple(piece) for piece in plan.slices(p)] for p in range(2)] == [[(0, 0, 3), (1, 0, 4)], [(1, 4, 2)]]
    for strategy in WHOLE:
        plan = pack([3, 5], 8, strategy=strategy, pad_doc_to_multiple_of=4)  # 4 + 8, so not together
        assert plan.num_packs == 2
        assert plan.efficiency == 0.5


def test_best_fit_and_first_fit_differ():
    lengths = [5, 7, 3]  # 3 fits both open packs
    assert packs_of(pack(lengths, 10, strategy="best_fit", seed=None)) == [[0], [1, 2]]
    lengths = [7, 6, 4, 3]
    assert packs_of(pack(lengths, 11, strategy="ffd", seed=None)) == [[0, 2], [1, 3]]
    lengths = [6, 6, 5, 3, 3]  # longest first: 6+5, 6; then 3 and 3 into the second
    assert packs_of(pack(lengths, 12, strategy="ffd", seed=None)) == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize("max_length", [2**31 - 1, 4096])
def test_the_longest_come_first_across_radix_digits(max_length):
    """Sizes that share low digits, so that a sort by one digit alone would fail; one that has a bit more than all others."""
    lengths = [n for n in (1, 2048, 4096, 3, 2049, 4095, 2**22 + 1, 2**22, 5, 2**30) if n <= max_length]
    plan = pack(lengths, max_length, strategy="ffd", seed=None, max_docs_per_pack=1)
    assert [lengths[i] for i in plan.indices] == sorted(lengths, reverse=True)


def test_numbers_of_a_plan():
    plan = pack([6, 5, 0, 3, 2, 4, 50], 10, strategy="bfd", seed=None, overlong="drop")
    assert (plan.num_packs, plan.num_documents, plan.num_empty, plan.num_overlong) == (2, 7, 1, 1)
    assert (plan.num_tokens, plan.dropped_tokens, plan.efficiency) == (20, 50, 1.0)
    assert plan.docs_per_pack.tolist() == [2, 3]
    assert plan.tokens_per_pack.tolist() == [10, 10]
    assert plan[-1].tolist() == plan[1].tolist() == [1, 3, 4]
    assert "7 documents -> 2 packs of 10 tokens, 100.00 % full" in repr(plan)
    assert "1 document -> 1 pack of 10 tokens" in repr(pack([3], 10))
    assert "1 empty; 1 overlong, 50 tokens dropped" in repr(plan)
    with pytest.raises(IndexError, match="pack 2 of a plan with 2 packs"):
        plan[2]


# ---- any input -------------------------------------------------------------------------------------------------------------

requests = st.fixed_dictionaries(
    {
        "strategy": st.sampled_from(STRATEGIES),
        "seed": st.one_of(st.none(), st.integers(0, 2**64 - 1)),
        "epoch": st.integers(0, 5),
        "max_docs_per_pack": st.one_of(st.none(), st.integers(1, 4)),
        "overlong": st.sampled_from(["truncate", "split", "drop"]),
        "pad_doc_to_multiple_of": st.sampled_from([1, 1, 2, 8]),
    }
)


@settings(max_examples=500)
@given(st.lists(st.integers(0, 90), max_size=60), st.sampled_from([8, 16, 64, 72]), requests)
def test_every_token_exactly_once(lengths, max_length, request):
    plan = pack(lengths, max_length, **request)
    cut = {"truncate": lambda n: min(n, max_length), "split": lambda n: n, "drop": lambda n: n if n <= max_length else 0}
    expected = (lambda n: n) if request["strategy"] == "wrapped" else cut[request["overlong"]]
    for document, tokens in check_plan(plan, lengths):
        assert tokens == expected(lengths[document])
    assert plan.num_tokens + plan.dropped_tokens == sum(lengths)
    assert plan.num_empty == lengths.count(0)
    if request["max_docs_per_pack"]:
        assert plan.docs_per_pack.max(initial=0) <= request["max_docs_per_pack"]
    again = pack(lengths, max_length, **request)
    assert plan.hash() == again.hash()
    assert np.array_equal(plan.indices, again.indices)


def best_fit_by_search(lengths, capacity):
    """Best fit as the textbook says it: look at every open pack. The free spaces it leaves are those of any correct best fit."""
    free = []
    for length in lengths:
        fitting = [i for i, space in enumerate(free) if space >= length]
        if fitting:
            free[min(fitting, key=lambda i: free[i])] -= length
        else:
            free.append(capacity - length)
    return sorted(free)


def first_fit_by_search(lengths, capacity):
    free, packs = [], []
    for i, length in enumerate(lengths):
        for p, space in enumerate(free):
            if space >= length:
                free[p] -= length
                packs[p].append(i)
                break
        else:
            free.append(capacity - length)
            packs.append([i])
    return packs


@given(st.lists(st.integers(1, 130), max_size=80), st.sampled_from([130, 200, 4097, 2**22 + 1, 2**31 - 1]))
def test_against_brute_force(lengths, capacity):
    """Capacities on both sides of the bound between the table of free spaces and the map, and with 1 to 4 bitmap levels."""
    scale = capacity // 130
    lengths = [length * scale for length in lengths]
    plan = pack(lengths, capacity, strategy="best_fit", seed=None)
    assert sorted((capacity - plan.tokens_per_pack).tolist()) == best_fit_by_search(lengths, capacity)
    longest_first = sorted(lengths, reverse=True)
    plan = pack(lengths, capacity, strategy="bfd")
    assert sorted((capacity - plan.tokens_per_pack).tolist()) == best_fit_by_search(longest_first, capacity)
    plan = pack(longest_first, capacity, strategy="ffd", seed=None)
    assert packs_of(plan) == first_fit_by_search(longest_first, capacity)


@pytest.mark.parametrize("strategy", WHOLE)
def test_many_packs(strategy):
    """More packs than the first-fit tree starts with, more documents than one shuffle bucket."""
    lengths = np.random.default_rng(0).integers(1, 1000, 50_000)
    plan = pack(lengths, 1000, strategy=strategy)
    assert plan.num_packs > 2048
    assert all(tokens == lengths[document] for document, tokens in check_plan(plan, lengths))
    if strategy in ("best_fit", "bfd", "ffd"):
        assert plan.efficiency > 0.97


def test_as_full_as_promised():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.6, 0.9, 200_000), 8, 4096).astype(np.int32)
    assert pack(lengths, 4096).efficiency >= 0.996
    assert pack(lengths, 4096, strategy="bfd").efficiency >= 0.9995
    assert pack(lengths, 4096).docs_per_pack.max() < 50 < pack(lengths, 4096, strategy="bfd").docs_per_pack.max()


# ---- order -----------------------------------------------------------------------------------------------------------------


def test_the_order_is_the_same_on_every_machine():
    """Frozen values: a change here changes every user's plan, and breaks the resumption of running trainings."""
    assert _C.permutation(10, 0, 0).tolist() == PERMUTATION_10
    long = _C.permutation(100_000, 1, 2)
    assert long[:5].tolist() == PERMUTATION_100000
    assert pack(range(1, 200), 300).hash() == PLAN_HASH


PERMUTATION_10 = [1, 2, 5, 7, 0, 8, 4, 3, 9, 6]
PERMUTATION_100000 = [36581, 84047, 67456, 35618, 69768]
PLAN_HASH = "1f5836fee6f3803cdfc54c86b32af21f"


def test_seeds_and_epochs_give_other_orders():
    lengths = np.arange(1, 200)
    hashes = [pack(lengths, 300, seed=s, epoch=e).hash() for s in (0, 1, 2**64 - 1) for e in (0, 1, 2)]
    assert len(set(hashes)) == 9
    assert pack(lengths, 300, strategy="sequential", seed=0).hash() == pack(lengths, 300, strategy="sequential", seed=1).hash()
    # bfd orders equal lengths by the seed
    equal = [5] * 40
    assert pack(equal, 10, strategy="bfd", seed=0).hash() != pack(equal, 10, strategy="bfd", seed=1).hash()


@pytest.mark.parametrize("count", [0, 1, 2, 7, 1 << 15, (1 << 15) + 1, 100_003])
def test_permutations_are_permutations(count):
    assert np.array_equal(np.sort(_C.permutation(count, 3, 1)), np.arange(count))


@pytest.mark.parametrize("count", [100, 40_000])
def test_the_shuffle_is_uniform(count):
    """Item 0 and item count-1 end everywhere alike, below and above the size at which buckets come in."""
    rounds = 800
    for item in (0, count - 1):
        places = np.array([np.flatnonzero(_C.permutation(count, seed, 0) == item)[0] for seed in range(rounds)])
        quarters = np.bincount(places * 8 // count, minlength=8)
        chi_square = ((quarters - rounds / 8) ** 2 / (rounds / 8)).sum()
        assert chi_square < 30  # 7 degrees of freedom: exceeded once in 10000


# ---- what no caller should pass --------------------------------------------------------------------------------------------


def test_bad_arguments():
    with pytest.raises(ValueError, match=r'lengths\[1\] = 11 is longer than max_length = 10; overlong="truncate"'):
        pack([3, 11], 10)
    with pytest.raises(ValueError, match=r"lengths\[2\] = -4 is negative"):
        pack([3, 1, -4], 10)
    with pytest.raises(TypeError, match=r"lengths must be integers .* got float64"):
        pack([1.5], 10)
    with pytest.raises(TypeError, match="got bool"):
        pack([True], 10)
    with pytest.raises(ValueError, match=r"one-dimensional .* got shape \(1, 2\)"):
        pack([[1, 2]], 10)
    with pytest.raises(ValueError, match=r"lengths must fit int64, got 18446744073709551615"):
        pack(np.array([2**64 - 1], np.uint64), 10)
    for max_length in (0, -1, 2**31):
        with pytest.raises(ValueError, match=rf"max_length must be between 1 and 2\^31 - 1, got {max_length}"):
            pack([1], max_length)
    with pytest.raises(ValueError, match=r"strategy must be one of 'best_fit', .*got 'lpfhp'"):
        pack([1], 10, strategy="lpfhp")
    with pytest.raises(ValueError, match=r"overlong must be one of 'error', .*got 'keep'"):
        pack([1], 10, overlong="keep")
    with pytest.raises(ValueError, match="max_docs_per_pack must be positive or None, got 0"):
        pack([1], 10, max_docs_per_pack=0)
    for seed, epoch, name in ((-1, 0, "seed"), (2**64, 0, "seed"), (0, -1, "epoch")):
        with pytest.raises(ValueError, match=rf"{name} must be between 0 and 2\^64 - 1( or None)?, got"):
            pack([1], 10, seed=seed, epoch=epoch)
    with pytest.raises(ValueError, match="pad_doc_to_multiple_of must divide max_length = 10, got 4"):
        pack([1], 10, pad_doc_to_multiple_of=4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_to_pack(strategy):
    for lengths in ([], [0, 0]):
        plan = pack(lengths, 10, strategy=strategy)
        assert (plan.num_packs, plan.num_empty, plan.efficiency) == (0, len(lengths), 1.0)
        assert packs_of(plan) == []
        assert "0 packs" in repr(plan)


def test_lengths_of_any_integer_type_and_stride():
    expected = pack([3, 4, 5, 6], 10).hash()
    for dtype in (np.int8, np.uint16, np.int32, np.uint64):
        assert pack(np.array([3, 4, 5, 6], dtype), 10).hash() == expected
    assert pack(np.array([3, 0, 4, 0, 5, 0, 6])[::2], 10).hash() == expected
    assert pack(range(3, 7), 10).hash() == expected


def test_a_document_longer_than_32_bits_is_split_right():
    plan = pack([2**33 + 5], 2**31 - 1, overlong="split")
    assert plan.num_tokens == 2**33 + 5
    assert plan.tokens_per_pack.max() == 2**31 - 1


@pytest.mark.parametrize("call", ["pack", "permutation"])
def test_packing_lets_other_threads_run(call):
    """Threads change only where one gives the GIL away. Another one ran between two lines of this one: the call gave it away."""
    lengths = np.random.default_rng(0).integers(1, 4000, 300_000)
    calls = {
        "pack": lambda: _C.pack(lengths, 4096, "ffd", seed=0, epoch=0, max_docs=0, overlong="error", multiple=1),
        "permutation": lambda: _C.permutation(3_000_000, 0, 0),
    }
    ticks, ran_meanwhile = 0, False

    def work():
        nonlocal ran_meanwhile
        for _ in range(50):  # one such call is enough; the machine may be busy with something else
            time.sleep(0.0005)  # before the first one, too: a thread that starts has given the GIL away
            before = ticks
            calls[call]()
            ran_meanwhile = ticks > before
            if ran_meanwhile:
                break

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        while thread.is_alive():
            ticks += 1
            time.sleep(0.0005)  # long enough for the other thread to take what this one gives away
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert ran_meanwhile


# ---- limits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("lengths", [[2**62, 2**62], [1, 2**63 - 1], [2**63 - 1, 0, 1]], ids=str)
@pytest.mark.parametrize("overlong", ["truncate", "drop", "split"])
def test_lengths_that_add_up_to_more_than_64_bits_are_refused(strategy, lengths, overlong):
    with pytest.raises(ValueError, match=r"lengths must add up to less than 2\^63 tokens|more than 2\^32 - 2 pieces"):
        pack(lengths, 16, strategy=strategy, overlong=overlong)


def test_lengths_that_just_fit_are_counted_exactly():
    plan = pack([2**63 - 10, 9], 9, strategy="sequential", overlong="drop")
    assert (plan.dropped_tokens, plan.num_packs) == (2**63 - 10, 1)
    plan = pack([2**63 - 10, 9], 9, strategy="sequential", overlong="truncate")
    assert (plan.dropped_tokens, plan.num_packs) == (2**63 - 19, 2)
    with pytest.raises(ValueError, match=r"lengths\[1\] = 10"):
        pack([2**63 - 10, 10], 9, strategy="sequential", overlong="drop")


@pytest.mark.parametrize("strategy, overlong", [("best_fit", "split"), ("wrapped", "error")])
def test_too_many_pieces_are_refused_before_they_are_made(strategy, overlong):
    with pytest.raises(ValueError, match="documents split into more than"):
        pack([2**40], 16, strategy=strategy, overlong=overlong)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_packing_does_not_write_or_keep_the_lengths(strategy):
    lengths = np.array([7, 3, 0, 5, 16, 2], dtype=np.int64)
    lengths.flags.writeable = False
    plan = pack(lengths, 16, strategy=strategy)
    assert not any(np.shares_memory(array, lengths) for array in (plan.indices, plan.offsets, plan.starts, plan.lengths))


# ---- numbers that count something -------------------------------------------------------------------------------------------

COUNTS = {
    "max_length": lambda value: pack([1], value),
    "max_docs_per_pack": lambda value: pack([3, 2], 8, max_docs_per_pack=value),
    "pad_doc_to_multiple_of": lambda value: pack([3, 2], 8, pad_doc_to_multiple_of=value),
    "seed": lambda value: pack([3, 2], 8, seed=value),
    "epoch": lambda value: pack([3, 2], 8, epoch=value),
    "packs_per_batch": lambda value: packops.PackedBatchSampler([3, 2], 8, packs_per_batch=value),
    "rank": lambda value: packops.PackedBatchSampler([3, 2], 8, rank=value, world_size=2),
    "world_size": lambda value: packops.PackedBatchSampler([3, 2], 8, rank=0, world_size=value),
    "epoch of set_epoch": lambda value: packops.PackedBatchSampler([3, 2], 8).set_epoch(value),
    "step": lambda value: packops.PackedBatchSampler([3, 2], 8).state_dict(step=value),
    "max_length of a stream": lambda value: packops.StreamPacker(value),
    "open_packs": lambda value: packops.StreamPacker(8, open_packs=value),
    "max_docs_per_pack of a stream": lambda value: packops.StreamPacker(8, max_docs_per_pack=value),
    "pad_doc_to_multiple_of of a stream": lambda value: packops.StreamPacker(8, pad_doc_to_multiple_of=value),
    "pad_token_id": lambda value: packops.PackingCollator(pad_token_id=value),
    "ignore_index": lambda value: packops.PackingCollator(ignore_index=value),
    "pad_to_multiple_of": lambda value: packops.PackingCollator(pad_to_multiple_of=value),
    "pad_to_length": lambda value: packops.PackingCollator(pad_to_length=value),
    "pad_doc_to_multiple_of of a collator": lambda value: packops.PackingCollator(pad_doc_to_multiple_of=value),
    "num_documents": lambda value: packops.PackingCollator(num_documents=value),
}


@pytest.mark.parametrize("which", COUNTS)
def test_what_counts_is_an_integer(which):
    """Half a document was a limit that nothing ever reached, None an epoch of its own; True is 1, and nobody means that."""
    for value in (1.5, 2.0, "1", True, np.float32(1)):
        with pytest.raises(TypeError, match=rf"^{which.split(' of ')[0]} must be an integer, got "):
            COUNTS[which](value)
    COUNTS[which](np.int64(1))


def test_ids_may_be_negative_and_fit_64_bits():
    packops.PackingCollator(pad_token_id=-1, ignore_index=-(2**63))
    with pytest.raises(ValueError, match=r"^pad_token_id must be between -2\^63 and 2\^63 - 1, got 9223372036854775808"):
        packops.PackingCollator(pad_token_id=2**63)


def test_a_state_holds_plain_numbers():
    """So that it is JSON, and torch.load takes it."""
    sampler = packops.PackedBatchSampler([3, 2], 8, rank=np.int64(0), world_size=np.int32(1), packs_per_batch=np.uint8(1))
    sampler.set_epoch(np.int64(3))
    state = sampler.state_dict(step=np.int64(0))
    assert json.loads(json.dumps(state))["epoch"] == 3
    other = packops.PackedBatchSampler([3, 2], 8)
    other.load_state_dict(state)
    assert other.epoch == 3


@pytest.mark.parametrize("cost", [(math.nan, 1), (1, math.inf), (-1, 1), (1,), (1, 2, 3), 3, "ab", None])
def test_a_cost_that_is_none_is_refused(cost):
    """NaN and a negative cost gave an order that evens out nothing."""
    with pytest.raises((TypeError, ValueError), match=r"^cost must be two .*numbers"):
        packops.PackedBatchSampler([3, 2], 8, cost=cost)


@pytest.mark.parametrize("gone", [300, 0])
def test_a_document_that_is_left_out_shares_nothing_with_the_next(gone):
    """What the next one shares with the last that is kept is no more than either shares with it."""
    plan = packops.pack([100, gone, 200], 256, groups=[0, 0, 0], shared=[0, 0, min(gone, 199)], overlong="drop")
    assert sorted(plan.tokens_per_pack.tolist()) == [100, 200]
    plan = packops.pack([100, 300, 120], 256, groups=[0, 0, 0], shared=[0, 60, 90], overlong="drop")
    assert plan.tokens_per_pack.tolist() == [100 + 120 - 60]


def test_the_pieces_of_a_pack_are_counted_from_either_end():
    plan = pack([3, 4, 2], 5, strategy="sequential")
    assert [plan.slices(p) for p in (-1, 1)] == [plan.slices(plan.num_packs - 1), [(1, 0, 4)]]
    for get in (plan.slices, plan.__getitem__):
        for place in (3, -4):
            with pytest.raises(IndexError, match=f"pack {place} of a plan with 3 packs"):
                get(place)
        with pytest.raises(TypeError, match="pack must be an integer, got a slice"):
            get(slice(0, 1))


def test_no_document_shares_more_than_there_is_before_it():
    """The row would be longer than the plan says."""
    with pytest.raises(ValueError, match=r"shared\[2\] must be at most lengths\[0\] = 1, of the document before it .*, got 5"):
        packops.pack([1, 5, 5], 5, groups=[0, 1, 0], shared=[0, 5, 5])
    plan = packops.pack([1, 5, 5], 5, groups=[0, 1, 0], shared=[1, 5, 1])  # what the first of a group shares is not asked
    assert plan.tokens_per_pack.sum() == 10


def test_documents_are_no_lengths():
    with pytest.raises(ValueError, match=r"lengths \(tokens per document\): "):
        pack([[1, 2, 3], [4]], 10)
