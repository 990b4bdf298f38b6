"""PackedBatchSampler: exactly once over the ranks, resumable, balanced."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packops import DocumentSlice, PackedBatchSampler, PackingCollator, SlicedDataset, pack

options = st.fixed_dictionaries(
    {
        "strategy": st.sampled_from(["best_fit", "bfd", "next_fit", "sequential"]),
        "packs_per_batch": st.integers(1, 3),
        "seed": st.one_of(st.none(), st.integers(0, 99)),
        "balance": st.sampled_from(["none", "tokens", "attention"]),
    }
)
documents = st.lists(st.integers(0, 20), max_size=60)


def ranks(lengths, max_length, world_size, **kwargs):
    return [PackedBatchSampler(lengths, max_length, rank=r, world_size=world_size, **kwargs) for r in range(world_size)]


def check_epoch(batches_of_ranks, lengths, capacity):
    """Exactly once, equally often, within capacity."""
    assert len({len(batches) for batches in batches_of_ranks}) == 1
    seen = Counter(i for batches in batches_of_ranks for batch in batches for i in batch)
    assert seen == Counter(i for i, n in enumerate(lengths) if n)
    for batches in batches_of_ranks:
        assert all(sum(lengths[i] for i in batch) <= capacity for batch in batches)


@settings(max_examples=300)
@given(documents, st.integers(1, 5), options, st.integers(0, 2))
def test_exactly_once_over_ranks(lengths, world_size, kwargs, epoch):
    samplers = ranks(lengths, 20, world_size, **kwargs)
    for sampler in samplers:
        sampler.set_epoch(epoch)
    batches = [list(sampler) for sampler in samplers]
    assert [len(b) for b in batches] == [len(s) for s in samplers]
    check_epoch(batches, lengths, 20 * kwargs["packs_per_batch"])
    assert [list(sampler) for sampler in samplers] == batches  # a second pass over the epoch is the same


@settings(max_examples=300)
@given(documents, st.integers(1, 4), options, st.integers(0, 12), st.integers(1, 4), st.integers(1, 2), st.integers(0, 5))
def test_resume_on_any_number_of_ranks(lengths, world_size, kwargs, stop, new_world_size, new_packs, stop_again):
    """Stop, go on with other ranks and batch sizes, stop, go on: every document once."""
    samplers = ranks(lengths, 20, world_size, **kwargs)
    done: list[list] = [[], [], []]

    def take(samplers, steps, into):
        iterators = [iter(s) for s in samplers]
        steps = min(steps, *(len(s) - sum(n for *_, n in s._past) - s._start for s in samplers))
        for iterator in iterators:
            into += [next(iterator) for _ in range(steps)]
        return json.loads(json.dumps(samplers[0].state_dict()))

    state = take(samplers, stop, done[0])
    middle = ranks(lengths, 20, new_world_size, **{**kwargs, "packs_per_batch": new_packs})
    for sampler in middle:
        sampler.load_state_dict(state)
        sampler.set_epoch(sampler.epoch)
    state = take(middle, stop_again, done[1])
    last = ranks(lengths, 20, world_size, **kwargs)
    for sampler in last:
        sampler.load_state_dict(state)
    for sampler in last:
        done[2] += list(sampler)
    check_epoch([[b for part in done for b in part]], lengths, 20 * max(kwargs["packs_per_batch"], new_packs))


@given(documents, st.integers(1, 3), options, st.integers(0, 20))
def test_resume_gives_the_same_batches(lengths, world_size, kwargs, stop):
    for rank in range(world_size):
        expected = list(PackedBatchSampler(lengths, 20, rank=rank, world_size=world_size, **kwargs))
        first = PackedBatchSampler(lengths, 20, rank=rank, world_size=world_size, **kwargs)
        stop = min(stop, len(expected))
        second = PackedBatchSampler(lengths, 20, rank=rank, world_size=world_size, **kwargs)
        second.load_state_dict(first.state_dict(step=stop))
        assert list(second) == expected[stop:]
        assert list(second) == expected  # and the epoch after that is whole again


def test_fetching_ahead_does_not_move_the_state():
    lengths = np.arange(1, 200)
    sampler = PackedBatchSampler(lengths, 250)
    dataset = [[1] * n for n in lengths]
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=PackingCollator(), num_workers=2)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    assert sampler.state_dict()["segments"][-1][2] > 3  # the workers are ahead
    resumed = PackedBatchSampler(lengths, 250)
    resumed.load_state_dict(sampler.state_dict(step=3))
    assert list(resumed) == list(PackedBatchSampler(lengths, 250))[3:]


def test_an_abandoned_pass_loses_nothing():
    sampler = PackedBatchSampler(range(1, 50), 60)
    expected = list(sampler)
    next(iter(sampler))
    assert list(sampler) == expected


def test_epochs_differ_and_ranks_agree():
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    samplers = ranks(lengths, 128, 4)
    orders = []
    for epoch in range(3):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        assert len({sampler.plan.hash() for sampler in samplers}) == 1
        orders.append(list(samplers[0]))
    assert orders[0] != orders[1] != orders[2]


def test_sequential_keeps_the_order():
    batches = list(PackedBatchSampler([4, 4, 4, 4, 4, 4], 8, strategy="sequential", balance="none"))
    assert batches == [[0, 1], [2, 3], [4, 5]]


def test_packs_are_cut_in_two_rather_than_dropped():
    # two packs, three ranks: the pack of [1, 1, 2] is cut where its tokens halve
    samplers = ranks([4, 1, 1, 2], 4, 3, seed=None, balance="none")
    assert [list(s) for s in samplers] == [[[0]], [[1, 2]], [[3]]]
    # three packs, five ranks: of packs with as many documents the first are cut first, so that the plan is the same everywhere
    samplers = ranks([1] * 6, 2, 5, seed=None, balance="none")
    assert [list(s) for s in samplers] == [[[0]], [[2]], [[4, 5]], [[1]], [[3]]]
    # one document for three ranks: two of them get an empty batch
    samplers = ranks([4], 4, 3, seed=None)
    assert sorted(batch for s in samplers for batch in s) == [[], [], [0]]
    assert len(ranks([4, 4, 4], 4, 2, drop_last=True)[0]) == 1


def utilisation(costs):
    return costs.mean(1).sum() / costs.max(1).sum()


def test_balance_evens_out_the_ranks():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.6, 0.9, 60_000), 8, 8192).astype(int)
    values = {}
    for balance in ("none", "tokens", "attention"):
        sampler = PackedBatchSampler(lengths, 8192, rank=0, world_size=8, balance=balance)
        tokens = np.array([[sum(lengths[i] for i in b) for b in s] for s in ranks(lengths, 8192, 8, balance=balance)]).T
        values[balance] = utilisation(sampler.costs()), utilisation(tokens)
    assert values["attention"][0] > 0.995 > values["none"][0]
    assert values["tokens"][1] >= values["none"][1]
    # several packs a rank and step are dealt so that their sums agree
    assert (
        utilisation(PackedBatchSampler(lengths, 2048, rank=0, world_size=8, packs_per_batch=4, overlong="drop").costs()) > 0.995
    )


def test_packs_of_a_step_are_dealt_in_turns():
    """Costs 8 7 6 5 4 3 2 1 over two ranks of four packs: 8+5+4+1 against 7+6+3+2."""
    sampler = PackedBatchSampler([8, 7, 6, 5, 4, 3, 2, 1], 8, max_docs_per_pack=1, packs_per_batch=4, rank=0, world_size=2)
    assert sampler.costs().shape == (1, 2)
    assert sampler.cost[0] * 36 + 204 == sampler.costs().sum()
    assert sorted(len(b) for b in sampler) == [4]
    assert [8 - i for i in next(iter(sampler))] == [8, 5, 4, 1]


def test_empty_packs_are_not_resumed():
    three = ranks([4], 4, 3)
    one = PackedBatchSampler([4], 4)
    one.load_state_dict(three[0].state_dict(step=0))
    assert list(one) == [[0]]


def test_costs_are_those_of_the_batches():
    lengths = np.random.default_rng(1).integers(1, 50, 100)
    samplers = ranks(lengths, 64, 3, cost=(10.0, 2.0), packs_per_batch=2)
    by_hand = [[sum(10 * lengths[i] + 2 * lengths[i] ** 2 for i in batch) for batch in s] for s in samplers]
    assert np.allclose(samplers[0].costs(), np.array(by_hand).T)


@pytest.mark.parametrize("strategy, overlong", [("best_fit", "truncate"), ("best_fit", "split"), ("wrapped", "error")])
def test_cut_documents_through_a_loader(strategy, overlong):
    lengths = [30, 5, 7, 100, 3]
    dataset = [{"input_ids": [10 * i + j % 10 for j in range(n)], "name": str(i)} for i, n in enumerate(lengths)]
    sampler = PackedBatchSampler(lengths, 16, strategy=strategy, overlong=overlong)
    assert all(isinstance(part, DocumentSlice) for batch in sampler for part in batch)
    loader = torch.utils.data.DataLoader(SlicedDataset(dataset), batch_sampler=sampler, collate_fn=PackingCollator())
    seen = Counter()
    for batch in loader:
        assert batch.num_tokens <= 16
        seen += Counter(batch.input_ids[0].tolist())
    kept = [n if overlong != "truncate" else min(n, 16) for n in lengths]
    assert seen == Counter(t for d, n in zip(dataset, kept, strict=True) for t in d["input_ids"][:n])


def test_stale_lengths_are_found_out():
    with pytest.raises(ValueError, match=r"tokens \[0, 16\) of a document of 4: the lengths packed were not its lengths"):
        SlicedDataset([[1, 2, 3, 4]])[DocumentSlice(0, 0, 16)]


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"rank must be in \[0, world_size = 2\), got 2"):
        PackedBatchSampler([1], 4, rank=2, world_size=2)
    with pytest.raises(ValueError, match=r"world_size \* packs_per_batch must be at most 2\^24 packs a step, got 33554432 \* 1"):
        PackedBatchSampler([1], 4, rank=0, world_size=2**25)
    for cost in ("12", ["1", 2], [True, 2], [1]):
        with pytest.raises(TypeError, match="cost must be two numbers"):
            PackedBatchSampler([1], 4, cost=cost)
    with pytest.raises(ValueError, match="balance must be 'none', 'tokens' or 'attention', got 'cost'"):
        PackedBatchSampler([1], 4, balance="cost")
    with pytest.raises(ValueError, match=r"lengths\[0\] = 9 is longer"):
        PackedBatchSampler([9], 4)
    with pytest.raises(ValueError, match="the state belongs to other lengths"):
        PackedBatchSampler([1, 2], 4).load_state_dict(PackedBatchSampler([3, 2], 4).state_dict())
    with pytest.raises(ValueError, match="step must be between 0 and 1, got 2"):
        PackedBatchSampler([1, 2], 4).state_dict(step=2)


def test_all_ranks_in_turn():
    """For loaders that share batches out themselves: what the ranks would yield, a step's batches one after the other."""
    options = {"max_length": 64, "world_size": 3, "seed": 5}
    lengths = [5 + i % 17 for i in range(100)]
    ranks = [list(PackedBatchSampler(lengths, rank=rank, **options)) for rank in range(3)]
    together = PackedBatchSampler(lengths, rank=0, all_ranks=True, **options)
    assert [batch for step in zip(*ranks, strict=True) for batch in step] == list(together)
    assert len(together) == 3 * len(ranks[0])
    state = together.state_dict(step=2)
    together.load_state_dict(state)
    assert list(together) == [batch for step in zip(*(rank[2:] for rank in ranks), strict=True) for batch in step]
    with pytest.raises(ValueError, match=f"step must be between 2 and {len(ranks[0])}"):
        together.state_dict(step=len(ranks[0]) + 1)


