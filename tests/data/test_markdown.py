"""Other people's text in Markdown stays text."""

from align.data.markdown import fenced, plain, table


def test_markup_is_escaped_and_lines_are_joined() -> None:
    assert plain("a|b\n# <b>c</b> [x](http://y) `z`") == r"a\|b \# \<b\>c\</b\> \[x\]\(http://y\) \`z\`"


def test_a_cell_is_left_alone_only_where_it_is_exactly_ours() -> None:
    rows = table(
        ("license", "digest"), [("**not known**", "`0a1b`"), ("**not known**<img src=x>", "`<b>`")], numbers=(1,)
    )
    assert rows[1] == "| --- | ---: |"
    assert rows[2] == "| **not known** | `0a1b` |"
    assert rows[3] == r"| \*\*not known\*\*\<img src=x\> | \`\<b\>\` |"


def test_a_code_block_is_not_left() -> None:
    assert fenced("a\n````\nb\n", "yaml") == ["`````yaml", "a\n````\nb", "`````"]


def test_what_steers_a_terminal_or_reorders_text_is_escaped() -> None:
    assert plain("a\x1b[31m\u202eb") == r"a\\x1b\[31m\\u202eb"
