"""The parts of ``benchmarks.ppo_vs_trl`` that measure nothing: floors, tables, lengths, errors, fixed lengths."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from align.inference.protocol import Response, Sampling
from benchmarks.ppo_align import FixedLengths
from benchmarks.ppo_table import efficiency, efficiency_lines, floor_flops, matrix_flops, phases, table, tokens_line
from benchmarks.ppo_trl import Clock, Cutter
from benchmarks.ppo_vs_trl import RunFailed, curve_lines, run_module
from benchmarks.ppo_work import TRL, Shape, environment, load_work_tokenizer, make_rows, requirements, response_lengths


def make_run(seconds, **more):
    """Updates of these lengths, a tenth of each sampling, a fifth each of three phases."""
    updates = [
        {"sampling": 0.1 * s, "scoring": 0.2 * s, "measuring": 0.2 * s, "learning": 0.2 * s, "seconds": s}
        | {"prompt_tokens": 60, "response_tokens": 40, "read_tokens": 75}
        for s in seconds
    ]
    return {"updates": updates, "peak_gib": 2.0} | more


def make_rounds():
    sizes = {"parameters": {"all": 10, "head": 4}}
    return [
        {"align": make_run([10.0, 20.0], matrix_peak=1000.0, **sizes), "trl": make_run([30.0, 30.0])},
        {"align": make_run([10.0, 10.0], matrix_peak=500.0, **sizes), "trl": make_run([20.0, 20.0])},
    ]


def test_flops_floor_of_full_and_lora_training():
    assert floor_flops("full", parameters=10, tokens=100) == 16 * 10 * 100
    assert floor_flops("lora", parameters=10, tokens=100) == 12 * 10 * 100
    assert floor_flops("lora_last", parameters=10, tokens=100) == 9 * 10 * 100


def test_needed_products_exclude_embedding_and_prompt_heads():
    # trunk of 6 for 100 tokens, head of 4 for 40: full 16 * 600 + (6 + 2) * 160, lora 12 * 600 + (4 + 2) * 160
    assert matrix_flops("full", 10, 4, prompt_tokens=60, response_tokens=40) == 9600 + 1280
    assert matrix_flops("lora", 10, 4, prompt_tokens=60, response_tokens=40) == 7200 + 960


def test_phases_account_for_the_whole_update():
    actual = phases(make_run([10.0, 20.0]))
    assert actual["seconds"] == 15.0
    assert actual["other"] == pytest.approx(0.3 * 15)
    assert actual["per_token"] == pytest.approx(150.0)  # 15 s over 100 tokens
    assert actual["per_response_token"] == pytest.approx(375.0)


def test_table_has_ratios_round_by_round_and_their_median():
    lines = {line.split(",")[0].strip(): line.split() for line in table(make_rounds())}
    assert lines["whole update"] == ["whole", "update,", "s", "12.50", "25.00", "0.50", "0.50", "0.50"]
    assert lines["peak memory"][-3:] == ["1.00", "1.00", "1.00"]
    assert len(lines["other"]) == 4  # no ratio


def test_table_of_align_alone():
    rounds = [{"align": entry["align"]} for entry in make_rounds()]
    assert {len(line.split(",")[-1].split()) for line in table(rounds)[1:]} == {2}


def test_efficiency_uses_the_best_matrix_rate():
    actual = efficiency(make_rounds(), "full")
    assert actual["matrix_peak"] == 1000.0
    # updates of 10, 20, 10, 10 s, 0.6 of each the update phase: the median is 6 s; 16 000 FLOPs at 1000/s are 16 s
    assert actual["update_phase"] == pytest.approx(6.0)
    assert actual["share"] == pytest.approx(16 / 6)
    assert actual["share_needed"] == pytest.approx(10.88 / 6)
    assert actual["share_read"] == pytest.approx(12 / 6)
    assert "267% of the matrix peak; 181%" in efficiency_lines(make_rounds(), "full")[1]


def test_tokens_of_both_sides_are_named():
    assert tokens_line(make_rounds()).endswith("align 60 prompt + 40 response; trl 60 prompt + 40 response")


def test_curve_shows_a_side_that_failed_as_missing():
    point = {"method": "full", "batch": 32, "tokens": 512, "runs": {"align": make_run([10.0])}}
    assert curve_lines([point])[1].split() == ["full", "32", "512", "10.0", "100.00", "2.0", "-", "-", "-"]


def test_lengths_are_the_same_each_time_and_one_is_full():
    shape = Shape(batch=8, tokens=32, updates=3)
    draws = response_lengths(shape)
    assert draws == response_lengths(shape)
    assert all(max(lengths) == 32 and min(lengths) >= 4 and len(lengths) == 8 for lengths in draws)
    assert response_lengths(Shape(batch=2, tokens=5, lengths="full", updates=1)) == [[5, 5]]


def test_prompts_differ_and_take_turns_in_size():
    rows = make_rows(Shape(batch=8, samples=2, instructions=2, updates=2))
    contents = [row["prompt"][0]["content"] for row in rows]
    assert len(set(contents)) == len(contents) == 8
    assert ["\n\n" in content for content in contents[:4]] == [False, True, False, True]


def test_a_named_template_takes_the_place_of_the_models(tiny_model):
    own = load_work_tokenizer(tiny_model, Shape()).chat_template
    named = load_work_tokenizer(tiny_model, Shape(template="zephyr")).chat_template
    assert own != named
    assert "<|assistant|>" in named


def test_only_torch_has_a_range():
    trl, *same, torch_range = requirements()
    assert trl == f"trl=={TRL}"
    assert all("==" in entry for entry in same)
    assert torch_range.startswith("torch>=") and ",<" in torch_range


def test_environment_refuses_a_folder_of_something_else(refused, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    refused(environment, tmp_path)


def test_environment_refuses_another_trl(refused, tmp_path):
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text("""#!/bin/sh\necho '{"trl": "0.9.6"}'\n""")
    python.chmod(0o755)
    refused(environment, tmp_path)


