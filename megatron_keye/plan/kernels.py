"""Inner loops of placement, in the part of Python that numba compiles (see `compiled.py`). All arrays are int64 and 1-D.

Items and bins have three numbers each, in tuples of arrays: costs of two kinds in one unit of time, and a size, which a capacity
limits. A bin finishes a kind at its load times its slowness.
"""

from megatron_keye.plan.compiled import Kernel

_FAR = 1 << 62


def _assign(order, candidates, items, loads, capacity, slowness, levels, bins):
    """Each item of `order` to the candidate with room that it lifts least above a level, then whose loads are least like the item: the
    scalar product of the two is smallest, so that an item of one kind goes where there is little of that kind.

    Where no candidate has room, to the emptiest bin. Ties go to the bin that comes first.
    """
    a, b, size = items
    load_a, load_b, load_size = loads
    for i in order:
        cost_a, cost_b, room_needed = a[i], b[i], size[i]
        chosen, best_excess, best_product = -1, _FAR, _FAR
        for bin in candidates:
            if load_size[bin] + room_needed > capacity:
                continue
            finish_a = (load_a[bin] + cost_a) * slowness[bin]
            finish_b = (load_b[bin] + cost_b) * slowness[bin]
            excess = max(0, finish_a - levels[0], finish_b - levels[1])
            if excess > best_excess:
                continue
            # Shifted so that the product stays below 2**62.
            product = (cost_a >> 4) * (finish_a >> 11) + (cost_b >> 4) * (finish_b >> 11)
            if excess < best_excess or product < best_product:
                chosen, best_excess, best_product = bin, excess, product
        if chosen < 0:
            for bin in range(len(slowness)):
                if chosen < 0 or load_size[bin] < load_size[chosen]:
                    chosen = bin
        bins[i] = chosen
        load_a[chosen] += a[i]
        load_b[chosen] += b[i]
        load_size[chosen] += size[i]


def _earliest(load, slowness, excluded, found):
    """The bins that finish first, but for `excluded` (-1 for none), the first one first; returns how many there are of them."""
    count = 0
    for bin in range(len(slowness)):
        finish = load[bin] * slowness[bin]
        if bin == excluded or (count == len(found) and finish >= load[found[count - 1]] * slowness[found[count - 1]]):
            continue
        at = count if count < len(found) else count - 1
        count = at + 1
        while at > 0 and load[found[at - 1]] * slowness[found[at - 1]] > finish:
            found[at] = found[at - 1]
            at -= 1
        found[at] = bin
    return count


def _candidates(num_kinds, loads, slowness, later, found, marked, candidates):
    """Bins that finish one kind, or all kinds, before most others do, in the order of their numbers; returns how many there are."""
    for bin in range(len(slowness)):
        marked[bin] = 0
        later[bin] = max(loads[0][bin], loads[1][bin])
    for kind in range(num_kinds):
        for at in range(_earliest(loads[kind], slowness, -1, found)):
            marked[found[at]] = 1
    for at in range(_earliest(later, slowness, -1, found)):
        marked[found[at]] = 1
    count = 0
    for bin in range(len(slowness)):
        if marked[bin]:
            candidates[count] = bin
            count += 1
    return count


def _assign_in_blocks(order, block, num_kinds, items, loads, capacity, slowness, levels, bins, later, found, marked, candidates):
    """`_assign` to the candidates of the moment, chosen anew for every `block` items of `order`."""
    for start in range(0, len(order), block):
        count = _candidates(num_kinds, loads, slowness, later, found, marked, candidates)
        _assign(order[start : start + block], candidates[:count], items, loads, capacity, slowness, levels, bins)


def _link(bins, first, following):
    """Members of each bin as linked lists: `first[bin]`, then `following[item]`, until -1."""
    for bin in range(len(first)):
        first[bin] = -1
    for i in range(len(bins) - 1, -1, -1):
        following[i] = first[bins[i]]
        first[bins[i]] = i


def _transfer(item, source, target, items, loads, bins, first, following):
    if first[source] == item:
        first[source] = following[item]
    else:
        at = first[source]
        while following[at] != item:
            at = following[at]
        following[at] = following[item]
    following[item] = first[target]
    first[target] = item
    bins[item] = target
    for number in range(len(items)):
        loads[number][source] -= items[number][item]
        loads[number][target] += items[number][item]


def _highest(load, slowness, top):
    """The bins of the three latest finish times in `top`; -1 where there are fewer bins."""
    top[0], top[1], top[2] = -1, -1, -1
    for bin in range(len(slowness)):
        finish = load[bin] * slowness[bin]
        if top[0] < 0 or finish > load[top[0]] * slowness[top[0]]:
            top[0], top[1], top[2] = bin, top[0], top[1]
        elif top[1] < 0 or finish > load[top[1]] * slowness[top[1]]:
            top[1], top[2] = bin, top[1]
        elif top[2] < 0 or finish > load[top[2]] * slowness[top[2]]:
            top[2] = bin


