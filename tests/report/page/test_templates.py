"""Hidden characters are spelled out on pages; JSON cannot end its script element."""

import json

from markupsafe import Markup

from align.report.page.templates import finalize, script_json


def test_script_json_holds_no_markup_and_reads_back():
    value = {"</script><b>": ["<!--", "&amp;", "\u2028", 1.5, None]}
    text = script_json(value)
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"</script><b>": ["<!--", "&amp;", "\\u2028", 1.5, None]}


def test_finalize_leaves_markup_alone():
    assert finalize(Markup("<b>\x01</b>")) == "<b>\x01</b>"
    assert finalize("\x01") == "\\x01"
    assert finalize(3) == 3
