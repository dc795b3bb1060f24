"""Safe loading of untrusted pickles as plain data: all opcodes are vetted before unpickling.

Restricting `find_class` is not enough. `pickle.Unpickler` allocates memory that a few bytes request
(a memo index of 100 million, a claimed length of 4 GB), and hashes nested tuples until the process
dies.
"""

import mmap
import pickle
import pickletools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mmsr1_jax.config.errors import UserError

MAX_BYTES = 1_000_000_000
_MAX_DEPTH = 64  # of nested containers, and of marks
_MAX_ITEMS = 3_000_000  # opcodes that allocate more memory than their size in the file
_MAX_INT = 2**63

# Opcodes, of all protocols, that encode plain data and instances with a state. Extension codes,
# persistent ids, INST and OBJ (old-style classes), sets and out-of-band buffers are not supported.
_ATOMS = frozenset(
    ("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT",
     "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "BINUNICODE8",
     "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "GLOBAL")
)  # fmt: skip
_EMPTY_CONTAINERS = frozenset(("EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE"))
_MARKED = frozenset(("LIST", "DICT", "TUPLE"))
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS = frozenset(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"))
_GETS = frozenset(("GET", "BINGET", "LONG_BINGET"))


class PickleError(UserError):
    """A pickle that is corrupt, or contains anything but plain data."""


def loads(
    data: bytes | mmap.mmap,
    find_class: Callable[[str, str], Any] | None = None,
    *,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Unpickle plain data. No code runs except the objects that `find_class` returns.

    Args:
      data: Pickled data.
      find_class: Function of a global's module and name that returns a harmless object to use
        instead. With None, globals are rejected.
      max_bytes: Maximum size of the pickle.

    Raises:
      PickleError: The pickle is larger than `max_bytes`, is corrupt, or contains an opcode that
        plain data does not need, an invalid length or memo index, containers or marks nested deeper
        than 64 levels, an integer of more than 64 bits, a key that is not a plain value, or more
        than 3 million containers.
    """
    if len(data) > max_bytes:
        raise PickleError(f"larger than {max_bytes} bytes")
    try:
        _vet(data)
        return _RestrictedUnpickler(data, find_class).load()
    except PickleError:
        raise
    except Exception as error:  # a corrupt pickle may raise anything
        raise PickleError(f"corrupt ({type(error).__name__}: {error})") from None


class _Reader:
    """File interface to bytes, without the copy that io.BytesIO makes of a slice."""

    def __init__(self, data: bytes | mmap.mmap):
        self._data, self._offset = data, 0

    def tell(self) -> int:
        return self._offset

    def read(self, count: int) -> bytes:
        start, self._offset = self._offset, min(len(self._data), self._offset + count)
        return self._data[start : self._offset]

    def readline(self) -> bytes:
        end = self._data.find(b"\n", self._offset)
        return self.read((end + 1 or len(self._data)) - self._offset)


class _RestrictedUnpickler(pickle.Unpickler):
    def __init__(self, data: bytes | mmap.mmap, find_class: Callable[[str, str], Any] | None):
        super().__init__(_Reader(data))
        self._find_class = find_class

    def find_class(self, module: str, name: str) -> Any:
        if self._find_class is None:
            raise PickleError(f"refers to {module}.{name}, which plain data does not need")
        return self._find_class(module, name)


def _vet(data: bytes | mmap.mmap) -> None:
    """Raise PickleError unless the opcodes build plain data of about the size of the pickle."""
    stack = _Stack()
    items = 0
    # genops rejects a claimed length that exceeds the remaining bytes, before unpickling starts.
    for count, (opcode, argument, offset) in enumerate(_operations(data)):
        name = opcode.name
        if name in _ATOMS:
            if type(argument) is int and not -_MAX_INT <= argument < _MAX_INT:
                raise PickleError(f"an integer of more than 64 bits at byte {offset}")
            stack.push(0)
        elif name in _PUTS:
            # Picklers number memoised objects, each of which takes at least one opcode.
            index = len(stack.memo) if argument is None else argument
            if not 0 <= index <= count:
                raise PickleError(f"memo index {index} at byte {offset}")
            stack.memo[index] = stack.top()
        elif name in _GETS:
            if argument not in stack.memo:
                raise PickleError(f"memo index {argument} at byte {offset}, which is not set")
            stack.push(stack.memo[argument])
        elif name == "STOP":
            stack.check_end()
            return
        elif name == "FRAME":
            if argument > len(data) - offset:
                raise PickleError(f"a frame of {argument} bytes at byte {offset}")
        elif name != "PROTO":
            items += 1
            if items > _MAX_ITEMS:
                raise PickleError(f"more than {_MAX_ITEMS} containers")
            if not stack.build(name):
                raise PickleError(f"opcode {name} at byte {offset}, which plain data does not need")
    raise PickleError("truncated: no STOP")


def _operations(data: bytes | mmap.mmap) -> Iterator[tuple[Any, Any, Any]]:
    """Yield (opcode, argument, offset) for each operation of a pickle."""
    reader: Any = _Reader(data)
    yield from pickletools.genops(reader)


class _Stack:
    """Abstract stack of the unpickler, which holds only the nesting depth of each value."""

    def __init__(self):
        self.memo: dict[int, int] = {}
        self._depths: list[int] = []
        self._marks: list[int] = []

    def push(self, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise PickleError(f"nested deeper than {_MAX_DEPTH} levels")
        self._depths.append(depth)

    def top(self) -> int:
        self._require(1)
        return self._depths[-1]

    def check_end(self) -> None:
        if len(self._depths) != 1 or self._marks:
            raise PickleError("corrupt: more than one value at its end")

    def build(self, name: str) -> bool:
        """Apply an opcode that creates or fills a container. Return False for any other opcode."""
        if name == "MARK":
            if len(self._marks) >= _MAX_DEPTH:
                raise PickleError(f"nested deeper than {_MAX_DEPTH} levels")
            self._marks.append(len(self._depths))
        elif name in _EMPTY_CONTAINERS:
            self.push(1)
        elif name in _MARKED:
            items = self._pop_to_mark()
            self._check_keys(items if name == "DICT" else ())
            self.push(1 + max(items, default=0))
        elif name in _TUPLES:
            self.push(1 + max(self._pop(_TUPLES[name])))
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
            single = {"APPEND": 1, "SETITEM": 2}.get(name)
            items = self._pop_to_mark() if single is None else self._pop(single)
            self._check_keys(items if name.startswith("SETITEM") else ())
            self._fill(items)
        elif name == "STACK_GLOBAL":
            self._pop(2)
            self.push(0)
        elif name in ("REDUCE", "NEWOBJ"):
            self.push(1 + max(self._pop(2)))
        elif name == "BUILD":
            self._fill(self._pop(1))
        else:
            return False
        return True

    def _fill(self, items: list[int]) -> None:
        depth = max([self.top(), *(1 + item for item in items)])
        self._depths.pop()
        self.push(depth)

    def _check_keys(self, items: Sequence[int]) -> None:
        if len(items) % 2 or any(items[::2]):
            raise PickleError("a key that is not a plain value")

    def _pop(self, count: int) -> list[int]:
        self._require(count)
        items = self._depths[-count:]
        del self._depths[-count:]
        return items

    def _pop_to_mark(self) -> list[int]:
        if not self._marks:
            raise PickleError("corrupt: no mark")
        start = self._marks.pop()
        items = self._depths[start:]
        del self._depths[start:]
        return items

    def _require(self, count: int) -> None:
        if len(self._depths) - (self._marks[-1] if self._marks else 0) < count:
            raise PickleError("corrupt: the stack is empty")
