"""The scripts of ``align completion``, written from the commands of the argument parser.

bash and zsh share functions that compute the candidates at a position; each shell has its own few lines to offer them.
fish has one line for each argument.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

PLACE = r"""
# Read the words before the cursor: sets command, position, first (its argument), file,
# and option if that one waits for its value.
_align_place() {
    local word skips=
    command= option= first= file= position=0
    for word in "$@"; do
        # bash splits PATH=VALUE and PIPELINE:STAGE into three words.
        if [ "$word" = "=" ] || [ "$word" = ":" ]; then skips=1; continue; fi
        if [ -n "$skips" ]; then skips=; continue; fi
        if [ -n "$option" ]; then option=; continue; fi
        case "$word" in
            -*)
                if [ -n "$(_align_values "$command $word")" ]; then option=$word; fi
                continue ;;
            *.yaml|*.yml)
                if [ -z "$file" ]; then file=$word; fi ;;
        esac
        if [ "$position" = 0 ] && [ -n "$(_align_options "${command:+$command }$word")" ]; then
            command="${command:+$command }$word"
        else
            position=$((position + 1))
            if [ "$position" = 1 ]; then first=$word; fi
        fi
    done
}
"""

BASH = r"""
_align_offer() {
    COMPREPLY=()
    while IFS= read -r candidate; do COMPREPLY+=("$candidate"); done
}

# Offer the names that a command of align prints. Not with compgen -W, which would run a $(...) in them.
_align_offer_names() {
    COMPREPLY=()
    while IFS= read -r candidate; do
        if [[ $candidate == "$current"* ]]; then COMPREPLY+=("$candidate"); fi
    done < <(align completion "$1" "$2" 2>/dev/null)
}

_align() {
    local current=${COMP_WORDS[COMP_CWORD]} command option first file position values candidate
    _align_place "${COMP_WORDS[@]:1:COMP_CWORD-1}"
    if [[ -z $option && $current == -* ]]; then
        _align_offer < <(compgen -W "$(_align_options "$command")" -- "$current")
        return
    fi
    values=$(_align_values "$command ${option:-$((position + 1))}")
    COMPREPLY=()
    case "$values" in
        words*) _align_offer < <(compgen -W "${values#words}" -- "$current") ;;
        stages) _align_offer_names stages "$file" ;;
        fields) _align_offer_names fields "$first" ;;
        paths)
            compopt -o nospace 2>/dev/null
            _align_offer_names paths "$file" ;;
        yaml)
            compopt -o filenames 2>/dev/null
            _align_offer < <(compgen -f -X '!*.y*ml' -- "$current"; compgen -d -- "$current") ;;
        files)
            compopt -o filenames 2>/dev/null
            _align_offer < <(compgen -f -- "$current") ;;
        folders)
            compopt -o filenames 2>/dev/null
            _align_offer < <(compgen -d -- "$current") ;;
    esac
}

complete -F _align align
"""

ZSH = r"""
_align() {
    local command option first file position values
    _align_place "${(@)words[2,CURRENT-1]}"
    if [[ -z $option && ${words[CURRENT]} == -* ]]; then
        compadd -- ${=$(_align_options "$command")}
        return
    fi
    values=$(_align_values "$command ${option:-$((position + 1))}")
    case "$values" in
        words*) compadd -- ${=values#words} ;;
        stages) compadd -- ${(f)"$(align completion stages "$file" 2>/dev/null)"} ;;
        fields) compadd -- ${(f)"$(align completion fields "$first" 2>/dev/null)"} ;;
        paths) compadd -S '' -- ${(f)"$(align completion paths "$file" 2>/dev/null)"} ;;
        yaml) _files -g '*.(yaml|yml)(-.)' ;;
        files) _files ;;
        folders) _files -/ ;;
    esac
}

if [ "$funcstack[1]" = "_align" ]; then
    _align "$@"
else
    compdef _align align
fi
"""

FISH = r"""function __align_is
    set -l words (commandline -opc)
    for index in (seq (count $argv))
        set -l place (math $index + 1)
        test "$words[$place]" = "$argv[$index]"; or return 1
    end
end

function __align_waits_for_command
    test (count (commandline -opc)) -eq $argv[1]
end

function __align_list
    for word in (commandline -opc)
        if string match -qr '\.ya?ml$' -- $word
            align completion $argv[1] $word 2>/dev/null
            return
        end
    end
end

function __align_fields
    set -l words (commandline -opc)
    align completion fields "$words[3]" 2>/dev/null
end

