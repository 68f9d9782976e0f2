"""From the field's dataset formats to rows of the recipe's kind.

A converter makes drafts of one raw record: rows with all that the record says. The recipe's kind then decides what of
it is kept. A record that does not have its format's fields is a mistake of the data or the recipe (``BadRecord``); one
that has them but makes no row (empty, identical, cut off) is ``Dropped``, and counted. Leaves out reading, filtering
and splitting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from align.data.formats.detection import LOOKED_AT, Detection, detect, fitting
from align.data.formats.fields import (
    KINDS,
    PAIRED,
    SEVERAL,
    Malformed,
    Unusable,
    missing,
    renamed,
    unrecognized,
)
from align.data.formats.instructions import (
    from_alpaca,
    from_dolly,
    from_gsm8k,
    from_prompt,
    from_prompt_completion,
    from_self_instruct,
    from_text,
)
from align.data.formats.kinds import finished, unusable
from align.data.formats.messages import from_messages, with_conversations_parsed
from align.data.formats.oasst import from_oasst
from align.data.formats.options import Form, Format, FormatOptions
from align.data.formats.pairs import from_hh, from_preferences, from_unpaired
from align.data.formats.responses import from_ranked, from_scored
from align.data.formats.stepwise import from_stepwise
from align.data.formats.usage import Watched, left_aside
from align.data.records import BadRecord
from align.data.rows import Dropped, Row

__all__ = [
    "KINDS", "LOOKED_AT", "PAIRED", "SEVERAL", "Detection", "Form", "Format", "FormatOptions", "convert", "detect",
    "fitting", "unusable",
]  # fmt: skip

Converter = Callable[[dict[str, Any], FormatOptions, str], list[Row | Dropped]]

CONVERTERS: dict[str, Converter] = {
    "messages": from_messages,
    "sharegpt": from_messages,
    "prompt_completion": from_prompt_completion,
    "alpaca": from_alpaca,
    "dolly": from_dolly,
    "gsm8k": from_gsm8k,
    "self_instruct": from_self_instruct,
    "hh_rlhf": from_hh,
    "preferences": from_preferences,
    "ranked": from_ranked,
    "scored": from_scored,
    "oasst": from_oasst,
    "unpaired": from_unpaired,
    "stepwise": from_stepwise,
    "prompt": from_prompt,
    "text": from_text,
    "rows": lambda record, options, kind: [dict(record)],
}


def convert(
    record: dict[str, Any],
    form: Form,
    where: str,
    kind: str,
    options: FormatOptions | None = None,
    check: bool = True,
    unused: Counter[str] | None = None,
) -> list[Row | Dropped]:
    """The rows of one record, or why there is none; a tree, or several instances of a task, give several.

    ``kind`` is the recipe's. Rows have ``id`` (of their content; a finished row keeps its own) and ``checks``, and
    ``source`` only where the record has one, being a row already. ``check=False`` leaves in what a ``normalize`` step
    may still mend, such as two user turns in a row; ``unusable`` finds it later. ``unused`` counts the fields that were
    not read of records that made rows.

    Raises ``BadRecord``, which begins with ``where``, for a record that lacks the format's fields or holds something
    else in them, and for one with a field that means something and would be lost.
    """
    options = options or FormatOptions()
    if kind not in KINDS[form]:
        able = ", ".join(name for name, kinds in KINDS.items() if kind in kinds and name != "rows")
        raise BadRecord(where, f"a record of format {form} cannot give {kind}; formats that can: {able}.")
    fields = renamed(record, options)
    if missing(fields, form):
        raise BadRecord(where, unrecognized(fields, form, fitting(fields)))
    try:
        watched = Watched(with_conversations_parsed(fields))
        made = [item for draft in CONVERTERS[form](watched, options, kind) for item in finished(draft, kind, check)]
        left = left_aside(watched, options.ignore) if form != "rows" and not _all_dropped(made) else []
    except Malformed as error:
        raise BadRecord(where, f"{error} (format {form}).") from None
    except RecursionError:
        raise BadRecord(where, "nested too deeply.") from None
    except Unusable as error:
        return [Dropped(str(error))]
    if unused is not None:
        unused.update(left)
    return made


def _all_dropped(made: list[Row | Dropped]) -> bool:
    return all(isinstance(item, Dropped) for item in made)
