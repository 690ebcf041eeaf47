"""Parse PTX text to kernels: instructions with resolved operands, parameters, and declared memory.

This module knows the syntax only. `instructions` has the meaning of each opcode. So a program with an unknown opcode
can be parsed; it fails when it is loaded, with the line in the message.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import EmulatorError
from .literals import TYPE_BYTES as TYPE_BYTES
from .literals import initial_bytes, number, split

VECTOR_LENGTHS = {"v2": 2, "v4": 4, "v8": 8}


@dataclass(frozen=True)
class Register:
    index: int
    bytes: int
    negated: bool = False


@dataclass(frozen=True)
class Special:
    """A read-only register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """An integer constant, the bits of a 0f / 0d constant, or a decimal fraction."""

    value: int | float


@dataclass(frozen=True)
class Symbol:
    """The name of a variable, a label or a kernel parameter."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Any  # Register, Symbol or Immediate
    offset: int


@dataclass(frozen=True)
class Vector:
    """A vector operand {a, b, ...}, or two destinations a|b."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Sink:
    """The destination `_`, which discards the value."""


Operand = Any
"""One of these classes. A builder refuses an instruction whose operand is of another kind than it expects."""


@dataclass(frozen=True)
class Instruction:
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    line: int
    text: str

    @property
    def type(self) -> str:
        """The type of the operation: the last modifier that is a type."""
        for modifier in reversed(self.modifiers):
            if modifier in TYPE_BYTES:
                return modifier
        raise EmulatorError("syntax", f"no type in PTX line {self.line}: {self.text}")

    @property
    def vector_length(self) -> int:
        return next((VECTOR_LENGTHS[m] for m in self.modifiers if m in VECTOR_LENGTHS), 1)

    def where(self) -> str:
        return f"PTX line {self.line}: {self.text}"


@dataclass(frozen=True)
class Parameter:
    name: str
    offset: int
    bytes: int
    type: str


@dataclass(frozen=True)
class Variable:
    """A variable in shared, local, global or const memory, at the byte `offset` within its space."""

    name: str
    offset: int
    bytes: int
    align: int
    initial: Any = b""


@dataclass
class Kernel:
    """A kernel of a PTX module, which can be launched."""

    name: str
    target: str
    parameters: list[Parameter] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branch_targets: dict[str, list[str]] = field(default_factory=dict)
    register_bytes: list[int] = field(default_factory=list)
    shared: dict[str, Variable] = field(default_factory=dict)
    local: dict[str, Variable] = field(default_factory=dict)
    data: dict[str, Variable] = field(default_factory=dict)
    shared_bytes: int = 0
    local_bytes: int = 0
    data_bytes: int = 0
    threads_required: tuple[int, ...] = ()
    threads_limit: tuple[int, ...] = ()
    cluster: int = 1
    # Set when the kernel is first launched: the functions that execute the instructions, and, by state space, the bytes
    # of the units that the race detector tracks.
    program: list[Any] | None = None
    granules: dict[str, int] = field(default_factory=dict)

    @property
    def arch(self) -> int:
        return int(re.sub(r"\D", "", self.target) or 0)


_BRACE = re.compile(r"[{}]")
_ENTRY = re.compile(r"(?:\.visible\s+|\.weak\s+)?\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{]*)\{")


def parse(ptx: str, name: str | None = None) -> Kernel:
    """Parse one kernel of a PTX module: the one called `name`, or the only one."""
    text = _without_comments(ptx)
    entries = list(_ENTRY.finditer(text))
    chosen = [entry for entry in entries if name is None or entry[1] == name]
    if len(chosen) != 1:
        found = ", ".join(entry[1] for entry in entries) or "none"
        raise EmulatorError("syntax", f"expected one kernel {name or ''}, the module has: {found}")
    entry = chosen[0]
    target = re.search(r"\.target\s+(\w+)", text)
    kernel = Kernel(entry[1], target[1] if target else "")
    kernel.parameters = _parameters(entry[2] or "")
    _launch_bounds(kernel, entry[3])
    body = text[entry.end() : _closing_brace(text, entry.end())]
    outside = _outside_functions(text)
    _Body(kernel, text, entry.end(), body, outside).parse()
    return kernel


def separate(ptx: str) -> dict[str, str]:
    """Return, for each kernel of a module, the module without the other kernels."""
    text = _without_comments(ptx)
    spans = {entry[1]: (entry.start(), _closing_brace(text, entry.end()) + 1) for entry in _ENTRY.finditer(text)}
    between = [0, *(position for span in spans.values() for position in span), len(text)]
    outside = [text[start:end] for start, end in zip(between[::2], between[1::2], strict=True)]
    return {
        name: "".join(outside[: i + 1]) + text[slice(*span)] + "".join(outside[i + 1 :])
        for i, (name, span) in enumerate(spans.items())
    }


