# SPDX-License-Identifier: Apache-2.0
"""Write the tables of README.md in this folder from the JSON files in results/, so that nobody types a number.

python benchmarks/speed/fill_readme.py
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The results that have a table, and the modules that make it.
PARTS = {
    "compare": "compare_tables",
    "cuda": "compare_tables",
    "build_dataset": "build_dataset",
    "seeds": "seeds",
    "accuracy": "accuracy",
    "build_scale": "build_scale",
    "streaming": "streaming",
    "tuner": "tuner",
}


def tables() -> dict[str, str]:
    """The Markdown of every result that is there, by its name."""
    sys.path.insert(0, str(HERE))
    files = {part: HERE / "results" / f"{part}.json" for part in PARTS}
    return {
        part: importlib.import_module(PARTS[part]).to_markdown(json.loads(file.read_text()))
        for part, file in files.items()
        if file.exists()
    }


def filled(text: str) -> str:
    """`text` with everything between the markers of each part replaced by its table."""
    for part, table in tables().items():
        begin, end = f"<!-- {part} -->", "<!-- end -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}\n\n{table}\n\n{end}{tail}"
    return text


if __name__ == "__main__":
    page = HERE / "README.md"
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
