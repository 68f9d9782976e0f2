"""Conversion of one record to rows of the recipe's kind.

A converter makes drafts of a record: rows with all that the record holds. The recipe's kind then decides which fields
stay. A record without its format's fields is a mistake of the data or the recipe (``BadRecord``); one that has them
but makes no row (empty, identical, cut off) is ``Dropped``, and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from align.config.recipe.format_options import KINDS, Form, FormatOptions
from align.data.formats.detection import fitting
from align.data.formats.fields import (
    Malformed,
    Unusable,
    describe_unrecognized,
    missing_groups,
    rename_columns,
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
from align.data.formats.kinds import complete_rows
from align.data.formats.messages import from_messages, parse_conversations
from align.data.formats.oasst import from_oasst
from align.data.formats.preferences import from_hh, from_preferences, from_unpaired
from align.data.formats.responses import from_ranked, from_scored
from align.data.formats.stepwise import from_stepwise
from align.data.formats.tracked_record import TrackedRecord, unused_fields
from align.data.rows import BadRecord, Dropped, Row

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
    *,
    check: bool = True,
    unused: Counter[str] | None = None,
) -> list[Row | Dropped]:
    """Return the rows of one record, or the reason why there are none; a tree or a task with instances gives several.

    ``kind`` is the recipe's. Rows have ``id`` (of their content; a finished row keeps its own) and ``checks``; they
    have ``source`` only where the record is a row already. ``check=False`` lets through rows that a ``normalize`` step
    can mend, such as two user turns in a row; ``find_fault`` finds them later. ``unused`` counts the fields that were
    not read, of records that made rows.

    Raises ``BadRecord``, which begins with ``where``, for a record that lacks the format's fields or holds a wrong type
    in them, and for one with a meaningful field that would be lost.
    """
    options = options or FormatOptions()
    if kind not in KINDS[form]:
        able = ", ".join(name for name, kinds in KINDS.items() if kind in kinds and name != "rows")
        raise BadRecord(where, f"a record of format {form} cannot give {kind}; formats that can: {able}.")
    # Renamed before the check, since ``columns`` may supply the required names.
    fields = rename_columns(record, options)
    if missing_groups(fields, form):
        raise BadRecord(where, describe_unrecognized(fields, form, fitting(fields)))
    ignored: list[str] = []
    try:
        tracked = TrackedRecord(parse_conversations(fields))
        rows: list[Row | Dropped] = []
        for draft in CONVERTERS[form](tracked, options, kind):
            rows += complete_rows(draft, kind, check)
        # A record without rows lost nothing that matters, so its unused fields are not reported.
        if form != "rows" and not all(isinstance(row, Dropped) for row in rows):
            ignored = unused_fields(tracked, options.ignore)
    except Malformed as error:
        raise BadRecord(where, f"{error} (format {form}).") from None
    except RecursionError:
        raise BadRecord(where, "nested too deeply.") from None
    except Unusable as error:
        return [Dropped(str(error))]
    if unused is not None:
        unused.update(ignored)
    return rows