def test_sharing_out_a_share_is_refused():
    """accelerate asks a batch sampler for its batch_size before it shares out its batches."""
    lengths = [5] * 20
    with pytest.raises(ValueError, match="all_ranks=True"):
        _ = PackedBatchSampler(lengths, 16, rank=0, world_size=2).batch_size
    assert not hasattr(PackedBatchSampler(lengths, 16, rank=0, world_size=2, all_ranks=True), "batch_size")
    assert not hasattr(PackedBatchSampler(lengths, 16, rank=0, world_size=1), "batch_size")


# ---- resuming twice, late, in the middle of fetching ahead, or with something else --------------------------------------------


def count(batches):
    return Counter(document for batch in batches for document in batch)


def take(samplers, steps):
    return count(batch for sampler in samplers for batch in itertools.islice(sampler, steps))


def resumed(samplers, state):
    for sampler in samplers:
        sampler.load_state_dict(json.loads(json.dumps(state)))
    return samplers


def fetched_ahead(sampler, dataset_size, steps):
    """The batches of the first ``steps`` steps, by a loader whose worker has fetched more."""
    loader = torch.utils.data.DataLoader(range(dataset_size), batch_sampler=sampler, num_workers=1, collate_fn=list)
    return loader, list(itertools.islice(loader, steps))


