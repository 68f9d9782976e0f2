"""Gates: who they hold for, what fails, what the message says; against cards written by hand."""

import json
import math

import pytest

from align.config.stages.evaluation.gates import Bound, Gate, GateConfig, parse_gates
from align.evaluation.scorecard import SystemInfo
from align.evaluation.scorecard.gates import check_gates, default_gates, evaluate_gates, failed_gates

ROLES = {"model": "base", "sft": "checkpoint", "ppo": "checkpoint", "shots": "prompted", "best8": "best_of"}
SYSTEMS = [SystemInfo(name, name, role, "key") for name, role in ROLES.items()]
METRIC = "ifeval.prompt_strict"


def estimate(value: float | None, low: float | None = None, high: float | None = None) -> dict:
    return {"value": value, "low": low, "high": high, "n": 541, "method": "wilson"}


def card(estimates: dict, differences: list | tuple = (), roles: dict = ROLES, reference: str = "sft") -> dict:
    return {
        "systems": [{"name": name, "role": role} for name, role in roles.items()],
        "reference": reference,
        "base": next((name for name, role in roles.items() if role == "base"), None),
        "estimates": {name: {METRIC: value} for name, value in estimates.items()},
        "differences": list(differences),
    }


def difference(policy: str, against: str, value: float, low: float | None, high: float | None, metric=METRIC) -> dict:
    return {"policy": policy, "against": against, "metric": metric, "value": value, "low": low, "high": high}


def one(text: str, actual: dict, **more) -> dict:
    [row] = evaluate_gates(parse_gates({METRIC: {"bound": text, "systems": ["ppo"], **more}}, ROLES, "sft"), actual)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    return row


FELL = card(
    {"sft": estimate(0.38, 0.34, 0.42), "ppo": estimate(0.31, 0.27, 0.35), "model": estimate(0.2)},
    [difference("ppo", "sft", -0.07, -0.1, -0.04)],
)


def test_violation_against_system_shows_difference_and_interval():
    row = one(">= sft - 0.02", FELL)
    assert row["passed"] is False
    assert row["clear"] is True
    assert row["text"] == (
        "ifeval.prompt_strict of ppo is 0.31, below sft - 0.02 = 0.36 (ppo - sft: -0.07, 95 % interval -0.1 to -0.04)"
    )
    assert (row["value"], row["bound"]) == (0.31, pytest.approx(0.36))
    # on the scale of the value: as far from it as -0.1 and -0.04 are from -0.07
    assert (row["low"], row["high"]) == (pytest.approx(0.28), pytest.approx(0.34))
    assert row["difference"] == {"against": "sft", "value": -0.07, "low": -0.1, "high": -0.04}
    assert (row["expression"], row["level"], row["system"]) == (">= sft - 0.02", "error", "ppo")
    assert failed_gates([row]) == [row["text"]]


@pytest.mark.parametrize(
    ("text", "passed", "clear"),
    [
        (">= sft - 0.07", True, False),  # just kept
        (">= sft - 0.06", False, False),  # beyond, but 0.34 reaches 0.32
        (">= sft - 0.04", False, False),  # the interval's end is the bound, which >= keeps
        ("> sft - 0.04", False, True),  # and > does not
        (">= sft - 0.03", False, True),
        ("<= sft - 0.08", False, False),
        ("<= sft - 0.11", False, True),
        ("<= sft * 0.5", False, True),
        ("< model + 0.5", True, False),
    ],
)
def test_clear_means_the_whole_interval_is_beyond(text, passed, clear):
    row = one(text, FELL)
    assert (row["passed"], row["clear"]) == (passed, clear)


def test_deciding_by_the_interval_fails_only_what_is_clear():
    assert one(">= sft - 0.06", FELL, decide="interval")["passed"] is True
    assert one(">= sft - 0.03", FELL, decide="interval")["passed"] is False
    assert one(">= sft - 0.06", FELL, decide="value")["passed"] is False


def test_a_number_of_its_own_shows_its_own_interval():
    row = one(">= 0.36", FELL)
    assert row["text"] == "ifeval.prompt_strict of ppo is 0.31, below 0.36 (95 % interval 0.27 to 0.35)"
    assert (row["passed"], row["clear"], row["low"], row["high"], row["difference"]) == (False, True, 0.27, 0.35, None)
    remaining = one("<= 0.36", FELL)
    assert remaining["text"].startswith("ifeval.prompt_strict of ppo is 0.31, at most 0.36 (")
    assert failed_gates([remaining]) == []


