# SPDX-License-Identifier: Apache-2.0
"""Raw text files as checked blocks of whole lines, in bounded memory and with no Python per row.

A byte-order mark and Windows line ends are taken away. Ragged rows, other columns, quotes (where there must be none) and
bytes that are not UTF-8 are refused with file, line and what was found there.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ctrbench.datasets.archives import RawMember, RawStream
from ctrbench.errors import DataError, did_you_mean

BLOCK_BYTES = 1 << 23
LONGEST_LINE = 1 << 20
_NEWLINE, _QUOTE = 10, 34


@dataclass(frozen=True)
class TextForm:
    """What a text file must look like.

    Attributes:
        columns: all columns in their order; with `may_have_more`, those that must be among them, in any order.
        separator: one byte.
        has_header: whether the first line names the columns.
        may_have_more: other columns may stand beside `columns`.
        label: the column that must hold 0 or 1.
        may_be_quoted: cells may be quoted as in RFC 4180 (without line breaks inside).
        alphabet: the only bytes that cells may hold; empty for any UTF-8 text.
    """

    columns: tuple[str, ...]
    separator: bytes
    has_header: bool
    label: str | None = None
    may_have_more: bool = False
    may_be_quoted: bool = False
    alphabet: bytes = b""


@dataclass(frozen=True)
class LineBlock:
    """Consecutive whole lines.

    Attributes:
        text: each line ends with one line feed.
        num_lines: how many.
        first_line: number of the first one in the file, counted from 1.
        labels: (num_lines,) uint8, 0 or 1; None without a label column.
    """

    text: bytes
    num_lines: int
    first_line: int
    labels: np.ndarray | None = None


class LineReader:
    """Reads one open text file.

    Args:
        stream: its bytes.
        form: what it must look like.
        block_bytes: size of a block, roughly.

    Attributes:
        columns: all columns of the file.

    Raises:
        DataError: the file is empty or its header is another one.
    """

    def __init__(self, stream: RawStream, form: TextForm, block_bytes: int = BLOCK_BYTES):
        self._stream, self._form, self._block_bytes = stream, form, block_bytes
        self._rest = b""
        self._line = 1
        self._is_at_end = False
        self._fill()
        if self._rest.startswith(b"\xef\xbb\xbf"):
            self._rest = self._rest[3:]
        if not self._rest.strip():
            raise DataError(f"{stream.name}: the file is empty: {stream.again}")
        if self._rest[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{stream.name}: the text is UTF-16, not UTF-8: convert it, or {stream.again}")
        self.columns = self._read_header() if form.has_header else form.columns
        self._label = None if form.label is None else self.columns.index(form.label)

    def blocks(self) -> Iterator[LineBlock]:
        """All data lines in order.

        Raises:
            DataError: a line is not as the form says, or the file has none.
        """
        seen = 0
        while True:
            self._fill()
            end = len(self._rest) if self._is_at_end else self._rest.rfind(b"\n") + 1
            if not end:
                break
            text, self._rest = self._rest[:end], self._rest[end:]
            if b"\r\n" in text:
                text = text.replace(b"\r\n", b"\n")
            block = self._checked(text if text.endswith(b"\n") else text + b"\n")
            self._line += block.num_lines
            seen += block.num_lines
            yield block
        if not seen:
            raise DataError(f"{self._stream.name}: there are no rows below the header: {self._stream.again}")

    def _fill(self) -> None:
        """Read until there is a block with a whole line, or the end."""
        while not self._is_at_end and (len(self._rest) < self._block_bytes or b"\n" not in self._rest):
            if len(self._rest) > LONGEST_LINE and b"\n" not in self._rest:
                raise self._wrong(0, f"is longer than {LONGEST_LINE:,} bytes: not a text file of rows")
            more = self._stream.read(self._block_bytes)
            self._rest += more
            self._is_at_end = not more

    def _read_header(self) -> tuple[str, ...]:
        line, _, self._rest = self._rest.partition(b"\n")
        self._line = 2
        separator = self._form.separator.decode()
        try:
            text = line.removesuffix(b"\r").decode()
            columns = tuple(next(csv.reader([text], delimiter=separator, strict=True), ()))
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{self._stream.name}: the header cannot be read ({error}): {self._stream.again}") from None
        self._check_header(columns)
        return columns

    def _check_header(self, columns: tuple[str, ...]) -> None:
        expected, again = self._form.columns, self._stream.again
        start = f"{self._stream.name}: header:"
        for name in columns:
            if columns.count(name) > 1:
                raise DataError(f"{start} it names '{name}' twice: {again}")
        for name in expected:
            if name not in columns:
                near = did_you_mean(name, set(columns) - set(expected))
                raise DataError(f"{start} column '{name}' is missing{near}, got {','.join(columns)[:200]}: {again}")
        if self._form.may_have_more or columns == expected:
            return
        if more := [name for name in columns if name not in expected]:
            raise DataError(f"{start} unknown column '{more[0]}': expected {','.join(expected)}: {again}")
        place = next(i for i, (got, known) in enumerate(zip(columns, expected, strict=True)) if got != known)
        raise DataError(
            f"{start} the columns are in another order: column {place + 1} is '{columns[place]}', "
            f"expected '{expected[place]}': {again}"
        )

    def _checked(self, text: bytes) -> LineBlock:
        buffer = np.frombuffer(text, np.uint8)
        lines = np.flatnonzero(buffer == _NEWLINE)
        self._check_bytes(text, lines)
        if b'"' in text:
            return LineBlock(text, len(lines), self._line, self._quoted(text, buffer, lines))
        labels = self._cells(buffer, lines, np.arange(len(lines)))
        return LineBlock(text, len(lines), self._line, labels)

    def _check_bytes(self, text: bytes, lines: np.ndarray) -> None:
        if not text.isascii():
            try:
                text.decode()
            except UnicodeDecodeError as error:
                raise self._at(error.start, lines, f"holds bytes that are not UTF-8 ({error.reason})") from None
        problems = {b"\0": "holds a NUL byte", b"\r": "holds a carriage return inside"}
        if not self._form.may_be_quoted:
            problems[b'"'] = "holds a quote, and the publisher's file has none"
        for wrong, problem in problems.items():
            if (place := text.find(wrong)) >= 0:
                raise self._at(place, lines, problem)
        if self._form.alphabet and (
            strange := text.translate(None, self._form.alphabet + self._form.separator + b"\n")
        ):
            wrong = strange.decode(errors="replace")[0].encode()
            raise self._at(
                text.find(wrong), lines, f"holds '{wrong.decode()}', which no cell of the publisher's file has"
            )

    def _cells(self, buffer: np.ndarray, lines: np.ndarray, numbers: np.ndarray) -> np.ndarray | None:
        """Check the number of cells of unquoted lines and give their labels.

        Args:
            buffer: lines one after the other.
            lines: (n,) where each ends in `buffer`.
            numbers: (n,) which line of the block each is.
        """
        width = len(self.columns)
        marks = np.flatnonzero((buffer == self._form.separator[0]) | (buffer == _NEWLINE))
        starts = np.concatenate(([0], lines[:-1] + 1))
        if len(marks) != width * len(lines) or (buffer[marks[width - 1 :: width]] != _NEWLINE).any():
            cells = np.diff(np.searchsorted(marks, lines, side="right"), prepend=0)
            wrong = int((cells != width).argmax())
            line = bytes(buffer[starts[wrong] : lines[wrong]])
            raise self._ragged(int(numbers[wrong]), line, int(cells[wrong]))
        if self._label is None:
            return None
        first = starts if self._label == 0 else marks[self._label - 1 :: width] + 1
        last = marks[self._label :: width]
        labels = buffer[first] - ord("0")  # wraps around below 0
        is_wrong = (last - first != 1) | (labels > 1)
        if is_wrong.any():
            wrong = int(is_wrong.argmax())
            raise self._wrong_label(int(numbers[wrong]), bytes(buffer[first[wrong] : last[wrong]]))
        return labels

    def _quoted(self, text: bytes, buffer: np.ndarray, lines: np.ndarray) -> np.ndarray | None:
        """The same where some lines hold quotes: these go through the csv module, one by one."""
        quotes = np.flatnonzero(buffer == _QUOTE)
        numbers = np.unique(np.searchsorted(lines, quotes))
        starts = np.concatenate(([0], lines[:-1] + 1))
        labels = None if self._label is None else np.zeros(len(lines), np.uint8)
        for number in numbers.tolist():
            line = text[starts[number] : lines[number]]
            try:
                cells = next(csv.reader([line.decode()], delimiter=self._form.separator.decode(), strict=True))
            except (csv.Error, StopIteration):
                raise self._wrong(number, "has a quote that is not closed, or text beside one") from None
            if len(cells) != len(self.columns):
                raise self._ragged(number, line, len(cells))
            if labels is not None and self._label is not None:
                if cells[self._label] not in ("0", "1"):
                    raise self._wrong_label(number, cells[self._label].encode())
                labels[number] = cells[self._label] == "1"
        is_plain = np.ones(len(lines), bool)
        is_plain[numbers] = False
        others = np.flatnonzero(is_plain)
        if len(others):
            kept = np.repeat(is_plain, np.diff(lines, prepend=-1))
            plain = buffer[kept]
            found = self._cells(plain, np.flatnonzero(plain == _NEWLINE), others)
            if labels is not None and found is not None:
                labels[others] = found
        return labels

    def _at(self, place: int, lines: np.ndarray, problem: str) -> DataError:
        return self._wrong(int(np.searchsorted(lines, place)), problem)

    def _ragged(self, number: int, line: bytes, cells: int) -> DataError:
        width, shown = len(self.columns), line[:60].decode(errors="replace")
        if not line:
            return self._wrong(number, "is empty")
        return self._wrong(number, f"has {cells} cells, expected {width}: '{shown}'")

    def _wrong_label(self, number: int, cell: bytes) -> DataError:
        return self._wrong(
            number, f"column '{self._form.label}': expected 0 or 1, got '{cell[:40].decode(errors='replace')}'"
        )

    def _wrong(self, number: int, problem: str) -> DataError:
        joint = ", " if problem.startswith("column") else " "
        return DataError(f"{self._stream.name}: line {self._line + number:,}{joint}{problem}: {self._stream.again}")


def read_lines(
    member: RawMember, form: TextForm, report: Callable[[str], None] = lambda line: None
) -> Iterator[LineBlock]:
    """All blocks of one raw file; says every quarter of a minute how far it is."""
    shown, rows = time.monotonic(), 0
    with member.open() as stream:
        for block in LineReader(stream, form).blocks():
            yield block
            rows += block.num_lines
            if time.monotonic() - shown > 15:
                shown = time.monotonic()
                report(f"  {rows:,} rows")
