"""Paths that a user wrote or sets by a variable. Relative paths start at the YAML file that names them.

``locate`` marks the texts of a file with its folder. ``settle`` replaces the texts that are paths according to the
types of a config's fields: ``UserPath`` and ``NameOrPath``. Keys depend on a file's contents and not on its location.
Never imports torch.
"""

from __future__ import annotations

import errno
import glob
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from align.errors import UserError, shorten

REFUSED = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
"""Errors of paths that cannot exist. A missing file is no error here: its reader reports it."""


def cache_folder() -> Path:
    """Return the folder for downloads and small caches, outside the repository and the store."""
    return Path(os.environ.get("ALIGN_CACHE") or Path.home() / ".cache" / "align").expanduser()


def user_path(text: str, base: Path | None = None) -> Path:
    """Return the path that ``text`` names, ``~`` and ``~user`` replaced; a relative path starts at ``base``.

    Raises ``UserError`` for text that no file system accepts, and for a user that this machine does not know.
    """
    try:
        path = Path(text).expanduser()
        path = path if base is None else base / path
        # Look at the path only for errors that no later reader could explain better.
        os.fsencode(path).decode("utf-8")
        os.lstat(path)
    except RuntimeError:
        user = shorten(text.partition("/")[0])
        raise UserError(f"'{shorten(text)}': there is no user '{user[1:]}' here; write the folder itself.") from None
    except ValueError as error:
        raise UserError(f"'{shorten(text)}' is not a path: {_encoding_problem(error)}.") from None
    except OSError as error:
        if error.errno in REFUSED:
            raise UserError(f"'{shorten(text)}' is not a path: {error.strerror}.") from None
    return path


def matching_paths(pattern: str, base: Path) -> list[Path]:
    """Return the files and folders that a path or glob names, sorted; a relative path starts at ``base``.

    A bracket in ``base``, or in a path that exists as it is written, is a sign like others.
    """
    path = user_path(pattern, base)
    if path.exists():
        return [path]
    names = glob.glob(str(Path(pattern).expanduser()), root_dir=base, recursive=True)
    return sorted(base / name for name in names)


def _encoding_problem(error: ValueError) -> str:
    """Describe a path that is not text; both ``UnicodeError`` and the error for a NUL character are ``ValueError``."""
    if isinstance(error, UnicodeError):
        return "it has bytes or half characters that are not UTF-8 text"
    return str(error)


class LocatedText(str):
    """Text of a YAML file that knows the file."""

    __slots__ = ("file",)
    file: Path

    def __new__(cls, text: str, file: Path) -> LocatedText:
        """Return ``text`` as a part of ``file``."""
        located = super().__new__(cls, text)
        located.file = file
        return located

    def __deepcopy__(self, memo: dict[int, Any]) -> LocatedText:
        return self


@dataclass(frozen=True)
class PathField:
    """Marks a field whose text is a path."""

    may_be_name: bool = False
    """True for a field that also accepts a name, such as a Hub model's name; then only an existing file is a path."""
    names: tuple[str, ...] = ()
    """Names that are never paths, even if a file of that name exists."""


UserPath = Annotated[str, PathField()]
"""Type of a field with the path, or glob, of a file or folder that is read."""
NameOrPath = Annotated[str, PathField(may_be_name=True)]
"""Type of a field with a path or a name."""


def locate(value: Any, file: Path) -> Any:
    """Return plain values of YAML with every text marked as part of ``file``."""
    if isinstance(value, Mapping):
        return {key: locate(item, file) for key, item in value.items()}
    if isinstance(value, list):
        return [locate(item, file) for item in value]
    return LocatedText(value, file) if isinstance(value, str) else value


def settle(config_class: type[BaseModel], values: Any, base: Path, place: str) -> Any:
    """Return ``values`` of a config class without marks, with paths relative to ``base``.

    Texts without a mark already start at ``base``. Raises ``UserError`` for a path that is missing at its file but
    exists in the current folder.
    """
    return _Settling(base).of_class(config_class, values, place)