def _without_comments(ptx: str) -> str:
    """Remove comments, but keep line breaks, so that line numbers stay correct."""
    ptx = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), ptx, flags=re.S)
    return re.sub(r"//[^\n]*", "", ptx)


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise EmulatorError("syntax", "the kernel's closing brace is missing")


def _outside_functions(text: str) -> str:
    """Return the declarations of the module: the text outside of functions and kernels."""
    parts, position = [], 0
    for function in re.finditer(r"\.(?:entry|func)\b[^;{]*\{", text):
        if function.start() >= position:
            parts.append(text[position : function.start()])
            position = _closing_brace(text, function.end()) + 1
    return "".join([*parts, text[position:]])


def _parameters(text: str) -> list[Parameter]:
    parameters, end = [], 0
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        array = re.search(r"\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", declaration)
        if array:
            align, name, size, type_ = int(array[1]), array[2], int(array[3]), "b8"
        else:
            type_, name = re.findall(r"\.param\s+\.(\w+)", declaration)[0], declaration.split()[-1]
            align = size = TYPE_BYTES[type_]
        offset = -(-end // align) * align
        parameters.append(Parameter(name, offset, size, type_))
        end = offset + size
    return parameters


def _launch_bounds(kernel: Kernel, directives: str) -> None:
    def numbers(name: str) -> tuple[int, ...]:
        found = re.search(rf"\.{name}\s+(\d+(?:\s*,\s*\d+)*)", directives)
        return tuple(int(n) for n in found[1].split(",")) if found else ()

    kernel.threads_required, kernel.threads_limit = numbers("reqntid"), numbers("maxntid")
    kernel.cluster, *others = numbers("reqnctapercluster") or (1,)
    if others not in ([], [1], [1, 1]):
        raise EmulatorError("launch", f"{kernel.name}: clusters along y or z are not modelled:{directives}")


_VARIABLE = re.compile(
    r"(?P<extern>\.extern\s+)?\.(?P<space>shared|local|global|const)\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    r"\.(?P<type>\w+)\s+(?P<name>[\w$]+)(?:\[(?P<count>\d*)\])?\s*(?:=\s*(?P<init>\{[^}]*\}|[^;]+))?;"
)
_REGISTERS = re.compile(r"\.reg\s*\.(\w+)\s+([^;]*);")
_REGISTER_RANGE = re.compile(r"(%?[\w$]+)<(\d+)>$")
_LABEL = re.compile(r"([\w$]+):(?!:)")
_NUMBERED = re.compile(r"(.*?)(\d+)$")
_NUMBER = re.compile(r"[+-]?\d")


