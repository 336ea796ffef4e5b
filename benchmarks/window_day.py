"""A day with the window, step by step in pseudo-terminals: one line for each, right or wrong.

    .venv/bin/python -P benchmarks/window_day.py

Runs the tests that press the keys and read the cells, once, and exits with 1 if a step is wrong. A step that no test
plays says so.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
FILES = ("tests/tui/test_hall.py", "tests/tui/test_two_windows.py", "tests/tui/test_conversations.py")
STEPS = {  # step -> (what is tried, a part of its test's name)
    "D1": ("a full history before the first question", "conversations_search_and_earlier_questions"),
    "D2": ("two windows on one conversation", "a_question_waits_for_the_answer_of_another_window"),
    "D3": ("leaving with a queue and a draft", "leaving_keeps_the_queue_and_the_draft"),
    "D4": ("the chosen row of a list", "the_chosen_row_of_a_list_is_seen"),
    "D5": ("pin, then delete", "what_is_pinned_or_renamed_stays"),
    "D6": ("page keys", "page_keys_scroll"),
    "D7": ("a refused model", "a_refused_model_leaves"),
    "D8": ("a comparison, then Esc", "an_answer_of_a_comparison_leaves_later_turns"),
    "D9": ("a forced adapter in the next conversation", "an_adapter_is_forced_for_one_conversation"),
    "D10": ("exports by extension", "an_export_has_the_form_of_its_name"),
    "D11": ("a draft that does not fit", "a_draft_that_does_not_fit_is_counted"),
    "D12": ("emptying the prompt", "the_prompt_can_be_emptied"),
    "D13": ("the first start", ""),
    "D14": ("a search, closed and opened again", "a_search_ends_with_the_list"),
    "D15": ("the key that opened a panel", "the_key_that_opened_a_panel"),
    "D16": ("enter_sends = false", "enter_and_its_other_key"),
    "D17": ("two windows, one engine", ""),
    **{f"D{n}": ("", "") for n in range(18, 27)},
    "D27": ("typed text and another conversation", "what_is_typed_stays_with_its_conversation"),
    **{f"D{n}": ("", "") for n in range(28, 31)},
    "D31": ("one-shots in the list", "answers_of_single_commands"),
    "D32": ("what is in force", ""),
    "D33": ("the order of the list", "only_what_is_said_changes_the_order"),
}


def outcomes() -> dict[str, bool]:
    """Test -> whether it passed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        pytest = [sys.executable, "-P", "-m", "pytest", "-q", f"--junitxml={report}", *FILES]
        subprocess.run(pytest, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
        cases = ElementTree.parse(report).iter("testcase")
        return {case.attrib["name"]: all(child.tag not in ("failure", "error") for child in case) for case in cases}


def main() -> int:
    played, wrong = outcomes(), 0
    for step, (what, name) in STEPS.items():
        results = [right for test, right in played.items() if name and name in test]
        verdict = "not played here" if not results else "right" if all(results) else "wrong"
        wrong += verdict == "wrong" or bool(name and not results)
        print(f"{step:<4} {verdict:<16} {what}".rstrip())
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