@pytest.mark.parametrize("left", [1, 2])
def test_an_elastic_resume_goes_on_while_workers_fetch_ahead(left):
    """The workers take the last batches before they are trained on; a state taken then still knows the first segment."""
    lengths = np.random.default_rng(0).integers(1, 100, 120)
    first, second = ranks(lengths, 256, 4), ranks(lengths, 256, 2)
    seen = take(first, 3)
    resumed(second, first[0].state_dict(step=3))
    total = len(second[0])
    loader, batches = fetched_ahead(second[0], len(lengths), total - 3 - left)
    seen += count(batches) + take(second[1:], total - 3 - left)
    assert len(loader) == total
    state = second[0].state_dict(step=total - left)
    assert state["segments"] == [(4, 1, 3), (2, 1, total - 3 - left)]
    for sampler in resumed(ranks(lengths, 256, 3), state):
        seen += count(sampler)
    assert seen == Counter(range(len(lengths)))


def test_a_state_without_step_counts_what_was_handed_out_to_workers():
    lengths = np.arange(1, 60)
    sampler = PackedBatchSampler(lengths, 100)
    total = len(sampler)
    _, batches = fetched_ahead(sampler, len(lengths), total - 1)
    assert len(batches) == total - 1
    assert sampler.state_dict()["segments"] == [(1, 1, total)]
    assert sampler.state_dict(step=total - 1)["segments"] == [(1, 1, total - 1)]


