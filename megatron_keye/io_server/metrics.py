"""Counters and histograms of the server, as Prometheus reads them."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping

PREFIX = "keye_io"
BUCKETS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Upper bounds of the buckets of every histogram, from a small image to a video at its time limit."""
Labels = tuple[tuple[str, str], ...]
Series = tuple[str, Labels]
"""A name, and its labels with their values."""


class Metrics:
    """Sums that only grow, and histograms of seconds, by name and labels."""

    def __init__(self):
        self._sums: Counter[Series] = Counter()
        self._seconds: dict[Series, _Histogram] = {}

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        self._sums[_series(name, labels)] += value

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        self._seconds.setdefault(_series(name, labels), _Histogram()).add(seconds)

    def text(self, sums: Mapping[str, float], gauges: Mapping[str, float]) -> str:
        """The text format: every sum so far, and `sums` that are counted elsewhere; `gauges`, which are values of this moment; histograms.
        Labels hold no quotes."""
        all_sums = self._sums | {(name, ()): value for name, value in sums.items()}
        lines = []
        for name in sorted({name for name, _ in all_sums}):
            lines.append(f"# TYPE {PREFIX}_{name} counter")
            lines += [_line(name, labels, value) for (key, labels), value in sorted(all_sums.items()) if key == name]
        for name, value in gauges.items():
            lines += [f"# TYPE {PREFIX}_{name} gauge", _line(name, (), value)]
        for name in sorted({name for name, _ in self._seconds}):
            lines.append(f"# TYPE {PREFIX}_{name} histogram")
            for (key, labels), histogram in sorted(self._seconds.items(), key=lambda item: item[0]):
                if key == name:
                    lines += histogram.lines(name, labels)
        return "\n".join(lines) + "\n"


class _Histogram:
    def __init__(self):
        self._counts = [0] * (len(BUCKETS_S) + 1)
        self._sum_s = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(BUCKETS_S, seconds)] += 1
        self._sum_s += seconds

    def lines(self, name: str, labels: Labels) -> Iterator[str]:
        total = 0
        for bound, count in zip((*BUCKETS_S, "+Inf"), self._counts, strict=True):
            total += count
            yield _line(f"{name}_bucket", (*labels, ("le", str(bound))), total)
        yield _line(f"{name}_sum", labels, round(self._sum_s, 6))
        yield _line(f"{name}_count", labels, total)


def _series(name: str, labels: Mapping[str, str]) -> Series:
    return name, tuple(sorted(labels.items()))


def _line(name: str, labels: Labels, value: float) -> str:
    inner = ",".join(f'{label}="{text}"' for label, text in labels)
    return f"{PREFIX}_{name}{{{inner}}} {value}" if inner else f"{PREFIX}_{name} {value}"
