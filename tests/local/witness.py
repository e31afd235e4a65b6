"""A `map` step that tells what it has seen: between two steps of a job, so that a test knows what the later one was given."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any


def seen(record: dict[str, Any]) -> dict[str, Any]:
    """Write the record to a file of its own in the folder that its input column `notes` names."""
    folder = Path(record["notes"])
    name = uuid.uuid4().hex
    (folder / f"{name}.tmp").write_text(json.dumps(record))
    (folder / f"{name}.tmp").rename(folder / f"{name}.json")
    return {"witnessed": True}


def told(folder: Path) -> list[dict[str, Any]]:
    """The records that were seen, each once, by row and sample; a shard may have been tried more than once."""
    records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    by_key = {(record["row_id"], record["sample_index"]): record for record in records}
    return [by_key[key] for key in sorted(by_key)]
