"""vmtasks.suites.junit: what suites print and write -> JUnit XML. Each case is a file in tests/data/junit."""

import tomllib
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from junitparser import JUnitXml

from vmtasks.host.process import Ended
from vmtasks.suites.junit import Counts, Format, report
from vmtasks.suites.junit.case import LOG_LIMIT, TEXT_LIMIT

CASES = sorted((Path(__file__).parent.parent / "data" / "junit").glob("*.toml"))
FORMATS: tuple[Format, ...] = ("auto", "go-json", "junit", "plain", "tap")
LINES = st.sampled_from(
    [
        "",
        "    ok 1 - inner",
        "  ---",
        "  ...",
        "# Subtest: x",
        "# note",
        "1..0 # SKIP why",
        "1..2",
        "Bail out! why",
        "FAIL\tp [build failed]",
        "TAP version 14",
        "not ok 2 - b # TODO",
        "not ok",
        "ok 1 - a",
        "ok 2 # SKIP",
        '{"Action":"build-fail","ImportPath":"p"}',
        '{"Action":"fail","Package":"p","Test":"T"}',
        '{"Action":"pass","Package":"p","Elapsed":1}',
        '{"Action":"run","Package":"p","Test":"T"}',
        "<testsuite><testcase/></testsuite>",
    ]
)
OUTPUTS = st.one_of(
    st.text(st.characters(exclude_categories=())), st.lists(st.one_of(LINES, st.text(max_size=8))).map("\n".join)
)


def run(output: str = "", status: int = 0, *, timed_out: bool = False, **given_: Any) -> tuple[bytes, Counts]:
    arguments = {"duration_s": 1.5, "fmt": "auto", "own_xml": None} | given_
    made = report("suite", output, ended=Ended(status, timed_out), **arguments)
    return made.xml, made.counts


def counted(data: bytes) -> Counts:
    """Count the cases of a report with junitparser, and check that the attributes say the same."""
    xml = JUnitXml.fromstring(data)
    cases = [case for suite in xml for case in suite]
    kinds = Counter(
        "errors" if case.is_error else "failed" if case.is_failure else "skipped" if case.is_skipped else "passed"
        for case in cases
    )
    assert (xml.tests, xml.failures) == (len(cases), kinds["failed"])
    assert (xml.errors, xml.skipped) == (kinds["errors"], kinds["skipped"])
    return Counts(**kinds)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path):
    case = tomllib.loads(path.read_text())
    own = case["own"].lstrip().encode() if "own" in case else None
    how = {"status": case.get("status", 0), "timed_out": case.get("timed_out", False)}
    data, counts = run(case["output"], **how, fmt=case.get("fmt", "auto"), own_xml=own)
    assert str(counts) == case["expect"]
    assert counted(data) == counts
    assert case.get("names", []) in ([], [case.get("name") for case in ET.fromstring(data).iter("testcase")])  # noqa: S314 - ours
    for text in case.get("contains", []):
        assert text in data.decode()
    for text in case.get("absent", []):
        assert text not in data.decode()


@given(OUTPUTS, st.integers(), st.sampled_from(FORMATS), st.floats())
def test_any_output_gives_valid_xml_and_is_never_green_by_mistake(output, status, fmt, duration_s):
    data, counts = run(output, status=status, fmt=fmt, duration_s=duration_s)
    assert counted(data) == counts
    assert 0 <= JUnitXml.fromstring(data).time < float("inf")
    assert status == 0 or not counts.green
    assert run(output, status=status, fmt=fmt, duration_s=duration_s) == (data, counts)


@given(st.one_of(st.binary(), OUTPUTS.map(lambda text: text.encode(errors="replace"))), st.integers(0, 255))
def test_any_own_file_gives_valid_xml_and_is_never_green_by_mistake(own, status):
    data, counts = run(own_xml=own, status=status)
    assert counted(data) == counts
    assert status == 0 or not counts.green


@given(st.integers(1, 20), st.integers(0, 20))
def test_a_tap_stream_cut_anywhere_is_not_green(planned, ran):
    lines = [f"1..{planned}", *(f"ok {number}" for number in range(1, min(ran, planned) + 1))]
    assert run("\n".join(lines), fmt="tap")[1].green == (ran >= planned)
    assert not ran or run("\n".join(lines))[1].green == (ran >= planned)


