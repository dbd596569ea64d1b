# SPDX-License-Identifier: Apache-2.0
"""manifest.json of a built dataset: the mark that it is complete, and what it was built from."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctrbench.files import sha256_of_file, sha256_of_value, write_json
from ctrbench.schema import DatasetConfig

FORMAT_VERSION = 1
NAME = "manifest.json"
CHECKSUM = "checksum"  # of the manifest's other entries
# Keys of a dataset section that name places or ways of working, not content.
_NOT_CONTENT = {"data_root", "train_data", "valid_data", "test_data", "item_info", "rebuild_dataset", "split_seed"}

Sources = dict[str, list[dict[str, Any]]]


def settings_hash(dataset: DatasetConfig, task: str | Sequence[str]) -> str:
    """SHA-256 of the settings that shape the stored data."""
    settings = dataset.model_dump(exclude=_NOT_CONTENT)
    if dataset.split_type == "random" and (dataset.valid_size or dataset.test_size):
        settings["split_seed"] = dataset.split_seed
    # The task decides only which labels are refused, but data built for one must not pass unchecked into the other.
    return sha256_of_value([FORMAT_VERSION, task, settings])


def describe(files: Mapping[str, list[Path]], known: Mapping[str, Any] | None = None) -> Sources:
    """Path, size, modification time and SHA-256 of each source file.

    Args:
        files: by the key that names them.
        known: earlier result; a file whose path, size and time are unchanged keeps its hash without being read.
    """
    hashes = {_stamp(entry): entry["sha256"] for entries in (known or {}).values() for entry in entries}
    sources: Sources = {}
    for key, paths in files.items():
        sources[key] = []
        for path in paths:
            status = path.stat()
            entry: dict[str, Any] = {"path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
            entry["sha256"] = hashes.get(_stamp(entry)) or sha256_of_file(path)
            sources[key].append(entry)
    return sources


def unchanged(sources: Sources) -> bool:
    """Whether the files still have the size and time of `sources` (nobody wrote to them meanwhile)."""
    for entry in (entry for entries in sources.values() for entry in entries):
        status = Path(entry["path"]).stat()
        if (status.st_size, status.st_mtime_ns) != (entry["size"], entry["mtime_ns"]):
            return False
    return True


def data_hash(sources: Sources, settings: str) -> str:
    """SHA-256 over the contents of the sources and the settings."""
    return sha256_of_value([{key: [e["sha256"] for e in entries] for key, entries in sources.items()}, settings])


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete dataset; None where there is none or what is there is no manifest."""
    try:
        manifest = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return manifest if _is_manifest(manifest) and _is_whole(manifest) else None


def _is_whole(manifest: dict[str, Any]) -> bool:
    """Whether a manifest is what its checksum says; one of an earlier version has none."""
    content = {key: value for key, value in manifest.items() if key != CHECKSUM}
    return CHECKSUM not in manifest or manifest[CHECKSUM] == sha256_of_value(content)


def _is_manifest(value: Any) -> bool:
    counts, texts = ("outputs", "num_rows"), ("settings_hash", "data_hash")
    if not isinstance(value, dict) or not isinstance(value.get("hashes", {}), dict):
        return False
    return (
        {"format_version", "sources", *counts, *texts} <= value.keys()
        and all(isinstance(value[key], str) for key in texts)
        and all(isinstance(value[key], dict) and all(type(n) is int for n in value[key].values()) for key in counts)
        and isinstance(value["sources"], dict)
        and all(isinstance(entries, list) for entries in value["sources"].values())
        and all(_is_source(entry) for entries in value["sources"].values() for entry in entries)
    )


def _is_source(value: Any) -> bool:
    types = {"path": str, "size": int, "mtime_ns": int, "sha256": str}
    return isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in types.items())


def write(
    folder: Path,
    sources: Sources,
    settings: str,
    num_rows: Mapping[str, int],
    outputs: list[Path],
    dataset_id: str | None = None,
) -> dict[str, Any]:
    """Write manifest.json, the last file of a build; `dataset_id` is the folder's name unless it is given."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "dataset_id": dataset_id or folder.name,
        "data_hash": data_hash(sources, settings),
        "settings_hash": settings,
        "num_rows": dict(num_rows),
        "outputs": {path.name: path.stat().st_size for path in outputs},
        # H5 files that are written here carry checksums of their own, which are compared when they are read.
        "hashes": {
            path.name: sha256_of_file(path)
            for path in outputs
            if path.suffix != ".h5" or path.name.startswith("pretrained_")
        },
        "sources": sources,
    }
    _write(folder, manifest)
    return manifest


def _write(folder: Path, manifest: dict[str, Any]) -> None:
    content = {key: value for key, value in manifest.items() if key != CHECKSUM}
    write_json(folder / NAME, {**content, CHECKSUM: sha256_of_value(content)})


def remove(folder: Path, names: list[str]) -> None:
    """Withdraw a dataset: the manifest goes first, then the files `names`."""
    for name in [NAME, *names]:
        (folder / name).unlink(missing_ok=True)


def why_stale(folder: Path, manifest: Mapping[str, Any], settings: str, files: Mapping[str, list[Path]]) -> str | None:
    """Why the dataset in `folder` no longer stands for its sources and settings, or None when it does.

    Args:
        folder: of the dataset.
        manifest: its manifest.
        settings: `settings_hash` of the present configuration.
        files: the present source files. Empty when none of them exists any more: then the sources are not compared.
    """
    if manifest["format_version"] != FORMAT_VERSION:
        return f"it has format version {manifest['format_version']}, this program writes {FORMAT_VERSION}"
    if manifest["settings_hash"] != settings:
        return "it was built from other settings (feature_cols, label_col, min_categr_count, splits, ...)"
    for name, size in manifest["outputs"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or incomplete"
        if (expected := manifest.get("hashes", {}).get(name)) and sha256_of_file(path) != expected:
            return f"{name} is damaged, its checksum does not match"
    if not files:
        logging.warning("%s: its source files are gone; using the data built from them", folder)
        return None
    if manifest["sources"].keys() != files.keys():
        return "it was built from other source files"
    sources = describe(files, manifest["sources"])
    for key, entries in sources.items():
        if [entry["sha256"] for entry in entries] != [entry["sha256"] for entry in manifest["sources"][key]]:
            return f"the content of {key} has changed"
    if sources != manifest["sources"]:  # touched or moved, same content: note it, so that it is not hashed again
        try:
            _write(folder, {**manifest, "sources": sources})
        except ValueError:
            logging.info("%s cannot be updated", folder / NAME)
    return None


def _stamp(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return entry["path"], entry["size"], entry["mtime_ns"]
