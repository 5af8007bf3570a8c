"""What is refused before it is read: archives, YAML and pickles that were made to do harm.

A foreign file is first looked through, without building anything that it
describes: sizes, names, nesting, and what it would import. The limits are far
above every real bundle (a light one has 5 MB, MegaSeg_v1 191 MB, a
train_config.yaml 20 kB).
"""

import io
import pickletools
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import Repr
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from megaseg_dask.errors import BundleError
from megaseg_dask.messages import one_line

if TYPE_CHECKING:
    import yaml

MAX_BYTES = (
    4 * 2**30
)  # of a checkpoint, and of all that a zip holds: twenty times the largest published one
MAX_ENTRIES = 10_000
MAX_RATIO = 100  # trained weights hardly compress
RATIO_FROM_BYTES = 100 * 2**20  # below this a high ratio does no harm
MAX_YAML_BYTES = 2**18
MAX_YAML_VALUES = 50_000  # with every alias written out
MAX_YAML_DEPTH = 64
MAX_YAML_TEXT = 10_000  # characters of one value: reading a number takes their square
MAX_OPCODES = 1_000_000  # a checkpoint with Adam's state has some 30,000
MAX_TUPLE = 1000  # values in a tuple and the tuples within: hashing one takes as long

# All that a checkpoint of numbers needs to import: tensors, their storages and types, plain containers.
_GLOBALS = re.compile(
    r"collections (OrderedDict|Counter)|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
    r"|torch (?!Untyped|Typed)\w+Storage|torch (Size|device|bool|(b?float|u?int|complex)\d+)"
    r"|_codecs encode|(__builtin__|builtins) set"
)
_Item: TypeAlias = tuple[object, int]  # a value on the pickle's stack, and how many values it holds
_MARK: _Item = (pickletools.markobject, 0)


class Unsafe(ValueError):
    """What makes a file unsafe, as the end of a sentence that begins with its name."""


class _Short(Repr):
    """Prints a foreign value in part: a short file can describe one without end."""

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to print numbers of more than 4300 digits.
        return repr(value) if value.bit_length() < 200 else "<a number without end>"

    def repr_instance(self, value: object, level: int) -> str:
        plain = isinstance(value, bool | float | None)
        return repr(value) if plain else f"<{type(value).__name__}>"


_SHORT = _Short()
_SHORT.maxstring, _SHORT.maxlevel = 100, 2
short = _SHORT.repr


# --- zip


@contextmanager
def open_zip(file: Path | io.BytesIO) -> Iterator[zipfile.ZipFile]:
    """A zip whose every entry was checked; none is unpacked to disk.

    Raises BundleError with the entry and the reason, and BadZipFile for what is no whole zip.
    """
    try:
        archive = zipfile.ZipFile(file)
    except (NotImplementedError, ValueError) as error:
        raise zipfile.BadZipFile(str(error)) from error
    with archive:
        try:
            _require_safe(archive)
        except Unsafe as error:
            raise BundleError(
                f"{error}; this zip is not safe and was not read, fetch it from its maker"
            ) from None
        yield archive


def _require_safe(archive: zipfile.ZipFile) -> None:
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise Unsafe(f"the zip has {len(entries)} entries; at most {MAX_ENTRIES} are read")
    names: set[str] = set()
    for entry in entries:
        if danger := _danger(entry):
            raise Unsafe(f"zip entry {short(entry.filename)} {danger}")
        # Also names that only some file systems tell apart: whoever unpacks it would get one or the other.
        if entry.filename.casefold() in names:
            raise Unsafe(f"zip entry {short(entry.filename)} is there twice")
        names.add(entry.filename.casefold())
    packed, total = (
        sum(getattr(e, size) for e in entries) for size in ("compress_size", "file_size")
    )
    if total > MAX_BYTES:
        raise Unsafe(f"the zip unpacks to {total} bytes; at most {MAX_BYTES} are read")
    if packed > archive.start_dir:
        raise Unsafe(f"the entries of the zip overlap: {packed} bytes in {archive.start_dir}")
    if total > max(RATIO_FROM_BYTES, MAX_RATIO * packed):
        raise Unsafe(f"the zip grows from {packed} to {total} bytes")


def _danger(entry: zipfile.ZipInfo) -> str:
    parts = entry.filename.removesuffix("/").split("/")
    # The name as stored: the module cuts it at a null character.
    if not {"", ".", ".."}.isdisjoint(parts) or re.search(r"[\\:\0]", entry.orig_filename):
        return "points outside its folder"
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind == stat.S_IFLNK:
        return "is a link"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is neither a file nor a folder"
    if entry.flag_bits & 1:
        return "is encrypted"
    if entry.file_size > max(RATIO_FROM_BYTES, MAX_RATIO * entry.compress_size):
        return f"grows from {entry.compress_size} to {entry.file_size} bytes"
    return ""


