"""Limit the time and memory of chat templates, which are programs that come with a model.

transformers renders in Jinja's sandbox, which protects Python's internals but sets no limits: nested loops, ``'x' *
10**10`` or a text doubled forty times hang or kill a stage. The environment here counts a step for each loop iteration,
call and filter, and the characters and items that a template creates. A template that exceeds a limit is refused, at
the same step on every machine. Torch-free.

It works in two places. The syntax tree is rewritten, so that loops, ``~``, ``in``, slices and literals pass through
filters that count. Jinja's hooks for calls, operators and output count the rest.

Left out: the contents of a template's output, which the linter checks (``align.lint.template``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.environment import Template
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from align.models.template_budget import Budget, LocalBudget, TemplateOutOfBounds
from align.models.template_growth import formatted, growth, repeated, size_of, weight

LONGEST_SOURCE = 500_000
"""Most characters of a template; the longest of a real model has about 20,000."""
MOST_BITS = 4096
"""Most bits of an integer."""
LARGEST_VALUE = 100_000
"""Most parts of a list or mapping literal, nested ones included; a shared part counts at each place."""
DEEPEST_INDENT = 100
"""Most spaces of JSON's indentation."""
UNUSED = ("urlize", "xmlattr", "striptags")
"""Filters for web pages, which are slow on long texts and useless in a chat template."""


class _Bounds(NodeTransformer):
    """Routes loops, ``~``, ``in``, slices and literals of a syntax tree through filters that count."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        # {% for x in items %} -> {% for x in items | bounded_turns %}
        node.iter = _filter("bounded_turns", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        # a ~ b -> [a, b] | bounded_joining
        return _filter("bounded_joining", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        # A search reads its whole right side; a comparison may read both sides.
        for operand in node.ops:
            if operand.op in ("in", "notin") or not isinstance(operand.expr, nodes.Const):
                operand.expr = _filter("bounded_search", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _filter("bounded_copy", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        self.generic_visit(node)
        return _filter("bounded_value", node) if node.items else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        self.generic_visit(node)
        return _filter("bounded_value", node) if node.items else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _filter("bounded_value", node) if node.items and node.ctx == "load" else node


def _filter(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """``{% generation %}``, which marks the assistant's text; ``activate_tracker`` collects its character ranges.

    A copy of transformers' extension of that name, which is defined inside a function and cannot be imported.
    """

    tags = {"generation"}  # noqa: RUF012  # jinja's own attribute

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        environment.extend(activate_tracker=self.activate_tracker)
        self._pieces: list[str] | None = None
        self._places: list[tuple[int, int]] | None = None

    def parse(self, parser: Any) -> nodes.Node:
        """Parse the block into a call of :meth:`_note`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Any) -> str:
        text = str(caller())
        if self._pieces is not None and self._places is not None:
            # `_pieces` has all text before this block, so their length is where the block starts.
            start = sum(map(len, self._pieces))
            self._places.append((start, start + len(text)))
        return text

    @contextmanager
    def activate_tracker(self, pieces: list[str], places: list[tuple[int, int]]) -> Iterator[None]:
        """Inside, collect the marked ranges while ``pieces`` are written."""
        self._pieces, self._places = pieces, places
        try:
            yield
        finally:
            self._pieces = self._places = None


