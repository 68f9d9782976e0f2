"""Faults of checkpoints that one stage hands to the next, by name, with remedies. Torch-free."""

from __future__ import annotations

REMEDIES: dict[str, str] = {
    "weights-truncated": "Copy the files again, or have the stage that made them run again with --rebuild.",
    "weights-not-finite": "Train again with a lower learning rate, or from an earlier checkpoint; nothing can be "
    "learned from these.",
    "weights-dtype": "Take the checkpoint in float32, bfloat16 or float16, as its stage wrote it.",
    "vocabulary-size": "Take weights and tokenizer of one model; resize_token_embeddings gives added tokens rows.",
    "score-head": "Point at the output of a reward stage, and keep its files together.",
    "wrong-kind": "A policy writes (...ForCausalLM), a reward model scores (...ForSequenceClassification): point at "
    "the stage that makes what is wanted.",
    "adapter-base": "Name the base that the adapter was trained on.",
    "template-changed": "Put the chat template back, or give it to the `model` stage (`chat_template`) and train again "
    "from there, so that every checkpoint learns it.",
    "tokenizer-changed": "Put the tokenizer's files back, or take checkpoints that come from the same base model.",
    "pad-is-eos": "Bring the model in through a `model` stage, or set pad_token to another special token.",
    "eos-not-turn-end": "Bring the model in through a `model` stage, which takes the template's end of turn as eos.",
    "reward-floor": "Give the reward model more or cleaner pairs, or more held-out ones; `reward_floor: null` trains "
    "against it all the same.",
}
"""Every fault and its remedy."""
