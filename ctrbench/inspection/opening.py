# SPDX-License-Identifier: Apache-2.0
"""What `ctrbench inspect` was asked to look at: a dataset_id, a folder or a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from ctrbench.dataset_lookup import FEATURE_MAP, Found, find_dataset
from ctrbench.errors import DataError
from ctrbench.inspection.measure import inspect_source
from ctrbench.inspection.records import Inspection
from ctrbench.inspection.sources import EncodedSource, RawSource
from ctrbench.rawdata import resolve_files
from ctrbench.schema import DatasetConfig
from ctrbench.splits import SPLITS
from ctrbench.transforms import parse_preprocess

RAW_SUFFIXES = (".csv", ".tsv", ".txt", ".parquet")


def inspect_dataset(
    name: str, config_dir: Path | None = None, label: str | None = None, sep: str | None = None
) -> Inspection:
    """Inspect a dataset.

    Args:
        name: a dataset_id, whose built data is read, or else its raw files; a folder with a feature_map.json, or with
            raw files train, valid and test; or one raw file.
        config_dir: as for `find_dataset`.
        label: label column of raw files.
        sep: separator of raw CSV files.

    Raises:
        ConfigError: there is no such dataset.
        DataError: data that cannot be read.
    """
    path = Path(name)
    if path.suffix in RAW_SUFFIXES:
        if not path.is_file():
            raise DataError(f"{path}: no such file: correct the path")
        return inspect_source(RawSource({"train": [path]}, label, sep or ","), name)
    if path.is_dir() and not (path / FEATURE_MAP).is_file():
        return inspect_source(RawSource(_raw_files(path), label, sep or ","), name)
    found = find_dataset(name, config_dir)
    if found.encoded is None:
        assert found.dataset is not None
        files = _section_files(found)
        columns = {c.name: c for c in found.dataset.feature_cols if c.active}
        splitters = {n: c.splitter or " " for n, c in columns.items() if c.type == "sequence"}
        kinds = {n: c.type for n, c in columns.items()}
        label = label or found.dataset.label_col[0].name
        return inspect_source(RawSource(files, label, sep or found.dataset.sep, kinds, splitters), name)
    inspection = inspect_source(EncodedSource(found.encoded), name)
    if found.encoded.is_built_here and found.dataset is not None:
        return with_missing(inspection, missing_rates(found))
    return inspection


def _raw_files(folder: Path) -> dict[str, list[Path]]:
    for suffix in RAW_SUFFIXES:
        found = {s: [folder / f"{s}{suffix}"] for s in SPLITS if (folder / f"{s}{suffix}").is_file()}
        if found:
            return found
    raise DataError(f"{folder}: it holds neither a feature_map.json nor raw files train.csv or train.parquet")


def _section_files(found: Found) -> dict[str, list[Path]]:
    dataset = found.dataset
    assert dataset is not None
    where = f"dataset_config: {dataset.dataset_id}."
    named = {split: text for split in SPLITS if (text := getattr(dataset, f"{split}_data"))}
    return {s: resolve_files(found.root, t, dataset.data_format, f"{where}{s}_data") for s, t in named.items()}


def missing_rates(found: Found) -> dict[str, dict[str, float]]:
    """Share of missing values by column and split in the raw files that data was built from; empty where they are gone.

    Encoded data does not tell it: FuxiCTR gives a missing token the id of unknown ones.
    """
    dataset = found.dataset
    assert dataset is not None
    if dataset.valid_size or dataset.test_size or dataset.n_rows:
        return {}
    try:
        files = _section_files(found)
    except DataError:
        return {}
    rates: dict[str, dict[str, float]] = {}
    for split, paths in files.items():
        is_csv = dataset.data_format == "csv"
        scan = pl.scan_csv(paths, separator=dataset.sep, infer_schema=False) if is_csv else pl.scan_parquet(paths)
        try:
            schema = scan.collect_schema()
            wanted = {name: column for name, column in _sources(dataset).items() if column in schema}
            shares = [_is_missing(column, schema[column]).mean().alias(name) for name, column in wanted.items()]
            row = scan.select(shares).collect(engine="streaming").row(0, named=True)
        except (pl.exceptions.PolarsError, OSError):
            return {}  # what was built from them is sound
        for name, share in row.items():
            rates.setdefault(name, {})[split] = float(share)
    return rates


def _sources(dataset: DatasetConfig) -> dict[str, str]:
    """The raw column that each active column is made from."""
    found = {}
    for column in dataset.feature_cols:
        transform = parse_preprocess(column.preprocess, column.name) if column.preprocess else None
        found[column.name] = column.name if transform is None or isinstance(transform, str) else transform.source
    return {column.name: found[column.name] for column in dataset.feature_cols if column.active}


def _is_missing(name: str, dtype: pl.DataType) -> pl.Expr:
    column = pl.col(name)
    if dtype == pl.String:
        return column.is_null() | (column.str.strip_chars() == "")
    return column.is_null() | column.is_nan() if dtype.is_float() else column.is_null()


def with_missing(inspection: Inspection, rates: Mapping[str, Mapping[str, float]]) -> Inspection:
    """The inspection with these shares of missing values."""
    fields = []
    for field in inspection.fields:
        known = rates.get(field.name, {})
        parts = {s: dataclasses.replace(p, missing=known.get(s, p.missing)) for s, p in field.parts.items()}
        fields.append(dataclasses.replace(field, parts=parts))
    return dataclasses.replace(inspection, fields=fields)
