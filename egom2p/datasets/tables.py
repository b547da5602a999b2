"""Tables of numbers as people's tools write them: with or without a header, comments, a byte-order mark, Windows line
ends, commas, semicolons, tabs or blanks, decimal commas."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from egom2p.datasets.recording import BadSequence, find

TRUE, FALSE = {"true", "yes", "valid"}, {"false", "no", "invalid"}


@dataclass(frozen=True)
class Table:
    """columns by name (lower case, stripped; those of a file without header are called 0, 1, ...): (N,) float64, NaN
    where a field is no number; True and False words are 1 and 0. lost: rows that are cut off or not of the table."""

    path: Path
    columns: dict[str, np.ndarray]
    has_header: bool
    lost: int

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def column(self, *names: str) -> np.ndarray:
        """The first of `names` that is there; BadSequence lists what there is."""
        found = self.get(*names)
        if found is None:
            raise BadSequence(f"{self.path} needs a column {' or '.join(names)}; it has {', '.join(self.columns)}")
        return found

    def get(self, *names: str) -> np.ndarray | None:
        return next((self.columns[n] for n in names if n in self.columns), None)

    def matrix(self) -> np.ndarray:
        """(N, C) of all columns."""
        return np.stack(list(self.columns.values()), 1)


def read_text(path: Path) -> str:
    """A text file in UTF-8 or, by its byte-order mark, UTF-16."""
    data = find(path).read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise BadSequence(f"{path} is no text file ({error.reason} at byte {error.start})") from error


def read_table(path: Path) -> Table:
    """See the module. The header is the last comment line or the first line, when it holds words, as many as a row.

    Tabs at a line's ends are empty cells, or mean nothing, and a line may hold several signs that could part it:
    whatever makes more numbers in whole rows, then a header, then a first column that holds something.
    """
    comments, lines = [], []
    for line in read_text(path).splitlines():
        if line.lstrip().startswith("#"):
            comments.append(line.strip().lstrip("#").strip())
        elif line.strip():
            lines.append(line.strip(" \r\n"))
    if not lines:
        raise BadSequence(f"{path} holds no row")
    bare = [line.strip() for line in lines]
    signs = dict.fromkeys([_delimiter(bare), _delimiter(lines), _delimiter(bare[:1])])
    readings = [(_columns_of([_split(line, delimiter) for line in some], comments, decimal), decimal)
                for some in ([lines] if lines == bare else [lines, bare]) for delimiter, decimal in signs]
    (header, rows, whole), decimal = max(readings, key=_sense) if len(readings) > 1 else readings[0]
    if not rows:
        raise BadSequence(f"{path} holds no row")
    width = len(header) if header else max(map(_filled, rows))
    if not whole:
        raise BadSequence(f"{path} holds no row of {width} columns")
    names = [name.strip().strip('"').lower() for name in header] if header else [str(i) for i in range(width)]
    table = np.array([[_number(word, decimal) for word in row] for row in whole], np.float64).T
    return Table(path, dict(zip(names, table, strict=False)), header is not None, len(rows) - len(whole))


def _sense(reading: tuple[tuple[list[str] | None, list[list[str]], list[list[str]]], str]) -> tuple[int, bool, bool]:
    """How well a reading of a table fits: numbers in whole rows, whether there is a header and a first column."""
    (header, rows, whole), decimal = reading
    return (sum(_is_number(word, decimal) for row in whole for word in row), header is not None,
            any(row[0] for row in rows))


def _columns_of(rows: list[list[str]], comments: list[str],
                decimal: str) -> tuple[list[str] | None, list[list[str]], list[list[str]]]:
    """(header if there is one, the other rows, those of them that are whole)."""
    header: list[str] | None = None
    if not any(_is_number(word, decimal) for word in rows[0]):
        header, rows = rows[0], rows[1:]
    elif comments:
        words = _split(comments[-1], _delimiter([comments[-1]])[0])
        fits = len(words) in (len(rows[0]), _filled(rows[0]))
        header = words if fits and not any(_is_number(w, ".") for w in words) else None
    width = len(header) if header else max(map(_filled, rows), default=0)
    cut = [row[:width] if _filled(row) <= width else row for row in rows]
    return header, rows, [row for row in cut if len(row) == width]


def numbers(path: Path, columns: int | None = None) -> np.ndarray:
    """(N, C) numbers of a text file; `columns` of them a row (further ones are left away). Rows that are cut off or
    hold something else are dropped."""
    table = read_table(path).matrix()
    if columns and table.shape[1] < columns:
        raise BadSequence(f"{path} holds rows of {table.shape[1]} numbers, expected {columns}")
    table = table[:, :columns]
    table = table[np.isfinite(table).any(1)]
    if not len(table):
        raise BadSequence(f"{path} holds no row of numbers")
    return table


def read_matrix(path: Path) -> np.ndarray:
    """A 3 x 3 matrix of a text file: three rows of three numbers, or nine in one row."""
    table = numbers(path)
    if table.size == 9:
        return table.reshape(3, 3)
    if table.shape[0] >= 3 and table.shape[1] >= 3:
        return table[:3, :3]
    raise BadSequence(f"{path} holds {table.shape[0]} x {table.shape[1]} numbers, expected a 3 x 3 matrix")


def _delimiter(lines: list[str]) -> tuple[str, str]:
    """(delimiter, "" for blanks; decimal sign) of the lines."""
    line = lines[len(lines) // 2]
    for delimiter in (";", "\t"):
        if delimiter in line:
            return delimiter, "," if "," in line and "." not in line else "."
    return ("," if "," in line else ""), "."


def _split(line: str, delimiter: str) -> list[str]:
    if not delimiter:
        return line.split()
    row = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
    return [word.strip() for word in row]


def _filled(row: list[str]) -> int:
    """Cells up to the last that is not empty."""
    return max((i + 1 for i, word in enumerate(row) if word), default=0)


def _is_number(word: str, decimal: str) -> bool:
    try:
        float(word.replace(",", ".") if decimal == "," else word)
    except ValueError:
        return False
    return True


def _number(word: str, decimal: str) -> float:
    if _is_number(word, decimal):
        return float(word.replace(",", ".") if decimal == "," else word)
    lower = word.lower()
    return 1.0 if lower in TRUE else 0.0 if lower in FALSE else float("nan")
