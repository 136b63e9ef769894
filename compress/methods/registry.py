"""The only registry: names to classes, imported when they are first asked for.

Three kinds of entries: those of the catalogue, those that installed packages declare as entry
points, and objects that somebody's code registers. Listing names imports none of them, so the
command line stays fast and an entry that cannot be imported breaks only itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from compress.errors import CompressError, did_you_mean
from compress.methods.summaries import written_summary

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to objects.

    Args:
        noun: what is registered, for messages ("method").
        catalogue: entries of the project, ``{name: "package.module:attribute"}``.
        group: entry points of this group, in whatever packages are installed, are entries too.
        check: called with an object that is not of the catalogue; raises a CompressError where it
            is not what the registry holds.
    """

    def __init__(
        self, noun: str, catalogue: Mapping[str, str], group: str, check: Callable[[Any], None]
    ) -> None:
        self.noun, self.group, self._check = noun, group, check
        self._catalogue = {n: EntryPoint(n, value, group) for n, value in catalogue.items()}
        self._registered: dict[str, T] = {}
        self._seen: tuple[tuple[str, ...], dict[str, list[EntryPoint]]] = ((), {})

    def register(self, target: T) -> T:
        """Add an object under its ``name`` and return it.

        The same class of the same module takes the place of an earlier one, as it must where a cell
        of a notebook runs again.

        Raises:
            CompressError: the object is not what the registry holds, or its name is taken.
        """
        self._check(target)
        name = target.name
        known = self._registered.get(name)
        if name in self._catalogue:
            raise self._clash(name, [_of_entry_point(self._catalogue[name]), _of_object(target)])
        if known is not None and _place(known) != _place(target):
            raise self._clash(name, [_of_object(known), _of_object(target)])
        self._registered[name] = target
        return target

    def get(self, name: str) -> T:
        """Return the object of a name, which is imported now where it has not been.

        Raises:
            CompressError: no such name (the message proposes the closest ones); several packages
                claim it; or the package that offers it cannot be imported or offers something
                else. The message names the package.
        """
        offers = self._entry_points(name)
        if not offers and name not in self._registered:
            raise CompressError(
                f"the name of a {self.noun}", repr(name), did_you_mean(name, list(self))
            )
        if len(offers) > 1:
            raise self._clash(name, [_of_entry_point(entry) for entry in offers])
        found = [self._load(entry) for entry in offers]
        # A class of an installed package may register itself too, on being imported.
        registered = self._registered.get(name, found[0] if found else None)
        if found and registered is not found[0]:
            raise self._clash(name, [_of_entry_point(offers[0]), _of_object(registered)])
        return registered

    def summary(self, name: str) -> str:
        """The object's own ``summary``; it is read from the source where nothing is imported yet.

        Empty where the source says none in so many words.
        """
        for entry in self._entry_points(name)[:1]:
            return written_summary(entry.module, entry.attr)
        return self._registered[name].summary

    def origin(self, name: str) -> str:
        """Who offers a name: "compress", or the package with its version, or a module."""
        claims = [_of_entry_point(entry) for entry in self._entry_points(name)]
        if not claims:
            claims = [_of_object(self._registered[name])]
        return " and ".join(claims)

    def package(self, name: str) -> tuple[str, str] | None:
        """Name and version of the installed package that offers a name; None where none does."""
        for entry in self._installed().get(name, ()):
            return entry.dist.name, entry.dist.version
        return None

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._catalogue, *self._installed(), *self._registered}))

    def __contains__(self, name: object) -> bool:
        return name in self._catalogue or name in self._installed() or name in self._registered

    def _entry_points(self, name: str) -> list[EntryPoint]:
        own = [self._catalogue[name]] if name in self._catalogue else []
        return [*own, *self._installed().get(name, ())]

    def _installed(self) -> dict[str, list[EntryPoint]]:
        """The entry points of installed packages by name; looked up again as ``sys.path`` changes,
        since it takes milliseconds for every hundred packages."""
        path = tuple(sys.path)
        if self._seen[0] != path:
            found: dict[str, list[EntryPoint]] = {}
            for entry in entry_points(group=self.group):
                found.setdefault(entry.name, []).append(entry)
            self._seen = (path, found)
        return self._seen[1]

    def _load(self, entry: EntryPoint) -> T:
        # Whatever goes wrong in importing ours is a defect and shows as one.
        return entry.load() if entry.dist is None else self._load_foreign(entry)

    def _load_foreign(self, entry: EntryPoint) -> T:
        where = f"the {self.noun} {entry.name!r} of {_of_entry_point(entry)}"
        try:
            target = entry.load()
        except (Exception, SystemExit) as error:  # a stranger's module may raise anything
            raise CompressError(
                f"{entry.value} to be importable",
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                f"Repair, update or uninstall {entry.dist.name}",
                where=where,
            ) from error
        try:
            self._check(target)
        except CompressError as error:
            raise error.within(where) from None
        if target.name != entry.name:
            raise CompressError(
                f"the entry point {entry.name!r} to be called what {entry.value} is called",
                repr(target.name),
                f"Correct the entry points of {entry.dist.name}",
                where=where,
            )
        return target

    def _clash(self, name: str, claims: list[str]) -> CompressError:
        return CompressError(
            f"one {self.noun} called {name!r}",
            " and ".join([f"that of {claims[0]}", *(f"one of {claim}" for claim in claims[1:])]),
            "Uninstall one of them, or give it another name",
        )


def _of_entry_point(entry: EntryPoint) -> str:
    if entry.dist is None:
        return "compress"
    return f"the package {entry.dist.name} {entry.dist.version}"


def _of_object(target: Any) -> str:
    return f"the module {target.__module__}"


def _place(target: Any) -> tuple[str, str]:
    return target.__module__, target.__qualname__