def test_a_failed_process_shows_its_last_lines(tmp_path):
    with pytest.raises(RunFailed, match=r"exit code 1[\s\S]*JSONDecodeError"):
        run_module(Path(sys.executable), "benchmarks.ppo_work", ["no json", str(tmp_path)], tmp_path / "log")


def test_trl_side_imports_without_trl_and_align():
    code = "import sys; import benchmarks.ppo_trl; sys.exit(any(m in sys.modules for m in ('align', 'trl', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_cutter_ends_responses_where_the_work_says():
    cutter = Cutter([[1, 3]], end=9)
    queries = torch.tensor([[0, 5], [6, 7]])
    sampled = torch.cat([queries, torch.tensor([[1, 2, 3], [4, 0, 8]])], dim=1)  # 0 is the pad: it may not end a row
    both, logits = cutter.wrap(lambda *_: (sampled, "logits"))(None, queries, 0, None)
    assert both.tolist() == [[0, 5, 1, 0, 0], [6, 7, 4, 9, 8]]
    assert logits == "logits"
    assert cutter.take() == {"prompt_tokens": 3, "response_tokens": 4}
    assert cutter.take() == {"prompt_tokens": 0, "response_tokens": 0}


def test_clock_splits_an_update_without_gaps():
    clock, reward = Clock(), object()
    clock.begin()
    clock.sampling(lambda: None)()
    clock.scoring(lambda model: None, reward)(reward)
    clock.learning(lambda: None)()
    clock.end(response_tokens=1)
    (update,) = clock.updates
    parts = sum(update[name] for name in ("sampling", "scoring", "measuring", "learning"))
    assert 0 < parts <= update["seconds"]
    assert update["response_tokens"] == 1


class LongEngine:
    """Answers every prompt with five tokens, as an engine that is told to ignore the end token."""

    name, dtype, eos = "transformers", torch.float32, 2
    tokenizer = load_weights = score_tokens = close = None

    def generate(self, prompts, sampling, on_progress=None):
        return [[Response([1] * 5, [0.0] * 5, False, "") for _ in range(sampling.n)] for _ in prompts]


def test_fixed_lengths_reduce_the_work():
    engine = LongEngine()
    engine.tokenizer = type("Tokenizer", (), {"decode": staticmethod(lambda ids, **_: "x" * len(ids))})
    work = {"shape": Shape(samples=2), "prompts": [[[7], [7], [8, 8], [8, 8]]], "lengths": [[1, 2, 3, 4]]}
    fixed = FixedLengths(engine, work)
    probe = fixed.generate([[3]], Sampling(5))
    assert len(probe[0][0].token_ids) == 5
    responses = fixed.generate([[7], [8, 8]], Sampling(5, n=2))
    assert [response.text for some in responses for response in some] == ["x", "xx", "xxx", "xxxx"]
    assert fixed.counts == [{"prompt_tokens": 6, "response_tokens": 10}]
    assert engine.eos == 2