class BoundedTemplate(Template):
    """A template that renders with a new budget each time."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        """Return the text. Raises ``TemplateError`` for any error in the template."""
        with self._in_bounds() as environment:
            return environment.joined(self.root_render_func(self.new_context(dict(*args, **kwargs))))

    def generate(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        """Yield the text in pieces; errors as for :meth:`render`."""
        with self._in_bounds():
            yield from self.root_render_func(self.new_context(dict(*args, **kwargs)))

    @contextmanager
    def _in_bounds(self) -> Iterator[BoundedEnvironment]:
        environment: Any = self.environment
        # A rendering inside another one, as from an include, gets a budget of its own and restores the outer one.
        before, environment.local.budget = environment.local.budget, Budget()
        try:
            yield environment
        except TemplateError:
            raise
        except RecursionError:
            raise TemplateOutOfBounds("calls itself without end") from None
        except MemoryError:
            raise TemplateOutOfBounds("needs more memory than there is") from None
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, AssertionError) as error:
            raise TemplateError(f"{type(error).__name__}: {error}") from error
        finally:
            environment.local.budget = before


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """transformers' Jinja environment for chat templates, with a budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    template_class = BoundedTemplate

    def __init__(self) -> None:
        self.local = LocalBudget()
        extensions = [_Generation, loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self._finalize_value)
        self.concat = self.joined  # type: ignore[assignment]  # Jinja joins blocks, macros and the output by it
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = self._date
        self.globals.pop("lipsum")
        for name in UNUSED:
            self.filters.pop(name)
        self.filters["tojson"] = _to_json
        self.filters = {name: self._counted(name, function) for name, function in self.filters.items()}
        self.filters["bounded_turns"] = self._count_iterations
        self.filters["bounded_joining"] = self._concatenate
        self.filters["bounded_search"] = self._search
        self.filters["bounded_copy"] = self._counted_result
        self.filters["bounded_value"] = self._require_small

    @property
    def budget(self) -> Budget:
        """Budget of this thread's current rendering."""
        return self.local.budget

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        # Rewrite the syntax tree before Jinja compiles it.
        bounded: nodes.Template = _Bounds().visit(source)
        return super()._generate(bounded, *args, **options)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Count a call; Jinja's hook for every call in a template."""
        self.budget.step()
        self._check_call(function, args, kwargs)
        if function is dict or function is Namespace:
            self._require_small([*args, *kwargs.values()])
        # A recursive loop calls its LoopContext with the next level's items, which the syntax tree does not show.
        if isinstance(function, LoopContext):  # {% for … recursive %}: its turns do not pass through the tree's loop
            args = (self._count_iterations(args[0]), *args[1:])
        return self._counted_result(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Count an operator; Jinja's hook for those whose result can be much larger than the operands."""
        self.budget.step()
        if operator == "%" and isinstance(left, str | bytes):
            self.budget.make(formatted(left, [right]))
        elif operator == "*":
            self.budget.make(repeated(left, right))
        elif operator == "**" and _bits(left) * max(1, abs(right) if isinstance(right, int) else 1) > MOST_BITS:
            raise TemplateOutOfBounds(f"makes a number of more than {MOST_BITS} bits")
        elif operator == "+":
            self.budget.make(weight(left) + weight(right))
        result = super().call_binop(context, operator, left, right)
        if _bits(result) > MOST_BITS:
            raise TemplateOutOfBounds(f"makes a number of more than {MOST_BITS} bits")
        return result

    def joined(self, pieces: Iterable[Any]) -> str:
        """Join and count the pieces of a block, a macro or the output."""
        texts = []
        for piece in pieces:
            self.budget.make(len(piece))
            texts.append(piece)
        return "".join(texts)

    def _count_iterations(self, items: Any) -> Any:
        """Return ``items`` with each iteration counted; a collection keeps its length, for ``loop.length``."""
        if isinstance(items, Undefined):
            return items
        return _CountedItems(self, items) if hasattr(items, "__len__") else self._iterate(items)

    def _iterate(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.budget.step()
            yield item

    def _concatenate(self, values: list[Any]) -> str:
        return self.joined(str(self._finalize_value(value)) for value in values)

    def _finalize_value(self, value: Any) -> Any:
        """Count a value that becomes text; Jinja's hook. A namespace could contain itself and is refused."""
        self.budget.step()
        if isinstance(value, Namespace):
            raise TemplateError("a namespace is written out")
        return value

    def _require_small(self, value: Any) -> Any:
        """Return ``value`` if it has few parts; a shared part counts at each place, as in printing or comparing."""
        # Count parts by repeated expansion. A value with many references to one list counts it at each place.
        parts, remaining = [value], LARGEST_VALUE
        while parts:
            part = parts.pop()
            if isinstance(part, Mapping):
                parts.extend(part.values())
            elif isinstance(part, list | tuple | set):
                parts.extend(part)
            remaining -= 1
            if remaining < len(parts):
                raise TemplateOutOfBounds(f"makes a value of more than {LARGEST_VALUE} parts")
        self.budget.step((LARGEST_VALUE - remaining) // 10)
        return value

    def _date(self, form: str) -> str:
        self.budget.make(formatted(form, []))
        return datetime.now().strftime(form)

    def _search(self, values: Any) -> Any:
        self.budget.step(1 + size_of(values) // 1000)
        return values

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a filter to spend a step, and more for long values, which filters read completely."""
        leading = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment or context comes first

        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            values = args[leading:]
            self.budget.step(1 + (size_of(values[0]) // 1000 if values else 0))
            if values:
                # These filters would consume a lazy iterator at once. A list has a known size.
                if name in ("join", "sum") and isinstance(values[0], Iterator):
                    values = (list(values[0]), *values[1:])
                    args = (*args[:leading], *values)
                self.budget.make(growth(name, values, kwargs, is_method=False))
            result = function(*args, **kwargs)
            if isinstance(result, Iterator):
                return self._iterate(result)
            return self._counted_result(result)

        return counted

    def _check_call(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        # Methods of texts, such as replace and center, are found by the object that they are bound to.
        wrapped = getattr(function, "__wrapped__", function)  # jinja wraps text.format
        subject, name = getattr(wrapped, "__self__", None), getattr(wrapped, "__name__", "")
        if name == "striptags":
            raise TemplateOutOfBounds("calls striptags")
        if isinstance(subject, str | bytes | int | list | tuple | dict):
            self.budget.step(size_of(subject) // 1000)
            self.budget.make(growth(name, (subject, *args), kwargs, is_method=True))

    def _counted_result(self, value: Any) -> Any:
        self.budget.make(weight(value))
        return value


class _CountedItems:
    """A collection whose iterations are counted."""

    def __init__(self, environment: BoundedEnvironment, items: Any) -> None:
        self._environment, self._items = environment, items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        return self._environment._iterate(self._items)


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 1


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return JSON as transformers' filter does, without HTML escapes."""
    if isinstance(indent, int) and indent > DEEPEST_INDENT:
        raise TemplateOutOfBounds(f"indents JSON by {indent}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=64)
def compile_template(source: str) -> BoundedTemplate:
    """Compile the template ``source``. Raises ``TemplateError`` where it does not compile."""
    if len(source) > LONGEST_SOURCE:
        raise TemplateOutOfBounds(f"has {len(source)} characters, more than {LONGEST_SOURCE}")
    environment = BoundedEnvironment()
    try:
        template: Any = environment.from_string(source)
    except RecursionError:
        raise TemplateOutOfBounds("is nested too deeply") from None
    except (SyntaxError, ValueError, TypeError, OverflowError) as error:  # from the Python code that Jinja generates
        raise TemplateError(f"{type(error).__name__}: {error}") from None
    compiled: BoundedTemplate = template
    return compiled


def bound_templates() -> None:
    """Make transformers render every chat template in this process with a budget; a second call changes nothing.

    transformers compiles templates in one function, which its tokenizers, trl, vLLM and lm-eval all use.
    """
    from transformers.utils import chat_template_utils

    if not hasattr(chat_template_utils, "_compile_jinja_template"):
        raise RuntimeError(
            "this transformers has no utils.chat_template_utils._compile_jinja_template, so chat templates cannot be "
            "bounded; install a version that align supports (pyproject.toml)."
        )
    chat_template_utils._compile_jinja_template = compile_template
