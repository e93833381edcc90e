"""Inner loops around rows, with bins in a heap. See `kernels.py` for the rules."""

from megatron_keye.plan.compiled import Kernel


def sift(heap, key, at, count):
    """Move the bin at `at` down to its place in a heap with the smallest (key, bin) first."""
    moving = heap[at]
    while True:
        child = 2 * at + 1
        if child >= count:
            break
        right = child + 1
        if right < count and (key[heap[right]], heap[right]) < (key[heap[child]], heap[child]):
            child = right
        if (key[moving], moving) < (key[heap[child]], heap[child]):
            break
        heap[at] = heap[child]
        at = child
    heap[at] = moving


def push(heap, key, bin, count):
    """Add a bin to a heap of `count`, which then holds one more."""
    at = count
    while at > 0:
        parent = (at - 1) // 2
        if (key[heap[parent]], heap[parent]) < (key[bin], bin):
            break
        heap[at] = heap[parent]
        at = parent
    heap[at] = bin


def _next_fitting(order, start, cost, size, cost_limit, size_limit):
    """The first place in `order` from `start` on whose item, and so every later one, is within both limits."""
    low, high = start, len(order)
    while low < high:
        middle = (low + high) // 2
        if cost[order[middle]] <= cost_limit and size[order[middle]] <= size_limit:
            high = middle
        else:
            low = middle + 1
    return low


def _fill(order, cost, size, capacity, level, slowness, finish, taken, wake, heap, waiting, row_of):
    """Fill one row per bin with the items of `order`, which fall in cost and size: each into the row with room that finishes first and not
    after `level`. An item left out has row -1.

    A row that cannot take the present item waits in a second heap for the first item that it can.
    """
    active, num_waiting = len(slowness), 0
    for row in range(active):
        heap[row] = row
        finish[row] = 0
        taken[row] = 0
    for at in range(len(order)):
        i = order[at]
        while num_waiting > 0 and wake[waiting[0]] <= at:
            push(heap, finish, waiting[0], active)
            active += 1
            num_waiting -= 1
            waiting[0] = waiting[num_waiting]
            sift(waiting, wake, 0, num_waiting)
        while active > 0:
            row = heap[0]
            spare_cost, spare_size = (level - finish[row]) // slowness[row], capacity - taken[row]
            if cost[i] <= spare_cost and size[i] <= spare_size:
                break
            active -= 1
            heap[0] = heap[active]
            sift(heap, finish, 0, active)
            wake[row] = _next_fitting(order, at + 1, cost, size, spare_cost, spare_size)
            push(waiting, wake, row, num_waiting)
            num_waiting += 1
        row_of[i] = -1
        if active > 0:
            row = heap[0]
            row_of[i] = row
            finish[row] += cost[i] * slowness[row]
            taken[row] += size[i]
            sift(heap, finish, 0, active)


def _count_rows(counts, sizes, capacity, room, needed):
    """Rows that best fit takes for each group of `sizes`: the first counts[0] of them, the next counts[1], and so on."""
    at = 0
    for group in range(len(counts)):
        rows = 0
        for i in range(at, at + counts[group]):
            best = -1
            for row in range(rows):
                if room[row] >= sizes[i] and (best < 0 or room[row] < room[best]):
                    best = row
            if best < 0:
                best = rows
                room[best] = capacity
                rows += 1
            room[best] -= sizes[i]
        needed[group] = rows
        at += counts[group]


fill = Kernel(_fill, (sift, push, _next_fitting))
count_rows = Kernel(_count_rows)
