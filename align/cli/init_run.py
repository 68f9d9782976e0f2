"""The pipeline that ``align init sft --model NAME --data FILE --hardware CARD`` writes. Never imports torch.

Its settings follow from the rows, the model's config and chat template, and the memory of the card as ``align plan
--hardware`` counts it. The texts with their comments are in ``examples/templates``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from align.config.shipped import shipped_root
from align.config.stages.inputs import ModelConfig
from align.config.user_paths import user_path
from align.config.validation import suggest, validate
from align.config.yaml import parse_yaml
from align.errors import UserError
from align.pipeline.pipeline import Pipeline

if TYPE_CHECKING:
    from align.capacity.hardware import Hardware
    from align.capacity.plan import StagePlan
    from align.data.rows import Row

TEMPLATES = "examples/templates"
KINDS = {"sft": "instructions", "dpo": "preferences", "grpo": "prompts"}
"""Kind of stage → kind of its rows."""
CONTENTS = {"instructions": "prompts with an answer", "preferences": "prompts with a better and a worse answer"}
"""Kind of rows → the kind in words, unless the word itself says it."""
COMMENTS = {
    "revision": "the commit that was looked at",
    "chat_template": "the model has none",
    "thinking": "switch of its chat template; thoughts need more tokens for an answer",
    "dataset": "paths start at this file",
    "keep": "the reward reads it",
    **dict.fromkeys(("columns", "better", "grouped"), "as `align data columns` found them"),
}
TUNINGS = {name: f"{{method: {name}, rank: 16, alpha: 32}}" for name in ("lora", "qlora")} | {"full": "{method: full}"}
FULL_SHARE = 0.5
"""Share of the usable memory up to which SFT trains every weight."""
RESPONSE_TOKENS = 1024
MOST_RECORDS = 10_000
"""Records of a file that are read; the tokens of ``COUNTED_ROWS`` of them are counted."""
COUNTED_ROWS = 2_000
FEWEST_ROWS = 20
BYTES_PER_TOKEN = 3
"""UTF-8 bytes for a token in an estimate. Most tokenizers need more, so the estimate is rather too large."""
TURN_TOKENS = 8
"""Tokens of a chat template around a message in an estimate."""
STEP = 64
"""Limits of tokens are multiples of this."""
SHORT_ANSWER = 60
"""Mean characters up to which right answers are compared as texts."""


@dataclass(frozen=True)
class Choice:
    """Settings that decide how much memory a stage needs."""

    tuning: str
    percentile: int = 99
    """Percentile of the rows' lengths that limits the length: 95 or 99."""
    evaluates: bool = True


