"""Tables of numbers as people's tools write them: with or without a header, comments, a byte-order mark, Windows line
ends, commas, semicolons, tabs or blanks, decimal commas."""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from egom2p.datasets.recording import BadSequence, find

SAMPLE = 5000
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
    """See the module. The header is the last comment line or the first line, when it holds words, as many as a row;
    columns of one name are numbered.

    Tabs at a line's ends are empty cells, or mean nothing, and a line may hold several signs that could part it:
    whatever makes more numbers in whole rows, then a header, then a first column that holds something. The first
    SAMPLE lines decide.
    """
    comments, lines = [], []
    for line in read_text(path).splitlines():
        if line.lstrip().startswith("#"):
            comments.append(line.strip().lstrip("#").strip())
        elif line.strip():
            lines.append(line.strip(" \r\n"))
    if not lines:
        raise BadSequence(f"{path} holds no row")
    form = _form_of(lines[:SAMPLE], comments)
    rows = lines[1:] if form.header and not form.commented else lines
    if not rows:
        raise BadSequence(f"{path} holds no row")
    if form.header is None and len(rows) > SAMPLE:
        form = replace(form, width=max(_filled(row) for row in form.rows(rows)))
    parts = [form.numbers(rows[start : start + SAMPLE]) for start in range(0, len(rows), SAMPLE)]
    table = np.concatenate(parts).T
    if not table.shape[1]:
        raise BadSequence(f"{path} holds no row of {form.width} columns")
    return Table(path, dict(zip(form.names, table, strict=True)), form.header is not None, len(rows) - table.shape[1])


@dataclass(frozen=True)
class _Form:
    """How the lines of a table are parted: at `delimiter` ("" for blanks), their ends stripped when `bare`; width:
    columns; header: their names, from a comment when `commented`."""

    bare: bool
    delimiter: str
    decimal: str
    width: int
    header: list[str] | None
    commented: bool

    @property
    def names(self) -> list[str]:
        if not self.header:
            return [str(i) for i in range(self.width)]
        names = [name.strip().strip('"').lower() for name in self.header]
        return [name if names.index(name) == i else f"{name}.{names[:i].count(name) + 1}"
                for i, name in enumerate(names)]

    def rows(self, lines: Iterable[str]) -> Iterator[list[str]]:
        return (_split(line.strip() if self.bare else line, self.delimiter) for line in lines)

    def whole(self, lines: list[str]) -> list[list[str]]:
        """The rows that have all columns; empty cells behind them do not count."""
        cut = [row[: self.width] if _filled(row) <= self.width else row for row in self.rows(lines)]
        return [row for row in cut if len(row) == self.width]

    def numbers(self, lines: list[str]) -> np.ndarray:
        """(rows that are whole, width) float64."""
        rows = [[_number(word, self.decimal) for word in row] for row in self.whole(lines)]
        return np.array(rows, np.float64).reshape(-1, self.width)

    def sense(self, lines: list[str]) -> tuple[int, bool, bool]:
        """How well it fits: numbers in whole rows, whether there is a header and a first column."""
        rows = lines[1:] if self.header and not self.commented else lines
        return (sum(_is_number(word, self.decimal) for row in self.whole(rows) for word in row),
                self.header is not None, any(row[0] for row in self.rows(rows)))


def _form_of(lines: list[str], comments: list[str]) -> _Form:
    """The form that fits best."""
    bare = [line.strip() for line in lines]
    signs = dict.fromkeys([_delimiter(bare), _delimiter(lines), _delimiter(bare[:1])])
    forms = [_with_header(strip, *sign, lines, comments) for strip in ([False] if lines == bare else [False, True])
             for sign in signs]
    return max(forms, key=lambda form: form.sense(lines)) if len(forms) > 1 else forms[0]


def _with_header(bare: bool, delimiter: str, decimal: str, lines: list[str], comments: list[str]) -> _Form:
    rows = list(_Form(bare, delimiter, decimal, 0, None, False).rows(lines))
    header, commented = None, False
    if not any(_is_number(word, decimal) for word in rows[0]):
        header = rows[0]
    elif comments:
        words = _split(comments[-1], _delimiter([comments[-1]])[0])
        fits = len(words) in (len(rows[0]), _filled(rows[0]))
        header = words if fits and not any(_is_number(w, ".") for w in words) else None
        commented = header is not None
    width = len(header) if header else max(map(_filled, rows), default=0)
    return _Form(bare, delimiter, decimal, width, header, commented)


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