# --- YAML


def parse_yaml(data: bytes) -> Any:
    """What a YAML file says, in plain values; raises Unsafe for bombs, and whatever PyYAML raises for the rest."""
    import yaml

    loader = yaml.SafeLoader(data)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _unfolded(node, {}, 0)
        return loader.construct_document(node)
    except RecursionError:
        raise Unsafe(f"is nested more than {MAX_YAML_DEPTH} deep") from None
    finally:
        loader.dispose()


def _unfolded(node: "yaml.Node", seen: dict[int, int], depth: int) -> int:
    """How many values a node is when every alias in it is written out."""
    if id(node) in seen:
        if not seen[id(node)]:
            raise Unsafe("contains itself, by an alias")
        return seen[id(node)]
    if depth > MAX_YAML_DEPTH:
        raise Unsafe(f"is nested more than {MAX_YAML_DEPTH} deep")
    seen[id(node)] = 0
    seen[id(node)] = size = 1 + sum(_unfolded(child, seen, depth + 1) for child in _children(node))
    if size > MAX_YAML_VALUES:
        raise Unsafe(f"unfolds to more than {MAX_YAML_VALUES} values")
    return size


def _children(node: "yaml.Node") -> "list[yaml.Node]":
    import yaml

    if isinstance(node, yaml.ScalarNode):
        if len(node.value) > MAX_YAML_TEXT:
            raise Unsafe(
                f"has a value of {len(node.value)} characters; at most {MAX_YAML_TEXT} are read"
            )
        return []
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    assert isinstance(node, yaml.MappingNode)
    keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
    if twice := [key for key, n in keys.items() if n > 1]:
        raise Unsafe(f"says {one_line(twice[0])} twice")
    return [part for pair in node.value for part in pair]


# --- pickles


def inspect_pickle(stream: IO[bytes], declared: dict[str, int]) -> None:
    """Walk through one pickle without running it.

    Adds to ``declared`` the number of values that it claims for each tensor's
    storage. Raises Unsafe for imports beyond `_GLOBALS`, for other ways of pickling
    than torch's, and for tuples that would take for ever to hash.
    """
    stack: list[_Item] = []
    memo: dict[int, _Item] = {}
    for n, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if n > MAX_OPCODES:
            raise Unsafe(f"is a pickle of more than {MAX_OPCODES} operations")
        name = opcode.name
        if name in ("GLOBAL", "INST") and not _GLOBALS.fullmatch(str(argument)):
            imported = one_line(str(argument).replace(" ", "."))
            raise Unsafe(f"pickles {imported}, neither a plain tensor nor a plain value")
        if name == "PROTO" and argument != 2:
            raise Unsafe(
                f"is pickled with protocol {argument}; torch.save writes 2, and only that is loaded"
            )
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[int(argument or 0)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
        else:
            operands = _popped(stack, opcode)
            if name == "BINPERSID":
                key, n_values = _storage(operands[0][0])
                declared[key] = max(n_values, declared.get(key, 0))
            if opcode.stack_after:
                stack.append(_result(opcode, argument, operands))


def _popped(stack: list[_Item], opcode: pickletools.OpcodeInfo) -> list[_Item]:
    """What an operation takes from the stack, in order."""
    before = opcode.stack_before
    if pickletools.markobject not in before:
        start = len(stack) - len(before)
        if start < 0:
            raise ValueError("pickle stack underflow")
    else:
        mark = next((i for i in reversed(range(len(stack))) if stack[i] is _MARK), -1)
        if mark < 0:
            raise ValueError("no mark on the pickle's stack")
        start = mark - before.index(pickletools.markobject)
        del stack[mark]
    operands = stack[start:]
    del stack[start:]
    return operands


def _result(opcode: pickletools.OpcodeInfo, argument: object, operands: list[_Item]) -> _Item:
    if opcode.name == "MARK":
        return _MARK
    size = 1 + sum(size for _, size in operands)
    if opcode.name.endswith(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")):
        if size > MAX_TUPLE:
            raise Unsafe(f"pickles a tuple that unfolds to more than {MAX_TUPLE} values")
        return tuple(value for value, _ in operands), size
    # What a call returns may be as long to hash as its arguments; containers cannot be hashed.
    called = opcode.name in ("REDUCE", "NEWOBJ", "BUILD")
    return (argument if not operands else None), (size if called else 1)


def _storage(identity: object) -> tuple[str, int]:
    """Key and number of values in the name under which torch stores a tensor's data."""
    if isinstance(identity, tuple) and len(identity) >= 5:
        key, n_values = identity[2], identity[4]
        if isinstance(key, str) and isinstance(n_values, int) and n_values >= 0:
            return key, n_values
    raise Unsafe("names a tensor's storage in a way that torch.save never does")