def _latest_of_others(top, one, two, load, slowness):
    """The latest finish time of any bin but `one` and `two`."""
    for bin in top:
        if bin >= 0 and bin != one and bin != two:
            return load[bin] * slowness[bin]
    return 0


def _best_exchange(one, two, items, loads, capacity, slowness, first, following, rest_a, rest_b, swaps, found):
    """The best move of an item from bin `one` to `two` or, with `swaps`, exchange for one of its items. `found` = (item, other or -1, sum
    of the pair's later times, all bins' times) is improved; returns the pairs tried."""
    a, b, size = items
    load_a, load_b, load_size = loads
    tried = 0
    i = first[one]
    while i >= 0:
        j = first[two] if swaps else -1
        while True:
            back_a, back_b, back_size = (0, 0, 0) if j < 0 else (a[j], b[j], size[j])
            if a[i] != back_a or b[i] != back_b:
                tried += 1
                one_a, one_b = (load_a[one] - a[i] + back_a) * slowness[one], (load_b[one] - b[i] + back_b) * slowness[one]
                two_a, two_b = (load_a[two] + a[i] - back_a) * slowness[two], (load_b[two] + b[i] - back_b) * slowness[two]
                pair_a, pair_b = max(one_a, two_a), max(one_b, two_b)
                time = max(rest_a, pair_a) + max(rest_b, pair_b)
                if time < found[3] or (time == found[3] and pair_a + pair_b < found[2]):
                    fits_one = load_size[one] - size[i] + back_size <= max(capacity, load_size[one])
                    if fits_one and load_size[two] + size[i] - back_size <= max(capacity, load_size[two]):
                        found[0], found[1], found[2], found[3] = i, j, pair_a + pair_b, time
            if j < 0 or following[j] < 0:
                break
            j = following[j]
        i = following[i]
    return tried


def _relieve(critical, kind, swaps, items, loads, capacity, slowness, bins, first, following, tops, partners, found):
    """Apply the first exchange found that helps bin `critical`, which finishes a kind last, with the bins that finish it first.

    Returns the pairs tried, negative where nothing was found.
    """
    load_a, load_b = loads[0], loads[1]
    tried = 0
    for p in range(_earliest(loads[kind], slowness, critical, partners)):
        other = partners[p]
        rest_a = _latest_of_others(tops[0], critical, other, load_a, slowness)
        rest_b = _latest_of_others(tops[1], critical, other, load_b, slowness)
        pair_a = max(load_a[critical] * slowness[critical], load_a[other] * slowness[other])
        pair_b = max(load_b[critical] * slowness[critical], load_b[other] * slowness[other])
        found[0], found[1], found[2], found[3] = -1, -1, pair_a + pair_b, max(rest_a, pair_a) + max(rest_b, pair_b)
        tried += _best_exchange(critical, other, items, loads, capacity, slowness, first, following, rest_a, rest_b, swaps, found)
        if found[0] >= 0:
            _transfer(found[0], critical, other, items, loads, bins, first, following)
            if found[1] >= 0:
                _transfer(found[1], other, critical, items, loads, bins, first, following)
            return tried
    return -1 - tried


def _refine(items, loads, capacity, slowness, bins, first, following, tops, partners, found, floor, budget):
    """Moves and swaps that lower max(finish of a) + max(finish of b), until it is at most `floor`, about `budget` pairs were
    tried or nothing helps. Each relieves the bin that finishes a kind last; moves, which are quick to try, go before swaps."""
    _link(bins, first, following)
    while budget > 0:
        for kind in range(2):
            _highest(loads[kind], slowness, tops[kind])
        latest_a, latest_b = tops[0][0], tops[1][0]
        if loads[0][latest_a] * slowness[latest_a] + loads[1][latest_b] * slowness[latest_b] <= floor:
            break
        tried = -1
        for attempt in range(4):
            kind, swaps = attempt % 2, attempt // 2
            critical = tops[kind][0]
            tried = _relieve(critical, kind, swaps, items, loads, capacity, slowness, bins, first, following, tops, partners, found)
            budget -= abs(tried)
            if tried >= 0:
                break
        if tried < 0:
            break


def _deal(order, costs, loads, places, bins):
    """Each item of `order`, which falls in cost, to the least loaded bin that has places left. Ties go to the bin that comes first."""
    for i in order:
        chosen = -1
        for bin in range(len(loads)):
            if places[bin] > 0 and (chosen < 0 or loads[bin] < loads[chosen]):
                chosen = bin
        bins[i] = chosen
        loads[chosen] += costs[i]
        places[chosen] -= 1


assign = Kernel(_assign)
assign_in_blocks = Kernel(_assign_in_blocks, (_earliest, _candidates, _assign))
deal = Kernel(_deal)
refine = Kernel(_refine, (_link, _transfer, _highest, _latest_of_others, _earliest, _best_exchange, _relieve))
