# SPDX-License-Identifier: Apache-2.0
"""Raw CSV and Parquet files as a stream of blocks whose columns are typed, filled and preprocessed.

CSV is read as text and cast here, so that a value that does not fit is reported with its file, row and column.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ctrbench.errors import DataError, did_you_mean
from ctrbench.schema import DatasetConfig, FeatureColumn, LabelColumn
from ctrbench.transforms import Transform, parse_preprocess

BLOCK_ROWS = 1 << 16
_TYPES: dict[str, pl.DataType] = {"str": pl.String(), "int": pl.Int64(), "float": pl.Float64()}
_NUMBERED = re.compile(r"_duplicated_\d+$")
_LARGEST = float(np.finfo(np.float32).max)  # what is stored of numbers and labels
_MEANINGS = {"int": "an integer", "float": "a number", "str": "text"}


def resolve_files(root: Path, text: str, data_format: str, where: str) -> list[Path]:
    """The files that `text` names: a file, the *.<data_format> of a folder, or a glob; relative to `root`.

    Raises:
        DataError: there are none.
    """
    path = root / text
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(path.glob(f"*.{data_format}"))
        if not files:
            raise DataError(f"{where}: the folder {path} holds no *.{data_format} file")
        return files
    if any(sign in text for sign in "*?["):
        pattern = Path(text)
        base = Path(pattern.anchor) if pattern.is_absolute() else root
        files = sorted(base.glob(str(pattern.relative_to(pattern.anchor) if pattern.is_absolute() else pattern)))
        if files:
            return files
        raise DataError(f"{where}: no file matches {path}")
    near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
    raise DataError(f"{where}: {path} does not exist{near}: download or prepare the data first, or correct the path")


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one file. Row numbers in messages count data rows from 1, the header not included."""

    frame: pl.DataFrame
    file: Path
    first_row: int

    def place(self, offset: int, column: str) -> str:
        """`file: row R, column 'x'` of the row at `offset` in this block."""
        return f"{self.file}: row {self.first_row + offset + 1}, column '{column}'"


@dataclass(frozen=True)
class _Step:
    """How one configured column gets its value; steps run in FuxiCTR's order."""

    name: str
    kind: str  # label, or the feature's type
    dtype: str
    fill: str | int | float | None
    transform: Transform | None
    splitter: str | None = None
    may_hold_lists: bool = False

    @property
    def reads(self) -> str:
        return self.transform.source if self.transform else self.name


class RawReader:
    """Reads raw files of one dataset.

    Columns come out as: label and numeric Float64; categorical and meta String, Int64 or Float64; sequence String (to
    be split) or List(String); embedding List(Float32); a meta column of lists as lists of its type. None of them holds
    nulls, except a label without fill_na.

    Args:
        dataset: its configuration; `preprocess` values must have been checked with `parse_preprocess`.
        ids_given: categorical and meta columns hold ids already: integers whatever their dtype says.
    """

    def __init__(self, dataset: DatasetConfig, *, ids_given: bool = False):
        self._dataset = dataset
        columns: list[FeatureColumn | LabelColumn] = [*dataset.label_col, *reversed(dataset.feature_cols)]
        # FuxiCTR's order: a function that reads a column listed before its own sees the raw value of that column.
        self._steps = [_step(column, ids_given, dataset.item_info is not None) for column in columns]
        # What the raw column is cast to, which differs from a step's result where a function turns numbers to tokens.
        typed = [(column, step) for column, step in zip(columns, self._steps, strict=True) if step.kind != "embedding"]
        self._types = {column.name: _raw_type(column, step) for column, step in typed}

    def columns(self, file: Path) -> list[str]:
        """Names of the columns of one file."""
        return list(self.schema(file))

    def schema(self, file: Path) -> Mapping[str, pl.DataType]:
        """The columns of one file with the types that they have there."""
        return dict(self._scan(file).collect_schema())

    def count_rows(self, files: Collection[Path]) -> list[int]:
        """Rows of each file."""
        return [_guarded(file, lambda scan: scan.select(pl.len()).collect().item(), self._scan(file)) for file in files]

    def missing(self, file: Path, wanted: Collection[str]) -> list[str]:
        """Columns that `wanted` depend on and that the file lacks."""
        present = set(self.columns(file))
        return [name for name in self._plan(wanted)[1] if name not in present]

    def blocks(self, files: Collection[Path], wanted: Collection[str]) -> Iterator[Block]:
        """The prepared columns `wanted` of all rows, file after file.

        Raises:
            DataError: a file cannot be read, lacks a column, or holds a value that does not fit its column.
        """
        steps, raw = self._plan(wanted)
        for file in files:
            self._check_columns(file, raw)
            first_row = 0
            batches = self._scan(file).select(raw).collect_batches(chunk_size=BLOCK_ROWS, maintain_order=True)
            while (frame := _guarded(file, lambda iterator: next(iterator, None), iter(batches))) is not None:
                block = Block(frame, file, first_row)
                prepared = _guarded(file, lambda b: _run_steps(b, _typed(b, self._types), steps), block)
                yield Block(prepared.select(wanted), file, first_row)
                first_row += frame.height

    def _check_columns(self, file: Path, names: Collection[str]) -> None:
        """Refuse a file that lacks one of the columns, has it twice, or holds in it what no column can take."""
        present = self.schema(file)
        twice = self._twice(file, present)
        for name in names:
            place = f"{file}: column '{name}'"
            if name not in present:
                is_label = any(name == label.name for label in self._dataset.label_col)
                remedy = "" if is_label else " or set the column active: false"
                near = did_you_mean(name, present)
                raise DataError(f"{place} is missing{near}: correct the name in dataset_config{remedy}")
            if name in twice:
                raise DataError(f"{place} is named twice in the header: rename or remove one of the two")
            if not _is_readable(present[name]):
                raise DataError(
                    f"{place} holds {str(present[name])[:100]}: it must hold text, numbers, dates or lists of these"
                )

    def _twice(self, file: Path, present: Collection[str]) -> set[str]:
        """The names that the header of a CSV file repeats, which polars numbers."""
        if self._dataset.data_format != "csv" or not any(_NUMBERED.search(name) for name in present):
            return set()
        options = {"has_header": False, "separator": self._dataset.sep, "n_rows": 1, "infer_schema": False}
        header = _guarded(file, lambda path: pl.read_csv(path, **options).row(0), file)
        return {name or "" for name in header if header.count(name) > 1}

    def _scan(self, file: Path) -> pl.LazyFrame:
        limit = self._dataset.n_rows
        if self._dataset.data_format == "csv":
            scan = pl.scan_csv(file, separator=self._dataset.sep, infer_schema=False, n_rows=limit)
        else:
            scan = pl.scan_parquet(file, n_rows=limit)
        try:
            scan.collect_schema()
        except pl.exceptions.NoDataError:
            raise DataError(f"{file}: the file is empty: it needs a header and at least one row") from None
        except (pl.exceptions.PolarsError, OSError) as error:
            raise _unreadable(file, error) from None
        return scan

    def _plan(self, wanted: Collection[str]) -> tuple[list[_Step], list[str]]:
        """The steps that `wanted` depend on, in order, and the raw columns that these read."""
        needed, steps = set(wanted), []
        for step in reversed(self._steps):
            if step.name in needed:
                steps.append(step)
                needed.remove(step.name)
                needed.add(step.reads)
        return steps[::-1], sorted(needed)


