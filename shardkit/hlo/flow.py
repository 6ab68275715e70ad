"""Where the values of a program come from, and where they go.

Owns following a value through operations that only move it, into and out of fusions,
calls and loops. Invariant: an operation that it does not know ends the way, so that
what it says moved a value is all that did.
"""

import dataclasses
import functools
from collections.abc import Iterator

from shardkit.hlo.text import Call, Instruction, Module

__all__ = ["Flow", "Value"]

_MOVES = {
    *("bitcast", "bitcast-convert", "broadcast", "concatenate", "convert", "copy"),
    *("copy-done", "copy-start", "dynamic-slice", "opt-barrier", "pad", "reshape"),
    *("reverse", "slice", "transpose", "tuple", "get-tuple-element"),
    *("dynamic-update-slice",),
}
_EXCHANGES = {"all-gather", "all-to-all", "collective-permute", "collective-broadcast"}
_CALLS = {"fusion", "call", "async-start"}
_CONSTANT = {"constant", "iota", "partition-id", "replica-id", "after-all"}
# How many values are looked at for one question; what is further is not said.
_MOST = 4000


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """What an instruction makes, or one part of it.

    Attributes:
        computation: Where it stands.
        name: The instruction.
        part: Which part of a tuple; -1 for all of it.
    """

    computation: str
    name: str
    part: int = -1


