"""Home commands and their JSON intents, made from the English templates in PyPI `home-assistant-intents` (Apache-2.0).

A template like `(turn|switch) on [the] {name}` is parsed by `hassil`; here one random sentence at a time is drawn from
it, together with the slots it fills. Rooms, device names, timer names and shopping items are ours. The answer is a
function of the sentence: a sentence that came out with two different answers is left out.

Test rows are of two kinds: new sentences of templates that were trained on, and sentences of templates never seen.
A held-out template always leaves another one with the same intent and the same slots to learn from.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import VeneerError
from veneer.storage import atomic_file, read_json

SYSTEM = "Home command to JSON."
HELD_OUT = 0.12  # share of the templates
# Small talk without slots, and templates that hold a whole second command.
LEFT_OUT = {"HassRespond", "HassNevermind"}
LEFT_OUT_LISTS = {"timer_command"}

ROOMS = ["kitchen", "living room", "bedroom", "bathroom", "hallway", "office", "garage", "garden", "dining room", "nursery",
         "guest room", "laundry room", "attic", "basement", "patio"]  # fmt: skip
FLOORS = ["ground floor", "first floor", "second floor", "top floor"]
NAMES = {
    "light": ["reading lamp", "fairy lights", "ceiling spots", "desk lamp", "night light", "floor lamp"],
    "switch": ["coffee maker", "space heater", "christmas tree", "water pump"],
    "fan": ["tower fan", "desk fan", "box fan"],
    "cover": ["left curtain", "roller shutter", "sun shade", "skylight blind"],
    "lock": ["front door lock", "back door lock", "gate lock"],
    "climate": ["thermostat", "heat pump", "air conditioner"],
    "media_player": ["television", "soundbar", "radio", "smart speaker"],
    "vacuum": ["robot vacuum", "dusty", "roomba"],
    "lawn_mower": ["robot mower", "lawn bot"],
    "scene": ["movie night", "party time", "bedtime"],
    "script": ["morning routine", "good night script"],
    "valve": ["sprinkler valve", "main water valve"],
    "todo": ["chores list", "packing list", "work list"],
    "weather": ["weather station"],
    "person": ["alice", "bob", "carol"],
    "binary_sensor": ["motion detector", "smoke alarm", "mailbox sensor"],
    "sensor": ["outdoor thermometer", "power meter", "rain gauge"],
}
ANY_NAME = ["reading lamp", "coffee maker", "tower fan", "fairy lights", "television", "space heater"]
WILDCARDS = {
    "message": ["dinner is ready", "the bus leaves in ten minutes", "please come downstairs", "the movie is starting"],
    "search_query": ["abbey road", "the beatles", "miles davis", "bohemian rhapsody", "star wars", "taylor swift"],
    "zone": ["home", "work", "school"],
    "timer_name": ["pizza", "laundry", "egg", "tea", "bread", "homework"],
    "shopping_list_item": ["milk", "eggs", "bananas", "olive oil", "toilet paper", "coffee beans"],
    "todo_list_item": ["call the dentist", "water the plants", "pay the rent", "clean the windows"],
}


@dataclass
class DemoData:
    """Rows {"prompt": sentence, "completion": JSON text}."""

    train: list[dict[str, str]]
    unseen_sentences: list[dict[str, str]]
    unseen_templates: list[dict[str, str]]


@dataclass(frozen=True)
class _Template:
    intent: str
    text: str
    fixed: tuple[tuple[str, Any], ...]  # slots the block sets whatever is said
    domains: tuple[str, ...]  # which devices {name} may be
    lists: Any
    rules: Any


def build_demo_data(seed: int = 0, train_rows: int = 2400, test_rows: int = 200) -> DemoData:
    """Draw the three sets; the same for a seed on every machine. No test sentence is in `train`.

    Raises:
        VeneerError: hassil or home-assistant-intents is not installed.
    """
    templates = _templates()
    rng = random.Random(seed)
    known, held = _hold_out(templates, rng)
    answers: dict[str, set[str]] = defaultdict(set)
    drawn_known = _draw(known, round(1.3 * (train_rows + test_rows)), rng, answers)
    drawn_held = _draw(held, round(1.3 * test_rows), rng, answers)
    clear = [item for item in drawn_known if len(answers[item[0]]) == 1]
    clear_held = [item for item in drawn_held if len(answers[item[0]]) == 1]
    rng.shuffle(clear)
    rng.shuffle(clear_held)
    test, train = clear[:test_rows], clear[test_rows : test_rows + train_rows]
    taken = {sentence for sentence, _ in clear}
    return DemoData(
        *[
            [{"prompt": sentence, "completion": answer} for sentence, answer in rows]
            for rows in (train, test, [item for item in clear_held if item[0] not in taken][:test_rows])
        ]
    )


def write_demo_data(folder: str | Path, data: DemoData) -> dict[str, Path]:
    """Write the three sets as JSON lines; returns their paths by name."""
    paths = {}
    for name in ("train", "unseen_sentences", "unseen_templates"):
        paths[name] = Path(folder) / f"{name}.jsonl"
        with atomic_file(paths[name]) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in getattr(data, name)), encoding="utf-8")
    return paths


def _templates() -> list[_Template]:
    for package in ("hassil", "home_assistant_intents"):
        if importlib.util.find_spec(package) is None:
            raise VeneerError(
                f"the demo's data needs the package {package.replace('_', '-')}, which is not installed",
                hint="pip install hassil home-assistant-intents",
            )
    spec = importlib.util.find_spec("home_assistant_intents")
    assert spec is not None and spec.origin is not None
    raw = read_json(Path(spec.origin).parent / "data" / "en.json")
    found = []
    for intent in sorted(raw["intents"]):
        if intent in LEFT_OUT:
            continue
        for block in raw["intents"][intent]["data"]:
            lists = {**raw["lists"], **block.get("lists", {})}
            rules = {**raw["expansion_rules"], **block.get("expansion_rules", {})}
            fixed = {k: v[0] if isinstance(v, list) else v for k, v in block.get("slots", {}).items()}
            wanted = (block.get("requires_context") or {}).get("domain") or fixed.get("domain") or ()
            if isinstance(wanted, dict):
                wanted = wanted.get("value", ())
            domains = tuple([wanted] if isinstance(wanted, str) else wanted)
            for text in block["sentences"]:
                used = set(re.findall(r"\{([a-z_]+)", text))
                if not used & LEFT_OUT_LISTS:
                    found.append(_Template(intent, text, tuple(sorted(fixed.items())), domains, lists, rules))
    return found


def _hold_out(templates: list[_Template], rng: random.Random) -> tuple[list[_Template], list[_Template]]:
    """Split into (known, held out); what a held-out template fills, a known one fills too."""
    groups: dict[Any, list[_Template]] = defaultdict(list)
    for template in templates:
        slots = tuple(sorted(set(re.findall(r"\{(?:[a-z_]+:)?([a-z_]+)\}", template.text))))
        groups[(template.intent, template.fixed, slots)].append(template)
    order = list(templates)
    rng.shuffle(order)
    held: set[int] = set()
    left = {id(t): group for group in groups.values() for t in group}
    for template in order:
        if len(held) >= HELD_OUT * len(templates):
            break
        if sum(id(t) not in held for t in left[id(template)]) >= 3:
            held.add(id(template))
    return [t for t in templates if id(t) not in held], [t for t in templates if id(t) in held]


def _draw(
    templates: list[_Template], count: int, rng: random.Random, answers: dict[str, set[str]]
) -> list[tuple[str, str]]:
    """`count` different sentences, the templates taking turns; `answers` collects all answers of each sentence."""
    rows: dict[str, str] = {}
    for _ in range(40):
        turn = list(templates)
        rng.shuffle(turn)
        for template in turn:
            sentence, answer = _sentence(template, rng)
            if len(sentence.split()) < 2:
                continue  # a single word is no command
            answers[sentence].add(answer)
            rows.setdefault(sentence, answer)
            if len(rows) == count:
                return list(rows.items())
    return list(rows.items())


def _sentence(template: _Template, rng: random.Random) -> tuple[str, str]:
    from hassil.expression import Alternative, ListReference, Permutation, RuleReference, Sequence, TextChunk
    from hassil.parse_expression import parse_sentence

    slots: dict[str, Any] = dict(template.fixed)

    def say(node: Any) -> str:
        if isinstance(node, TextChunk):
            return str(node.original_text)
        if isinstance(node, Alternative):
            return say(rng.choice(node.items))
        if isinstance(node, Permutation):
            items = list(node.items)
            rng.shuffle(items)
            return " ".join(say(item) for item in items)
        if isinstance(node, Sequence):
            return "".join(say(item) for item in node.items)
        if isinstance(node, RuleReference):
            return say(parse_sentence(template.rules[node.rule_name]).expression)
        if isinstance(node, ListReference):
            spoken, value = choose(node.list_name)
            slots[node.slot_name] = value
            return spoken
        raise AssertionError(f"unknown part of a template: {type(node).__name__}")

    def choose(name: str) -> tuple[str, Any]:
        if name == "area":
            return (room := rng.choice(ROOMS)), room
        if name == "floor":
            return (floor := rng.choice(FLOORS)), floor
        if name == "name":
            devices = [device for domain in template.domains for device in NAMES.get(domain, ())] or ANY_NAME
            return (device := rng.choice(devices)), device
        values = template.lists.get(name, {})
        if "range" in values:
            limits = values["range"]
            number = rng.randrange(limits["from"], limits["to"] + 1, limits.get("step", 1))
            return str(number), number * limits.get("multiplier", 1)
        if "values" in values:
            item = rng.choice(values["values"])
            if isinstance(item, str):
                return (text := say(parse_sentence(item).expression)), text
            return say(parse_sentence(item["in"]).expression), item["out"]
        words = WILDCARDS.get(name) or ANY_NAME
        return (word := rng.choice(words)), word

    text = say(parse_sentence(template.text).expression)
    text = re.sub(r"\s+([?!,.%])", r"\1", re.sub(r"\s+", " ", text)).strip().lower()
    answer = {"intent": template.intent, **{key: slots[key] for key in sorted(slots)}}
    return text, json.dumps(answer, separators=(",", ":"))