def _step(column: FeatureColumn | LabelColumn, ids_given: bool, has_histories: bool) -> _Step:
    transform = parse_preprocess(column.preprocess, column.name) if column.preprocess else None
    if isinstance(transform, str):
        raise DataError(f"column '{column.name}': preprocess: {transform}")
    if isinstance(column, LabelColumn):
        return _Step(column.name, "label", "float", column.fill_na, transform)
    kind, dtype = column.type, column.dtype
    fill: str | int | float | None = column.na_value
    if kind in ("numeric", "embedding"):
        dtype = "int" if dtype == "int" else "float"
        fill = 0 if fill == "" else fill
    elif kind == "sequence":
        dtype, fill = "str", "" if column.fill_na is None else str(column.fill_na)
    elif ids_given:
        dtype, fill = "int", column.fill_na if isinstance(column.fill_na, int) else None
    elif dtype == "float" and transform is not None and transform.gives_integer:
        # The result is meant, not the column that it replaces: tokens are 3, not 3.0, as in FuxiCTR.
        dtype = "int"
    if dtype == "str":
        fill = str(fill)
    may_hold_lists = kind in ("sequence", "embedding") or (kind == "meta" and has_histories)
    return _Step(column.name, kind, dtype, fill, transform, column.splitter, may_hold_lists)


def _raw_type(column: FeatureColumn | LabelColumn, step: _Step) -> str:
    return column.dtype if isinstance(column, FeatureColumn) and step.transform is not None else step.dtype


def _is_readable(dtype: pl.DataType) -> bool:
    if isinstance(dtype, pl.List | pl.Array):
        dtype = dtype.inner
    return not isinstance(dtype, pl.Binary | pl.Duration | pl.Object) and not dtype.is_nested()


def _typed(block: Block, types: Mapping[str, str]) -> pl.DataFrame:
    """Cast configured columns to their dtype; NaN counts as missing."""
    before = block.frame
    casts = {}
    for name, dtype in before.schema.items():
        if isinstance(dtype, pl.List | pl.Array):
            continue
        if name in types and dtype != _TYPES[types[name]]:
            casts[name] = _cast(pl.col(name), dtype, types[name])
    after = before.with_columns(**casts)
    floats = [name for name, dtype in after.schema.items() if dtype.is_float()]
    # Looking whether there is a NaN costs far less than replacing none.
    has_nan = after.select(pl.col(floats).is_nan().any()).row(0) if floats else ()
    after = after.with_columns(pl.col([n for n, is_so in zip(floats, has_nan, strict=True) if is_so]).fill_nan(None))
    for name in casts:
        if name in types and after[name].null_count() > before[name].null_count():
            _refuse_unreadable(block, name, before[name], after[name], _MEANINGS[types[name]])
    return after


