"""YAML as recipes use it: plain data, each key once, nothing that grows when it is read.

PyYAML keeps the last of two equal keys, builds dates and sets, and expands aliases on demand: ten
lines of them stand for a billion values. Recipes need none of that.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from compress.errors import CompressError
from compress.system.intake import read_limited

_LARGEST = 2**20  # bytes of a recipe; long ones have a few thousand
_DEEPEST = 50  # mappings and lists inside each other
_MOST_VALUES = 20_000  # every alias counted with all that it stands for
_LONGEST_NUMBER = 40  # characters

_PREFIX = "tag:yaml.org,2002:"
_MERGE = _PREFIX + "merge"  # the key <<
_DATE = _PREFIX + "timestamp"
_TAGS = {_PREFIX + kind for kind in ("map", "seq", "str", "int", "float", "bool", "null")}


class _Loader(yaml.SafeLoader):
    """Safe YAML with the numbers of version 1.2: 2:4 is a pattern, not 124 in base 60."""

    depth = 0

    def compose_node(self, parent, index):
        self.depth += 1
        if self.depth > _DEEPEST:
            raise yaml.composer.ComposerError(
                None, None, f"more than {_DEEPEST} levels of nesting", self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_data(self):
        node = self.get_single_node()
        if node is None:
            return None
        _check(node, {}, set())
        return self.construct_document(node)


_NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?",
}
_Loader.yaml_implicit_resolvers = {
    start: [
        (tag, pattern)
        for tag, pattern in pairs
        if tag in (_MERGE, _DATE, *_TAGS) and tag.removeprefix(_PREFIX) not in _NUMBERS
    ]
    for start, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(
        _PREFIX + _kind, re.compile(rf"^(?:{_pattern})$"), list("-+.0123456789")
    )


def _check(node: yaml.Node, sizes: dict[int, int], open_: set[int]) -> int:
    """Refuse what :func:`parse` refuses; returns how many values a node stands for.

    Args:
        sizes: of the nodes that are done, by identity: an alias is the node that it names.
        open_: the nodes around this one; one of them inside itself is a cycle.
    """
    if id(node) in sizes:
        return sizes[id(node)]
    if id(node) in open_:
        raise _refused(node, "an alias inside what it names")
    if node.tag == _DATE:
        raise _refused(node, f"{node.value}, a date to some readers and text to others: quote it")
    if node.tag not in (*_TAGS, _MERGE):
        raise _refused(node, f"the tag {node.tag.replace(_PREFIX, '!!')!r}")
    open_.add(id(node))
    size = 1
    if isinstance(node, yaml.MappingNode):
        size += _check_mapping(node, sizes, open_)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check(item, sizes, open_) for item in node.value)
    elif node.tag == _PREFIX + "str":
        node.value = _whole_characters(node)
    elif len(node.value) > _LONGEST_NUMBER:
        raise _refused(node, f"a number of {len(node.value)} characters")
    if size > _MOST_VALUES:
        raise _refused(node, f"more than {_MOST_VALUES:,} values, each alias counted in full")
    open_.remove(id(node))
    sizes[id(node)] = size
    return size


def _check_mapping(node: yaml.MappingNode, sizes: dict[int, int], open_: set[int]) -> int:
    seen: dict[str, yaml.Node] = {}
    size = 0
    for key, value in node.value:
        if key.tag not in (_PREFIX + "str", _MERGE):
            raise _refused(key, "a key that is no text (quote it if it should be)")
        if key.value in seen:
            line = seen[key.value].start_mark.line + 1
            raise _refused(key, f"the key {key.value!r} for the second time (first in line {line})")
        seen[key.value] = key
        size += _check(key, sizes, open_) + _check(value, sizes, open_)
    return size


def _whole_characters(node: yaml.ScalarNode) -> str:
    """The text with pairs of escapes joined, as JSON spells characters beyond the first 65,536."""
    try:
        return node.value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise _refused(node, "half a character (an escape of a pair without the other)") from None


def _refused(node: yaml.Node, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def parse(text: str) -> Any:
    """Plain data from YAML text.

    Raises:
        ValueError: what does not parse, keys that repeat or are no text, tags other than those of
            plain data, aliases that contain themselves or stand for too much, nesting too deep,
            numbers too long.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{error.problem or error}{place}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def read(path: Path) -> Any:
    """Plain data from a YAML file in UTF-8.

    Raises:
        CompressError: no regular file, a large one, or what :func:`parse` refuses.
    """
    data = read_limited(path, "a recipe file", _LARGEST)
    try:
        return parse(data.decode("utf-8-sig"))
    except ValueError as error:
        raise CompressError(
            "a YAML file in UTF-8 with plain data", f"{error}", "Correct that place of the recipe",
            where=str(path),
        ) from None  # fmt: skip
