"""Random damage to CSV, JSON and JSON Lines: every file gives the rows that its bytes say, or one line of error.

What the bytes say is read a second time here, by other means than gpt/data/rows.py uses: CSV by a state machine on
bytes, JSON by a tokenizer and a recursive descent, UTF-8 by the table of the Unicode standard. Both must agree on
every row, on every line left out by on_bad_row=skip, and on what is refused.
"""

import gzip
import json
import random
import re
from collections import Counter

import pytest

from gpt.data import json_rows, rows
from gpt.errors import UserError

N_FILES = 5_000  # of each shard
FORMATS = ("csv", "jsonl", "json")

WORDS = ["", "NA", "None", "n/a", "nan", "null", "-1", "1e5", "Croup", "naïve", "漢字", "\U0001f600", " ", "\t", ",",
         ";", '"', '""', "'", "\\", "\n", "\r\n", "\r", "\x1b[31m", "\x7f", "\x85", "\u2028", "\u202e", "\ufeff",
         "=1+1", "\\n", "[", "{", "}", "]", ":", "#", "\u00ad"]  # fmt: skip
SPECIAL = [b'"', b'""', b",", b"\n", b"\r\n", b"\r", b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80",
           b"\xc0\xaf", b"\xef\xbb\xbf", b"\xff\xfe", b" ", b"\t", b"\x0b", b"\xc2\xa0", b"{", b"}", b"[", b"]", b":",
           b"\\", b"\\u", b"\\ud800", b"\\ud83d\\ude00", b"\\u0000", b"NaN", b"-Infinity", b"1e999", b"0", b"-", b".",
           b"e", b"null", b"[]", b"{}", b'"a":1,', b',"a":{"a":1,"a":2}', b"x,", b",x", b'"x"', b"#"]  # fmt: skip
RARE = [b"[" * 5_000, b'{"a":' * 5_000, b"1" * 5_000, b"[" * 50 + b"]" * 50, b"x" * 200_000, b"0" * 400]


# ---- files of known rows


def word(rng: random.Random) -> str:
    return "".join(rng.choice(WORDS) for _ in range(rng.choice([1, 1, 2, 3, 6])))


def made(rng: random.Random, kind: str) -> tuple[bytes, list[dict]]:
    """A file and the rows in it."""
    names = rng.sample(["question", "answer", "source", "a", "é", " x ", "a b", "ß"], rng.randint(1, 4))
    if kind == "csv":
        rows = [{name: word(rng) for name in names} for _ in range(rng.randint(1, 5))]
        data = csv_bytes(rng, [names, *(list(row.values()) for row in rows)])
    else:
        rows = [{name: json_value(rng) for name in names[: rng.randint(0, 4)]} for _ in range(rng.randint(1, 5))]
        ascii_only = rng.random() < 0.5
        if kind == "jsonl":
            end = rng.choice(["\n", "\r\n", " \n", "\n\n"])
            lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
            data = (end.join(lines) + rng.choice(["", end])).encode()
        else:
            text = json.dumps(rows, ensure_ascii=ascii_only, indent=rng.choice([None, None, 0, 2]))
            data = (rng.choice(["", " \n\t\r"]) + text + rng.choice(["", "\n"])).encode()
    return (b"\xef\xbb\xbf" if rng.random() < 0.2 else b"") + data, rows


def csv_bytes(rng: random.Random, rows: list[list[str]]) -> bytes:
    end, share_quoted = rng.choice(["\n", "\r\n"]), rng.choice([0, 0.3, 1])
    lines = []
    for row in rows:
        cells = []
        for cell in row:
            is_quoted = rng.random() < share_quoted or row == [""] or any(c in cell for c in '",\r\n')
            cells.append('"' + cell.replace('"', '""') + '"' if is_quoted else cell)
        lines.append(",".join(cells) + end * rng.choice([1, 1, 1, 2]))
    text = "".join(lines)
    return (text if rng.random() < 0.7 else text.rstrip("\r\n") if not text.endswith('""' + end) else text).encode()