def _cast(source: pl.Expr, present: pl.DataType, wanted: str) -> pl.Expr:
    if isinstance(present, pl.Categorical | pl.Enum):
        source, present = source.cast(pl.String), pl.String()
    cast = source.cast(_TYPES[wanted], strict=False)
    if wanted == "int" and (present.is_float() or present.is_decimal()):  # 1.5 must not become 1
        return pl.when(cast.cast(present) == source).then(cast)
    return cast


def _refuse_unreadable(block: Block, name: str, before: pl.Series, after: pl.Series, expected: str) -> None:
    """Raise for the first row whose value was there and got lost; blank text and NaN are missing values."""
    blank = before.cast(pl.String).str.strip_chars().str.to_lowercase().is_in(["", "nan"])
    rows = (after.is_null() & before.is_not_null() & ~blank).arg_true()
    if len(rows):
        raise DataError(
            f"{block.place(rows[0], name)}: {before[rows[0]]!r} is not {expected}: "
            "correct the value, or the column's dtype in dataset_config"
        )


def _run_steps(block: Block, frame: pl.DataFrame, steps: list[_Step]) -> pl.DataFrame:
    """Apply the steps in order, evaluating together those that do not read each other's results."""
    batch: list[_Step] = []
    for step in steps:
        if any(step.reads == earlier.name for earlier in batch):
            frame = _run_batch(block, frame, batch)
            batch = []
        batch.append(step)
    return _run_batch(block, frame, batch)


def _run_batch(block: Block, frame: pl.DataFrame, steps: list[_Step]) -> pl.DataFrame:
    transformed = [step for step in steps if step.transform is not None]
    after = frame.with_columns(_transformed(step).alias(step.name) for step in transformed)
    for step in transformed:
        values = after[step.name]
        if values.null_count() and not isinstance(values.dtype, pl.List | pl.Array):
            assert step.transform is not None
            source = frame[step.reads]
            expected = step.transform.expects + (f" (for column '{step.name}')" if step.reads != step.name else "")
            _refuse_unreadable(block, step.reads, source, values, expected)
    unfilled = [step for step in steps if _needs_filling(step, after[step.name])]
    after = after.with_columns(_filled(step, after.schema[step.name], block).alias(step.name) for step in unfilled)
    for step in steps:
        _check_finite(block, step, after[step.name])
    return after


def _transformed(step: _Step) -> pl.Expr:
    assert step.transform is not None
    source = pl.col(step.reads)
    if step.reads == step.name and step.fill is not None:  # FuxiCTR fills a column before it calls its function
        source = source.fill_null(step.fill)
    result = step.transform.expression(source)
    if step.kind == "sequence" or step.kind == "embedding":
        return result
    return result.cast(_TYPES[step.dtype], strict=False)


def _needs_filling(step: _Step, values: pl.Series) -> bool:
    if isinstance(values.dtype, pl.List | pl.Array) or step.kind in ("sequence", "embedding"):
        return True  # these may change their type too
    return step.fill is not None and values.null_count() > 0


def _filled(step: _Step, dtype: pl.DataType, block: Block) -> pl.Expr:
    values = pl.col(step.name)
    if isinstance(dtype, pl.List | pl.Array):
        if not step.may_hold_lists:
            raise DataError(
                f"{block.file}: column '{step.name}' holds lists, but its type is {step.kind}: "
                "set type: sequence or embedding, or name the item_info that a history of item ids belongs to"
            )
        inner = {"sequence": pl.String(), "embedding": pl.Float32(), "meta": _TYPES[step.dtype]}[step.kind]
        lists = values.cast(pl.List(inner), strict=False)
        return (lists if step.kind == "embedding" else lists.list.drop_nulls()).fill_null([])
    if step.kind == "embedding":
        numbers = values.cast(pl.String).str.split(step.splitter or "^").cast(pl.List(pl.Float32), strict=False)
        is_missing = values.cast(pl.String).fill_null("") == ""
        return pl.when(is_missing).then(pl.lit([], pl.List(pl.Float32))).otherwise(numbers)
    if step.kind == "sequence":
        return values.cast(pl.String).fill_null(step.fill)
    return values.fill_null(pl.lit(step.fill).cast(_TYPES[step.dtype]))


def _check_finite(block: Block, step: _Step, values: pl.Series) -> None:
    if step.kind not in ("numeric", "label") or not values.dtype.is_float():
        return
    beyond = values.abs() > _LARGEST
    if beyond.any():
        row = beyond.arg_true()[0]
        what = "is not a finite number" if math.isinf(values[row]) else f"is beyond 32-bit numbers ({_LARGEST:.1e})"
        raise DataError(f"{block.place(row, step.name)}: {values[row]} {what}: correct the value")


def _guarded(file: Path, action: Callable[[Any], Any], argument: Any) -> Any:
    """`action(argument)` with polars' errors turned into one line that names the file."""
    try:
        return action(argument)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(f"{file}: cannot be read: {reason}: check data_format, sep and the file itself")
