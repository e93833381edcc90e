"""JSON files of model folders."""

import json
from pathlib import Path
from typing import Any

from megatron_keye.errors import CheckpointError


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder. Raises CheckpointError where it is missing, damaged, or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; copy every file of the released folder, not only weights") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); restore it from where it was copied") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, expected an object; restore it from where it was copied")
    return content
