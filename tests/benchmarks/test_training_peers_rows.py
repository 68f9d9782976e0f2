"""Choice of rows that every side reads alike, their token counts, and the files that each side reads."""

import json
from pathlib import Path

from align.models.loading import load_tokenizer
from benchmarks.training_peers.model import export_model, render, token_counter
from benchmarks.training_peers.rows import choose_rows, conversations, data_folder, read_rows, write_rows
from benchmarks.training_peers.works import WORKS


def write_demo(folder, name, records):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(records))


def count_words(messages):
    return sum(len(message["content"].split()) for message in messages)


def pair(prompt, chosen="a", rejected="b"):
    turns = [{"from": "human", "value": prompt}]
    return {"conversations": turns, "chosen": {"from": "gpt", "value": chosen}, "rejected": {"value": rejected}}


def labeled(prompt, label, answer="yes"):
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "label": label}


def test_instruction_and_input_are_one_prompt(tmp_path):
    records = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Hi", "input": "", "output": ""}]
    write_demo(tmp_path, "alpaca_en_demo.json", records)
    (row,) = read_rows("sft", tmp_path)  # the second has no answer
    assert conversations(row) == [[{"role": "user", "content": "Add.\n1 2"}, {"role": "assistant", "content": "3"}]]


def test_pairs_of_several_turns_and_equal_answers_are_left_out(tmp_path):
    several = pair("x")
    several["conversations"] += [{"from": "gpt", "value": "y"}, {"from": "human", "value": "z"}]
    write_demo(tmp_path, "dpo_en_demo.json", [pair("one"), several, pair("two", "same", "same")])
    rows = read_rows("dpo", tmp_path)
    assert [row["prompt"][0]["content"] for row in rows] == ["one"]
    assert len(conversations(rows[0])) == 2


def test_tokens_of_a_pair_count_its_prompt_twice(tmp_path):
    write_demo(tmp_path, "dpo_en_demo.json", [pair("one two", "three", "four five")])
    rows = read_rows("dpo", tmp_path)
    chosen, tokens = choose_rows(rows, WORKS["dpo_full"], 1, count_words)
    assert chosen == rows
    assert tokens == (2 + 1) + (2 + 2)


def test_rows_that_do_not_fit_or_repeat_a_prompt_are_left_out(tmp_path):
    long = "word " * 600
    write_demo(tmp_path, "dpo_en_demo.json", [pair("a", rejected=long), pair("b"), pair("b", "c", "d"), pair("e")])
    chosen, _ = choose_rows(read_rows("dpo", tmp_path), WORKS["dpo_lora"], 2, count_words)
    assert [row["prompt"][0]["content"] for row in chosen] == ["b", "e"]


def test_labels_of_both_kinds_are_equally_many(tmp_path):
    labels = [True, True, True, False, True, False]
    write_demo(tmp_path, "kto_en_demo.json", [labeled(str(n), label) for n, label in enumerate(labels)])
    chosen, _ = choose_rows(read_rows("kto", tmp_path), WORKS["kto_lora"], 4, count_words)
    assert [row["label"] for row in chosen] == [True, True, False, False]


def test_too_few_rows_are_refused(refused, tmp_path):
    write_demo(tmp_path, "dpo_en_demo.json", [pair("a")])
    refused(lambda: choose_rows(read_rows("dpo", tmp_path), WORKS["dpo_lora"], 2, count_words))


def test_a_missing_data_folder_is_named(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path))
    refused(data_folder)


def test_files_for_llamafactory_name_its_columns(tmp_path):
    write_demo(tmp_path, "dpo_en_demo.json", [pair("one")])
    write_demo(tmp_path, "kto_en_demo.json", [labeled("two", False)])
    for kind in ("reward", "kto"):
        write_rows(read_rows(kind, tmp_path), kind, tmp_path / kind)
    reward, kto = ((tmp_path / kind / "llamafactory") for kind in ("reward", "kto"))
    info = json.loads((reward / "dataset_info.json").read_text())["train"]
    record = json.loads((reward / "train.jsonl").read_text())
    assert info["ranking"] is True
    assert {info["columns"][name] for name in ("messages", "chosen", "rejected")} == record.keys()
    assert record["chosen"] == {"role": "assistant", "content": "a"}
    record = json.loads((kto / "train.jsonl").read_text())
    assert json.loads((kto / "dataset_info.json").read_text())["train"]["columns"]["kto_tag"] == "label"
    assert record["label"] is False
    assert [message["role"] for message in record["messages"]] == ["user", "assistant"]


def test_tokens_are_those_of_the_exported_template(tmp_path: Path):
    folder = export_model(tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    conversation = [
        {"role": "user", "content": "Say <|im_end|>, then ä!\n"},
        {"role": "assistant", "content": " Done. "},
        {"role": "user", "content": "Thanks"},
    ]
    assert tokenizer.apply_chat_template(conversation, tokenize=False) == render(conversation)
    ids = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"]
    assert token_counter(folder)(conversation) == len(ids)
    # A prompt is a prefix of prompt and answer, as all sides need it.
    prompt = tokenizer.apply_chat_template(conversation[:1], tokenize=False, add_generation_prompt=True)
    assert render(conversation[:2]).startswith(prompt)
