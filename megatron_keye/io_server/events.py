"""What a server and its workers write to stderr: events, each a line of JSON."""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


def log_event(event: str, **facts: object) -> None:
    # As one string, or lines of several processes could mix.
    sys.stderr.write(json.dumps({"time": round(time.time(), 3), "event": event, **facts}) + "\n")
    sys.stderr.flush()


class EventHandler(logging.Handler):
    """Writes what parts and libraries log by `logging` as events of their level's name."""

    def __init__(self):
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        facts = {"logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            facts["traceback"] = logging.Formatter().formatException(record.exc_info)
        log_event(record.levelname.lower(), **facts)


@contextmanager
def logging_as_events() -> Iterator[None]:
    """Meanwhile all that `logging` and `warnings` say in this process are events."""
    handler = EventHandler()
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(handler)