def test_a_difference_the_card_has_the_other_way_round_is_turned():
    turned = FELL | {"differences": [difference("sft", "ppo", 0.07, 0.04, 0.1)]}
    assert one(">= sft - 0.03", turned) == one(">= sft - 0.03", FELL)


def test_pair_that_is_not_compared_has_no_interval():
    apart = FELL | {"differences": [difference("ppo", "sft", -0.07, -0.1, -0.04, "other.metric")]}
    row = one(">= sft - 0.02", apart)
    assert "no interval: the scorecard does not compare them" in row["text"]
    assert (row["passed"], row["clear"], row["low"], row["high"]) == (False, False, None, None)
    undecided = one(">= sft - 0.02", apart, decide="interval")
    assert undecided["passed"] is None
    assert failed_gates([undecided]) == [undecided["text"]]
    assert one(">= sft - 0.08", apart, decide="interval")["passed"] is True  # an interval holds its own value


@pytest.mark.parametrize("hole", [None, math.nan, math.inf])
def test_a_missing_number_is_undecided_and_fails_at_level_error(hole):
    for text, absent, actual in [
        (">= 0.3", "ppo", {"ppo": estimate(hole), "sft": estimate(0.3)}),
        (">= sft", "sft", {"ppo": estimate(0.3), "sft": estimate(hole)}),
        (">= sft", "sft", {"ppo": estimate(0.3)}),
        (">= sft", "ppo", {"sft": estimate(0.3)}),
    ]:
        row = one(text, card(actual))
        assert row["passed"] is None
        assert row["text"] == f"ifeval.prompt_strict of ppo cannot be compared with {text}: {absent} has no {METRIC}"
        assert failed_gates([row]) == [row["text"]]
        assert failed_gates([one(text, card(actual), level="warning")]) == []


def test_an_interval_without_an_end_is_never_clear():
    actual = card(
        {"ppo": estimate(0.31, None, 0.35), "sft": estimate(0.3)}, [difference("ppo", "sft", 0.01, None, 0.1)]
    )
    assert one("<= 0.1", actual)["clear"] is False
    assert one(">= 0.36", actual)["clear"] is True
    assert one("<= sft - 0.1", actual)["low"] is None


def test_numbers_close_to_bound_show_enough_digits():
    assert "is 0.35998, below 0.36" in one(">= 0.36", card({"ppo": estimate(0.35998)}))["text"]
    assert "is 1235, above 1200" in one("<= 1200", card({"ppo": estimate(1235.2)}))["text"]


def holds_for(raw: dict, roles: dict = ROLES, reference: str = "sft") -> list[str]:
    gates = parse_gates(raw, roles, reference)
    result = card({name: estimate(0.5) for name in roles}, roles=roles, reference=reference)
    return [row["system"] for row in evaluate_gates(gates, result)]


def test_who_a_gate_holds_for():
    roles = ROLES | {"dpo": "checkpoint"}
    assert holds_for({METRIC: ">= 0.3"}, roles) == ["ppo", "dpo"]
    assert holds_for({METRIC: ">= sft"}, roles) == ["ppo", "dpo"]
    assert holds_for({METRIC: ">= reference"}, roles) == ["ppo", "dpo"]
    assert holds_for({METRIC: ">= dpo"}, roles) == ["ppo"]
    assert holds_for({METRIC: ">= shots"}, roles) == ["ppo", "dpo"]
    # against the base the reference is a trained checkpoint like any other
    assert holds_for({METRIC: ">= base"}, roles) == ["sft", "ppo", "dpo"]
    assert holds_for({METRIC: ">= model"}, roles) == ["sft", "ppo", "dpo"]
    assert holds_for({METRIC: ">= 0.3"}, roles, reference="model") == ["sft", "ppo", "dpo"]
    assert holds_for({f"sft/{METRIC}": ">= 0.3"}, roles) == ["sft"]
    assert holds_for({f"base/{METRIC}": ">= 0.3"}, roles) == ["model"]
    assert holds_for({METRIC: {"bound": ">= 0.3", "systems": ["best8", "reference", "sft"]}}, roles) == ["best8", "sft"]


def test_a_system_that_is_called_base_comes_before_the_alias():
    roles = {"model": "base", "base": "checkpoint", "ppo": "checkpoint"}
    assert holds_for({METRIC: ">= base"}, roles, reference="model") == ["ppo"]