class _Body:
    """Parse the statements of a kernel, and add them to it."""

    def __init__(self, kernel: Kernel, text: str, start: int, body: str, outside: str) -> None:
        self.kernel, self.start, self.body, self.outside = kernel, start, body, outside
        self.newlines = [match.start() for match in re.finditer("\n", text)]
        # A name maps to its (first) register; a block { } of inline assembly may declare it again.
        self.scopes: list[dict[str, int]] = [{}]
        self.ranges: list[dict[str, tuple[int, int]]] = [{}]
        # A label belongs to its block too; labels of inner blocks are renamed.
        self.label_names: list[dict[str, str]] = [{}]
        self.registers: dict[int, Register] = {}

    def parse(self) -> None:
        for found in _VARIABLE.finditer(self.outside):
            name = found["name"]  # the plain search is fast, and excludes most variables of other kernels
            if name in self.body and re.search(rf"(?<![\w$]){re.escape(name)}(?![\w$])", self.body):
                self._variable(found)
        for line, statement in self._statements():
            if statement == "}":
                for stack in (self.scopes, self.ranges, self.label_names):
                    stack.pop()
            elif statement.startswith("{"):
                self.scopes.append({})
                self.ranges.append({})
                labels = _LABEL.findall(statement)
                self.label_names.append({name: f"{name}@{len(self.kernel.code)}" for name in labels})
            elif statement.startswith("."):
                self._directive(statement)
            else:
                self.kernel.code.append(self._instruction(statement, line))
        # Dynamic shared memory begins after the static variables.
        open_ended = [variable for variable in self.kernel.shared.values() if variable.bytes == 0]
        align = max([16, *(variable.align for variable in open_ended)])
        dynamic = -(-self.kernel.shared_bytes // align) * align
        for variable in open_ended:
            self.kernel.shared[variable.name] = replace(variable, offset=dynamic)
        self.kernel.shared_bytes = dynamic

    def _statements(self) -> Iterator[tuple[int, str]]:
        position, body = 0, self.body
        while True:
            while position < len(body) and body[position].isspace():
                position += 1
            if position >= len(body):
                return
            if body[position] in "{}":
                end = _closing_brace(body, position + 1) if body[position] == "{" else position
                yield 0, body[position : end + 1]
                position += 1
            elif label := _LABEL.match(body, position):
                self._label(label[1])
                position = label.end()
            elif body.startswith((".loc ", ".loc\t"), position):
                position = body.find("\n", position) % (len(body) + 1)
            else:
                end = body.find(";", position)
                if end < 0:
                    raise EmulatorError("syntax", f"unfinished statement: {body[position : position + 80]}")
                line = bisect_right(self.newlines, self.start + position) + 1
                yield line, " ".join(body[position : end + 1].split())
                position = end + 1

    def _label(self, name: str) -> None:
        name = self._scoped(name)
        if name in self.kernel.labels:
            raise EmulatorError("syntax", f"label {name} is defined twice")
        self.kernel.labels[name] = len(self.kernel.code)

    def _scoped(self, label: str) -> str:
        return next((names[label] for names in reversed(self.label_names) if label in names), label)

    def _directive(self, statement: str) -> None:
        if registers := _REGISTERS.match(statement):
            for name in registers[2].split(","):
                self._declare_register(name.strip(), TYPE_BYTES[registers[1]])
        elif statement.startswith(".branchtargets"):
            label = next(n for n, at in reversed(self.kernel.labels.items()) if at == len(self.kernel.code))
            targets = statement[14:].rstrip(";").split(",")
            self.kernel.branch_targets[label] = [self._scoped(target.strip()) for target in targets]
        elif variable := _VARIABLE.match(statement):
            self._variable(variable)
        elif not statement.startswith((".pragma", ".file", ".section")):
            raise EmulatorError("unknown instruction", f"this is not modelled: {statement}")

    def _declare_register(self, name: str, size: int) -> None:
        first = len(self.kernel.register_bytes)
        if many := _REGISTER_RANGE.match(name):
            self.ranges[-1][many[1]] = (first, int(many[2]))
            self.kernel.register_bytes += [size] * int(many[2])
        else:
            self.scopes[-1][name] = first
            self.kernel.register_bytes.append(size)

    def _variable(self, found: re.Match[str]) -> None:
        kernel, name, element = self.kernel, found["name"], TYPE_BYTES[found["type"]]
        space = {"shared": "shared", "local": "local"}.get(found["space"], "data")
        count = int(found["count"]) if found["count"] else (1 if found["count"] is None else 0)
        size = 0 if found["extern"] and not count else element * count
        align = int(found["align"] or element)
        offset = -(-getattr(kernel, f"{space}_bytes") // align) * align
        initial = initial_bytes(found["init"], found["type"]) if found["init"] else b""
        getattr(kernel, space)[name] = Variable(name, offset, size, align, initial)
        setattr(kernel, f"{space}_bytes", offset + size)

    def _instruction(self, statement: str, line: int) -> Instruction:
        rest, guard = statement.rstrip(";").strip(), None
        if guarded := re.match(r"@(!?)(%?[\w$]+)\s+", rest):
            register = self._register(guarded[2])
            if register is None:
                raise EmulatorError("syntax", f"undeclared predicate in PTX line {line}: {statement}")
            guard = Register(register.index, register.bytes, negated=bool(guarded[1]))
            rest = rest[guarded.end() :]
        opcode, _, arguments = rest.partition(" ")
        name, *modifiers = opcode.split(".")
        operands = tuple(self._operand(argument) for argument in split(arguments))
        return Instruction(name, tuple(modifiers), operands, guard, line, statement)

    def _register(self, name: str) -> Register | None:
        for scope, ranges in zip(reversed(self.scopes), reversed(self.ranges), strict=True):
            index = scope.get(name)
            if index is None and (numbered := _NUMBERED.match(name)) and numbered[1] in ranges:
                first, count = ranges[numbered[1]]
                index = first + int(numbered[2]) if int(numbered[2]) < count else None
            if index is not None:
                if index not in self.registers:
                    self.registers[index] = Register(index, self.kernel.register_bytes[index])
                return self.registers[index]
        return None

    def _operand(self, text: str) -> Operand:
        if text.startswith("["):
            base, _, offset = text[1:-1].replace(" ", "").partition("+")
            return Address(self._operand(base), int(number(offset)) if offset else 0)
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in split(text[1:-1])))
        if "|" in text:
            return Vector(tuple(self._operand(part.strip()) for part in text.split("|")))
        if text == "_":
            return Sink()
        if text.startswith("!"):
            register = self._operand(text[1:].strip())
            return Register(register.index, register.bytes, negated=True)
        if _NUMBER.match(text):
            return Immediate(number(text))
        # A % name that no .reg declares is a special register, or an error that is reported when the kernel is loaded.
        return self._register(text) or (Special(text) if text.startswith("%") else Symbol(self._scoped(text)))
