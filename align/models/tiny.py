"""Create the two-layer model of the tests and of ``pipelines/smoke.yaml``, without a download.

It has everything a real chat model has (special tokens, chat template, tied embeddings, safetensors), is untrained and
smaller than a megabyte. The head size is 32 because vLLM's CPU attention refuses 16. The tokenizer has one token per
byte, so it encodes any text.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

HEAD_DIM = 32

END_OF_TEXT, TURN_START, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, PAD)
"""Ids 0 to 3; the end of a turn is id 2, as in SmolLM2."""

# The line break is before a turn, not after it: a conversation then ends with the end-of-turn token, which is the
# last token a policy learns, samples and is scored at.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte after the four special tokens: 260 in all."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=TURN_START,
        eos_token=TURN_END,
        pad_token=PAD,
        unk_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


MAX_POSITIONS = 2048


def _config(vocabulary_size: int, hidden_size: int, layers: int, **extra: Any) -> LlamaConfig:
    from transformers import LlamaConfig

    # The head size is fixed, so a wider model has more heads.
    heads = max(1, hidden_size // HEAD_DIM)
    return LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=SPECIAL_TOKENS.index(TURN_START),
        eos_token_id=SPECIAL_TOKENS.index(TURN_END),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        tie_word_embeddings=True,
        initializer_range=0.1,  # large enough that two tokens in a row visibly change the next one's distribution
        dtype="float32",
        **extra,
    )


def make_tiny(out_dir: Path, seed: int = 0, hidden_size: int = 64, layers: int = 2) -> Path:
    """Write a tiny causal language model and its tokenizer to ``out_dir``; the same seed gives the same bytes.

    ``hidden_size`` is a multiple of 32. The caller's random state is left as it was.
    """
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = make_tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(len(tokenizer), hidden_size, layers))
    model.generation_config.do_sample = True
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return out_dir


def make_tiny_reward(out_dir: Path, seed: int = 0, hidden_size: int = 64, layers: int = 2) -> Path:
    """Write a tiny reward model: one score per conversation, by a random head that is saved."""
    import torch
    from transformers import LlamaForSequenceClassification

    tokenizer = make_tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(_config(len(tokenizer), hidden_size, layers, num_labels=1))
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return out_dir