def test_a_state_after_the_last_step_leaves_nothing_of_the_epoch():
    lengths = np.arange(1, 60)
    sampler = PackedBatchSampler(lengths, 100)
    sampler.set_epoch(3)
    whole = list(sampler)
    for state in (sampler.state_dict(), sampler.state_dict(step=len(whole))):
        for world_size in (1, 2):
            (after, *_) = resumed(ranks(lengths, 100, world_size), state)
            after.set_epoch(3)
            assert list(after) == []
            after.set_epoch(4)
            assert count(after) if world_size == 1 else True
            assert after.state_dict()["epoch"] == 4
    (after,) = resumed([PackedBatchSampler(lengths, 100)], sampler.state_dict())
    sampler.set_epoch(4)
    assert list(after) == []
    after.set_epoch(4)
    assert list(after) == list(sampler) != whole


def test_the_pass_after_an_elastic_resume_is_whole():
    lengths = np.random.default_rng(1).integers(1, 50, 100)
    first = ranks(lengths, 64, 3)
    take(first, 4)
    second = resumed(ranks(lengths, 64, 2), first[0].state_dict(step=4))
    fresh = [list(s) for s in ranks(lengths, 64, 2)]
    rest = [list(s) for s in second]
    assert rest != fresh
    assert second[0].state_dict()["segments"] == [(3, 1, 4), (2, 1, len(rest[0]))]
    assert [list(s) for s in second] == fresh  # nobody has called set_epoch
    assert len(second[0]) == len(fresh[0])
    assert second[0].state_dict(step=5)["segments"] == [(2, 1, 5)]
    second[0].set_epoch(1)
    fresh[0] = PackedBatchSampler(lengths, 64, rank=0, world_size=2)
    fresh[0].set_epoch(1)
    assert list(second[0]) == list(fresh[0])


