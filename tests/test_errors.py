from veneer.errors import SHOWN, VeneerError


def test_one_problem_is_a_sentence_and_several_are_a_list():
    assert str(VeneerError("a: found 0", hint="set it")) == "a: found 0\nset it"
    assert str(VeneerError(["a", "b"], hint="mend")) == "2 problems:\n  - a\n  - b\nmend"


def test_of_very_many_problems_the_first_are_shown_and_all_are_counted():
    error = VeneerError([f"row {number}" for number in range(1500)])
    first, *shown, last = str(error).splitlines()
    assert first == "1,500 problems:" and last == f"  and {1500 - SHOWN:,} more"
    assert shown == [f"  - row {number}" for number in range(SHOWN)] and len(error.problems) == 1500


def test_what_a_terminal_would_act_on_is_shown_as_its_code():
    assert str(VeneerError("layer a\x1b[2J\r\u202eb: no \u00e9\ttab")) == "layer a\\x1b[2J\\r\\u202eb: no \u00e9\\ttab"
