"""Inspection of untrusted files before they are read: archives, YAML and pickles made to do harm.

A foreign file is first looked through, without building anything that it describes: sizes, names,
nesting, and what it would import. The limits are far above every real bundle (a light one has 5 MB,
MegaSeg_v1 191 MB, a train_config.yaml 20 kB).
"""

import io
import pickletools
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePosixPath
from reprlib import Repr
from typing import IO, TYPE_CHECKING, TypeAlias

from megaseg_dask.errors import BundleError
from megaseg_dask.messages import one_line
from megaseg_dask.stores.zip_entries import MAX_RATIO, RATIO_FROM_BYTES, danger_of

if TYPE_CHECKING:
    import yaml

# Of a checkpoint, and of all that a zip holds: twenty times the largest published one.
MAX_BYTES = 4 * 2**30
MAX_ENTRIES = 10_000
MAX_YAML_BYTES = 2**18
MAX_YAML_VALUES = 50_000  # with every alias written out
MAX_YAML_DEPTH = 64
MAX_YAML_TEXT = 10_000  # characters of one value: reading a number takes their square
MAX_OPCODES = 1_000_000  # a checkpoint with Adam's state has some 30,000
MAX_TUPLE = 1000  # values in a tuple and the tuples within: hashing one takes as long

# All that a checkpoint of numbers imports: tensors, their storages and types, plain containers.
_GLOBALS = re.compile(
    r"collections (OrderedDict|Counter)|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
    r"|torch (?!Untyped|Typed)\w+Storage|torch (Size|device|bool|(b?float|u?int|complex)\d+)"
    r"|_codecs encode|(__builtin__|builtins) set"
)


class Unsafe(ValueError):
    """What makes a file unsafe, as the end of a sentence that begins with its name."""


class _Short(Repr):
    """Prints a foreign value in part: a short file can describe one without end."""

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to print numbers of more than 4300 digits.
        return repr(value) if value.bit_length() < 200 else "<a number without end>"

    def repr_instance(self, value: object, level: int) -> str:
        is_plain = isinstance(value, bool | float | None)
        return repr(value) if is_plain else f"<{type(value).__name__}>"


_SHORT = _Short()
_SHORT.maxstring = 100
_SHORT.maxlevel = 2
short = _SHORT.repr


# -- zip


@contextmanager
def open_zip(file: Path | io.BytesIO) -> Iterator[zipfile.ZipFile]:
    """Open a zip whose every entry was checked; none is unpacked to disk.

    Raises:
        BundleError: An entry is not safe; the message has its name and the reason.
        BadZipFile: It is no zip, or not a whole one.
    """
    try:
        archive = zipfile.ZipFile(file)
    except (NotImplementedError, ValueError) as error:
        raise zipfile.BadZipFile(str(error)) from error
    with archive:
        try:
            _require_safe_zip(archive)
        except Unsafe as error:
            raise BundleError(
                f"{error}; this zip is not safe and was not read, fetch it from its maker"
            ) from None
        yield archive


def _require_safe_zip(archive: zipfile.ZipFile) -> None:
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise Unsafe(f"the zip has {len(entries)} entries; at most {MAX_ENTRIES} are read")
    names: set[str] = set()
    for entry in entries:
        if danger := danger_of(entry):
            raise Unsafe(f"zip entry {short(entry.filename)} {danger}")
        # Also names that only some file systems tell apart.
        if entry.filename.casefold() in names:
            raise Unsafe(f"zip entry {short(entry.filename)} is there twice")
        names.add(entry.filename.casefold())
    packed_bytes = sum(entry.compress_size for entry in entries)
    total_bytes = sum(entry.file_size for entry in entries)
    if total_bytes > MAX_BYTES:
        raise Unsafe(f"the zip unpacks to {total_bytes} bytes; at most {MAX_BYTES} are read")
    if packed_bytes > archive.start_dir:
        raise Unsafe(f"the entries of the zip overlap: {packed_bytes} bytes in {archive.start_dir}")
    if total_bytes > max(RATIO_FROM_BYTES, MAX_RATIO * packed_bytes):
        raise Unsafe(f"the zip grows from {packed_bytes} to {total_bytes} bytes")