OWN = b"<testsuite><testcase/></testsuite>"


@pytest.mark.parametrize(
    ("output", "given_", "counts", "trouble"),
    [
        ("1..5\nok 1 - a\n", {}, "1 passed, 1 error", 'planned 5 tests, ran 1 (if this is no TAP: format = "plain")'),
        ("1..5\nok 1 - a\n", {"fmt": "tap"}, "1 passed, 1 error", "planned 5 tests, ran 1"),
        ("1..2\nok 1 - a\nnot ok 2 - b", {"status": 1}, "1 passed, 1 failed", ""),
        ("", {"status": 124}, "1 failed", ""),
        ("1..1\nok 1 - a", {"status": 124}, "1 passed, 1 error", "exited with status 124, although no test failed"),
        ("", {"status": 124, "timed_out": True}, "1 error", "timed out after 1.5 s"),
        ("", {"problem": "no r.xml"}, "1 error", "no r.xml"),
        ("1..1\nok 1 - a", {"problem": "no r.xml"}, "1 error", "no r.xml"),
        ("", {"problem": "no r.xml", "status": 3}, "2 errors", "no r.xml"),
        ("", {"problem": "the guest is gone", "ended": None}, "1 error", "the guest is gone"),
        ("1..2\nok 1 - a", {"problem": "gone", "ended": None}, "1 passed, 2 errors", "planned 2 tests, ran 1"),
        ("", {"problem": "gone", "ended": None, "fmt": "junit"}, "1 error", "gone"),
        ("", {"own_xml": OWN}, "1 passed", ""),
        ("", {"own_xml": OWN, "status": 1}, "1 passed, 1 error", "exited with status 1, although no test failed"),
        ("", {"own_xml": b"<x/>"}, "1 error", "the suite's JUnit XML cannot be used: its root is <x>"),
    ],
)
def test_the_trouble_is_told_in_a_sentence(output: str, given_: dict[str, Any], counts: str, trouble: str) -> None:
    given = {"ended": Ended(given_.pop("status", 0), given_.pop("timed_out", False))} | given_
    made = report("suite", output, **{"duration_s": 1.5, "fmt": "auto", "own_xml": None} | given)
    assert str(made.counts) == counts
    assert counted(made.xml) == made.counts
    assert made.trouble.startswith(trouble)
    assert bool(trouble) == bool(made.trouble)


def test_huge_output_loses_its_middle_and_says_so():
    data, counts = run("1..1\nok 1 - first\n" + "x" * (3 * LOG_LIMIT) + "\nthe end")
    assert counts == Counts(passed=1)
    assert len(data) < LOG_LIMIT + 5000
    assert b"characters left out" in data
    assert b"ok 1 - first" in data
    assert b"the end" in data


def test_huge_text_of_one_failure_is_shortened():
    data, _ = run(own_xml=f"<testsuite><testcase><failure>{'x' * 10**6}</failure></testcase></testsuite>".encode())
    assert len(data) < TEXT_LIMIT + 2000


def test_deep_nesting_is_refused():
    _, counts = run(own_xml=b"<testsuite>" * 5000 + b"</testsuite>" * 5000)
    assert counts == Counts(errors=1)


def test_stray_bytes_of_output_are_marked():
    data, _ = run(b"caf\xe9".decode(errors="surrogateescape"))
    assert "caf\ufffd" in data.decode()


def test_names_of_suites_may_hold_anything():
    made = report('a<b>&"\x00\n c', "", ended=Ended(0), duration_s=0, fmt="auto", own_xml=None)
    assert JUnitXml.fromstring(made.xml).name == 'a<b>&" c'


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        (Counts(), "no tests"),
        (Counts(7, 1, 2, 0), "7 passed, 1 failed, 2 skipped"),
        (Counts(errors=1), "1 error"),
        (Counts(passed=1, errors=2), "1 passed, 2 errors"),
    ],
)
def test_counts_as_people_say_them(counts, text):
    assert str(counts) == text
