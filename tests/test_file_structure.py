"""qlora.py as a text: its list of rooms, the order of definitions, and its size.

`python tests/test_file_structure.py --write` updates the line ranges in the list of rooms.
"""

import ast
import re
import statistics
import symtable
import sys
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).resolve().parent.parent / "qlora.py"
RULE = "# " + "-" * 84
MOST_LINES, MOST_BYTES = 7690, 475636
LONGEST_FUNCTION, MEDIAN_FUNCTION = 66, 12  # lines, decorators and docstring included


class Room(NamedTuple):
    number: int
    name: str
    first: int  # line of the banner's upper rule
    last: int  # last line that is not blank

    def __str__(self) -> str:
        return f"    {self.number:2} {self.name:<16} {f'{self.first}-{self.last}':>9}"


def rooms_of(text: str) -> list[Room]:
    """The rooms by their banners: a rule, then `# 4. Name: what it does`."""
    lines = text.splitlines()
    titles = [(i, re.match(r"# (\d+)\. ([\w ]+)", line)) for i, line in enumerate(lines) if i and lines[i - 1] == RULE]
    starts = [(i - 1, title) for i, title in titles if title]
    ends = [start for start, _ in starts[1:]] + [len(lines)]
    return [
        Room(int(title[1]), title[2], start + 1, max(i for i in range(start, end) if lines[i].strip()) + 1)
        for (start, title), end in zip(starts, ends, strict=True)
    ]


def listed_rooms(text: str) -> list[str]:
    """The lines of the docstring that list a room."""
    return re.findall(r"^ {4}[ \d]\d [A-Z][\w ]+? +\d+-\d+$", text.partition('"""\n\n')[0], re.M)


def update_list(text: str) -> str:
    for line, room in zip(listed_rooms(text), rooms_of(text), strict=True):
        text = text.replace(f"{line}\n", f"{room}\n", 1)
    return text


def functions_of(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def lines_of(function: ast.FunctionDef) -> int:
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    return (function.end_lineno or 0) - first + 1


def global_names(table: symtable.SymbolTable) -> set[str]:
    """The module's names that a piece of code uses, also inside its functions, classes and comprehensions."""
    top = table.get_type() == "module"
    names = {s.get_name() for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())}
    return names.union(*map(global_names, table.get_children()))


def assigned_names(statement: ast.stmt) -> set[str]:
    table = symtable.symtable(ast.unparse(statement), FILE.name, "exec")
    return {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned()}


def uses_of_later_rooms(text: str) -> list[str]:
    """`room: statement uses name of room` for each name that is defined further down the file."""
    found, defined, uses = [], {}, []
    rooms, number = rooms_of(text), 0
    for statement in ast.parse(text).body:
        number = max((room.number for room in rooms if room.first <= statement.lineno), default=0)
        defined |= {name: number for name in assigned_names(statement) if name not in defined}
        table = symtable.symtable(ast.unparse(statement), FILE.name, "exec")
        uses.append((number, statement.lineno, global_names(table)))
    for number, line, names in uses:
        later = sorted(name for name in names if defined.get(name, 0) > number)
        found += [f"line {line}, room {number}, uses {name} of room {defined[name]}" for name in later]
    return found


TEXT = FILE.read_text(encoding="utf-8")
TREE = ast.parse(TEXT)


def test_the_list_of_rooms_has_their_lines():
    """If this fails: python tests/test_file_structure.py --write."""
    rooms = rooms_of(TEXT)
    assert [room.number for room in rooms] == list(range(1, len(rooms) + 1)) and len(rooms) > 10
    assert listed_rooms(TEXT) == [str(room) for room in rooms]


def test_a_room_uses_only_rooms_above_it():
    assert uses_of_later_rooms(TEXT) == []


def test_functions_are_short():
    lengths = {f"{function.name}, line {function.lineno}": lines_of(function) for function in functions_of(TREE)}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}
    assert statistics.median(lengths.values()) < MEDIAN_FUNCTION


def test_every_except_names_its_errors():
    assert [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.ExceptHandler) and node.type is None] == []


def test_the_file_is_small():
    lines, size = len(TEXT.splitlines()), len(TEXT.encode())
    assert lines <= MOST_LINES and size <= MOST_BYTES


def test_these_tests_find_what_they_look_for():
    rule = f"{RULE}\n# {{}}. {{}}: what it does\n{RULE}\n"
    text = '"""A file.\n\n     1 One    5-9\n     2 Two Words   1-2\n"""\n\n' + rule.format(1, "One")
    text += "def first(later: int = 1):\n    return [later for later in later()]\n\n\n" + rule.format(2, "Two Words")
    text += "def later():\n    return first()\n\n\n"
    assert [tuple(room) for room in rooms_of(text)] == [(1, "One", 7, 11), (2, "Two Words", 14, 18)]
    assert uses_of_later_rooms(text) == []  # `later` is an argument there
    assert uses_of_later_rooms(text.replace("later: int = 1", "")) == ["line 10, room 1, uses later of room 2"]
    assert uses_of_later_rooms(text.replace("int = 1", "int = later"))[0].endswith("uses later of room 2")
    assert listed_rooms(update_list(text)) == ["     1 One                   7-11", "     2 Two Words            14-18"]


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    FILE.write_text(update_list(TEXT), encoding="utf-8")
