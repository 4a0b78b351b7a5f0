"""The arithmetic of the benchmarks: medians and their intervals, ratios round by round, ceilings, targets. Pure."""

import math
import statistics

CONFIDENCE = 0.95


def interval(samples, confidence=CONFIDENCE):
    """Between which two samples the median lies with this confidence, by order statistics: nothing is assumed of how
    they are distributed. The whole range where there are too few samples for that (fewer than 6, at 95 %)."""
    ordered = sorted(samples)
    n = len(ordered)
    # The widest cut with at most half of the doubt on either side: P(fewer than `cut` of n fair coins show heads).
    cut, below = 0, 0.0
    while cut < n // 2:
        below += math.comb(n, cut) / 2**n
        if below > (1 - confidence) / 2:
            break
        cut += 1
    cut = max(cut - 1, 0)
    return ordered[cut], ordered[n - 1 - cut]


def summary(samples):
    """(median, low, high)."""
    return (statistics.median(samples), *interval(samples))


def paired(ours, theirs):
    """Ours over theirs, round by round. A round in which theirs did nothing says nothing; one in which only ours did
    nothing says 0."""
    return [a / b for a, b in zip(ours, theirs, strict=True) if b > 0]


def composed(*rates):
    """What is left of rates that follow each other on the same cores: 1 / (1/a + 1/b …)."""
    return 1 / sum(1 / rate for rate in rates)


def of_ceiling(ours, engine, transport):
    """Ours over the ceiling composed of what the engine alone and the transport alone do, round by round."""
    rates = zip(engine, transport, strict=True)
    return paired(ours, [composed(*both) if min(both) > 0 else 0 for both in rates])


def verdict(samples, bound, at_least=True):
    """`met`, `missed`, or which of them with a question mark where the interval holds the bound."""
    median, low, high = summary(samples)
    met = median >= bound if at_least else median <= bound
    return ("met" if met else "missed") + ("?" if low < bound < high else "")


def best_cell(cells):
    """Of an exhaustive search of the engine alone: the one with the most rows a second."""
    return max(cells, key=lambda cell: cell["rows_per_second"])


def best_single(cells):
    """The layout that answers one lone row soonest."""
    return min((cell for cell in cells if cell["rows"] == 1 and cell["instances"] == 1), key=lambda cell: cell["p50"])


def percent(ratio):
    return f"{100 * ratio:.1f} %"


def show(samples, digits=2):
    """`0.71 (0.69–0.73)`."""
    median, low, high = summary(samples)
    return f"{median:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"
