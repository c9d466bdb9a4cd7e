"""The pool's books: no block is lost or given out twice, and what is reused holds what it should."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasa_trt.core.contract import KEYS, VALUES, block_offset
from fasa_trt.runtime.blocks import BlockAllocator, extend_chain

UNTOUCHED = -7


def chain_of(tokens: list[int], tokens_per_block: int = 4) -> list[bytes]:
    chain: list[bytes] = []
    extend_chain(chain, tokens, tokens_per_block)
    return chain


def blocks_of(allocator: BlockAllocator, sequence: int) -> list[int]:
    """Block numbers, read back from the offsets."""
    row = np.full((allocator.num_pools, 2, allocator.held(sequence)), UNTOUCHED, np.int32)
    allocator.fill_offsets(sequence, row)
    return [int(block) for block in row[0, 0] // 2]


def serve_and_free(allocator: BlockAllocator, sequence: int, tokens: list[int]) -> None:
    """One sequence from its prompt to its end, with its full blocks published."""
    assert allocator.allocate(sequence, len(tokens), chain_of(tokens)) is not None
    allocator.publish(sequence, chain_of(tokens))
    allocator.free(sequence)


def test_room_grows_block_by_block_and_comes_back() -> None:
    allocator = BlockAllocator(5, 4)
    assert allocator.allocate(1, 4) == 0
    assert (allocator.held(1), allocator.free_blocks) == (1, 4)
    assert allocator.append(1, 4)
    assert allocator.held(1) == 1
    assert allocator.append(1, 5)
    assert allocator.held(1) == 2
    assert allocator.append(1, 20)
    assert allocator.free_blocks == 0
    assert not allocator.append(1, 21)
    assert allocator.held(1) == 5
    allocator.check()
    allocator.free(1)
    assert allocator.free_blocks == 5
    allocator.check()


def test_refused_allocation_changes_nothing() -> None:
    allocator = BlockAllocator(4, 4)
    prompt = list(range(8))
    serve_and_free(allocator, 1, prompt)
    assert allocator.allocate(2, 17, chain_of(prompt)) is None
    assert allocator.allocate(2, 9, chain_of(prompt), spare=2) is None
    assert allocator.free_blocks == 4
    assert allocator.counters.reused == 0
    assert allocator.sequences == set()
    allocator.check()
    assert allocator.allocate(2, 9, chain_of(prompt), spare=1) == 8


def test_spare_counts_reused_blocks_that_nobody_held() -> None:
    """A cached block is free until it is reused; one that somebody holds costs nothing."""
    allocator = BlockAllocator(4, 4)
    prompt = list(range(8))
    serve_and_free(allocator, 1, prompt)
    assert allocator.allocate(2, 8, chain_of(prompt)) == 8
    assert allocator.free_blocks == 2
    assert allocator.allocate(3, 8, chain_of(prompt), spare=2) == 8
    assert allocator.free_blocks == 2
    allocator.check()


def test_prefix_is_shared_and_counted() -> None:
    allocator = BlockAllocator(8, 4)
    first, second = [*range(12)], [*range(8), 90, 91, 92, 93]
    assert allocator.allocate(1, 12, chain_of(first)) == 0
    assert allocator.match(chain_of(second)) == 0  # nothing is known of a block before it is computed
    allocator.publish(1, chain_of(first))
    assert allocator.match(chain_of(second)) == 2
    assert allocator.allocate(2, 12, chain_of(second)) == 8
    assert blocks_of(allocator, 2)[:2] == blocks_of(allocator, 1)[:2]
    assert blocks_of(allocator, 2)[2] != blocks_of(allocator, 1)[2]
    assert (allocator.counters.wanted, allocator.counters.reused) == (6, 2)
    allocator.free(1)
    allocator.check()
    assert allocator.free_blocks == 8 - 3
    allocator.free(2)
    assert allocator.free_blocks == 8
    allocator.check()


def test_same_block_after_another_prefix_is_not_shared() -> None:
    allocator = BlockAllocator(8, 4)
    serve_and_free(allocator, 1, [1, 2, 3, 4, 5, 6, 7, 8])
    assert allocator.match(chain_of([5, 6, 7, 8])) == 0
    assert allocator.match(chain_of([9, 9, 9, 9, 5, 6, 7, 8])) == 0


def test_content_computed_twice_is_offered_once() -> None:
    allocator = BlockAllocator(8, 4)
    prompt = list(range(8))
    assert allocator.allocate(1, 8, chain_of(prompt)) == allocator.allocate(2, 8, chain_of(prompt)) == 0
    allocator.publish(1, chain_of(prompt))
    allocator.publish(2, chain_of(prompt))
    allocator.check()
    assert allocator.allocate(3, 8, chain_of(prompt)) == 8
    assert blocks_of(allocator, 3) == blocks_of(allocator, 1)
    for sequence in (1, 2, 3):
        allocator.free(sequence)
    allocator.check()


def test_publishing_goes_on_where_it_stopped() -> None:
    allocator = BlockAllocator(4, 4)
    chain = chain_of(list(range(12)))
    allocator.allocate(1, 12, chain)
    for blocks in (1, 3, 2, 3):
        allocator.publish(1, chain[:blocks])
        allocator.check()
    assert allocator.match(chain) == 3


def test_longest_unused_goes_first_and_a_prefix_outlives_its_end() -> None:
    allocator = BlockAllocator(4, 4)
    old, new = list(range(8)), list(range(50, 58))
    serve_and_free(allocator, 1, old)
    serve_and_free(allocator, 2, new)
    assert allocator.counters.evicted == 0  # blank blocks are taken before anything is evicted
    allocator.allocate(3, 4)
    assert (allocator.match(chain_of(old)), allocator.match(chain_of(new))) == (1, 2)
    allocator.allocate(4, 4)
    assert (allocator.match(chain_of(old)), allocator.match(chain_of(new))) == (0, 2)
    assert allocator.counters.evicted == 2
    allocator.check()


def test_use_renews_a_cached_prefix() -> None:
    allocator = BlockAllocator(4, 4)
    old, new = list(range(8)), list(range(50, 58))
    serve_and_free(allocator, 1, old)
    serve_and_free(allocator, 2, new)
    serve_and_free(allocator, 3, old)
    allocator.allocate(4, 8)
    assert (allocator.match(chain_of(old)), allocator.match(chain_of(new))) == (2, 0)


def test_own_prefix_is_not_evicted_for_the_rest() -> None:
    """Reused blocks are the longest unused ones here, and new ones have to come from eviction."""
    allocator = BlockAllocator(4, 4)
    old, new = list(range(8)), list(range(50, 58))
    serve_and_free(allocator, 1, old)
    serve_and_free(allocator, 2, new)
    assert allocator.allocate(3, 16, chain_of(old)) == 8
    assert sorted(blocks_of(allocator, 3)) == [0, 1, 2, 3]
    allocator.check()


@pytest.mark.parametrize("layers", [(1,), (32,), (30, 2)])
def test_offsets_have_tensorrt_llms_layout(layers: tuple[int, ...]) -> None:
    allocator = BlockAllocator(6, 4, layers_in_pool=layers)
    allocator.allocate(1, 4)
    allocator.allocate(2, 12)
    allocator.free(1)
    allocator.append(2, 16)  # block 0 comes last now
    row = np.full((len(layers), 2, 6), UNTOUCHED, np.int32)
    allocator.fill_offsets(2, row)
    for pool, count in enumerate(layers):
        for column, block in enumerate((1, 2, 3, 0)):
            assert row[pool, :, column].tolist() == [block_offset(block, kind, count) for kind in (KEYS, VALUES)]
    assert (row[:, :, 4:] == UNTOUCHED).all()


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 2**31 - 1), max_size=30),
    st.lists(st.integers(0, 3), max_size=30),
    st.integers(1, 5),
    st.integers(0, 30),
)
def test_chain_names_prefixes(tokens: list[int], others: list[int], tokens_per_block: int, split: int) -> None:
    """Grown in pieces it is the same; two chains agree exactly as far as the tokens do."""
    grown = chain_of(tokens[:split], tokens_per_block)
    extend_chain(grown, tokens, tokens_per_block)
    assert grown == chain_of(tokens, tokens_per_block)
    assert len(grown) == len(tokens) // tokens_per_block
    mixed = tokens[:split] + others
    for i, (a, b) in enumerate(zip(grown, chain_of(mixed, tokens_per_block), strict=False), start=1):
        assert (a == b) == (tokens[: i * tokens_per_block] == mixed[: i * tokens_per_block])


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: BlockAllocator(0, 4),
        lambda: BlockAllocator(4, 0),
        lambda: BlockAllocator(4, 4, layers_in_pool=()),
        lambda: BlockAllocator(4, 4, layers_in_pool=(2, 0)),
        lambda: BlockAllocator(2**25 + 1, 64, layers_in_pool=(1, 32)),
    ],
)
def test_impossible_pools(mistake: Callable[[], object]) -> None:
    with pytest.raises(ValueError):
        mistake()


def test_mistakes_of_the_caller() -> None:
    allocator = BlockAllocator(4, 4)
    allocator.allocate(1, 4)
    with pytest.raises(ValueError, match="already has a table"):
        allocator.allocate(1, 4)
    with pytest.raises(ValueError, match="longer than"):
        allocator.allocate(2, 4, chain_of(list(range(8))))
    with pytest.raises(ValueError, match="2 digests for the 1 blocks"):
        allocator.publish(1, chain_of(list(range(8))))
    allocator.free(1)
    for call in (allocator.free, allocator.held, lambda n: allocator.append(n, 1), lambda n: allocator.publish(n, ())):
        with pytest.raises(KeyError):
            call(1)
    allocator.check()


def damage(allocator: BlockAllocator, name: str) -> None:
    books = vars(allocator)
    if name == "lost":
        books["_blank"].pop()
    elif name == "twice free":
        books["_blank"].append(books["_blank"][0])
    elif name == "free and held":
        books["_blank"].append(books["_tables"][1].blocks[0])
    elif name == "reference":
        books["_references"][books["_tables"][1].blocks[0]] += 1
    elif name == "shared unknown":
        books["_tables"][2].blocks.append(books["_tables"][1].blocks[-1])
    elif name == "twice in a table":
        books["_tables"][1].blocks.append(books["_tables"][1].blocks[0])
    elif name == "index":
        books["_by_digest"].popitem()
    elif name == "blank with digest":
        books["_blank"].append(books["_cached"].popitem()[0])


DAMAGES = "lost, twice free, free and held, reference, shared unknown, twice in a table, index, blank with digest"


@pytest.mark.parametrize("name", DAMAGES.split(", "))
def test_check_finds_damage(name: str) -> None:
    allocator = BlockAllocator(8, 4)
    serve_and_free(allocator, 0, [7] * 8)
    prompt = list(range(6))
    allocator.allocate(1, 6, chain_of(prompt))
    allocator.publish(1, chain_of(prompt))
    allocator.allocate(2, 6, chain_of(prompt))
    allocator.check()
    damage(allocator, name)
    with pytest.raises(AssertionError):
        allocator.check()


def test_100k_random_operations() -> None:
    """Against a model that remembers what every block holds and how many tokens every sequence has."""
    rng = random.Random(5)
    allocator = BlockAllocator(num_blocks=40, tokens_per_block=4)
    held: dict[int, list[int]] = {}  # tokens of each sequence
    content: dict[int, bytes] = {}  # of each block: the digest of what was last computed into it
    refused = 0
    for operation in range(100_000):
        draw = rng.random()
        if draw < 0.25 or not held:
            tokens = [rng.randrange(2) for _ in range(rng.randint(1, 40))]
            chain = chain_of(tokens)
            before = {block for sequence in held for block in blocks_of(allocator, sequence)}
            reused = allocator.allocate(operation, len(tokens), chain, spare=rng.choice((0, 0, 3)))
            if reused is None:
                refused += 1
                continue
            held[operation] = tokens
            blocks = blocks_of(allocator, operation)
            known = reused // 4
            assert [content.get(block) for block in blocks[:known]] == chain[:known]
            assert not before & set(blocks[known:])
            content |= dict.fromkeys(blocks[known:], b"garbage")
        elif draw < 0.55:
            sequence = rng.choice(list(held))
            count = len(held[sequence]) + rng.choice((1, 1, 1, 9))
            had, free = allocator.held(sequence), allocator.free_blocks
            if allocator.append(sequence, count):
                held[sequence] += [rng.randrange(2) for _ in range(count - len(held[sequence]))]
                content |= dict.fromkeys(blocks_of(allocator, sequence)[had:], b"garbage")
                assert allocator.held(sequence) == -(-count // 4)
            else:
                refused += 1
                assert -(-count // 4) - had > free
        elif draw < 0.75:
            sequence = rng.choice(list(held))
            chain = chain_of(held[sequence])
            chain = chain[: rng.randint(0, len(chain))]
            content |= zip(blocks_of(allocator, sequence), chain, strict=False)
            allocator.publish(sequence, chain)
        else:
            sequence = rng.choice(list(held))
            del held[sequence]
            allocator.free(sequence)
        if operation % 8 == 0:
            allocator.check()
    assert min(refused, allocator.counters.reused, allocator.counters.evicted) > 1000
    for sequence in held:
        allocator.free(sequence)
    allocator.check()
    assert allocator.free_blocks == 40