# -- YAML


def parse_yaml(data: bytes) -> object:
    """Return what a YAML file says, in plain values.

    Raises:
        Unsafe: It would become much larger than it is.
        Exception: Whatever PyYAML raises for what is no YAML.
    """
    import yaml

    loader = yaml.SafeLoader(data)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {}, 0)
        return loader.construct_document(node)
    except RecursionError:
        raise Unsafe(f"is nested more than {MAX_YAML_DEPTH} deep") from None
    finally:
        loader.dispose()


def _count_values(node: "yaml.Node", counts: dict[int, int], depth: int) -> int:
    """Return the number of values of a node when every alias in it is written out."""
    if id(node) in counts:
        if not counts[id(node)]:
            raise Unsafe("contains itself, by an alias")
        return counts[id(node)]
    if depth > MAX_YAML_DEPTH:
        raise Unsafe(f"is nested more than {MAX_YAML_DEPTH} deep")
    counts[id(node)] = 0
    n_values = 1 + sum(_count_values(child, counts, depth + 1) for child in _children(node))
    if n_values > MAX_YAML_VALUES:
        raise Unsafe(f"unfolds to more than {MAX_YAML_VALUES} values")
    counts[id(node)] = n_values
    return n_values


def _children(node: "yaml.Node") -> "list[yaml.Node]":
    import yaml

    if isinstance(node, yaml.ScalarNode):
        n_characters = len(node.value)
        if n_characters > MAX_YAML_TEXT:
            raise Unsafe(
                f"has a value of {n_characters} characters; at most {MAX_YAML_TEXT} are read"
            )
        return []
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    assert isinstance(node, yaml.MappingNode)
    keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
    for key, n in keys.items():
        if n > 1:
            raise Unsafe(f"says {one_line(key)} twice")
    children: list[yaml.Node] = []
    for key, value in node.value:
        children += (key, value)
    return children


# -- checkpoints


def require_safe_checkpoint(stream: io.BytesIO) -> None:
    """Look through a checkpoint in either of torch's formats; leaves the stream at its begin.

    Raises:
        Unsafe: It would import or allocate more than tensors of the file's size.
        BundleError: The zip that it is in is not safe.
        Exception: Whatever fails on bytes that are no checkpoint.
    """
    n_bytes = len(stream.getvalue())
    pickles: list[IO[bytes]] = [stream]
    # By its first bytes, as torch decides.
    if stream.getvalue().startswith(b"PK\3\4"):
        with open_zip(stream) as archive:
            n_bytes = sum(entry.file_size for entry in archive.infolist())
            (name,) = (
                name for name in archive.namelist() if PurePosixPath(name).match("*/data.pkl")
            )
            pickles = [io.BytesIO(archive.read(name))]
    else:
        # Magic number, version, byte order, content, keys of the storages, one after the other.
        pickles *= 5
    n_values: dict[str, int] = {}
    for pickle in pickles:
        _Inspection(n_values).run(pickle)
    if sum(n_values.values()) > n_bytes:
        raise Unsafe(f"claims tensors of {sum(n_values.values())} values in {n_bytes} bytes")
    stream.seek(0)


def text_in_checkpoint(data: bytes, key: str) -> str | None:
    """Return the text that a checkpoint in torch's zip format holds under a key, loading nothing.

    None if it has none, or is no such checkpoint.
    """
    try:
        with open_zip(io.BytesIO(data)) as archive:
            names = [name for name in archive.namelist() if PurePosixPath(name).match("*/data.pkl")]
            pickled = archive.read(names[0]) if names else b""
        texts = (text for _, text, _ in pickletools.genops(pickled) if isinstance(text, str))
        for text in islice(texts, MAX_OPCODES):
            if text == key:
                return next(texts, None)
    # What is wrong with the file is told when it is loaded.
    except (BundleError, ValueError, zipfile.BadZipFile, zlib.error):
        pass
    return None


