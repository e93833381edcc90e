"""Counters of the server, as Prometheus reads them."""

from collections import Counter
from collections.abc import Mapping

PREFIX = "keye_io"


class Metrics:
    """Sums that only grow, by name and labels."""

    def __init__(self):
        self._sums: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        self._sums[name, tuple(sorted(labels.items()))] += value

    def text(self, gauges: Mapping[str, float]) -> str:
        """The text format: every sum so far, and `gauges`, which are values of this moment. Labels hold no quotes."""
        lines = []
        for name in sorted({name for name, _ in self._sums}):
            lines.append(f"# TYPE {PREFIX}_{name} counter")
            for (key, labels), value in sorted(self._sums.items()):
                if key == name:
                    inner = ",".join(f'{label}="{text}"' for label, text in labels)
                    lines.append(f"{PREFIX}_{name}{{{inner}}} {value}" if inner else f"{PREFIX}_{name} {value}")
        for name, value in gauges.items():
            lines += [f"# TYPE {PREFIX}_{name} gauge", f"{PREFIX}_{name} {value}"]
        return "\n".join(lines) + "\n"
