"""Faults of the chat template and of the tokenizer under it."""

from __future__ import annotations

import copy

from align.data.rows import assistant, user
from align.lint.findings import Finding
from tests.support.lint import dialects
from tests.support.lint.dialects import FOREIGN
from tests.support.lint.harness import SPOILT, instructions, look
from tests.support.lint.seeding import Case, seeds


@seeds("special-token-split")
def end_of_turn_unknown_to_the_tokenizer(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    case.also = {"template-of-another-family", "mask-shifted"}
    end = case.spec.eos
    special = (*(token for token in case.spec.special if token != end), "<|stop|>")
    template = case.spec.template.replace("eos_token", f"'{end}'")
    return look(dialects.make(case.spec, special, template), instructions())


@seeds("template-of-another-family")
def tokenizer_of_another_model(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    case.also = {"special-token-split", "mask-shifted"}
    foreign = copy.deepcopy(dialects.tokenizer_of(FOREIGN[case.name]))
    foreign.chat_template = case.spec.template
    if foreign.bos_token is None:
        foreign.bos_token = "<|endoftext|>"
    return look(foreign, instructions())


@seeds("generation-prompt-differs")
def sampling_opens_a_thought(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    template = case.spec.template + "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
    return look(dialects.make(case.spec, template=template), instructions())


@seeds("generation-prompt-differs")
def template_forgets_its_generation_prompt(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    case.also = {"mask-shifted"}
    template = case.spec.template.replace("add_generation_prompt", "false")
    if template == case.spec.template:  # the prompt closes with the answer's beginning: let it be written later
        template = template.replace("' [/INST]'", "''").replace("'[/INST]'", "''")
        template = template.replace("{% else %}{{ ' '", "{% else %}{{ '[/INST] '")
    return look(dialects.make(case.spec, template=template), instructions())


@seeds("unexpected-system-prompt")
def a_system_prompt_of_the_templates_own(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    words = "You always answer in rhyme and never in prose."
    template = case.spec.template
    if not case.spec.injects:
        template = template.replace("{{ bos_token }}", f"{{{{ bos_token + '{words}' }}}}", 1)
        if template == case.spec.template:
            template = f"{{{{ '{words} ' }}}}" + template
    return look(dialects.make(case.spec, template=template), instructions())


@seeds("pad-is-eos")
def padding_with_the_end(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    tokenizer = copy.deepcopy(case.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return look(tokenizer, instructions())


@seeds("turn-rewritten")
def a_template_that_drops_thoughts(case: Case) -> dict[str, Finding]:
    template = case.spec.template.replace("m['content']", "m['content'].split('</thought>')[-1]")
    rows = instructions()
    rows[SPOILT]["completion"] = [assistant("Let me count the ways. </thought>There are four.")]
    return look(dialects.make(case.spec, template=template), rows)


@seeds("template-refuses-row")
def a_template_that_takes_three_turns(case: Case) -> dict[str, Finding]:
    template = "{% if messages | length > 4 %}{{ raise_exception('too many turns') }}{% endif %}" + case.spec.template
    rows = instructions()
    rows[SPOILT]["prompt"] = [*rows[SPOILT]["prompt"], assistant("Which ones?"), user("Any of them.")]
    return look(dialects.make(case.spec, template=template), rows)


CODE = "def double(x):\n    y = 2 * x\n    return y"


@seeds("white-space-changed")
def a_template_that_collapses_white_space(case: Case) -> dict[str, Finding]:
    template = case.spec.template.replace("m['content']", "(m['content'].split() | join(' '))")
    rows = instructions()
    rows[SPOILT]["completion"] = [assistant(CODE)]
    return look(dialects.make(case.spec, template=template), rows)


@seeds("white-space-changed")
def a_template_that_strips_indentation(case: Case) -> dict[str, Finding]:
    template = case.spec.template.replace("m['content']", "m['content'].lstrip()")
    rows = instructions()
    rows[SPOILT]["completion"] = [assistant("    y = 2 * x")]
    return look(dialects.make(case.spec, template=template), rows)


@seeds("trailing-space-stripped")
def a_template_that_trims_the_end_of_answers(case: Case) -> dict[str, Finding]:
    template = case.spec.template.replace("m['content']", "m['content'].rstrip()")
    rows = instructions()
    rows[SPOILT]["completion"] = [assistant("There are nine kinds.\n")]
    return look(dialects.make(case.spec, template=template), rows)


@seeds("earlier-turns-unclosed")
def a_template_that_closes_the_last_turn_alone(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    template = case.spec.template
    end = f"'{case.spec.eos}\n'" if f"'{case.spec.eos}\n'" in template else f"'{case.spec.eos}'"
    if end not in template:
        end = "eos_token"
    closed = f"({end} if loop is not defined or loop.last or m['role'] != 'assistant' else ' ')"
    return look(dialects.make(case.spec, template=template.replace(end, closed)), instructions())


@seeds("earlier-turns-unclosed")
def a_template_that_closes_no_answer(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    template = case.spec.template
    end = next(text for text in (f"'{case.spec.eos}\n'", f"'{case.spec.eos}'", "eos_token") if text in template)
    open_answer = f"({end} if m is not defined or m['role'] != 'assistant' else ' ')"
    return look(dialects.make(case.spec, template=template.replace(end, open_answer)), instructions())
