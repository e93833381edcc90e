"""Counters of the server, as Prometheus reads them."""

from collections import Counter
from collections.abc import Mapping

PREFIX = "keye_io"
Series = tuple[str, tuple[tuple[str, str], ...]]
"""A name, and its labels with their values."""


class Metrics:
    """Sums that only grow, by name and labels."""

    def __init__(self):
        self._sums: Counter[Series] = Counter()

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        self._sums[name, tuple(sorted(labels.items()))] += value

    def text(self, sums: Mapping[str, float], gauges: Mapping[str, float]) -> str:
        """The text format: every sum so far, and `sums` that are counted elsewhere; and `gauges`, which are values of this moment.
        Labels hold no quotes."""
        all_sums = self._sums | {(name, ()): value for name, value in sums.items()}
        lines = []
        for name in sorted({name for name, _ in all_sums}):
            lines.append(f"# TYPE {PREFIX}_{name} counter")
            for (key, labels), value in sorted(all_sums.items()):
                if key == name:
                    inner = ",".join(f'{label}="{text}"' for label, text in labels)
                    lines.append(f"{PREFIX}_{name}{{{inner}}} {value}" if inner else f"{PREFIX}_{name} {value}")
        for name, value in gauges.items():
            lines += [f"# TYPE {PREFIX}_{name} gauge", f"{PREFIX}_{name} {value}"]
        return "\n".join(lines) + "\n"