class Flow:
    """The ways of values through a program.

    Args:
        module: The program.
    """

    def __init__(self, module: Module) -> None:
        self.module = module

    def instruction(self, value: Value) -> Instruction:
        """Returns what makes a value."""
        return self._instructions[value.computation][value.name]

    def is_argument(self, value: Value) -> bool:
        """Whether it is an argument of the program."""
        found = self.instruction(value)
        return found.opcode == "parameter" and value.computation == self.module.entry

    def sources(self, value: Value) -> list[Value]:
        """Lists what made a value, before it was moved to where it is.

        Those are arguments of the program and results of operations that do more than
        move; constants are left out.
        """
        found: dict[Value, None] = {}
        waiting, seen = [value], {value}
        while waiting and len(seen) < _MOST:
            current = waiting.pop()
            before = self._before(current)
            if before is None:
                if self.instruction(current).opcode not in _CONSTANT:
                    found[current] = None
                continue
            fresh = [x for x in before if x not in seen]
            seen.update(fresh)
            waiting += reversed(fresh)
        return list(found)

    def nearest_arguments(
        self, value: Value, most_steps: int = 12
    ) -> list[Instruction]:
        """Lists the arguments that a value is made of, the fewest operations away."""
        layer, seen = self.sources(value), {value}
        for _ in range(most_steps):
            found = [self.instruction(x) for x in layer if self.is_argument(x)]
            if found or len(seen) > _MOST:
                return sorted(set(found), key=lambda i: i.number)
            following: dict[Value, None] = {}
            for each in layer:
                seen.add(each)
                for name in self.instruction(each).operand_names:
                    operand = Value(each.computation, name)
                    following.update(dict.fromkeys(self.sources(operand)))
            layer = [x for x in following if x not in seen]
        return []

    def uses(self, value: Value) -> list[Value]:
        """Lists who computes with a value, wherever it is moved to before.

        The result of the program is among them as what returns it.
        """
        found: dict[Value, None] = {}
        waiting, seen = [value], {value}
        while waiting and len(seen) < _MOST:
            current = waiting.pop()
            after, users, is_result = self._after(current)
            found.update(dict.fromkeys(users))
            if is_result:
                found[Value(self.module.entry, self._roots[self.module.entry])] = None
            fresh = [x for x in after if x not in seen]
            seen.update(fresh)
            waiting += reversed(fresh)
        return list(found)

    def is_result(self, value: Value) -> bool:
        """Whether it is what the program returns, or a part of that."""
        return value.name == self._roots.get(self.module.entry) and (
            value.computation == self.module.entry
        )

    @functools.cached_property
    def _instructions(self) -> dict[str, dict[str, Instruction]]:
        return {
            name: {i.name: i for i in instructions}
            for name, instructions in self.module.computations.items()
        }

    @functools.cached_property
    def _roots(self) -> dict[str, str]:
        return {
            name: next((i.name for i in instructions if i.is_root), "")
            for name, instructions in self.module.computations.items()
        }

    @functools.cached_property
    def _parameters(self) -> dict[tuple[str, int], str]:
        return {
            (name, i.number): i.name
            for name, instructions in self.module.computations.items()
            for i in instructions
            if i.opcode == "parameter"
        }

    @functools.cached_property
    def _callers(self) -> dict[str, list[tuple[Value, Call]]]:
        found: dict[str, list[tuple[Value, Call]]] = {}
        for name, instructions in self.module.computations.items():
            for each in instructions:
                for call in each.calls():
                    found.setdefault(call.name, []).append(
                        (Value(name, each.name), call)
                    )
        return found

    @functools.cached_property
    def _users(self) -> dict[tuple[str, str], list[tuple[Instruction, int]]]:
        found: dict[tuple[str, str], list[tuple[Instruction, int]]] = {}
        for name, instructions in self.module.computations.items():
            for each in instructions:
                for place, operand in enumerate(each.operand_names):
                    found.setdefault((name, operand), []).append((each, place))
        return found

    def _before(self, value: Value) -> list[Value] | None:
        """The values that are moved to this one; None if it is made here."""
        where, found = value.computation, self.instruction(value)
        operands = [Value(where, name) for name in found.operand_names]
        opcode = found.opcode
        if opcode == "parameter":
            if where == self.module.entry:
                return None
            callers = self._callers.get(where, [])
            return [
                x for c in callers for x in self._given(c, found.number, value.part)
            ]
        if opcode == "tuple" and value.part >= 0:
            return operands[value.part : value.part + 1]
        if opcode == "get-tuple-element":
            return [dataclasses.replace(operands[0], part=found.number)]
        if opcode in ("opt-barrier", "async-done", "async-update", "copy-done"):
            return [dataclasses.replace(operands[0], part=value.part)]
        if opcode in _CALLS or opcode == "conditional":
            return [self._root(call.name, value.part) for call in found.calls()]
        if opcode == "while":
            bodies = [c.name for c in found.calls() if c.role == "body"]
            ends = [self._root(name, value.part) for name in bodies]
            return [dataclasses.replace(operands[0], part=value.part), *ends]
        if opcode in ("dynamic-slice", "pad"):
            return operands[:1]
        if opcode == "dynamic-update-slice":
            return operands[:2]
        is_moved = opcode in _MOVES
        is_moved |= opcode.removesuffix("-start").removesuffix("-done") in _EXCHANGES
        return operands if is_moved else None

    def _given(self, caller: tuple[Value, Call], number: int, part: int) -> list[Value]:
        """What a caller hands over as a parameter."""
        value, call = caller
        found = self.instruction(value)
        operands = found.operand_names
        if found.opcode == "while":
            bodies = [c.name for c in found.calls() if c.role == "body"]
            ends = [self._root(name, part) for name in bodies]
            return [Value(value.computation, operands[0], part), *ends]
        if found.opcode == "conditional":
            branches = [c.name for c in found.calls()]
            place = 1 + branches.index(call.name)
            return [Value(value.computation, operands[place], part)]
        if number >= len(operands):
            return []
        return [Value(value.computation, operands[number], part)]

    def _root(self, computation: str, part: int) -> Value:
        return Value(computation, self._roots[computation], part)

    def _after(self, value: Value) -> tuple[list[Value], list[Value], bool]:
        """Where a value is moved to, who computes with it, whether it is returned."""
        moved: list[Value] = []
        users: list[Value] = []
        where, part = value.computation, value.part
        for user, place in self._users.get((where, value.name), []):
            moved_to = list(self._taken(where, user, place, part))
            moved += moved_to
            if not moved_to and user.opcode != "get-tuple-element":
                users.append(Value(where, user.name))
        is_result = False
        if self._roots.get(where) == value.name:
            is_result = where == self.module.entry
            for caller, call in self._callers.get(where, []):
                if call.role == "condition":
                    continue
                moved.append(dataclasses.replace(caller, part=part))
                if call.role == "body":
                    moved.append(Value(where, self._parameters[where, 0], part))
        return moved, users, is_result

    def _taken(
        self, where: str, user: Instruction, place: int, part: int
    ) -> Iterator[Value]:
        """Yields where a user that only moves a value moves it to."""
        opcode = user.opcode
        if opcode == "get-tuple-element":
            if part in (-1, user.number):
                yield Value(where, user.name)
        elif opcode == "tuple":
            yield Value(where, user.name, place)
        elif opcode in _CALLS or opcode == "conditional":
            calls = list(user.calls())
            if opcode == "conditional":
                calls, place = calls[place - 1 : place], 0
            for call in calls:
                if (call.name, place) in self._parameters:
                    name = self._parameters[call.name, place]
                    yield Value(call.name, name, part)
        elif opcode == "while":
            for call in user.calls():
                if call.role == "body":
                    yield Value(call.name, self._parameters[call.name, 0], part)
            yield Value(where, user.name, part)
        elif opcode in ("opt-barrier", "async-done", "copy-done"):
            yield Value(where, user.name, part)
        elif opcode in _MOVES or opcode.removesuffix("-done") in _EXCHANGES:
            # Indices of a slice do not move with it.
            if not (opcode.startswith("dynamic-") and place > 1) and not (
                opcode in ("dynamic-slice", "pad") and place > 0
            ):
                yield Value(where, user.name)
