"""Pieces of rows, checked against what the tokenizer and the training stages themselves say."""

from pathlib import Path

import pytest

from align.errors import UserError
from align.models.built_in import make_tiny_tokenizer
from align.report.dataset.token_views import Piece, load_preview_tokenizer, split_pieces, token_views
from align.training.rows import MASKED, encode_pairs, encode_supervised
from tests.support.data.sample_build import pair, row


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return make_tiny_tokenizer()


def text(pieces: list[Piece], trained: bool) -> str:
    return "".join(piece.text for piece in pieces if piece.trained is trained)


def test_an_instruction_is_trained_on_its_answer_and_end_of_turn(tokenizer) -> None:
    (view,) = token_views(tokenizer, row("Say hé.", "hé 你好"))
    pieces = view.pieces(tokenizer)
    assert text(pieces, False) == "<|im_start|>user\nSay hé.<|im_end|>\n<|im_start|>assistant\n"
    assert text(pieces, True) == "hé 你好<|im_end|>"
    assert [piece.text for piece in pieces if piece.special] == [
        "<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"
    ]  # fmt: skip
    encoded = encode_supervised(tokenizer, [row("Say hé.", "hé 你好")], 10**6).rows[0]
    assert list(view.ids) == encoded["input_ids"]
    assert list(view.trained) == [label != MASKED for label in encoded["labels"]]


def test_a_template_in_the_text_is_a_special_token_only_if_it_becomes_one(tokenizer) -> None:
    (view,) = token_views(tokenizer, row("a<|im_end|>b", "c"))
    assert [piece.text for piece in view.pieces(tokenizer) if piece.special].count("<|im_end|>") == 3
    assert view.ids.count(tokenizer.eos_token_id) == 3


def test_a_pair_is_trained_on_both_answers(tokenizer) -> None:
    chosen, rejected = token_views(tokenizer, pair("q", "good", "bad"))
    assert (chosen.title, rejected.title) == ("chosen", "rejected")
    assert text(chosen.pieces(tokenizer), True) == "good<|im_end|>"
    assert text(rejected.pieces(tokenizer), True) == "bad<|im_end|>"
    encoded = encode_pairs(tokenizer, [pair("q", "good", "bad")], 10**6).rows[0]
    assert list(chosen.ids) == encoded["prompt_ids"] + encoded["chosen_ids"]


def test_an_unfinished_answer_has_no_end_of_turn(tokenizer) -> None:
    chosen, _ = token_views(tokenizer, {**pair("q", "good", "bad"), "chosen_finished": False})
    assert text(chosen.pieces(tokenizer), True) == "good"


def test_a_pair_of_equal_answers_says_why_nothing_is_learned(tokenizer) -> None:
    chosen, rejected = token_views(tokenizer, pair("q", "same", "same"))
    assert chosen.notes == ("skipped: both answers are the same",)
    assert not any(chosen.trained) and not any(rejected.trained) and chosen.ids


def test_a_prompt_is_shown_up_to_where_the_answer_begins(tokenizer) -> None:
    prompt_row = {name: value for name, value in row("q", "a").items() if name != "completion"}
    (view,) = token_views(tokenizer, prompt_row)
    assert not any(view.trained)
    assert text(view.pieces(tokenizer), False).endswith("<|im_start|>assistant\n")


def test_a_cut_answer_is_shown_as_it_is_cut(tokenizer) -> None:
    length = len(token_views(tokenizer, row("q", "abcdef"))[0].ids)
    (view,) = token_views(tokenizer, row("q", "abcdef"), max_length=length - 3)
    assert text(view.pieces(tokenizer), True) == "abcd"
    assert view.notes == ("cut at max_length, so the answer has no end of turn",)
    (view,) = token_views(tokenizer, row("q", "abcdef"), max_length=8)
    assert view.notes == ("skipped: the prompt alone fills max_length",) and not any(view.trained)


def test_labels_and_responses_are_named(tokenizer) -> None:
    assert [v.title for v in token_views(tokenizer, row("q", "a", label=False))] == ["an undesirable answer"]
    prompt_row = {name: value for name, value in row("q", "a").items() if name != "completion"}
    several = [{"content": "x", "score": 0.5, "rank": None}, {"content": "y", "score": None, "rank": 1}]
    views = token_views(tokenizer, {**prompt_row, "responses": several})
    assert [view.title for view in views] == ["response 1 · score 0.5", "response 2 · rank 1"]
    assert text(views[1].pieces(tokenizer), True) == "y<|im_end|>"


def test_a_template_that_rewrites_prompts_is_reported_and_still_shown() -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("\\n<|im_start|>assistant\\n", "\\n<|im_start|>bot\\n")
    (view,) = token_views(tokenizer, row("q", "a"))
    assert "renders a prompt differently" in view.notes[0]
    assert view.ids and not any(view.trained)


def test_a_template_that_refuses_a_row_is_reported() -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    (view,) = token_views(tokenizer, row("q", "a"))
    assert view.ids == () and "no such role" in view.notes[0]


def test_pieces_are_the_whole_text_even_where_a_letter_is_cut() -> None:
    tokenizer = make_tiny_tokenizer()
    ids = tokenizer("aé b")["input_ids"]
    cut = [False, False, *[True] * (len(ids) - 2)]  # between the two bytes of é
    assert [piece.text for piece in split_pieces(tokenizer, ids, cut)] == ["a\ufffd", "\ufffd b"]


def test_spaces_between_runs_survive_tokenizers_that_strip_them() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "[unk]": 2}, "[unk]"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[unk]")
    assert tokenizer.decode([1]) == "two"  # the space is lost when decoded alone
    assert [piece.text for piece in split_pieces(tokenizer, [0, 1, 0], [False, True, True])] == ["one", " two one"]


def test_a_preview_tokenizer_ends_with_its_end_of_turn(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path / "model")
    loaded, notes = load_preview_tokenizer(tmp_path / "model")
    assert loaded.eos_token == "<|im_end|>"
    assert notes == [
        "eos is '<|endoftext|>', but turns end with '<|im_end|>', which a model stage makes the eos",
    ]


def test_a_folder_without_tokenizer_or_template_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no tokenizer.json"):
        load_preview_tokenizer(tmp_path / "empty")
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="no chat template"):
        load_preview_tokenizer(tmp_path / "base")


def test_tools_reach_the_template_in_every_view() -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = "{{ tools | map(attribute='name') | join }}" + tokenizer.chat_template
    tools = '[{"name": "clock"}]'
    prompt = {name: value for name, value in row("q", "a").items() if name != "completion"}
    for full_row in (row("q", "a"), prompt, pair("q", "good", "bad"), pair("q", "same", "same")):
        for view in token_views(tokenizer, {**full_row, "tools": tools}):
            assert text(view.pieces(tokenizer), False).startswith("clock<|im_start|>user"), full_row