def write_text(kind: str, options: argparse.Namespace, file: Path) -> tuple[str, str]:
    """Return the text of the pipeline for ``file``, and its plan, a line for each stage.

    Raises ``UserError`` for rows, a model or hardware that do not fit the kind of stage.
    """
    from align.capacity.hardware import parse_hardware
    from align.cli.plan_hardware import describe_fit

    hardware = parse_hardware(options.hardware)
    if hardware.devices > 1:
        raise UserError(f"--hardware {options.hardware}: `align init` writes files for one device, such as 24gb.")
    model = _find_model(options.model)
    data, rows = _read_rows(kind, options)
    model = _with_template(model, rows)
    lengths, counted = measure_lengths(rows, model)
    is_small = len(rows) < MOST_RECORDS
    values: dict[str, Any] = {
        "name": file.stem,
        "output": file,
        "card": options.hardware,
        "device": "cuda" if hardware.device.gpu else "cpu",
        "model": model.source,
        "file": Path(options.data).name,
        "rows": f"{len(rows):,}" if is_small else f"{len(rows):,} and more",
        "lengths": counted,
        "answer": options.answer,
        "test_size": 0.1 if is_small else 0.02,
        "epochs": 2 if is_small else 1,
        "updates": min(100, max(10, len(rows) // 4)),
        "prompt_tokens": round_up(lengths["prompt"][99]),
        "answer_tokens": min(RESPONSE_TOKENS, round_up(lengths["answer"][95])),
    }
    if kind == "grpo":
        values |= {"score": f"{{{choose_verifier(rows, options)}: {options.answer}}}", "answer_tokens": RESPONSE_TOKENS}

    def fill(choice: Choice, base: Path, plan: str = "", rate: str = "auto") -> str:
        """Return the text with a choice; its paths start at ``base``."""
        blocks = {"model_fields": _lines(model.model_dump(exclude_unset=True), base), "data_fields": _lines(data, base)}
        limits = {"share": choice.percentile, "max_length": round_up(lengths["row"][choice.percentile])}
        text = Template((shipped_root() / TEMPLATES / f"{kind}.yaml").read_text(encoding="utf-8"))
        filled = text.substitute(values | blocks | limits, tuning=TUNINGS[choice.tuning], plan=plan, rate=rate)
        if choice.evaluates:
            return filled
        training, _, _ = filled.partition("  evaluate:\n")
        return (
            f"{training}  # {options.hardware} cannot hold the whole model: only {kind} measures the held-out rows\n"
            f"  report:\n    stages: [model, data, {kind}]\n"
        )

    choice, pipeline, plans = _choose(kind, lambda choice: fill(choice, Path.cwd()), hardware, str(file))
    lines = [f"By `align plan`, {plan.name} {describe_fit(plan, hardware)}" for plan in plans]
    # The number is written, since a plan without the model's config.json could not find it.
    rate = f"{pipeline.nodes[kind].config.model_dump()['learning_rate']:.1e}".replace("e-0", "e-")
    return fill(choice, file.parent, "\n# ".join(lines), rate), "\n".join(lines)


def round_up(tokens: int) -> int:
    """Return the next multiple of ``STEP``."""
    return -(-max(tokens, 1) // STEP) * STEP


# ---- hardware, model and rows ----


def _find_model(word: str) -> ModelConfig:
    """Return the model stage of a folder, a built-in name, or a Hub name, perhaps with ``@COMMIT``.

    Raises ``UserError`` for a model that cannot be reached or has no known architecture.
    """
    from align.models.checkpoints.source import resolve
    from align.models.compute.architecture import UnknownArchitecture
    from align.models.model_plan import known_architecture

    name, _, revision = (word, "", "") if user_path(word).exists() else word.partition("@")
    try:
        source = resolve(name, revision or None, Path.cwd())
        known_architecture(name, source.revision, Path.cwd())
    except UnknownArchitecture as error:
        raise UserError(f"--model {word}: {error}.") from None
    except UserError as error:
        remedy = f" Here: --model {name}@COMMIT." if "write the commit" in str(error) else ""
        raise UserError(f"--model {word}: {error}{remedy}") from None
    # A revision that is not set is not written.
    return ModelConfig(source=name, revision=source.revision) if source.revision else ModelConfig(source=name)


def _with_template(model: ModelConfig, rows: Sequence[Row]) -> ModelConfig:
    """Return the model stage with a chat template if the model has none, and with the state of its thoughts."""
    from align.models.chat.named_templates import TEMPLATES as NAMED
    from align.models.chat.named_templates import fitting_templates
    from align.models.model_plan import check_template, known_vocabulary
    from align.models.planned_template import has_thinking_switch

    try:
        check_template(model, Path.cwd())
    except UserError:
        name = fitting_templates(known_vocabulary(model, Path.cwd()))[0]
        return model.model_copy(update={"chat_template": name if NAMED[name].tokens else "zephyr"})
    if not has_thinking_switch(model, Path.cwd()):
        return model
    has_thoughts = any("<think>" in message["content"] for row in rows for message in row.get("completion", ()))
    return model.model_copy(update={"thinking": "on" if has_thoughts else "off"})


def _read_rows(kind: str, options: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """Return the data stage of the file, and its rows. Raises ``UserError`` for rows that do not fit the kind."""
    from align.config.recipe.recipe import Recipe
    from align.data.builds.dataset_recipe import preview_rows
    from align.data.formats.column_guess import free_name, report_columns

    file, wanted = options.data, KINDS[kind]
    report = report_columns({"paths": [file]}, Path.cwd())
    names = [facts.name for facts in report.columns]
    shown = f"--data {file}: the columns are {', '.join(names)}"
    if kind == "grpo":
        if options.answer not in names:
            hint = suggest(options.answer, names) if options.answer else ""
            raise UserError(f"{shown}. Name the column with the right answer: --answer COLUMN.{hint}")
        column, options.answer = options.answer, free_name(options.answer)
        keep = [column] if column == options.answer else {options.answer: column}
        report = report_columns({"paths": [file], "keep": keep}, Path.cwd(), wanted)
    guess = report.guess
    needs = f"{kind} needs {CONTENTS.get(wanted, wanted)}"
    if guess is None:
        raise UserError(
            f"{shown}, and {needs}. Rename columns to prompt, completion, chosen and rejected, or write a recipe: "
            f"`align data columns {file}` shows what is in them."
        )
    if guess.kind != wanted:
        other = next((f" `align init {name}` learns from them." for name in KINDS if KINDS[name] == guess.kind), "")
        raise UserError(f"{shown}. These are {CONTENTS.get(guess.kind, guess.kind)}, and {needs}.{other}")
    if guess.bad:
        raise UserError(f"--data {file}: {guess.bad[0]} Correct the record, or remove it.")
    recipe = validate(Recipe, {"kind": guess.kind, "sources": [guess.source]}, file)
    rows = preview_rows(recipe, Path.cwd(), MOST_RECORDS) or []
    if len(rows) < FEWEST_ROWS:
        raise UserError(f"--data {file}: has {len(rows)} rows. Some are held out, so give at least {FEWEST_ROWS}.")
    hidden = ("type", "paths") if kind == "grpo" else ("type", "paths", "keep")
    mapping = {name: value for name, value in guess.source.items() if name not in hidden}
    return {"dataset": file, **({"kind": wanted} if kind == "grpo" else {}), **mapping}, rows


def measure_lengths(rows: Sequence[Row], model: ModelConfig) -> tuple[dict[str, dict[int, int]], str]:
    """Return percentiles of the tokens of rows, prompts and answers, and a sentence about the rows' percentiles.

    Tokens are counted with the model's tokenizer, or estimated from bytes if it is not on this machine.
    """
    from jinja2 import TemplateError

    from align.models.model_plan import known_positions
    from align.models.planned_template import token_counter

    chosen = rows[:: -(-len(rows) // COUNTED_ROWS)]
    counter = token_counter(model, Path.cwd()) or _estimate_tokens
    counts: dict[str, list[int]] = {"row": [], "prompt": [], "answer": []}
    for row in chosen:
        # The stage drops a row that its template refuses.
        with contextlib.suppress(TemplateError):
            prompt = counter(row["prompt"])
            for answer in [row[side] for side in ("completion", "chosen", "rejected") if row.get(side)] or [[]]:
                total = counter([*row["prompt"], *answer])
                for name, tokens in (("row", total), ("prompt", prompt), ("answer", total - prompt)):
                    counts[name].append(tokens)
    if not counts["row"]:
        raise UserError(f"the chat template of '{model.source}' refuses the rows, such as {rows[0]['prompt']}.")
    limit = known_positions(model.source, model.revision, Path.cwd()) or max(counts["row"])
    lengths = {
        name: {share: min(limit, sorted(tokens)[-(-share * len(tokens) // 100) - 1]) for share in (95, 99)}
        for name, tokens in counts.items()
    }
    how = "by the model's tokenizer and chat template"
    if counter is _estimate_tokens:
        how = f"estimated by {BYTES_PER_TOKEN} bytes a token, since the tokenizer's files are not here"
    low, high = lengths["row"].values()
    return lengths, f"Tokens of {len(chosen):,} rows: 95 % have at most {low:,}, 99 % at most {high:,}, {how}."


def _estimate_tokens(messages: Sequence[Mapping[str, Any]]) -> int:
    size = sum(len(str(message["content"]).encode()) for message in messages)
    return -(-size // BYTES_PER_TOKEN) + TURN_TOKENS * len(messages)


def choose_verifier(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """Return the verifier that reads the right answers of all rows. Raises ``UserError`` if none does."""
    from align.config.verifiers import VerifierFields
    from align.scoring.verifiers import open_verifier

    answers = [str(row[options.answer]) for row in rows]
    kinds = ["number", "choice"]
    if all(re.search(r"[\d\\^=]", text) for text in answers):
        kinds.append("math")
    if sum(map(len, answers)) <= SHORT_ANSWER * len(answers):
        kinds.append("exact")
    for kind in kinds:
        fields = VerifierFields.model_validate({kind: options.answer})
        verifier = open_verifier(fields, f"--answer {options.answer}")
        with contextlib.suppress(UserError):
            verifier.check_references(rows[:COUNTED_ROWS])
            return kind
    raise UserError(
        f"--answer {options.answer}: not all rows have a number, a letter, an expression or a short text there. Name a "
        "column with only the final answer, or write a function as in the example of `align init grpo`."
    )


# ---- the card ----


def _choices(kind: str) -> list[Choice]:
    """Return the settings to try, the best first."""
    if kind == "grpo":
        return [Choice("lora"), Choice("qlora")]
    adapters = [Choice(tuning, percentile) for percentile in (99, 95) for tuning in ("lora", "qlora")]
    # In 4 bits a model trains on a card that cannot sample from it.
    adapters += [replace(choice, evaluates=False) for choice in adapters]
    # DPO's reference is the policy without its adapter; full tuning needs a copy of the policy.
    return [Choice("full"), *adapters] if kind == "sft" else adapters


def _choose(
    kind: str, fill: Callable[[Choice], str], hardware: Hardware, where: str
) -> tuple[Choice, Pipeline, list[StagePlan]]:
    """Return the first choice with which all stages fit, and their plans. Raises ``UserError`` if none fits."""
    from align.capacity.plan import plan_hardware
    from align.runner.open_store import open_store

    usable = hardware.device.usable + hardware.device.context
    for choice in _choices(kind):
        pipeline = Pipeline(parse_yaml(fill(choice), where), where, Path.cwd())
        store = open_store(pipeline, None)
        plans = plan_hardware(pipeline, store, hardware)
        most = FULL_SHARE * usable if choice.tuning == "full" else usable
        if all(plan.best for plan in plans) and min(way.peak for way in plans[0].ways if way.fits) <= most:
            return choice, pipeline, plans
    failed = next(plan for plan in plans if plan.best is None)
    larger = (card for card in hardware.other_cards() if card.device.memory > hardware.device.memory)
    fitting = (card.label for card in larger if all(plan.best for plan in plan_hardware(pipeline, store, card)))
    remedy = next((f"Take --hardware {label}, a" for label in fitting), "Take a")
    raise UserError(
        f"{kind} fits on {hardware.label} with none of the settings that `align init` tries. With the smallest, "
        f"{TUNINGS[choice.tuning]}: {failed.name}: {failed.ways[0].obstacle}. {remedy} smaller model, or shorter rows."
    )


def _lines(block: Mapping[str, Any], base: Path) -> str:
    """Return the lines of a stage, with paths of the command line as a file in ``base`` writes them."""
    from align.data.formats.column_guess import flow_line

    lines = []
    for name, value in block.items():
        if name in ("source", "dataset") and (path := user_path(value)).exists() and not path.is_absolute():
            value = os.path.relpath(path, base)
        lines.append(flow_line({name: value}) + (f"  # {COMMENTS[name]}" if name in COMMENTS else ""))
    return "\n    ".join(lines)
