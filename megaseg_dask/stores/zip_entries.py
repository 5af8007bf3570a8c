"""What the directory of a zip says of its entries, before any of them is read."""

import re
import stat
import zipfile

MAX_RATIO = 100
RATIO_FROM_BYTES = 100 * 2**20  # below this a high ratio does no harm


def danger_of(entry: zipfile.ZipInfo) -> str:
    """Return why an entry is not safe, as the end of a sentence; empty if it is."""
    parts = entry.filename.removesuffix("/").split("/")
    # The name as stored: the module cuts it at a null character.
    if not {"", ".", ".."}.isdisjoint(parts) or re.search(r"[\\:\0]", entry.orig_filename):
        return "points outside its folder"
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is neither a file nor a folder"
    if entry.flag_bits & 1:
        return "is encrypted"
    if entry.file_size > max(RATIO_FROM_BYTES, MAX_RATIO * entry.compress_size):
        return f"grows from {entry.compress_size} to {entry.file_size} bytes"
    return ""