def test_an_abandoned_pass_after_a_resume_begins_where_the_resume_did():
    lengths = np.arange(1, 60)
    whole = list(PackedBatchSampler(lengths, 100))
    (sampler,) = resumed([PackedBatchSampler(lengths, 100)], PackedBatchSampler(lengths, 100).state_dict(step=4))
    abandoned = iter(sampler)
    assert [next(abandoned), next(abandoned)] == whole[4:6]
    again = iter(sampler)
    assert next(again) == whole[4]
    list(abandoned)  # a loader that still fetches for the old pass says nothing about the new one
    assert sampler.state_dict()["segments"] == [(1, 1, 5)]
    assert list(again) == whole[5:]
    assert list(sampler) == whole


def test_steps_after_a_resume_count_from_the_beginning_of_the_epoch():
    lengths = np.arange(1, 60)
    first = ranks(lengths, 100, 2)
    (same, _) = resumed(ranks(lengths, 100, 2), first[0].state_dict(step=4))
    assert same.state_dict()["segments"] == [(2, 1, 4)]
    with pytest.raises(ValueError, match=rf"step must be between 4 and {len(same)}, got 2: it counts from"):
        same.state_dict(step=2)
    (other,) = resumed([PackedBatchSampler(lengths, 100)], same.state_dict(step=6))
    with pytest.raises(ValueError, match=f"step must be between 6 and {len(other)}, got 5"):
        other.state_dict(step=5)
    assert other.state_dict(step=8)["segments"] == [(2, 1, 6), (1, 1, 2)]


OTHER_ORDERS = {
    "balance": ({}, {"balance": "none"}),
    "what is balanced": ({}, {"balance": "tokens"}),
    "cost": ({}, {"cost": (1.0, 1.0)}),
    "seed": ({"strategy": "bfd", "seed": 0}, {"strategy": "bfd", "seed": 1}),
    "no seed": ({"strategy": "bfd", "seed": 0}, {"strategy": "bfd", "seed": None}),
    "drop_last": ({}, {"drop_last": True}),
    "strategy": ({}, {"strategy": "bfd"}),
    "max_docs_per_pack": ({}, {"max_docs_per_pack": 3}),
}


@pytest.mark.parametrize("name", OTHER_ORDERS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_another_order_is_refused_and_changes_nothing(name, world_size):
    lengths = np.random.default_rng(1).permutation(np.arange(1, 203))
    before, after = OTHER_ORDERS[name]
    state = ranks(lengths, 256, 2, **before)[0].state_dict(step=20)
    sampler = PackedBatchSampler(lengths, 256, rank=0, world_size=world_size, **after)
    sampler.set_epoch(2)
    next(iter(sampler))
    own, batches = sampler.state_dict(), list(PackedBatchSampler(lengths, 256, rank=0, world_size=world_size, **after))
    with pytest.raises(ValueError, match="other lengths, packing arguments or order"):
        sampler.load_state_dict(state)
    assert (sampler.epoch, sampler.state_dict()) == (2, own)
    sampler.set_epoch(0)
    assert list(sampler) == batches
    # The same order under another name is none.
    same = PackedBatchSampler(lengths, 256, rank=0, world_size=world_size, **before)
    same.load_state_dict(state)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"segments": [(1, 1, 99)]}, "step 99 where there are"),
        ({"segments": [(1, 1, -1)]}, "not the state of a PackedBatchSampler"),
        ({"segments": [(0, 1, 1)]}, "not the state of a PackedBatchSampler"),
        ({"segments": []}, "not the state of a PackedBatchSampler"),
        ({"segments": [(1, 1)]}, "not the state of a PackedBatchSampler"),
        ({"segments": [(1, 1, 2.0)]}, "not the state of a PackedBatchSampler"),
        ({"segments": [(True, 1, 4)]}, "not the state of a PackedBatchSampler"),
        ({"segments": [(2**40, 1, 4)]}, "not the state of a PackedBatchSampler"),
        ({"segments": [(1, 2**40, 4)]}, "not the state of a PackedBatchSampler"),
        ({"segments": [(2**24, 1, 0)]}, "other lengths"),
        ({"segments": [(2, 1, 99)]}, "other lengths|step 99 where"),
        ({"epoch": 1}, "other lengths"),
        ({"epoch": -1}, "epoch must be between 0"),
        ({"plan": "0"}, "other lengths"),
        ({"plan": None, "segments": None}, "not the state of a PackedBatchSampler"),
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_states_that_no_sampler_made_are_refused(change, message, world_size):
    lengths = np.arange(1, 60)
    state = PackedBatchSampler(lengths, 100).state_dict(step=4) | change
    sampler = PackedBatchSampler(lengths, 100, rank=0, world_size=world_size)
    own = sampler.state_dict()
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(state)
    assert sampler.state_dict() == own
    with pytest.raises(ValueError, match="not the state"):
        sampler.load_state_dict({})
    with pytest.raises(ValueError, match="epoch must be between 0"):
        sampler.set_epoch(-1)
    assert sampler.state_dict() == own


