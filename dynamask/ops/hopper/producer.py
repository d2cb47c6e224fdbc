"""What the Hopper kernels share: work items, the producer that gathers listed keys and values, two small devices."""

from __future__ import annotations

from triton import next_power_of_2
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier


def heads_of_a_consumer(ratio: int, consumers: int) -> int:
    """Query heads of one consumer, as many as of each other, where that leaves no row of a tile empty; else 0.

    A tile of all `ratio` heads has rows for the next power of 2. Of three heads a quarter of them would be empty, and
    three consumers take a head each.
    """
    each, left = divmod(ratio, consumers)
    return each if ratio != next_power_of_2(ratio) and left == 0 and each == next_power_of_2(each) else 0


@gluon.jit
def tell(slots, told, taken, turn, first, second, third, fourth, SLOTS: gl.constexpr):
    """Hand four numbers to the consumers."""
    field = gl.arange(0, 4, gl.BlockedLayout([4], [32], [4], [0]))
    slot = turn % SLOTS
    mbarrier.wait(taken.index(slot), ((turn // SLOTS) & 1) ^ 1)
    numbers = gl.where(field < 2, gl.where(field == 0, first, second), gl.where(field == 2, third, fourth))
    slots.index(slot).store(numbers)
    mbarrier.arrive(told.index(slot), count=1)


@gluon.jit
def take(slots, told, taken, turn, SLOTS: gl.constexpr):
    """The next four numbers of the producer."""
    # Every thread holds all four.
    whole: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    field = gl.arange(0, 4, whole)
    slot = turn % SLOTS
    mbarrier.wait(told.index(slot), (turn // SLOTS) & 1)
    numbers = slots.index(slot).load(whole)
    first = gl.sum(gl.where(field == 0, numbers, 0), 0)
    second = gl.sum(gl.where(field == 1, numbers, 0), 0)
    third = gl.sum(gl.where(field == 2, numbers, 0), 0)
    fourth = gl.sum(gl.where(field == 3, numbers, 0), 0)
    mbarrier.arrive(taken.index(slot), count=1)
    return first, second, third, fourth


@gluon.jit
def copy_queries(
    source,
    target,
    buffer,
    first_head,
    first_place,
    num_queries,
    WIDTH: gl.constexpr,
    ROWS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    RATIO: gl.constexpr,
    RATIO_PAD: gl.constexpr,
):
    """Copy a block's rows of `source` (B, H, Nq, WIDTH) to the consumers' tiles of a buffer; zeros where are none.

    Consumers share the queries of a block; where RATIO_PAD is below RATIO, they share the heads.
    """
    PART: gl.constexpr = 16
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    QUERIES: gl.constexpr = ROWS // RATIO_PAD
    PLACES_ON: gl.constexpr = 0 if RATIO > RATIO_PAD else QUERIES
    HEADS_ON: gl.constexpr = RATIO_PAD if RATIO > RATIO_PAD else 0
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    for consumer in gl.static_range(CONSUMERS):
        for part in gl.static_range(0, ROWS, PART):
            r = part + gl.arange(0, PART, gl.SliceLayout(1, layout))
            place = first_place + consumer * PLACES_ON + r % QUERIES
            at = (first_head + consumer * HEADS_ON + r // QUERIES).to(gl.int64) * num_queries + place
            async_copy.async_copy_global_to_shared(
                target.index(buffer * CONSUMERS + consumer).slice(part, PART),
                source + (at * WIDTH)[:, None] + columns[None, :],
                mask=((r // QUERIES < RATIO) & (place < num_queries))[:, None],
            )


@gluon.jit
def produce(
    query,
    grad_output,
    key,
    value,
    expiry,
    bias,
    index,
    whole,
    partial,
    table,
    tickets,
    items,
    batch_size,
    heads,
    num_queries,
    length,
    blocks,
    entries,
    queries,
    grads,
    keys,
    values,
    biases,
    deaths,
    places,
    work,
    told,
    taken,
    key_full,
    value_full,
    empty,
    KEY_LAG: gl.constexpr,
    VALUE_LAG: gl.constexpr,
    GROUPS: gl.constexpr,
    RATIO: gl.constexpr,
    RATIO_PAD: gl.constexpr,
    DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    ROWS: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    HAS_GRADS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """Take work items, tell the consumers, and gather listed keys and values into the stages, in their order.

    An item is one block of queries of one head. Items are taken as programs become free, those with the longest lists
    first: the widest head's, the last blocks first. Consumers are told row, block, keys that the whole block sees and
    all keys; a negative row ends the work. An item's queries (with HAS_GRADS its output gradients, too) are copied to
    one of two buffers before its first keys, and are there when those are: while consumers work on the item before.

    Consumers arrive at `empty` once a tile, however many things they are done with: at tile t the keys of tile
    t - KEY_LAG and the values of tile t - VALUE_LAG are free. An arrival costs a barrier of four warps.
    """
    k_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    v_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // VALUE_DIM, VALUE_DIM // 8], [4, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    k_rows = gl.arange(0, N, gl.SliceLayout(1, k_layout))
    k_columns = gl.arange(0, DIM, gl.SliceLayout(0, k_layout))
    v_columns = gl.arange(0, VALUE_DIM, gl.SliceLayout(0, v_layout))
    M: gl.constexpr = (1 if RATIO > RATIO_PAD else CONSUMERS) * (ROWS // RATIO_PAD)
    n = gl.arange(0, N, flat)
    thread = gl.arange(0, 128, flat)
    one = gl.full([128], 1, gl.int32, flat)
    step = 0
    turn = 0
    item = gl.program_id(0)
    while item < items:
        # The next item, one for each program being taken already; the answer is needed only behind this one.
        ticket = gl.atomic_add(tickets + thread * 0, one, mask=thread == 0, sem="relaxed")
        group = gl.load(table + 2 * GROUPS + item // (batch_size * blocks))
        left = item % (batch_size * blocks)
        block = blocks - 1 - left // batch_size
        batch = left % batch_size
        row = batch * GROUPS + group
        num_whole = gl.load(whole + row * blocks + block)
        total = num_whole + gl.load(partial + row * blocks + block)
        capacity = gl.load(table + group) * 16
        before = gl.load(table + GROUPS + group).to(gl.int64) * 16
        tell(work, told, taken, turn, row, block, num_whole, total, SLOTS)
        # Who has taken the item before this one is done with the one before that, whose buffer this is.
        past = turn + SLOTS - 1
        mbarrier.wait(taken.index(past % SLOTS), (past // SLOTS - 1) & 1)
        first_head = batch * heads + group * RATIO
        first_place = block * M
        # A block that sees nothing waits for no key, hence for no query: none must be on its way.
        if total > 0:
            copy_queries(
                query, queries, turn % 2, first_head, first_place, num_queries, DIM, ROWS, CONSUMERS, RATIO, RATIO_PAD
            )
        if HAS_GRADS and total > 0:
            copy_queries(
                grad_output, grads, turn % 2, first_head, first_place, num_queries, VALUE_DIM, ROWS, CONSUMERS, RATIO,
                RATIO_PAD,
            )  # fmt: skip
        base = row.to(gl.int64) * length
        list_row = index + (batch.to(gl.int64) * entries + before) * blocks + block.to(gl.int64) * capacity
        k_base = key + base * DIM
        v_base = value + base * VALUE_DIM
        # Entry p stands at p if every query sees it, else at capacity - 1 - (p - whole).
        back = capacity - 1 + num_whole
        # Positions are loaded a tile ahead, so that no copy waits for them.
        k_next = gl.load(list_row + gl.where(k_rows < num_whole, k_rows, back - k_rows), mask=k_rows < total, other=0)
        n_next = gl.load(list_row + gl.where(n < num_whole, n, back - n), mask=n < total, other=0)
        for begin in range(0, total, N):
            stage = step % STAGES
            k_j = k_next
            n_j = n_next
            p = begin + N + k_rows
            k_next = gl.load(list_row + gl.where(p < num_whole, p, back - p), mask=p < total, other=0)
            p = begin + N + n
            n_next = gl.load(list_row + gl.where(p < num_whole, p, back - p), mask=p < total, other=0)
            mbarrier.wait(empty.index((step + KEY_LAG) % STAGES), (((step + KEY_LAG) // STAGES) & 1) ^ 1)
            async_copy.async_copy_global_to_shared(
                keys.index(stage), k_base + (k_j * DIM)[:, None] + k_columns[None, :]
            )
            if HAS_BIAS:
                async_copy.async_copy_global_to_shared(biases.index(stage), bias + base + n_j)
            if begin + N > num_whole:
                p = begin + n
                entry = gl.where(p < num_whole, p, back - p)
                async_copy.async_copy_global_to_shared(deaths.index(stage), expiry + base + n_j, mask=p < total)
                async_copy.async_copy_global_to_shared(places.index(stage), list_row + entry, mask=p < total)
            async_copy.mbarrier_arrive(key_full.index(stage), increment_count=False)
            mbarrier.wait(empty.index((step + VALUE_LAG) % STAGES), (((step + VALUE_LAG) // STAGES) & 1) ^ 1)
            v_j = gl.convert_layout(k_j, gl.SliceLayout(1, v_layout)) if DIM != VALUE_DIM else k_j
            async_copy.async_copy_global_to_shared(
                values.index(stage), v_base + (v_j * VALUE_DIM)[:, None] + v_columns[None, :]
            )
            async_copy.mbarrier_arrive(value_full.index(stage), increment_count=False)
            step += 1
        item = gl.num_programs(0) + gl.sum(gl.where(thread == 0, ticket, 0), 0)
        turn += 1
    tell(work, told, taken, turn, -1, 0, 0, 0, SLOTS)
    async_copy.wait_group(0)


@gluon.jit
def store_rows(
    target,
    result,
    scratch,
    first_head,
    first_place,
    num_queries,
    WIDTH: gl.constexpr,
    ROWS: gl.constexpr,
    QUERIES: gl.constexpr,
    RATIO: gl.constexpr,
):
    """Write a consumer's tile to rows of `target` (B, H, Nq, WIDTH), 16 bytes a thread.

    In the layout of the products a thread holds two neighbours of each row, and a store of a warp writes half sectors
    of eight rows. `scratch` (ROWS, WIDTH) is the shared memory of the tile's queries, which nothing needs any more: the
    producer fills it again only when all consumers have taken the item after this one.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    scratch.store(result)
    gl.thread_barrier()
    tile = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    place = first_place + tile % QUERIES
    row = (first_head + tile // QUERIES).to(gl.int64) * num_queries + place
    real = (tile // QUERIES < RATIO) & (place < num_queries)
    gl.store(target + (row * WIDTH)[:, None] + columns[None, :], scratch.load(layout), mask=real[:, None])


@gluon.jit
def by_lane(p):
    """Sums over the columns of a score tile that one thread holds: (rows, N) -> (rows, 4), without a shuffle."""
    # In the accumulator's layout a row belongs to four lanes, each holding two of every eight columns.
    return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def hold(x):
    """x, once it is there: no wait that follows in the program is begun before.

    ptxas moves a wait for a product up over arithmetic that does not need it, and the tensor cores then idle through
    the softmax that was to hide them. It moves none over a branch, so this branches, on a bit pattern that no
    arithmetic produces (a NaN with a payload), and would do no more than pause.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred q; .reg .b32 bits; mov.b32 bits, $1; setp.ne.u32 q, bits, 0x7FC0DEAD; "
        "@q bra DONE; nanosleep.u32 100; DONE: mov.b32 $0, $1; }",
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )
