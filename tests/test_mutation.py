"""How the mutation check judges: only a test, a crash or a loop without end kills, and a proof belongs to one line."""

import signal
import tomllib

import pytest

from tests import mutation

STARTED = "tests/test_a.py::test_one PASSED\ntests/test_a.py::TestTwo::test_two[x] "
FAILED = STARTED + "FAILED\nFAILED tests/test_a.py::TestTwo::test_two[x] - AssertionError\n"
IN_COLLECTION = "ERROR tests/test_b.py - ImportError\n!!! Interrupted: 1 error during collection !!!\n"


@pytest.mark.parametrize(
    ("code", "said", "outcome", "test"),
    [
        (0, STARTED, "survived", ""),
        (1, FAILED, "killed", "test_a.py::TestTwo::test_two[x]"),
        (2, IN_COLLECTION, "killed", "test_b.py"),
        (-signal.SIGSEGV, STARTED, "killed by SIGSEGV", "test_a.py::TestTwo::test_two[x]"),
        (-signal.SIGXCPU, STARTED, "hung", "test_a.py::TestTwo::test_two[x]"),
        (-signal.SIGKILL, STARTED, "unclear", "signal SIGKILL in test_a.py::TestTwo::test_two[x]"),
        (-signal.SIGTERM, "", "unclear", "signal SIGTERM"),
        (1, STARTED, "unclear", "exit code 1 in test_a.py::TestTwo::test_two[x]"),
        (2, STARTED, "unclear", "exit code 2 in test_a.py::TestTwo::test_two[x]"),
        (3, "", "unclear", "exit code 3"),
        (4, "", "unclear", "exit code 4"),
        (5, "", "unclear", "exit code 5"),
    ],
)
def test_what_kills(code, said, outcome, test):
    assert mutation.ended(code, said) == (outcome, test)


def entry(line, outcome="survived", **changes):
    return {"source": "a.py", "line": line, "before": "x = 1", "after": "x = 2", "occurrence": 1} | {
        "outcome": outcome, "test": "",
    } | changes  # fmt: skip


def test_a_proof_is_for_one_line(monkeypatch):
    reasons = {("a.py", "x = 1", "x = 2", 2): {"because": "it is\nso"}}
    monkeypatch.setattr(mutation, "_reasons", lambda: reasons)
    assert mutation.verdict(entry(3)) == "survived"
    assert mutation.verdict(entry(3, occurrence=2)) == "equivalent: it is so"
    assert mutation.occurrence(["x = 1", "y", "  x = 1"], 2) == 2


def test_the_table_counts_what_it_shows(monkeypatch):
    monkeypatch.setattr(mutation, "_reasons", lambda: {("a.py", "x = 1", "x = 2", 2): {"because": "so"}})
    monkeypatch.setattr(mutation, "commit", lambda: "abc1234")
    results = [entry(1), entry(2, occurrence=2), entry(3, "hung"), entry(4, "killed", test="t"), entry(5, "unclear")]
    first = mutation.table(results, 1234, 7).splitlines()[0]
    want = "5 of 1,234 mutations of commit abc1234, seed 7: 2 killed, 1 equivalent, 1 survived, 1 unclear."
    assert first == want


def test_every_proof_is_of_a_line_that_is_there():
    for proof in tomllib.loads(mutation.EQUIVALENT.read_text("utf-8"))["mutant"]:
        lines = [line.strip() for line in (mutation.ROOT / proof["source"]).read_text("utf-8").splitlines()]
        assert proof["source"] in mutation.SOURCES
        assert proof["occurrences"] == [*range(1, lines.count(proof["before"]) + 1)], "another line of this text"
        assert proof["because"].strip()
