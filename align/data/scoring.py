"""Scorers: what gives one number per response. Here the verifiable ones; reward models are in align.models.

Torch-free. ``gold`` is short for ``align.data.checkers:gold``.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from align.config.validation import suggest
from align.data import checkers
from align.data.code_identity import code_identity
from align.data.rows import Row
from align.errors import UserError
from align.store.fingerprint import file_digest

ScoreFunction = Callable[[list[Row], list[str]], list[float]]

SHORT = {"gold": "align.data.checkers:gold", "gsm8k_answer": "align.data.checkers:gsm8k_answer"}


class Scorer(Protocol):
    """Gives one score per response."""

    def score(self, rows: list[Row], responses: list[str], truncated: list[bool] | None = None) -> list[float]:
        """Scores in the order of ``rows``; ``truncated`` marks responses that hit the length limit."""
        ...


@dataclass(frozen=True)
class FunctionScorer:
    """A verifiable function as a scorer. A truncated response is judged by its text, like any other."""

    path: str
    function: ScoreFunction

    def score(self, rows: list[Row], responses: list[str], truncated: list[bool] | None = None) -> list[float]:
        """Call the function; ``UserError`` when it returns a wrong count or something that is no finite number."""
        scores = list(self.function(rows, responses))
        if len(scores) != len(responses):
            raise UserError(f"{self.path} returned {len(scores)} scores for {len(responses)} responses; one each.")
        for row, score in zip(rows, scores, strict=True):
            if not isinstance(score, (int, float)) or not math.isfinite(score):
                raise UserError(f"{self.path} returned {score!r} for row {row['id']}; it must return finite numbers.")
        return [float(score) for score in scores]


def function_scorer(path: str) -> FunctionScorer:
    """The scorer behind ``module:name`` or a short name. Raises ``UserError`` when it cannot be imported."""
    return FunctionScorer(_full(path, "score"), load_function(path))


def load_function(path: str, what: str = "score") -> Callable[..., Any]:
    """The function behind ``module:name``. ``UserError``, which begins with ``what`` it is, where there is none."""
    full = _full(path, what)
    module_name, _, name = full.partition(":")
    _find(full, what)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{what} '{path}': importing {module_name} failed: {error}.") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{what} '{path}': {module_name} has no function '{name}'.{suggest(name, known)}")
    found: Callable[..., Any] = function
    return found


def function_identity(path: str, what: str = "score") -> str:
    """What a key holds of a verifiable function: align's own by version, another one by its code.

    The code is the module's and that of the user's modules which it imports (``align.data.code_identity``). Imports
    nothing of the module itself (only its parent packages). Raises ``UserError``, which begins with ``what`` it is,
    when there is none.
    """
    full = _full(path, what)
    origin = _find(full, what)
    module = full.partition(":")[0]
    if module == "align.data.checkers":
        return f"{full} version {checkers.VERSION}"
    if module.partition(".")[0] == "align":
        return f"{full} sha256:{file_digest(origin)}"
    try:
        return f"{full} sha256:{code_identity(module)}"
    except UserError as error:
        raise UserError(f"{what} '{full}': {error}") from None


def _full(path: str, what: str) -> str:
    full = SHORT.get(path, path)
    module, colon, name = full.partition(":")
    if not (module and colon and name):
        raise UserError(f"{what} '{path}': expected 'gold' or 'module:name'.{suggest(path, SHORT)}")
    return full


def _find(full: str, what: str) -> Path:
    """File of the module, looked for in the current directory too, as ``python -m`` does."""
    module = full.partition(":")[0]
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise UserError(
            f"{what} '{full}': there is no module '{module}'; write it as package.module:function, importable from the "
            "current directory or installed."
        )
    return Path(spec.origin)
