"""Read YAML with the line of every key, and every mistake instead of the first. The one file that imports yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from sekha.errors import Problem

__all__ = ["Place", "Tree", "dump", "path_of", "read"]

Place: TypeAlias = tuple[str | int, ...]
"""Where a value stands: `("providers", 0, "models", 2, "dimension")`."""


_MOST_BITS = 4096
"""Of a whole number, which may be hexadecimal: Python writes out none of more than 4,300 digits, in no message."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A document as plain values, with the line on which each of them starts."""

    data: Any
    lines: Mapping[Place, int]
    problems: tuple[Problem, ...] = ()

    def line(self, place: Place) -> int | None:
        """The line of a place, or of the nearest thing around it; None for what is not in the file."""
        for length in range(len(place), 0, -1):
            if (line := self.lines.get(place[:length])) is not None:
                return line
        return None

    def problem(self, place: Place, message: str) -> Problem:
        return Problem(path_of(place), message, self.line(place) if place else None)


def path_of(place: Place) -> str:
    """Write a place as operators do: `providers[0].models[2].dimension`."""
    path = ""
    for step in place:
        if isinstance(step, int):
            path += f"[{step}]"
        else:
            path += f".{step}" if path else step
    return path


def read(text: str) -> Tree:
    """Parse one document. Invalid YAML and duplicate keys come back as problems, not as exceptions."""
    import yaml

    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        on_line = text.count("\n", 0, error.position) + 1
        what = f"U+{error.character:04X} is a character that may not stand in it. Take it out, or write it as an escape"
        return Tree(None, {}, (Problem("", f"not valid YAML: {what}", on_line),))
    lines: dict[Place, int] = {}
    problems: list[Problem] = []
    written_in: dict[int, set[int]] = {}

    def value_of(node: yaml.Node) -> Any:
        try:
            return _writable(loader.construct_object(node, deep=True))
        except (ValueError, LookupError, AttributeError, ArithmeticError) as error:
            # What a tag promises, as `!!bool` does, and the text does not keep.
            said = str(error).splitlines()[0] if isinstance(error, ValueError) else "it is not what its tag says"
            raise yaml.constructor.ConstructorError(problem=said, problem_mark=node.start_mark) from error

    def build(node: yaml.Node, place: Place) -> Any:
        lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            # Keys merged in by `<<` come first, and the mapping's own replace them.
            own = written_in.setdefault(id(node), {id(key_node) for key_node, _ in node.value})
            loader.flatten_mapping(node)
            built: dict[str, Any] = {}
            written: dict[str, int] = {}
            for key_node, value_node in node.value:
                key = value_of(key_node)
                line = key_node.start_mark.line + 1
                if not isinstance(key, str | int | float | bool):
                    problems.append(Problem(path_of(place), f"{key!r} cannot be a key.", line))
                    continue
                name, here = str(key), (*place, str(key))
                if name in written:
                    problems.append(
                        Problem(path_of(here), f"written twice, first on line {written[name]}. Keep one.", line)
                    )
                    continue
                if id(key_node) in own:
                    written[name] = line
                lines[here] = line
                built[name] = build(value_node, here)
            return built
        if isinstance(node, yaml.SequenceNode):
            return [build(child, (*place, index)) for index, child in enumerate(node.value)]
        return value_of(node)

    try:
        node = loader.get_single_node()
        data = build(node, ()) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(filter(None, [error.context, error.problem]))
        line = mark.line + 1 if mark else None
        return Tree(None, {}, (Problem("", f"not valid YAML: {what}", line),))
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        return Tree(None, {}, (Problem("", f"not valid YAML: {str(error).splitlines()[0]}"),))
    except RecursionError:
        return Tree(None, {}, (Problem("", "not usable YAML: it is nested too deeply, or an anchor holds itself."),))
    finally:
        loader.dispose()
    return Tree(data, lines, tuple(problems))


def _writable(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise ValueError("a number of thousands of digits means nothing here. Write a smaller one")
    return value


def dump(data: Any) -> str:
    """Write plain values as YAML, keys in the order given."""
    import yaml

    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100))
