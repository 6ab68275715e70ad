"""What made the compiler reshard, and the annotation that would remove it.

Owns the words for it. They follow from the text of the program: what is exchanged,
where it was made, and who needs it otherwise. Invariant: an annotation is named only
where the program tells whose it is.

References:
    Xu et al., GSPMD: General and Scalable Parallelization for ML Computation Graphs
    (2021).
    Shoeybi et al., Megatron-LM (2019), for pairs of a column cut and a row cut.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from shardkit.explain.arguments import Argument, spell_spec
from shardkit.explain.exchanges import Exchanged, operation, place_of
from shardkit.hlo.flow import Flow, Value
from shardkit.hlo.text import shape_parts

__all__ = ["Resharding", "explain_resharding"]

_PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"}


@dataclasses.dataclass(frozen=True)
class Resharding:
    """One exchange that nobody asked for.

    Attributes:
        exchanged: It.
        what: What is laid out anew, and for whom.
        remedy: What to annotate instead.
    """

    exchanged: Exchanged
    what: str
    remedy: str


def explain_resharding(
    exchanged: Exchanged,
    flow: Flow,
    mesh: Mapping[str, int],
    arguments: Sequence[Argument],
) -> Resharding:
    """Explains a collective that reshards."""
    exchange = exchanged.exchange
    where = exchange.computation
    operands = [Value(where, name) for name in exchange.instruction.operand_names]
    sources = list(dict.fromkeys(x for v in operands for x in flow.sources(v)))
    held = [
        arguments[flow.instruction(x).number] for x in sources if flow.is_argument(x)
    ]
    made = [x for x in sources if not flow.is_argument(x)]
    uses = flow.uses(Value(where, exchange.end.name))
    is_returned = any(map(flow.is_result, uses))
    users = [x for x in uses if not flow.is_result(x)]
    axes = exchanged.span.axes or ()
    told = _Told(flow, mesh, arguments, exchanged, " ".join(axes) or "?", axes)
    subject = told.subject(held, made)
    if exchanged.kind == "collective-permute":
        return told.permute(subject, held, users)
    if exchanged.kind != "all-gather":
        return told.exchange(subject, held, users, is_returned)
    if is_returned and not users:
        return told.returned(subject)
    if held and not made:
        return told.argument(held, users)
    return told.intermediate(subject, made, users)


@dataclasses.dataclass(frozen=True)
class _Told:
    """What is said of one collective."""

    flow: Flow
    mesh: Mapping[str, int]
    arguments: Sequence[Argument]
    exchanged: Exchanged
    axis: str
    axes: tuple[str, ...]

    def subject(self, held: list[Argument], made: list[Value]) -> str:
        if held and not made:
            return " and ".join(x.name for x in held)
        return self.makers(made) or "a value"

    def makers(self, made: list[Value]) -> str:
        return self.spelled(made, "what {} makes{}")

    def users(self, users: list[Value]) -> str:
        return self.spelled(users, "{}{}") or "the program"

    def spelled(self, values: list[Value], words: str) -> str:
        """Names operations with their lines, of each operation one."""
        found: dict[str, str] = {}
        for value in values:
            instruction = self.flow.instruction(value)
            name = operation(instruction.op_name)
            place = place_of(self.flow.module.frames(instruction))
            if name:
                found.setdefault(name, f" at {place}" if place else "")
        listed = [words.format(name, place) for name, place in found.items()]
        return " and ".join(listed[:2]) + (" and others" if len(listed) > 2 else "")

    def argument(self, held: list[Argument], users: list[Value]) -> Resharding:
        """An argument that lies cut and is needed whole."""
        names = " and ".join(x.name for x in held)
        what = f"{names}, cut by {self.axis}, is needed whole by {self.users(users)}"
        better = [
            f"{x.name}: {x.spec_without(self.axes)} in place of {spell_spec(x.spec)}, "
            f"×{self.saved(x)} the memory"
            for x in held
            if x.spec and x.dims_cut_by(self.axes)
        ]
        remedy = f"leave whole the dim of it that {self.axis} cuts"
        return self.found(what, f"annotate {'; '.join(better)}" if better else remedy)

    def saved(self, argument: Argument) -> int:
        """How many times the memory it takes if these axes do not cut it."""
        kept = argument.spec or ()
        count = 1
        for cut in kept:
            for axis in cut:
                count *= self.mesh[axis] if axis in self.axes else 1
        return count

    def returned(self, subject: str) -> Resharding:
        """A result that is asked for whole."""
        return self.found(
            f"{subject}, cut by {self.axis}, is returned whole",
            f"out_shardings: let {self.axis} cut {self.dim()} of this result, or leave "
            "out_shardings out",
        )

    def intermediate(
        self, subject: str, made: list[Value], users: list[Value]
    ) -> Resharding:
        """A value that follows the cut of an argument and is needed whole."""
        what = f"{subject}, cut by {self.axis}, is needed whole by {self.users(users)}"
        origins = self.origins(made)
        advice = []
        if origins:
            listed = ", ".join(f"{x.name} {spell_spec(x.spec)}" for x in origins[:3])
            advice.append(f"the cut comes with {listed}: leave that dim whole")
        partners = self.partners(users)
        if partners:
            listed = " or ".join(x.name for x in partners[:3])
            now = [spell_spec(x.spec) for x in partners if x.spec]
            also = f" (now {now[0]})" if len(now) == 1 == len(partners) else ""
            advice.append(
                f"cut {listed}{also} by {self.axis} along the dim that is summed over, "
                "so that partial results are added instead"
            )
        advice = advice or [
            f"constrain the value so that {self.axis} cuts a dim that its user can "
            "take cut, or none"
        ]
        return self.found(what, "; or ".join(advice))

    def permute(
        self, subject: str, held: list[Argument], users: list[Value]
    ) -> Resharding:
        """Pieces that go to other devices as they are."""
        sizes = [x.num_bytes for x in held]
        if sizes and max(sizes) <= self.exchanged.exchange.num_bytes:
            return self.found(
                f"{subject} is needed in the same pieces on other devices",
                f"name the axes in one order, in all annotations of it: {self.axis}",
            )
        return self.found(
            f"{subject}, cut by {self.axis}, is needed shifted or in other pieces by "
            f"{self.users(users)}",
            f"leave whole the dim along which that works, which {self.axis} cuts",
        )

    def exchange(
        self,
        subject: str,
        held: list[Argument],
        users: list[Value],
        is_returned: bool,
    ) -> Resharding:
        """A cut that goes from one dim to another."""
        by = self.users(users) if users else "the result's annotation"
        what = f"{subject}, cut by {self.axis}, is needed cut along another dim by {by}"
        if is_returned and not users:
            return self.found(what, "out_shardings: ask for the cut that it has")
        better = [
            f"{x.name}: {spell_spec(x.spec[::-1])} in place of {spell_spec(x.spec)}"
            for x in held
            if x.spec and len(x.spec) == 2
        ]
        remedy = f"let {self.axis} cut the other dim from the beginning"
        return self.found(what, f"annotate {'; '.join(better)}" if better else remedy)

    def origins(self, made: list[Value]) -> list[Argument]:
        """The nearest arguments that these axes cut."""
        found = {
            i.number: self.arguments[i.number]
            for value in made
            for name in self.flow.instruction(value).operand_names
            for i in self.flow.nearest_arguments(Value(value.computation, name))
        }
        return [x for x in found.values() if x.dims_cut_by(self.axes)]

    def partners(self, users: list[Value]) -> list[Argument]:
        """What is multiplied with the value, where a product needs it."""
        found: dict[int, Argument] = {}
        for user in users:
            instruction = self.flow.instruction(user)
            if operation(instruction.op_name) not in _PRODUCTS:
                continue
            for name in instruction.operand_names:
                for source in self.flow.sources(Value(user.computation, name)):
                    if self.flow.is_argument(source):
                        number = self.flow.instruction(source).number
                        found[number] = self.arguments[number]
        return list(found.values())

    def dim(self) -> str:
        """The dim of the result along which pieces are gathered."""
        exchange = self.exchanged.exchange
        found = re.search(r"\bdimensions=\{(\d+)\}", exchange.instruction.attributes)
        # Of a result that is laid out anew afterwards, dims have other numbers.
        shapes = [shape_parts(x.shape) for x in self.flow.module.results]
        is_same = any(shape_parts(exchange.end.shape)[0] in each for each in shapes)
        return f"dim {found[1]}" if found and is_same else "a dim"

    def found(self, what: str, remedy: str) -> Resharding:
        return Resharding(self.exchanged, what, remedy)
