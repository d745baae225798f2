import json

import pytest

pytest.importorskip("hassil")
pytest.importorskip("home_assistant_intents")

from veneer.demo_data import build_demo_data


@pytest.fixture(scope="module")
def data():
    return build_demo_data(0, 400, 60)


def test_sizes_and_no_overlap(data):
    sets = [{row["prompt"] for row in rows} for rows in (data.train, data.unseen_sentences, data.unseen_templates)]
    assert [len(s) for s in sets] == [400, 60, 60]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]


def test_rows_are_clean_and_answers_are_json_with_a_known_intent(data):
    known = {json.loads(row["completion"])["intent"] for row in data.train}
    for row in data.train + data.unseen_sentences + data.unseen_templates:
        assert not set(row["prompt"]) & set("[]{}<>|()") and row["prompt"] == row["prompt"].strip().lower()
        answer = json.loads(row["completion"])
        assert next(iter(answer)) == "intent"
    assert len(known) > 20


def test_deterministic(data):
    assert build_demo_data(0, 400, 60) == data and build_demo_data(1, 400, 60) != data
