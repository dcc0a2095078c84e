"""
What a verdict is made of: lines of evidence, each with its numbers, and how they are counted.
"""

from dataclasses import dataclass, replace

FEWEST_SEEDS = 3  # with fewer a sentence says so
REPRODUCED = ('reproduced', 'partly', 'not reproduced')
HOLDS = ('yes', 'in part', 'no')


@dataclass(frozen=True)
class Evidence:
    """One condition in one seed. What has the same seed and quantity stands or falls together."""

    seed: int
    quantity: str
    condition: str
    holds: bool
    numbers: str
    counts: bool = True  # False: the seed is shown, not counted


@dataclass(frozen=True)
class Need:
    """What is missing for a verdict, in words."""

    what: str


def low(quantity):
    """The lower end of a quantity's interval; the value itself where it was measured without one."""
    return quantity['value'] if quantity['low'] is None else quantity['low']


def high(quantity):
    """The upper end of a quantity's interval; the value itself where it was measured without one."""
    return quantity['value'] if quantity['high'] is None else quantity['high']


def is_below(x, y, factor=1):
    """Is factor times x below y, between their near ends? What is not finite is never below."""
    if None in (x['value'], y['value']):
        return False
    return high(x) < low(y) if factor == 1 else factor * high(x) <= low(y)


def seeds_in_words(seeds):
    """Returns '3 seeds', or 'only 2 seeds' where they are too few."""
    count = f'{len(seeds)} seed{"" if len(seeds) == 1 else "s"}'
    return count if len(seeds) >= FEWEST_SEEDS else f'only {count}'


def held(evidence):
    """Returns {(seed, quantity): does every condition of it hold?}."""
    result = {}
    for line in evidence:
        key = line.seed, line.quantity
        result[key] = result.get(key, True) and line.holds
    return result


def verdict(found, words):
    """found: Evidence and Needs. words: for all, some and none. Returns the verdict in words, with how many
    conditions hold, how many seeds count, what seeds that do not count show, and what is missing."""
    evidence = [item for item in found if isinstance(item, Evidence)]
    conditions = counted(evidence)
    needs = list(dict.fromkeys(item.what for item in found if isinstance(item, Need)))
    shown = held(line for line in evidence if not line.counts)
    parts = []
    if conditions:
        holding, seeds = sum(conditions.values()), {seed for seed, _ in conditions}
        word = words[0] if holding == len(conditions) else words[1] if holding else words[2]
        parts.append(f'{word} ({holding} of {len(conditions)}; {seeds_in_words(seeds)})')
    elif evidence or needs:
        parts.append('no seed that counts')
    else:
        parts.append('–')
    if shown:
        seeds = ', '.join(sorted({str(seed) for seed, _ in shown}))
        parts.append(f'{seeds}, not counted: {sum(shown.values())} of {len(shown)}')
    if needs:
        parts.append(f'needs {"; ".join(needs)}')
    return '; '.join(parts)


def counted(found):
    """found: Evidence and Needs. Returns {(seed, quantity): does it hold?} of the seeds that count."""
    return held(item for item in found if isinstance(item, Evidence) and item.counts)


def holds_in_all(found):
    """Does every condition hold in every seed that counts? None where no seed counts."""
    conditions = counted(found)
    return all(conditions.values()) if conditions else None


def not_counting(found, seeds):
    """Returns the evidence with that of these seeds marked as shown only."""
    return [
        replace(item, counts=False) if isinstance(item, Evidence) and item.seed in seeds else item
        for item in found
    ]
