"""Names and regexes as PEFT means them, and none that takes for ever."""

import re
import time

import pytest
from conftest import make_model

import veneer
from veneer.adapters import patterns
from veneer.adapters.patterns import by_pattern, matching

NAMES = [f"model.layers.{n}.{x}" for n in (0, 1, 10, 11) for x in ("self_attn.q_proj", "mlp.up_proj", "norm")] + [
    "q_proj"
]


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        r".*\.q_proj",
        r".*layers\.\d+\..*proj",
        r".*\.(0|11)\..*",
        r"model\.layers\.1[01]?\.(mlp|self_attn)\..+",
        ".*a.*",
    ],
)
def test_matching_is_res_full_match_whoever_does_it(pattern, monkeypatch):
    expected = [bool(re.fullmatch(pattern, name)) for name in NAMES]
    assert matching(pattern, NAMES) == expected and any(expected)
    monkeypatch.setattr(patterns, "_HARMLESS", re.compile(r"(?!)"))  # all in the other process
    patterns._matching.cache_clear()
    assert matching(pattern, NAMES) == expected


@pytest.mark.parametrize(
    "key", ["q_proj", "self_attn.q_proj", r"\d.mlp.up_proj", "layers.1.self_attn.q_proj", "proj", "q_proj|norm"]
)
def test_patterns_are_pefts(key):
    peft = pytest.importorskip("peft.utils.other")
    expected = [{key: 5}.get(peft.get_pattern_key([key], name), 2) for name in NAMES]
    assert by_pattern({key: 5}, NAMES, 2) == expected


def test_the_first_key_decides():
    assert by_pattern({"layers.0.*": 1, "q_proj": 2, ".*": 3}, NAMES[:2] + NAMES[-1:], 0) == [1, 1, 2]
    assert by_pattern({}, NAMES[:2], 7) == by_pattern(None, NAMES[:2], 7) == [7, 7]


@pytest.mark.parametrize("pattern", [r"(\w+\.?)+!", r"((.*)*)*x", r"(?:(?:\w|\w\w)+\.?)+!"])
def test_a_regex_that_explodes_is_stopped(pattern, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(veneer.VeneerError, match=r"gave no answer in 0\.5 s(.|\n)*more simply"):
        matching(pattern, ["model.layers.10.self_attn.q_projection_of_a_long_name" * 3])
    assert time.monotonic() - began < 5


def test_explosions_in_targets_and_in_patterns_are_errors(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    for settings in (
        {"targets": r"((\w+)\.?)+!"},
        {"exclude": r"((\w+)\.?)+!"},
        {"rank_pattern": {r"((\w+)\.?)+!": 2}},
        {"alpha_pattern": {r"((\w+)\.?)+!": 2}},
    ):
        with pytest.raises(veneer.VeneerError, match=rf"lora\.{next(iter(settings))}: .* gave no answer in 0\.5 s"):
            veneer.attach(make_model(), veneer.LoraConfig(**{"r": 2, **settings}))


@pytest.mark.parametrize("pattern", ["(", "a{2,1}", "(?P<x", "x" * 200_000])
def test_what_is_no_regex(pattern):
    with pytest.raises(veneer.VeneerError, match="regex"):
        matching(pattern, NAMES)


def test_full_names_need_no_other_process(monkeypatch):
    monkeypatch.setattr(patterns.subprocess, "run", lambda *args, **settings: pytest.fail("a process was started"))
    pattern = {re.escape(name): at for at, name in enumerate(NAMES)} | {r".*\.\d+\.mlp": -2}
    assert by_pattern(pattern, NAMES[:-1], -1) == list(range(len(NAMES) - 1))
    with pytest.raises(pytest.fail.Exception):  # one run of anything more than are harmless
        by_pattern({".*a.*b.*": 1}, NAMES, 0)
