"""The linter's rules: name, severity, fault and remedy of each. Torch-free.

An *error* means that a row teaches something wrong; it stops a training stage unless it is waived by name. A *warning*
wastes rows or makes metrics doubtful. A *note* is a fact worth knowing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Rule:
    """One kind of fault. A stage counts the ``counted`` ones over all rows itself, and warns of them anyway."""

    severity: Severity
    what: str
    remedy: str
    counted: bool = False


RULES: dict[str, Rule] = {
    # The template and the tokenizer.
    "template-of-another-family": Rule(
        "error",
        "the chat template writes turn tokens that the tokenizer does not have, or leaves unused those that it has",
        "Take the chat template that belongs to the tokenizer, or add the template's tokens to it and train them.",
    ),
    "special-token-split": Rule(
        "error",
        "a special token of the template reaches the model in pieces",
        "Register it with `add_special_tokens`, and do not tokenize with `split_special_tokens`.",
    ),
    "generation-prompt-differs": Rule(
        "error",
        "training puts another beginning before the answer than sampling will",
        "Take a chat template whose generation prompt is the beginning of an assistant turn, for both.",
    ),
    "text-before-answer": Rule(
        "note",
        "the template writes text between the generation prompt and the answer, such as an empty thought",
        "Nothing: it is trained with the answer, as such models have it. Sampled answers will begin with it.",
    ),
    "earlier-turns-unclosed": Rule(
        "warning",
        "the template writes no end token after earlier answers of a conversation, or after any answer",
        "Write the end token after every answer, as the model will sample it.",
    ),
    "pad-is-eos": Rule(
        "warning",
        "the tokenizer pads with its end token, which collators that mask padding by its id then mask in answers too",
        "Bring the model in through a model stage, or set pad_token to another special token.",
    ),
    "template-refuses-row": Rule(
        "error",
        "the chat template raises an error on a row",
        "Change the row's roles to those the template takes, with a normalize step, or leave the row out.",
    ),
    "unexpected-system-prompt": Rule(
        "note",
        "the template puts a system prompt into conversations that have none",
        "Nothing, if the same template serves the model; else give rows a system turn, or edit the template.",
    ),
    # Token ids.
    "double-bos": Rule(
        "error",
        "a row begins with the beginning-of-sequence token twice",
        "Tokenize rendered text with `add_special_tokens=False`, or take the token out of the template.",
    ),
    "id-beyond-embeddings": Rule(
        "error",
        "a token id has no row in the model's embeddings",
        "Tokenizer and weights are not of one model: take matching ones, or resize the embeddings.",
    ),
    "over-context": Rule(
        "error",
        "a row is longer than the model's context",
        "Lower max_length to the model's context, or leave the row out.",
    ),
    "prompt-truncated": Rule(
        "error",
        "a row has lost the beginning of its first turn",
        "Raise max_length, leave long rows out, or cut at the end (`truncation_mode: keep_start`).",
    ),
    "turn-rewritten": Rule(
        "warning",
        "the text of a turn is not among the tokens as it was written",
        "The template drops or changes it (some drop thoughts or system turns): change the template or the row.",
    ),
    "pack-leak": Rule(
        "error",
        "positions do not start anew where a packed document begins, or its first token has a label",
        "Pack with a collator that gives position ids per document (`packing_strategy: bfd`).",
    ),
    # Labels.
    "missing-eos": Rule(
        "error",
        "an answer that ended has no end-of-turn token in its labels: the model never learns to stop",
        "Take a tokenizer whose eos is the template's end of turn, and a template that writes it after answers.",
    ),
    "cut-off-answer-ended": Rule(
        "error",
        "an answer that was cut off has an end-of-turn token all the same: the model learns to stop in mid-sentence",
        "Render it without its end where the row's completion_finished (chosen_, rejected_) is False, or leave it out.",
    ),
    "eos-masked": Rule(
        "error",
        "the end-of-turn token follows the answer but its label is masked: the model never learns to stop",
        "Pad with a token other than eos, mask padding by position, and put the turn's end inside the mask.",
    ),
    "labels-all-masked": Rule(
        "error",
        "no token of a row has a label, so nothing is learned from it",
        "Raise max_length; with `assistant_only_loss`, take a template with {% generation %} markers.",
    ),
    "labels-none-masked": Rule(
        "error",
        "every token of a row has a label, the prompt's too",
        "Train on answers only: prompt/completion rows, or `assistant_only_loss`.",
    ),
    "user-tokens-supervised": Rule(
        "error",
        "labels cover a user's or system's turn: the model learns to speak for them",
        "Mask all but the assistant's turns; a template needs {% generation %} markers for that.",
    ),
    "middle-turns-unsupervised": Rule(
        "error",
        "an assistant turn in the middle of a conversation has no labels though all are meant to",
        "Take a template whose {% generation %} markers enclose every assistant turn.",
    ),
    "mask-shifted": Rule(
        "error",
        "the labeled tokens are not those of the answer",
        "Build the mask from token offsets of the same rendering, and label each token with itself.",
    ),
    "padding-supervised": Rule(
        "error",
        "a row has other labels in a batch than alone: padding is labeled",
        "Pad labels with -100, by position.",
    ),
    "answer-truncated": Rule(
        "warning",
        "an answer is cut at max_length and so has no end",
        "Raise max_length, or leave long rows out with a filter step.",
        counted=True,
    ),
    "no-room-for-answer": Rule(
        "warning",
        "the prompt alone fills max_length: the row has no labels and is left out",
        "Raise max_length, or leave long prompts out with a filter step.",
        counted=True,
    ),
    "over-max-length": Rule(
        "warning",
        "a row is longer than max_length and is left out",
        "Raise max_length, or leave long rows out with a filter step.",
        counted=True,
    ),
    # Turns, as written.
    "empty-answer": Rule(
        "error",
        "an answer is empty: the model learns to say nothing",
        "Leave the row out with a filter step.",
    ),
    "empty-turn": Rule(
        "warning",
        "a turn of the prompt is empty",
        "Leave the row out with a filter step.",
    ),
    "repeated-role": Rule(
        "warning",
        "two turns in a row are the same speaker's",
        "Join them, or leave the row out, with a normalize step.",
    ),
    "unknown-role": Rule(
        "error",
        "a turn's role is none of system, user, assistant and tool; templates print it as it is",
        "Rename the role (sharegpt's `human` is `user`, `gpt` is `assistant`).",
    ),
    "unreadable-call": Rule(
        "error",
        "a tool call of an answer cannot be read back from what the template writes, so that no episode could run it",
        "Correct the call, or take a template that writes calls in a known format.",
    ),
    "unknown-tool": Rule(
        "warning",
        "an answer calls a tool that its row does not offer",
        "Add the tool to the row's tools, or leave the row out.",
    ),
    "wrong-arguments": Rule(
        "warning",
        "a tool call of an answer has arguments that the row's own schema of the tool does not allow",
        "Correct the call or the schema, or leave the row out.",
    ),
    "result-without-call": Rule(
        "warning",
        "a turn has the result of a tool, and no turn before it calls one",
        "Restore the call (`tool_calls` of the assistant's turn), or leave the row out.",
    ),
    "unclosed-thought": Rule(
        "error",
        "the thought of an answer is never closed: the model learns to end its turn without an answer",
        "Close the thought and write the answer after it, mark the answer as cut off, or leave the row out.",
    ),
    "thought-without-answer": Rule(
        "error",
        "the thought makes up a whole answer: the model learns to end its turn without an answer",
        "Write the answer after the thought, or leave the row out.",
    ),
    "special-token-in-content": Rule(
        "error",
        "the text of a turn contains a control token, which ends or opens turns inside it",
        "Leave the row out or rewrite it with a normalize step.",
    ),
    "turn-marker-in-content": Rule(
        "warning",
        "the text of a turn contains the template's own mark of a turn, which no token sets apart",
        "Leave the row out, or rewrite the mark.",
    ),
    "not-utf8": Rule(
        "warning",
        "text with bytes that were not UTF-8 (replacement characters or lone surrogates)",
        "Read the source in its own encoding, or leave the row out.",
    ),
    "placeholder": Rule(
        "warning",
        "a {{placeholder}} was never filled in",
        "Fill it in, or leave the row out.",
    ),
    "foreign-token-in-content": Rule(
        "warning",
        "the text of a turn contains the mark of a turn of another model's template",
        "Split the rendered text into turns, or take the mark out, with a normalize step.",
    ),
    "speaker-label-in-content": Rule(
        "note",
        "the text of a turn has the label of a speaker, as a transcript has it",
        "Nothing where a text quotes a conversation; else split it into turns.",
    ),
    "invisible-character": Rule(
        "note",
        "text with characters that have no width (zero-width spaces, byte order marks)",
        "Take them out with a normalize step.",
    ),
    "direction-override": Rule(
        "warning",
        "text with characters that change its direction: what a person reads is not what the model learns",
        "Take them out with a normalize step, or leave the row out.",
    ),
    "assistant-speaks-first": Rule(
        "warning",
        "the first turn of a conversation is the assistant's",
        "Leave the turn out, or give it a user turn before it.",
    ),
    "system-turn-inside": Rule(
        "warning",
        "a system turn stands inside a conversation; many templates move, drop or refuse it",
        "Put it first, or make it part of a user's turn.",
    ),
    "white-space-changed": Rule(
        "warning",
        "the template changes the white space of a turn: indentation is lost, or runs of spaces become one",
        "Take a template that writes a turn as it is.",
    ),
    "trailing-space-stripped": Rule(
        "note",
        "the template strips the white space at the end of an answer",
        "Nothing, unless it matters for your answers.",
    ),
    "one-answer-for-all": Rule(
        "warning",
        "most rows have the same answer",
        "Look at the source: a column may be mapped wrongly. Cap repeated answers, or balance the classes.",
    ),
    "answer-in-prompt": Rule(
        "warning",
        "a user's turn has the whole answer in it, in a good share of the rows",
        "Look at the mapping of the columns: the answer may be part of both. Waive it if the task is to quote.",
    ),
    "roles-swapped": Rule(
        "warning",
        "nearly all answers are questions and no prompt is: users and assistants look swapped in every row",
        "Look at a few rows, and correct the mapping or `roles` of the source.",
    ),
    "prompt-with-several-answers": Rule(
        "note",
        "a prompt has another answer in an earlier row",
        "Nothing, if several answers are meant; else keep one of them.",
    ),
    # The model.
    "untrained-token": Rule(
        "warning",
        "a control token of the template has an embedding that was never trained",
        "Take the model's own template, or train the embeddings (`tuning: {method: full}`).",
    ),
    "rows-dropped": Rule(
        "warning",
        "the trainer has left out rows without a word",
        "Raise max_length, or leave long rows out with a filter step.",
    ),
    "no-rows-left": Rule(
        "error",
        "the trainer's dataset has no rows",
        "Raise max_length, or look at what the trainer's preparation filters.",
    ),
    # Pairs.
    "sides-differ-in-case-alone": Rule(
        "warning",
        "the two answers of a pair differ in case or white space alone",
        "Leave the pair out, unless that is what is to be learned.",
    ),
    "sides-differ-in-punctuation": Rule(
        "warning",
        "the two answers of a pair differ only in the marks at the ends of words",
        "Leave the pair out, unless that is what is to be learned.",
    ),
    "pairs-contradict": Rule(
        "warning",
        "two pairs of one prompt prefer the same two answers the other way round",
        "Keep one of them, by a majority of its annotators, or leave both out.",
    ),
    "sides-swapped": Rule(
        "warning",
        "chosen and rejected look swapped in a good share of the pairs",
        "Look at pairs on both sides of the split; correct the mapping of the source that swaps them.",
    ),
    "chosen-equals-rejected": Rule(
        "warning",
        "both answers of a pair are the same tokens, so there is nothing to learn",
        "Leave the pair out; where only truncation makes them equal, raise max_length.",
    ),
    "pair-prompts-differ": Rule(
        "error",
        "chosen and rejected answer different prompts",
        "Split the turns before comparing them, and leave out pairs whose prompts differ.",
    ),
    "length-imbalance": Rule(
        "warning",
        "one answer of a pair is many times longer than the other in a good share of the pairs",
        "Leave such pairs out; else the model learns length.",
    ),
    "length-bias": Rule(
        "warning",
        "nearly always the longer (or the shorter) answer is the chosen one",
        "Compare with the accuracy of preferring the longer answer; balance the pairs, or normalize by length.",
    ),
    "labels-contradict": Rule(
        "warning",
        "the same answer to the same prompt has both labels",
        "Keep one of them, by a majority of its annotators, or leave both out.",
    ),
    "label-skew": Rule(
        "warning",
        "nearly all labels are the same",
        "Balance the labels, or weigh them (`desirable_weight`, `undesirable_weight`).",
    ),
    # Between rows.
    "leaked-prompt": Rule(
        "warning",
        "a prompt of the test split is in the train split too: scores on it say little",
        "Split by prompt, as a recipe does, or decontaminate against the test split.",
    ),
    "nearly-leaked-prompt": Rule(
        "note",
        "most of a test prompt's word sequences are in one training prompt",
        "Look at the examples; add a near-duplicate step before the split.",
    ),
    "leaked-answer": Rule(
        "note",
        "a long answer of the test split is a training row's answer to another prompt",
        "Decontaminate against the test split, replies included.",
    ),
    "duplicate-row": Rule(
        "note",
        "the same tokens as an earlier row",
        "Add an exact duplicate step, unless the repetition is meant.",
    ),
}
"""Every rule by name, in the order of a report."""
