"""The paged KV pool's bookkeeping: which block belongs to whom, and which blocks can be used again.

A block holds the keys and values of `tokens_per_block` consecutive tokens, in every layer. It is always in exactly one
of three states, and `BlockAllocator.check` says so:

    blank    nobody uses it and nothing is known of what it holds
    cached   nobody uses it, but it holds a known prefix: it can be used again, or evicted, the longest unused first
    held     in the table of one sequence, or of several when its content is published

Only full blocks of known content are shared, so nobody ever writes to a shared block and none needs to be copied.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fasa_trt.core.contract import KEYS, SECONDARY, VALUES


def extend_chain(chain: list[bytes], tokens: Sequence[int], tokens_per_block: int) -> None:
    """Appends the digests of the full blocks of `tokens` that `chain` does not have yet.

    A block's digest covers its own tokens and its parent's digest, thus everything before it: equal digests mean equal
    keys and values. Cryptographic, since a collision would show one user another one's prompt.
    """
    for start in range(len(chain) * tokens_per_block, len(tokens) - tokens_per_block + 1, tokens_per_block):
        block = np.asarray(tokens[start : start + tokens_per_block], np.int32).tobytes()
        chain.append(hashlib.blake2b((chain[-1] if chain else b"") + block, digest_size=16).digest())


@dataclass
class Table:
    """Blocks of one sequence, in order, as int32; the content of the first `published` of them is settled."""

    blocks: array[int] = field(default_factory=lambda: array("i"))
    published: int = 0


@dataclass
class ReuseCounters:
    """In blocks. wanted: full prompt blocks of admitted sequences; reused: those that were found."""

    wanted: int = 0
    reused: int = 0
    evicted: int = 0


class BlockAllocator:
    """Hands out the blocks of a pool to sequences, which are known by a number.

    layers_in_pool: layers of each of the runtime's memory pools. Pools share the block numbers and differ in how many
    layers a block spans, thus in the offsets.
    """

    def __init__(self, num_blocks: int, tokens_per_block: int, *, layers_in_pool: Sequence[int] = (1,)) -> None:
        if num_blocks < 1 or tokens_per_block < 1 or not layers_in_pool or min(layers_in_pool) < 1:
            raise ValueError("a pool has at least one block, one token in a block and one layer")
        if 2 * num_blocks * max(layers_in_pool) > SECONDARY:
            raise ValueError(f"{num_blocks} blocks of {max(layers_in_pool)} layers do not fit into 31-bit offsets")
        self.num_blocks, self.tokens_per_block = num_blocks, tokens_per_block
        self.counters = ReuseCounters()
        self._layers = np.asarray(layers_in_pool, np.int32)
        self._references = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))  # a stack: the lowest number on top
        self._cached: OrderedDict[int, None] = OrderedDict()  # the longest unused first
        self._tables: dict[int, Table] = {}

    @property
    def num_pools(self) -> int:
        return len(self._layers)

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody uses, whether they hold something known or not."""
        return len(self._blank) + len(self._cached)

    @property
    def sequences(self) -> set[int]:
        """Those that have a table."""
        return set(self._tables)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.tokens_per_block)

    def held(self, sequence: int) -> int:
        """Blocks of a sequence."""
        return len(self._tables[sequence].blocks)

    def match(self, chain: Sequence[bytes]) -> int:
        """How many leading blocks of a chain the pool holds."""
        return next((i for i, digest in enumerate(chain) if digest not in self._by_digest), len(chain))

    def allocate(self, sequence: int, tokens: int, chain: Sequence[bytes] = (), *, spare: int = 0) -> int | None:
        """Opens a table with room for `tokens` tokens, reusing what the pool holds of the prefix `chain`.

        Returns the number of reused tokens; None, and changes nothing, when fewer than `spare` blocks would stay free.
        """
        if sequence in self._tables:
            raise ValueError(f"sequence {sequence} already has a table")
        if len(chain) * self.tokens_per_block > tokens:
            raise ValueError(f"a chain of {len(chain)} blocks is longer than {tokens} tokens")
        reused = [self._by_digest[digest] for digest in chain[: self.match(chain)]]
        fresh = self.blocks_for(tokens) - len(reused)
        revived = sum(self._references[block] == 0 for block in reused)
        if fresh + revived + spare > self.free_blocks:
            return None
        for block in reused:  # all of them before anything is evicted
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
        self.counters.wanted += len(chain)
        self.counters.reused += len(reused)
        self._tables[sequence] = Table(array("i", [*reused, *(self._take() for _ in range(fresh))]), len(reused))
        return len(reused) * self.tokens_per_block

    def append(self, sequence: int, tokens: int) -> bool:
        """Makes room for `tokens` tokens in all; False, and changes nothing, when the pool has too few free blocks."""
        table = self._tables[sequence]
        fresh = self.blocks_for(tokens) - len(table.blocks)
        if fresh > self.free_blocks:
            return False
        table.blocks.extend(self._take() for _ in range(fresh))
        return True

    def publish(self, sequence: int, chain: Sequence[bytes]) -> None:
        """Offers the leading blocks of a sequence for reuse, now that they hold what `chain` says.

        A block whose content another block already offers stays private: one of each is enough.
        """
        table = self._tables[sequence]
        if len(chain) > len(table.blocks):
            raise ValueError(f"{len(chain)} digests for the {len(table.blocks)} blocks of sequence {sequence}")
        for block, digest in zip(table.blocks[table.published : len(chain)], chain[table.published :], strict=True):
            if digest not in self._by_digest:
                self._digests[block], self._by_digest[digest] = digest, block
        table.published = max(table.published, len(chain))

    def free(self, sequence: int) -> None:
        """Closes a table. The last blocks come first in the order of eviction: a prefix is of use without its end."""
        for block in reversed(self._tables.pop(sequence).blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._digests[block] is None:
                    self._blank.append(block)
                else:
                    self._cached[block] = None

    def fill_offsets(self, sequence: int, row: NDArray[np.int32]) -> None:
        """Writes a sequence's offsets into row [pools, 2, max_blocks]; columns past its last block stay as they are.

        The offsets are those of `contract.block_offset`.
        """
        blocks = np.asarray(self._tables[sequence].blocks, np.int32)
        keys = blocks * (2 * self._layers[:, None])
        row[:, KEYS, : len(blocks)] = keys + KEYS
        row[:, VALUES, : len(blocks)] = keys + VALUES

    def check(self) -> None:
        """Raises AssertionError unless every block is in exactly one state and all books agree."""
        holders: dict[int, list[int]] = {}
        for sequence, table in self._tables.items():
            require(0 <= table.published <= len(table.blocks), f"{sequence} published more than it has")
            for block in table.blocks:
                holders.setdefault(block, []).append(sequence)
        for block, sequences in holders.items():
            require(len(set(sequences)) == len(sequences), f"block {block} is twice in one table")
            require(len(sequences) == 1 or self._digests[block] is not None, f"block {block} is shared but unknown")
        states = [*self._blank, *self._cached, *holders]
        require(sorted(states) == list(range(self.num_blocks)), "a block is lost, or in two states")
        counts = [len(holders.get(block, ())) for block in range(self.num_blocks)]
        require(self._references == counts, "reference counts differ from the tables")
        known = {digest: block for block, digest in enumerate(self._digests) if digest is not None}
        require(known == self._by_digest, "digests and their index differ")
        require(len(known) == sum(d is not None for d in self._digests), "two blocks offer the same content")
        require(all(self._digests[block] is None for block in self._blank), "a blank block has a digest")
        require(all(self._digests[block] is not None for block in self._cached), "a cached block has no digest")

    def _take(self) -> int:
        """A free block, for its first user. The caller has seen to it that there is one."""
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            digest, self._digests[block] = self._digests[block], None
            if digest is not None:
                del self._by_digest[digest]
            self.counters.evicted += 1
        self._references[block] = 1
        return block


def require(condition: bool, message: str) -> None:
    if not condition:  # not an assert statement, so that it also holds under python -O
        raise AssertionError(message)
