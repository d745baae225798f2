import math

import pytest

from veneer import demo
from veneer.errors import VeneerError
from veneer.evaluation import evaluate, json_match
from veneer.training.rows import read_rows

PAIR = {"prompt": "add milk", "completion": "ok"}


def test_cut_rows_are_counted(model, tokenizer):
    rows = read_rows([PAIR, {"prompt": "p" * 200, "completion": "ok"}]).rows
    result = evaluate(model, tokenizer, rows, max_length=100, max_new_tokens=2)
    assert (result["rows"], result["truncated"], len(result["answers"])) == (2, 1, 2)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"])) and result["exact_match"] == 0
    assert evaluate(model, tokenizer, rows, generate=False)["truncated"] == 0


def test_a_row_the_template_refuses_is_named(model, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(VeneerError, match="rows given, line 1: the chat template refused a conversation: no"):
        evaluate(model, tokenizer, read_rows([PAIR]).rows, generate=False)


@pytest.mark.parametrize(
    ("answer", "wanted", "share"),
    [
        ('{"a": 1, "b": 2}', '{"a": 1, "b": 3}', 0.5),
        ('{"a": 1, "c": 2}', '{"a": 1}', 0.5),
        ("{}", "{}", 1.0),
        ("junk", '{"a": 1}', 0.0),
        ("[1]", '{"a": 1}', 0.0),
        ("x", "x", None),
        ("1", "1", None),
    ],
)
def test_json_match(answer, wanted, share):
    assert json_match(answer, wanted) == share


def test_the_demo_says_how_many_rows_each_figure_is_of(capsys):
    names = ("unseen_sentences", "unseen_templates")
    demo._report(
        {
            "exact_match_before": dict.fromkeys(names, 0.0), "exact_match": dict.fromkeys(names, 0.8),
            "rows_before": dict.fromkeys(names, 32), "rows": dict.fromkeys(names, 200), "trainable_parameters": 1,
            "adapter_bytes": 1, "train_seconds": 1, "tokens_per_second": 1, "peak_bytes": 1, "seconds": 1,
            "merge": {"max_logit_difference": 0, "top1_agreement": 1, "tokens": 1}, "merged_exact_match": 1,
            "unmerged_exact_match": 1, "adapter": "a", "merged": "m",
        }
    )  # fmt: skip
    assert "0.0% of  32 rows    80.0% of 200 rows" in capsys.readouterr().err