def test_a_state_whose_segments_do_not_belong_together_is_refused():
    """The steps of an earlier segment decide which packs the later ones share out."""
    lengths = np.random.default_rng(1).integers(1, 50, 100)
    second = resumed(ranks(lengths, 64, 2), ranks(lengths, 64, 3)[0].state_dict(step=4))
    state = second[0].state_dict(step=7)
    for world_size in (2, 4):
        (sampler, *_) = resumed(ranks(lengths, 64, world_size), state)
        own = sampler.state_dict()
        for segments in ([(3, 1, 5), (2, 1, 3)], [(3, 1, 3), (2, 1, 3)], [(4, 1, 4), (2, 1, 3)], [(3, 1, 4)], [(2, 1, 3)]):
            with pytest.raises(ValueError, match="its plan is not this sampler's"):
                sampler.load_state_dict({**state, "segments": segments})
        assert sampler.state_dict() == own


def test_the_callers_lengths_are_neither_kept_nor_written():
    lengths = np.arange(1, 60)
    before = lengths.copy()
    sampler = PackedBatchSampler(lengths, 100)
    expected = list(PackedBatchSampler(before.copy(), 100, rank=0, world_size=1))
    lengths[:] = 1
    sampler.set_epoch(1)
    _ = sampler.plan
    sampler.set_epoch(0)
    assert list(sampler) == expected
    frozen = before.copy()
    frozen.flags.writeable = False
    for strategy in ("best_fit", "bfd", "ffd", "next_fit", "sequential", "wrapped"):
        list(PackedBatchSampler(frozen, 100, strategy=strategy))


@pytest.mark.parametrize("options", [{"strategy": "sequential"}, {"seed": None}], ids=str)
@pytest.mark.parametrize("packs_per_batch, world_size", [(1, 1), (2, 1), (1, 2)])
def test_without_a_seed_packs_keep_their_order(options, packs_per_batch, world_size):
    """Whatever is balanced by default: a curriculum is one."""
    lengths = [1, 5, 2, 7, 3, 4, 8, 6, 2, 2, 5, 1] * 3
    in_order = [int(i) for documents in pack(lengths, 8, **options) for i in documents]
    batches = ranks(lengths, 8, world_size, packs_per_batch=packs_per_batch, **options)
    assert [i for step in itertools.zip_longest(*batches, fillvalue=[]) for batch in step for i in batch] == in_order


@pytest.mark.parametrize("name", ["all_ranks", "drop_last"])
def test_flags_are_flags(name):
    with pytest.raises(TypeError, match=f"{name} must be True or False, got 'no'"):
        PackedBatchSampler([1], 4, **{name: "no"})


def test_a_sampler_that_was_made_too_early_says_so(monkeypatch, recwarn):
    """By default it is for the ranks that there are when it is made."""
    samplers = {
        "early": PackedBatchSampler([1, 2, 3], 5),
        "told": PackedBatchSampler([1, 2, 3], 5, rank=0, world_size=1),
        "shared out": PackedBatchSampler([1, 2, 3], 5, all_ranks=True),
    }
    for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_rank", 1)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    samplers["late"] = PackedBatchSampler([1, 2, 3], 5)
    for name, sampler in samplers.items():
        list(sampler)
        found = [str(warning.message) for warning in recwarn]
        recwarn.clear()
        assert len(found) == (name == "early"), name
        assert all("made before torch.distributed was initialised, for one process, and now there are 2:" in x for x in found)
    assert samplers["late"].world_size == 2