def json_value(rng: random.Random, depth: int = 0) -> object:
    choice = rng.random()
    if choice < 0.7 or depth > 2:
        return word(rng)
    if choice < 0.9:
        return rng.choice([None, True, False, 0, -7, 10**30, 0.1, -1.5e-7, 1e300])
    values = [json_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    return values if choice < 0.95 else {str(i): value for i, value in enumerate(values)}


# ---- damage


def damaged(rng: random.Random, data: bytes, kind: str) -> bytes:
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        data = rng.choice(DAMAGES)(rng, data, kind)
    return data


def flip(rng, data, kind):
    at = rng.randrange(len(data)) if data else 0
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if data else data


def insert(rng, data, kind):
    at = rng.randint(0, len(data))
    return data[:at] + rng.choice(SPECIAL if rng.random() < 0.98 else RARE) + data[at:]


def replace(rng, data, kind):
    at = rng.randint(0, len(data))
    return data[:at] + rng.choice(SPECIAL) + data[at + 1 :]


def delete(rng, data, kind):
    at = rng.randint(0, len(data))
    return data[:at] + data[at + rng.choice([1, 1, 2, 10]) :]


def truncate(rng, data, kind):
    return data[: rng.randint(0, len(data))]


def repeat(rng, data, kind):
    first, last = sorted(rng.randint(0, len(data)) for _ in range(2))
    return data[:last] + data[first:]


def splice(rng, data, kind):
    other, _ = made(rng, rng.choice(FORMATS) if rng.random() < 0.2 else kind)
    return data[: rng.randint(0, len(data))] + other[rng.randint(0, len(other)) :]


def join(rng, data, kind):
    return data + made(rng, kind)[0]


def shuffle_lines(rng, data, kind):
    lines = data.split(b"\n")
    rng.shuffle(lines)
    return b"\n".join(lines)


def encode_again(rng, data, kind):
    return data.decode(errors="replace").encode(rng.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-7"]))


def exchange(rng, data, kind):
    """One cell or value becomes another of the same file, or something that JSON can spell and nobody can use."""
    parts = list((CSV_PART if kind == "csv" else JSON_PART).finditer(data))
    if not parts:
        return data
    old, new = rng.choice(parts), rng.choice(parts)[0]
    new = rng.choice([new, new.upper(), b" " + new] if kind == "csv" else [new, new, *JSON_VALUES])
    return data[: old.start()] + new + data[old.end() :]


CSV_PART = re.compile(rb'[^,"\r\n]+')
JSON_PART = re.compile(rb'"[^"]*"|[-+.0-9a-zA-Z]+')
JSON_VALUES = [b"NaN", b"-Infinity", b"1e999", b"-0", b"1E-400", b'"\\ud800"', b'"\\u0000"', b'{"a":1,"a":1}',
               b"1" * 5_000, b"[" * 190 + b"]" * 190]  # fmt: skip
DAMAGES = [exchange, exchange, flip, flip, insert, insert, insert, replace, delete, truncate, repeat, splice, join,
           shuffle_lines, encode_again]  # fmt: skip


# ---- the second reader: (rows, lines left out), or None for a file that is refused

UTF8 = re.compile(
    rb"(?:[\x01-\x7f]|[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}"
    rb"|\xed[\x80-\x9f][\x80-\xbf]|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}"
    rb"|\xf4[\x80-\x8f][\x80-\xbf]{2})*"
)
Found = tuple[list[tuple[int, dict]], list[int]] | None


def expected(kind: str, data: bytes, policy: str) -> Found:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or 0 in data[:1] or (0 in data[:2] and data[:1] != b"\n"):
        return None  # UTF-16
    data = data.removeprefix(b"\xef\xbb\xbf")
    if kind == "csv":
        found = csv_file(data)
    else:
        found = json_array(data) if data.lstrip(b" \t\r\n").startswith(b"[") else json_objects(data)
    if found is None or not any(found) or (policy == "error" and found[1]):
        return None
    return found


def csv_file(data: bytes) -> Found:
    at, header, rows, bad = 0, None, [], []
    while at < len(data):
        line = 1 + data.count(b"\n", 0, at)
        line_end = data.find(b"\n", at) + 1 or len(data)
        if data[at:line_end] in (b"\n", b"\r\n"):
            at = line_end
            continue
        cells, row_end = csv_row(data, at)
        row = data[at:row_end]
        if cells is None and (header is None or data.count(b'"', at, line_end) % 2):
            return None
        at = line_end if cells is None else row_end
        if cells and not UTF8.fullmatch(row):
            if header is None:
                return None
            bad.append(line + row.count(b"\n", 0, row.find(b"\0") if b"\0" in row else UTF8.match(row).end()))
            continue
        cells = cells and [cell.decode() for cell in cells]
        if header is None:
            keys = [name.strip().casefold() for name in cells if name.strip()]
            if len(set(keys)) < len(keys):
                return None
            header = [name if name.strip() else f"column {i} without a name" for i, name in enumerate(cells, start=1)]
            n_named = max((i for i, name in enumerate(cells, start=1) if name.strip()), default=len(cells))
        elif cells is None or (
            len(cells) != len(header) and (len(cells) > len(header) or len(cells) < n_named or any(cells[n_named:]))
        ):
            bad.append(line)
        else:
            cells += [""] * (len(header) - len(cells))
            rows.append((line, dict(zip(header, cells, strict=True))))
    return rows, bad


def csv_row(data: bytes, at: int) -> tuple[list[bytes] | None, int]:
    """The cells of the row that starts at a byte, None if it is not as RFC 4180 says; and where the next one starts."""
    cells: list[bytes] = []
    cell, state = bytearray(), "start"
    while at < len(data):
        byte = data[at : at + 1]
        at += 1
        if state == "quoted":
            if byte == b'"':
                state = "quote"
            else:
                cell += byte
        elif byte == b"," or byte == b"\n" or data[at - 1 : at + 1] == b"\r\n":
            cells.append(bytes(cell))
            cell, state = bytearray(), "start"
            if byte != b",":
                at += byte == b"\r"
                break
        elif byte == b'"' and state != "plain":
            if state == "quote":
                cell += byte
            state = "quoted"
        elif byte in b'"\r' or state == "quote":
            return None, at
        else:
            cell += byte
            state = "plain"
    else:
        if state == "quoted":
            return None, at
        cells.append(bytes(cell))
    return cells, at


JSON_TOKEN = re.compile(
    r'[ \t\r\n]*(?:([{}\[\]:,])|(true|false|null)|(-?(?:0|[1-9][0-9]*))(\.[0-9]+)?([eE][+-]?[0-9]+)?'
    r'|"((?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*)"|(NaN|-?Infinity))'
)  # fmt: skip
JSON_ESCAPE = re.compile(r"\\(?:u(....)|(.))")
MAX_DEPTH = 200  # gpt/data/json_rows.py can go deeper: what lies between is not checked


class TooDeep(Exception):
    pass


class JsonParser:
    """Reads values of a text one after the other; raises ValueError at a syntax error. `is_bad` says of the value read
    last that it has a repeated key or a number beyond what Python holds."""

    def __init__(self, text: str, at: int = 0) -> None:
        self.text, self.at, self.is_bad = text, at, False

    def token(self) -> re.Match:
        match = JSON_TOKEN.match(self.text, self.at)
        if not match:
            raise ValueError
        self.at = match.end()
        return match

    def punctuation(self) -> str:
        mark = self.token()[1]
        if mark is None:
            raise ValueError
        return mark

    def peek(self) -> str:
        return self.text[self.at :].lstrip(" \t\r\n")[:1]

    def value(self, depth: int = 0) -> object:
        if depth > MAX_DEPTH:
            raise TooDeep
        match = self.token()
        mark, word, integer, fraction, exponent, string, constant = match.groups()
        if word:
            return {"true": True, "false": False, "null": None}[word]
        if constant:
            self.is_bad = True
            return None
        if string is not None:
            return unescaped(string)
        if integer:
            if not fraction and not exponent:
                self.is_bad |= len(integer.lstrip("-")) > 4300
                return int(integer) if not self.is_bad else None
            number = float(match[0])
            self.is_bad |= number in (float("inf"), float("-inf"))
            return number
        if mark == "[":
            items: list = []
            if self.peek() == "]":
                self.token()
                return items
            while True:
                items.append(self.value(depth + 1))
                if self.punctuation_of("]"):
                    return items
        if mark == "{":
            pairs: list = []
            if self.peek() == "}":
                self.token()
                return {}
            while True:
                key = self.token()[6]
                if key is None or self.punctuation() != ":":
                    raise ValueError
                pairs.append((unescaped(key), self.value(depth + 1)))
                if self.punctuation_of("}"):
                    self.is_bad |= len(dict(pairs)) < len(pairs)
                    return dict(pairs)
        raise ValueError

    def punctuation_of(self, closing: str) -> bool:
        """Whether a list ends here or, after a comma, goes on."""
        mark = self.punctuation()
        if mark not in (closing, ","):
            raise ValueError
        return mark == closing


def unescaped(string: str) -> str:
    short = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
    halves = JSON_ESCAPE.sub(lambda m: chr(int(m[1], 16)) if m[1] else short.get(m[2], m[2]), string)
    return halves.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def is_row(value: object) -> bool:
    texts = (
        [part for pair in value.items() for part in pair if isinstance(part, str)] if type(value) is dict else [None]
    )
    return all(text is not None and not re.search("[\0\ud800-\udfff]", text) for text in texts)


def json_objects(data: bytes) -> Found:
    """Objects one after the other, if the first one ends in another line than it begins in; else JSON Lines."""
    lines = data.lstrip(b" \t\r\n").split(b"\n", 1)
    if not lines[0].startswith(b"{"):
        return json_lines(data)
    for text in (lines[0], b"\n".join(lines)):
        parser = JsonParser(text.decode(errors="replace"))
        try:
            parser.value()
        except ValueError:
            continue
        if text is lines[0]:
            if not parser.peek():
                return json_lines(data)
        elif parser.at > len(lines[0].decode(errors="replace")):
            return json_sequence(data)
    return json_lines(data)


def json_sequence(data: bytes) -> Found:
    if not UTF8.fullmatch(data):
        return None
    text, rows, bad = data.decode(), [], []
    parser = JsonParser(text)
    try:
        while parser.peek():
            parser.is_bad = False
            start = len(text) - len(text[parser.at :].lstrip(" \t\r\n"))
            value = parser.value()
            where = bad if parser.is_bad or not is_row(value) else rows
            line = 1 + text.count("\n", 0, start)
            where.append(line if where is bad else (line, value))
    except ValueError:
        return None
    return rows, bad


def json_lines(data: bytes) -> Found:
    rows, bad = [], []
    for line, raw in enumerate(data.split(b"\n"), start=1):
        if not UTF8.fullmatch(raw):
            bad.append(line)
            continue
        parser = JsonParser(raw.decode().rstrip(" \t\r"))
        if not parser.text:
            continue
        try:
            value = parser.value()
            is_bad = parser.is_bad or parser.at < len(parser.text) or not is_row(value)
        except ValueError:
            is_bad = True
        except TooDeep:
            if max(raw.count(b"["), raw.count(b"{")) < 2_000:
                raise
            is_bad = True
        if is_bad:
            bad.append(line)
        else:
            rows.append((line, value))
    return rows, bad


def json_array(data: bytes) -> Found:
    if not UTF8.fullmatch(data):
        return None
    text = data.decode()
    rows, bad = [], []
    parser = JsonParser(text, text.index("[") + 1)
    try:
        while parser.peek() != "]" or rows or bad:
            parser.is_bad = False
            start = len(text) - len(text[parser.at :].lstrip(" \t\r\n"))
            line = 1 + text.count("\n", 0, start)
            value = parser.value()
            if parser.is_bad or not is_row(value):
                bad.append(line)
            else:
                rows.append((line, value))
            if parser.punctuation_of("]"):
                return (rows, bad) if not parser.peek() else None
    except ValueError:
        return None
    return None


# ---- the comparison

UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def found(path, policy: str) -> Found:
    """What gpt/data/rows.py makes of a file. Any exception but a UserError of one line fails the test."""
    bad = rows.BadRows(policy)
    try:
        good = [(row.line, row.values) for row in rows.read(path, bad)]
    except UserError as error:
        assert error.code in (2, 5) and not UNPRINTABLE.search(str(error)) and len(str(error)) < 1000, ascii(str(error))
        return None
    lines = [re.fullmatch(r"[^:]*:(\d+): (.+)", text) for text in bad.left_out]
    assert all(line and not UNPRINTABLE.search(line[2]) for line in lines), ascii(bad.left_out)
    return good, [int(line[1]) for line in lines]


def check_one(seed: int, folder, counts: Counter, wrong: list[str]) -> None:
    rng = random.Random(seed)
    kind = FORMATS[seed % 3]
    content, rows = made(rng, kind)
    is_damaged = rng.random() < 0.85
    if is_damaged:
        content = damaged(rng, content, kind)
    stored, is_packed, is_torn = content, rng.random() < 0.25, False
    if is_packed:
        stored = gzip.compress(content, mtime=0)
        is_torn = rng.random() < 0.5
        if is_torn:
            stored = rng.choice([flip, delete, truncate])(rng, stored, kind)
            is_packed = stored[:2] == b"\x1f\x8b"
            content = content if is_packed else stored
    path = folder / f"{seed}.{kind}{'.gz' if is_packed else ''}"
    path.write_bytes(stored)
    for policy in ("error", "skip"):
        try:
            wanted = expected(kind, content, policy)
        except TooDeep:
            counts["unchecked"] += 1
            return
        try:
            got = found(path, policy)
        except Exception as error:  # the very thing that must not happen
            wrong.append(f"seed {seed}, policy {policy}, {path.name}: {type(error).__name__}: {error!s:.500}")
            return
        # repr, because 1 is not True and not 1.0, and keys have an order. Of a torn archive only the content that was
        # packed may be accepted: the checksum at its end vouches for it.
        is_right = repr(got) == repr(wanted) or (got is None and is_packed and is_torn)
        if not is_damaged and not is_torn and policy == "error":
            is_right &= got is not None and repr([values for _, values in got[0]]) == repr(rows)
        if not is_right:
            wrong.append(f"seed {seed}, policy {policy}, {path.name}: {got!r:.500} and not {wanted!r:.500}")
        counts[kind, policy, "refused" if got is None else "accepted"] += 1
        if got:
            counts[kind, "rows"] += len(got[0])
            counts[kind, "left out"] += len(got[1])
    path.unlink()
    counts["damaged"] += is_damaged or is_torn


@pytest.mark.parametrize("shard", [0, *(pytest.param(shard, marks=pytest.mark.exhaustive) for shard in range(1, 41))])
def test_no_row_is_silently_changed_and_no_file_makes_a_traceback(shard, tmp_path, record_property, monkeypatch):
    counts: Counter = Counter()
    wrong: list[str] = []
    for seed in range(shard * N_FILES, (shard + 1) * N_FILES):
        monkeypatch.setattr(json_rows, "PIECE", [4, 40, 65_536][seed // 3 % 3])  # so that characters are cut too
        check_one(seed, tmp_path, counts, wrong)
    described = "; ".join(
        f"{kind} {counts[kind, 'error', 'accepted']} accepted, {counts[kind, 'error', 'refused']} refused, with skip "
        f"{counts[kind, 'skip', 'refused']} refused and {counts[kind, 'left out']} of "
        f"{counts[kind, 'rows'] + counts[kind, 'left out']} rows left out"
        for kind in FORMATS
    )
    record_property(
        "count",
        f"reader fuzz, {N_FILES:,} files, {counts['damaged']:,} damaged, {len(wrong)} read wrongly: {described}",
    )
    assert not wrong, "\n".join(wrong[:5])
    for kind in FORMATS:
        for outcome in ("accepted", "refused"):
            assert counts[kind, "error", outcome] > N_FILES / 20, (kind, outcome)
        assert counts[kind, "left out"] > N_FILES / 50 and counts[kind, "skip", "refused"] > N_FILES / 50, kind
    assert counts["damaged"] > 0.8 * N_FILES and counts["unchecked"] < N_FILES / 100