def test_every_spelling_of_the_block():
    gates = parse_gates(
        {
            METRIC: ">= sft - 0.02",
            "kl_to_sft": "<= 15",
            "ppo/gold": {"bound": ">= 0.5", "level": "warning", "decide": "interval"},
            "length": [">= sft * 0.5", GateConfig(bound="<= sft * 2", systems=["ppo"])],
        },
        ROLES,
        "sft",
    )
    assert gates == [
        Gate(METRIC, METRIC, Bound(">=", "sft", "-", 0.02)),
        Gate("kl_to_sft", "kl", Bound("<=", number=15.0)),
        Gate("ppo/gold", "gold", Bound(">=", number=0.5), "warning", "interval", ("ppo",)),
        Gate("length", "length", Bound(">=", "sft", "*", 0.5)),
        Gate("length", "length", Bound("<=", "sft", "*", 2.0), systems=("ppo",)),
    ]


def test_drift_is_named_after_what_it_is_measured_against():
    [gate] = parse_gates({"ppo/kl_to_reference": "<= 15"}, ROLES, "sft")
    assert (gate.metric, gate.title) == ("kl", "kl_to_reference")
    actual = card({}) | {"estimates": {"ppo": {"kl": estimate(17.25, 14.0, 20.5)}}}
    [row] = evaluate_gates([gate], actual)
    assert row["text"] == "kl_to_reference of ppo is 17.2, above 15 (95 % interval 14 to 20.5)"


@pytest.mark.parametrize(
    "raw",
    [
        {"kl_to_ppo": "<= 15"},
        {"poo/gold": ">= 1"},
        {"gold": ">= sfft"},
        {"gold": {"bound": ">= 1", "systems": ["pppo"]}},
        {"ppo/gold": {"bound": ">= 1", "systems": ["ppo"]}},
        {"gold": 0.5},
        {"gold": []},
        {"gold": {"bound": ">= 1", "lvl": "error"}},
        {"gold": {"bound": ">= 1", "level": "fatal"}},
        {"gold": {"level": "error"}},
        {"ifval.prompt_strict": ">= 1"},
        {"goldd": ">= 1"},
    ],
)
def test_mistakes_are_named_with_place_and_remedy(refused, raw):
    refused(parse_gates, raw, ROLES, "sft", tasks=["ifeval"], prompt_metrics=["gold", "kl"])


def test_undecidable_gate_is_refused_before_run(refused):
    def check(raw: dict, systems: list[SystemInfo] = SYSTEMS) -> None:
        check_gates(parse_gates(raw, [system.name for system in systems], "sft"), [METRIC, "gold"], systems, "sft")

    check({METRIC: ">= base", "gold": ">= 0.3", "sft/gold": ">= 0.1"})
    refused(check, {"ifeval.prompt_strct": ">= 0.3"})
    refused(check, {"kl_to_sft": "<= 3"})
    without = [system for system in SYSTEMS if system.role != "base"]
    refused(check, {"gold": ">= base"}, without)
    refused(check, {"base/gold": ">= 0.1"}, without)
    refused(lambda: check({"gold": ">= 0.3"}, [system for system in SYSTEMS if system.name in ("model", "sft")]))


def test_a_gate_for_nobody_is_shown_and_fails():
    roles = {"model": "base", "sft": "checkpoint"}
    rows = evaluate_gates(parse_gates({METRIC: ">= 0.3"}, roles, "sft"), card({"sft": estimate(0.1)}, roles=roles))
    assert [row["passed"] for row in rows] == [None]
    assert failed_gates(rows) == ["ifeval.prompt_strict >= 0.3 applies to no compared system"]


def test_forgetting_is_gated_by_default_as_a_warning():
    kinds = {"general": "perplexity", "code": "perplexity", "ifeval": "ifeval"}
    stated = parse_gates({"ppo/code.bits_per_byte": "<= 2"}, ROLES, "sft")
    assert default_gates(kinds, None, stated) == []
    gates = default_gates(kinds, "model", stated)
    assert [(gate.metric, str(gate.bound), gate.level) for gate in gates] == [
        ("general.bits_per_byte", "<= base * 1.05", "warning")
    ]
    values = {"model": 1.0, "sft": 1.06, "ppo": 1.04, "shots": 2.0}
    actual = card({}) | {
        "estimates": {name: {"general.bits_per_byte": estimate(value)} for name, value in values.items()},
        "differences": [difference("sft", "model", 0.06, 0.055, 0.065, "general.bits_per_byte")],
    }
    rows = evaluate_gates(gates, actual)
    assert [(row["system"], row["passed"], row["clear"]) for row in rows] == [
        ("sft", False, True),
        ("ppo", True, False),
    ]
    assert failed_gates(rows) == []
    alone = card({"model": estimate(1.0)}, roles={"model": "base"}, reference="model")
    assert evaluate_gates(gates, alone) == []