_Item: TypeAlias = tuple[object, int]  # a value on the pickle's stack, and how many values it holds
_MARK: _Item = (pickletools.markobject, 0)


class _Inspection:
    """A walk through one pickle that runs nothing of it.

    Adds to ``n_values`` the number of values that it claims for each tensor's storage.
    """

    def __init__(self, n_values: dict[str, int]) -> None:
        self._n_values = n_values
        self._stack: list[_Item] = []
        self._memo: dict[object, _Item] = {}

    def run(self, stream: IO[bytes]) -> None:
        """Walk to the end of the pickle.

        Raises:
            Unsafe: It imports more than `_GLOBALS`, was pickled in another way than torch's, or
                has tuples that would take for ever to hash.
        """
        for n, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if n > MAX_OPCODES:
                raise Unsafe(f"is a pickle of more than {MAX_OPCODES} operations")
            self._step(opcode, argument)

    def _step(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        match opcode.name:
            case "GLOBAL" | "INST" if not _GLOBALS.fullmatch(str(argument)):
                imported = one_line(str(argument).replace(" ", "."))
                raise Unsafe(f"pickles {imported}, neither a plain tensor nor a plain value")
            case "PROTO" if argument != 2:
                raise Unsafe(
                    f"is pickled with protocol {argument}; torch.save writes 2, and only that is "
                    "loaded"
                )
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._stack[-1]
            case "BINGET" | "LONG_BINGET":
                self._stack.append(self._memo[argument])
            case "MARK":
                self._stack.append(_MARK)
            case _:
                operands = self._pop(opcode)
                if opcode.name == "BINPERSID":
                    self._add_storage(operands[0][0])
                if opcode.stack_after:
                    self._stack.append(_result(opcode, argument, operands))

    def _pop(self, opcode: pickletools.OpcodeInfo) -> list[_Item]:
        """Return what an operation takes from the stack, in order."""
        before = opcode.stack_before
        stack = self._stack
        if pickletools.markobject in before:
            mark = len(stack) - 1
            while mark >= 0 and stack[mark] is not _MARK:
                mark -= 1
            if mark < 0:
                raise ValueError("no mark on the pickle's stack")
            start = mark - before.index(pickletools.markobject)
            del stack[mark]
        else:
            start = len(stack) - len(before)
        if start < 0:
            raise ValueError("pickle stack underflow")
        operands = stack[start:]
        del stack[start:]
        return operands

    def _add_storage(self, identity: object) -> None:
        """Note the name under which torch stores a tensor's data, and its number of values."""
        if isinstance(identity, tuple) and len(identity) >= 5:
            key = identity[2]
            n_values = identity[4]
            if isinstance(key, str) and isinstance(n_values, int) and n_values >= 0:
                self._n_values[key] = max(n_values, self._n_values.get(key, 0))
                return
        raise Unsafe("names a tensor's storage in a way that torch.save never does")


def _result(opcode: pickletools.OpcodeInfo, argument: object, operands: list[_Item]) -> _Item:
    """Return what an operation puts on the stack."""
    size = 1 + sum(size for _, size in operands)
    if opcode.name.endswith(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")):
        if size > MAX_TUPLE:
            raise Unsafe(f"pickles a tuple that unfolds to more than {MAX_TUPLE} values")
        return tuple(value for value, _ in operands), size
    value = None if operands else argument
    # What a call returns may be as long to hash as its arguments; containers cannot be hashed.
    is_call = opcode.name in ("REDUCE", "NEWOBJ", "BUILD")
    return value, size if is_call else 1