complete -c align -f
"""
FISH_VALUES = {
    "stages": "-x -a '(__align_list stages)'",
    "paths": "-x -a '(__align_list paths)'",
    "fields": "-x -a '(__align_fields)'",
    "yaml": "-x -a '(__fish_complete_suffix .yaml)'",
    "files": "-r -F",
    "folders": "-x -a '(__fish_complete_directories)'",
    "text": "-x",
}
"""Options of fish's ``complete`` for a kind of value."""


@dataclass(frozen=True)
class Argument:
    """An option or a positional argument of a command."""

    name: str
    """The option, ``--only``, or the number of the positional argument, counted from 1."""
    kind: str
    """Kind of value: ``words``, ``stages``, ``paths`` (of ``--set``), ``fields``, ``yaml``, ``files``, ``folders``,
    ``text``, or ``flag`` for an option without a value."""
    words: tuple[str, ...] = ()
    help: str = ""
    repeats: bool = False
    """True if all further positional arguments are also of this kind."""


@dataclass(frozen=True)
class Command:
    """A command with its arguments; ``name`` is empty for ``align`` itself, ``data build`` for a command in another."""

    name: str
    help: str = ""
    arguments: list[Argument] = field(default_factory=list)

    @property
    def options(self) -> list[Argument]:
        """Arguments that begin with a hyphen."""
        return [argument for argument in self.arguments if argument.name.startswith("-")]


def bash_script(commands: Sequence[Command]) -> str:
    """Return the script for bash: ``source <(align completion bash)``."""
    return "# bash completion of align\n" + _functions(commands) + PLACE + BASH


def zsh_script(commands: Sequence[Command]) -> str:
    """Return the script for zsh, to source after ``compinit`` or to save as ``_align`` in a folder of ``fpath``."""
    return "#compdef align\n" + _functions(commands) + PLACE + ZSH


def _functions(commands: Sequence[Command]) -> str:
    """Return the functions that print a command's options, and the kind and words of an argument's values."""
    options = [
        _case(f'"{command.name}"', " ".join(argument.name for argument in command.options)) for command in commands
    ]
    values = [
        _case(_pattern(command, argument), " ".join([argument.kind, *argument.words]))
        for command in commands
        for argument in command.arguments
        if argument.kind != "flag"
    ]
    return "\n".join(
        [
            "\n# Options of a command.",
            '_align_options() {\n    case "$1" in',
            *options,
            "    esac\n}",
            "\n# Kind of the values of an option, or of the positional argument with a number.",
            '_align_values() {\n    case "$1" in',
            *values,
            "    esac\n}\n",
        ]
    )


def _pattern(command: Command, argument: Argument) -> str:
    if argument.repeats:
        return f'"{command.name} "[{argument.name}-9]*'
    return f'"{command.name} {argument.name}"'


def _case(pattern: str, text: str) -> str:
    return f"        {pattern}) printf '%s\\n' {shlex.quote(text)} ;;"


def fish_script(commands: Sequence[Command]) -> str:
    """Return the script for fish, to save as ``~/.config/fish/completions/align.fish``."""
    lines = ["# fish completion of align", FISH]
    helps = {command.name: command.help for command in commands}
    for command in commands:
        for argument in command.arguments:
            condition = f"__align_is {command.name}".strip()
            if argument.name.startswith("-"):
                parts = [f"-l {argument.name.removeprefix('--')}", _fish_value(argument), _fish_help(argument.help)]
                lines.append(_fish_line(condition, parts))
            elif any(f"{command.name} {word}".strip() in helps for word in argument.words):
                # The words are commands themselves, each with its own help.
                depth = len(command.name.split()) + 1
                condition = f"__align_waits_for_command {depth}; and {condition}"
                for word in argument.words:
                    help_text = helps[f"{command.name} {word}".strip()]
                    lines.append(_fish_line(condition, [f"-a {word}", _fish_help(help_text)]))
            elif argument.kind != "text":
                value = _fish_value(argument).replace("-x ", "").replace("-r ", "")
                lines.append(_fish_line(condition, [value]))
    return "\n".join(lines) + "\n"


def _fish_line(condition: str, parts: Sequence[str]) -> str:
    return " ".join(["complete -c align", f"-n '{condition}'", *(part for part in parts if part)])


def _fish_value(argument: Argument) -> str:
    if argument.kind == "flag":
        return ""
    if argument.kind == "words":
        return f"-x -a '{' '.join(argument.words)}'"
    return FISH_VALUES[argument.kind]


def _fish_help(text: str) -> str:
    # In single quotes fish reads only \ and ' in a special way.
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"-d '{escaped}'" if text else ""
