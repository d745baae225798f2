"""torch's caching allocator on paper: sizes of blocks and segments as its source has them."""

import random

from veneer.ops.allocator import Blocks

MIB = 1 << 20


def test_small_blocks_are_cut_from_segments_of_2_mib_in_steps_of_512_bytes():
    blocks = Blocks()
    first, second = blocks.take(1), blocks.take(513)
    assert (first.size, second.size, blocks.allocated) == (512, 1024, 1536)
    assert blocks.reserved == 2 * MIB and second.start == first.start + 512


def test_large_blocks_come_from_20_mib_or_segments_of_their_own():
    blocks = Blocks()
    blocks.take(3 * MIB)
    assert blocks.reserved == 20 * MIB and blocks.allocated == 3 * MIB
    blocks.take(10 * MIB + 1)  # what is left of the 20 is enough
    assert blocks.reserved == 20 * MIB
    big = blocks.take(100 * MIB + 1)
    assert (
        blocks.reserved == 122 * MIB and big.size == 100 * MIB + 512
    )  # what is left, over 1 MiB, is a block of its own
    assert Blocks().take(101 * MIB).size == 102 * MIB  # here it is not over 1 MiB


def test_the_smallest_block_that_is_large_enough_is_taken():
    blocks = Blocks()
    _, b, c, _ = (blocks.take(size * MIB) for size in (30, 50, 40, 20))
    reserved = blocks.reserved
    for block in (b, c):
        blocks.give_back(block)
    assert blocks.take(39 * MIB).start == c.start and blocks.reserved == reserved
    assert blocks.most == 140 * MIB and blocks.lately == 140 * MIB
    blocks.lately = blocks.allocated
    assert blocks.take(10 * MIB).start == b.start and blocks.reserved == reserved
    assert blocks.lately == 100 * MIB and blocks.most == 140 * MIB


def test_a_segment_that_is_all_free_is_one_block_again():
    blocks = Blocks()
    pieces = [blocks.take(2 * MIB) for _ in range(10)]
    random.Random(0).shuffle(pieces)
    for piece in pieces:
        blocks.give_back(piece)
    assert blocks.take(20 * MIB).start == 0 and blocks.reserved == 20 * MIB


def test_fragments_are_what_no_tensor_of_this_size_fits_into():
    blocks = Blocks()
    held = [blocks.take(12 * MIB) for _ in range(4)]
    for block in held[::2]:
        blocks.give_back(block)
    blocks.take(24 * MIB)  # the two free places are no neighbours
    assert blocks.reserved == 72 * MIB and blocks.allocated == 48 * MIB
