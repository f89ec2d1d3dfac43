"""Names the formats of files that are not read, and what to do with them."""

from pathlib import Path

from gpt.errors import UserError
from gpt.terminal.console import escape

UNPACK = "unpack it and give the file in it"
SAVE_AS_CSV = "save it as CSV (UTF-8) in the program that made it"
SAVE_AS_TEXT = "save it as plain text (UTF-8)"
DOWNLOAD = "download the file itself, not the page that shows it"
CONVERT = "convert it to Parquet, JSON Lines or CSV"
OFFICE = ("a file of Microsoft Office", "save it as CSV or plain text (UTF-8)")
OFFICE_PARTS = (b"[Content_Types].xml", b"_rels/", b"docProps/", b"xl/", b"word/")  # the first name in such an archive
# What a file begins with -> what it is, and what to do. Text never begins so.
SIGNATURES = {
    b"PAR1": ("a Parquet file", "give it a name that ends in .parquet"),
    b"PK\x03\x04": ("a zip archive", UNPACK),
    b"PK\x05\x06": ("an empty zip archive", UNPACK),
    b"\xd0\xcf\x11\xe0": OFFICE,
    b"7z\xbc\xaf": ("a 7z archive", UNPACK),
    b"Rar!": ("a rar archive", UNPACK),
    b"BZh": ("compressed with bzip2", "decompress it with bunzip2, or compress it with gzip"),
    b"\xfd7zXZ": ("compressed with xz", "decompress it with unxz, or compress it with gzip"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "decompress it with unzstd, or compress it with gzip"),
    b"\x04\x22\x4d\x18": ("compressed with lz4", "decompress it with unlz4, or compress it with gzip"),
    b"ARROW1": ("an Arrow (Feather) file", CONVERT),
    b"FEA1": ("a Feather file", CONVERT),
    b"\xff\xff\xff\xff": ("an Arrow stream, as datasets saves", CONVERT),
    b"SQLite format 3\0": ("an SQLite database", CONVERT),
    b"\x89HDF": ("an HDF5 file", CONVERT),
    b"\x93NUMPY": ("a NumPy array", CONVERT),
    b"Obj\x01": ("an Avro file", CONVERT),
    b"ORC": ("an ORC file", CONVERT),
    **dict.fromkeys([b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"], ("a pickle, which is never opened", CONVERT)),
    b"%PDF-": ("a PDF document", SAVE_AS_TEXT),
    b"{\\rtf": ("a document in rich text", SAVE_AS_TEXT),
    **dict.fromkeys([b"<!doctype html", b"<html"], ("a web page", DOWNLOAD)),
    b"version https://git-lfs": ("a pointer of Git LFS, not the file itself", "get the file with git lfs pull"),
}
# What the names of zip archives end in, where that says more, and those of text that has no rows.
NAMES = {
    **dict.fromkeys([".xlsx", ".xlsm", ".xls", ".ods"], ("a spreadsheet", SAVE_AS_CSV)),
    **dict.fromkeys([".docx", ".odt", ".epub"], ("a document, not plain text", SAVE_AS_TEXT)),
    ".npz": ("an archive of NumPy arrays", CONVERT),
}
NOT_ROWS = {
    **{suffix: (f"{name}, which is not read", CONVERT) for suffix, name in
       {".xml": "XML", ".yaml": "YAML", ".yml": "YAML", ".toml": "TOML", ".html": "HTML", ".htm": "HTML"}.items()},
    **NAMES,
}  # fmt: skip
N_BYTES = 262  # of the beginning of a file in which a signature stands, white space before it included
TAR = slice(257, 262), b"ustar"


def refuse(path: Path, start: bytes) -> None:
    """Raises UserError for a file whose first bytes are those of a format that is not text."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    found = OFFICE if start.startswith(b"PK") and start[30:].startswith(OFFICE_PARTS) else None
    for signature, format in SIGNATURES.items():
        if start.startswith(signature) or text.startswith(signature) or text.lower().startswith(signature):
            found = found or format
            if signature.startswith((b"PK", b"\xd0")):
                found = NAMES.get(path.suffix.lower(), found)
    if start[TAR[0]] == TAR[1]:
        found = ("a tar archive", UNPACK)
    if found:
        what, remedy = found
        raise UserError(f"{escape(str(path))} is {what}", remedy=remedy)


def refuse_name(path: Path) -> None:
    """Raises UserError for a file of rows whose name says that it is of a format that is not read."""
    if path.suffix.lower() in NOT_ROWS:
        what, remedy = NOT_ROWS[path.suffix.lower()]
        raise UserError(f"{escape(str(path))} is {what}", remedy=remedy)
