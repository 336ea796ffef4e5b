"""A day with the window, step by step in pseudo-terminals: one line for each, right or wrong, its seconds, its tests.

    .venv/bin/python -P benchmarks/window_day.py

The steps are tests that press keys and read cells; this runs them, once, and exits with 1 if one is wrong. `make test`
runs them with the others.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "tui"
STEPS = {  # step -> (what is tried, the file and the beginning of the name of its tests)
    "D1": ("a full history before the first question", "hall", "conversations_search_and_earlier_questions"),
    "D2": ("two windows on one conversation", "two_windows", "a_question_waits_for_the_answer_of_another_window"),
    "D3": ("leaving with a queue and a draft", "hall", "leaving_keeps_the_queue_and_the_draft"),
    "D4": ("the chosen row of a list", "hall", "the_chosen_row_of_a_list_is_seen"),
    "D5": ("pin, then delete", "hall", "what_is_pinned_or_renamed_stays"),
    "D6": ("page keys", "hall", "page_keys_scroll"),
    "D7": ("a refused model", "hall", "a_refused_model_leaves"),
    "D8": ("a comparison, then Esc", "hall", "an_answer_of_a_comparison_leaves_later_turns"),
    "D9": ("a forced adapter in the next conversation", "hall", "an_adapter_is_forced_for_one_conversation"),
    "D10": ("exports by extension", "hall", "an_export_has_the_form_of_its_name"),
    "D11": ("a draft that does not fit", "hall", "a_draft_that_does_not_fit_is_counted"),
    "D12": ("emptying the prompt", "hall", "the_prompt_can_be_emptied"),
    "D13": ("the first start", "first_start", ""),
    "D14": ("a search, closed and opened again", "conversations", "a_search_ends_with_the_list"),
    "D15": ("the key that opened a panel", "hall", "the_key_that_opened_a_panel"),
    "D16": ("enter_sends = false", "hall", "enter_and_its_other_key"),
    "D17": ("two windows, one engine", "day", "two_windows_on_one_model_share_an_engine"),
    "D18": ("what a quantised copy will take", "day", "what_a_quantised_copy_will_take"),
    "D19": ("a wrong setting and doctor", "day", "a_setting_that_no_command_would_take"),
    "D20": ("models and adapters of a server", "servers", ("the_models_of_a_server_are_listed", "the_list_of_models")),
    "D21": ("notes and the prompt", "day", "a_note_in_the_corner"),
    "D22": ("a copy in tmux", "day", "a_copy_reaches_a_tmux"),
    "D23": ("the palette", "palette", ("it_", "enter_")),
    "D24": ("themes", "theme", ("a_theme_", "few_colours")),
    "D25": ("the columns of the models", "day", "a_model_takes_one_line"),
    "D26": ("lists and what Tab offers", "day", ("a_list_says", "tab_offers")),
    "D27": ("typed text and another conversation", "conversations", "what_is_typed_stays_with_its_conversation"),
    "D28": ("a refused adapter", "day", "an_adapter_that_is_refused"),
    "D29": ("a replay that is asked to differ", "day", "a_replay_that_parts"),
    "D30": ("adapters and a new conversation", "day", "a_new_conversation_says_which_adapters"),
    "D31": ("one-shots in the list", "conversations", "answers_of_single_commands"),
    "D32": ("what is in force", "day", ("a_system_prompt_is_in_sight", "where_the_system_prompt_changed")),
    "D33": ("the order of the list", "conversations", "only_what_is_said_changes_the_order"),
}


def tests_of(step: str) -> list[str]:
    """The tests that play a step, as pytest names them without their parameters; none where none does."""
    _, file, beginnings = STEPS[step]
    if not file:
        return []
    path = TESTS / f"test_{file}.py"
    defined = [line.split("(")[0].split()[-1] for line in path.read_text().splitlines() if "def test_" in line]
    starts = tuple(f"test_{one}" for one in ((beginnings,) if isinstance(beginnings, str) else beginnings))
    return [f"{path}::{name}" for name in defined if name.startswith(starts)]


def outcomes(tests: list[str]) -> dict[str, list[tuple[bool, float]]]:
    """Test -> of each of its cases whether it was right, and its seconds; none where all were skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        pytest = [sys.executable, "-P", "-m", "pytest", "-q", f"--junitxml={report}", *dict.fromkeys(tests)]
        subprocess.run(pytest, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
        found: dict[str, list[tuple[bool, float]]] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            cases = found.setdefault(case.attrib["name"].split("[")[0], [])
            ends = {child.tag for child in case}
            if "skipped" not in ends:
                cases.append((not ends & {"failure", "error"}, float(case.attrib["time"])))
        return found


def main() -> int:
    played = {step: tests_of(step) for step in STEPS}
    results, wrong = outcomes([test for tests in played.values() for test in tests]), 0
    for step, (what, *_) in STEPS.items():
        names = [test.rpartition("::")[2] for test in played[step]]
        cases = [case for name in names for case in results.get(name, [])]
        verdict = "not played here" if not cases else "right" if all(right for right, _ in cases) else "wrong"
        wrong += verdict == "wrong"
        print(f"{step:<4} {verdict:<16} {sum(seconds for _, seconds in cases):5.1f} s  {what}")
        for test in played[step]:
            print(f"      {Path(test).relative_to(ROOT)}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
