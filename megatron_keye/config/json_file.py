"""Files that hold one JSON object."""

import json
from pathlib import Path
from typing import Any

from megatron_keye.errors import CheckpointError, KeyeError

COPY_AGAIN = "copy every file of the released folder again, not only weights"


def read_json_object(path: Path, remedy: str = COPY_AGAIN, failure: type[KeyeError] = CheckpointError) -> dict[str, Any]:
    """The object in a JSON file. Raises `failure`, which says `remedy`, where the file is missing, damaged, or holds no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise failure(f"cannot read {path}: {error.strerror}; {remedy}") from error
    except ValueError as error:
        raise failure(f"{path} is not JSON ({error}): it is damaged; {remedy}") from error
    if not isinstance(content, dict):
        raise failure(f"{path} holds a JSON {type(content).__name__}, expected an object; {remedy}")
    return content