def unmark(value: Any) -> Any:
    """Return values without marks; paths among them stay as they are written."""
    if isinstance(value, Mapping):
        return {key: unmark(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unmark(item) for item in value]
    return str(value) if isinstance(value, LocatedText) else value


def settle_path(text: str, base: Path, place: str, field: PathField = PathField()) -> str:
    """Return the path that ``text`` means to readers who start at ``base``; see ``settle``."""
    is_here = base.absolute() == Path.cwd()
    if text in field.names or (is_here and not isinstance(text, LocatedText)):
        return str(text)
    folder = text.file.parent if isinstance(text, LocatedText) else base
    is_complete = text.startswith(("/", "~")) or "://" in text
    if is_complete or (is_here and folder.absolute() == base.absolute()):
        return str(text)
    full = os.path.abspath(user_path(str(text), folder))
    if _exists(full):
        is_below = is_here and Path(full).is_relative_to(base.absolute())
        return os.path.relpath(full, base) if is_below else full
    if isinstance(text, LocatedText) and _exists(os.path.abspath(text)):
        remedy = os.path.relpath(os.path.abspath(text), folder.absolute())
        raise UserError(
            f"{place}: there is no '{full}'; relative paths start at the folder of {text.file.name}. The current "
            f"folder has '{text}': write '{remedy}'."
        )
    # A name is no path; what begins like a path is one, and its reader reports that it is missing.
    return str(text) if field.may_be_name and not text.startswith(".") else full


def _exists(path: str) -> bool:
    return os.path.exists(path) or bool(glob.has_magic(path) and glob.glob(path, recursive=True))


@dataclass(frozen=True)
class _Settling:
    """The walk through values along the types of their fields."""

    base: Path

    def of_class(self, config_class: type[BaseModel], values: Any, place: str) -> Any:
        if not isinstance(values, Mapping):
            return unmark(values)
        settled = {}
        for name, value in values.items():
            info = config_class.model_fields.get(str(name))
            if info is None:
                settled[name] = unmark(value)
                continue
            marks = [mark for mark in info.metadata if isinstance(mark, PathField)]
            inside = f"{place}.{name}" if ": " in place else f"{place}: {name}"
            settled[name] = self._of_type(info.annotation, marks, value, inside)
        return settled

    def _of_type(self, annotation: Any, marks: list[PathField], value: Any, place: str) -> Any:
        """Return ``value`` of a field of this type, whose metadata has ``marks``."""
        if get_origin(annotation) is Annotated:
            annotation, *metadata = get_args(annotation)
            marks = [mark for mark in metadata if isinstance(mark, PathField)] or marks
        if isinstance(value, str):
            marks = marks or _marks_of(annotation)
            return settle_path(value, self.base, place, marks[0]) if marks else str(value)
        if isinstance(value, Mapping):
            return self._of_mapping(annotation, value, place)
        if isinstance(value, list):
            items = [argument for kind in _members(annotation) for argument in _items_of(kind)]
            item_type = Union[tuple(items)] if items else None  # noqa: UP007  (a union of a list)
            return [self._of_type(item_type, [], item, f"{place}[{index}]") for index, item in enumerate(value)]
        return value

    def _of_mapping(self, annotation: Any, value: Mapping[Any, Any], place: str) -> Any:
        for kind in _members(annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel) and _fits(kind, value):
                return self.of_class(kind, value, place)
            if get_origin(kind) in (dict, Mapping) and get_args(kind):
                value_type = get_args(kind)[1]
                return {key: self._of_type(value_type, [], item, f"{place}.{key}") for key, item in value.items()}
        return unmark(value)


def _members(annotation: Any) -> list[Any]:
    """Return the members of a union, also of unions inside it, or the type itself."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for argument in get_args(annotation) for member in _members(argument)]
    return [annotation]


def _items_of(kind: Any) -> tuple[Any, ...]:
    return get_args(kind)[:1] if get_origin(kind) in (list, tuple) else ()


def _marks_of(annotation: Any) -> list[PathField]:
    """Return the marks of text in a type such as ``UserPath | None``."""
    if get_origin(annotation) is Annotated:
        return [mark for mark in get_args(annotation)[1:] if isinstance(mark, PathField)]
    if get_origin(annotation) in (Union, types.UnionType):
        return [mark for argument in get_args(annotation) for mark in _marks_of(argument)]
    return []


def _fits(kind: type[BaseModel], value: Mapping[Any, Any]) -> bool:
    """Return True for the member of a union that the values mean: its literal fields (``type``, ``task``) agree."""
    for name, info in kind.model_fields.items():
        choices = typing.get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
        if choices and isinstance(value.get(name), str) and str(value[name]) not in choices:
            return False
    return True
