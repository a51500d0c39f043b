"""The report of a verification: what was observed answers its question, and no text can break the document."""

from markdown_it import MarkdownIt

from vmtasks.config.tables import Question
from vmtasks.verify.findings import LONGEST, Findings, Stage, answer, markdown, observed

PFI = Question(asks="What is in rc.d/pfi?", observed="pfi")
SSHD = Question(asks="When does sshd start?", observed="sshd *")
TIME = Question(asks="Is the time right?", command="date")
BUTTON = Question(asks="Does the button work?", host="power-button")
CONSOLE = [
    "+ 12: observe pfi cat x",
    "observed pfi: #!/bin/sh",
    "observed pfi: ",
    "observed sshd in 2: is: running",
    "x",
]


def test_what_was_observed_is_kept_by_name_and_in_order():
    assert observed(CONSOLE) == {"pfi": ["#!/bin/sh", ""], "sshd in 2": ["is: running"]}


def test_questions_find_their_answers():
    seen = observed(CONSOLE)
    assert answer(PFI, {}, seen) == ["[pfi]", "#!/bin/sh", ""]
    assert answer(SSHD, {}, seen) == ["[sshd in 2]", "is: running"]
    assert answer(TIME, {TIME.asks: ["today"]}, seen) == ["today"]
    assert answer(BUTTON, {}, seen) == []


def test_the_report_counts_what_is_open_and_shows_all_the_rest():
    stages = [
        Stage("fetch", "passed", 1.25, "a | b"),
        Stage("1-install", "failed", 2, "why\nlog: x"),
        Stage("start", "not reached"),
    ]
    consoles = {"1-install": [*CONSOLE, "observed extra: 1"], "machine": [f"line {n}" for n in range(100)]}
    text = markdown(
        "T", Findings({"guest": "bsd"}, {"QEMU": "7"}, stages, {TIME.asks: ["today"]}, consoles), [PFI, TIME, BUTTON]
    )
    assert "1-install: failed; 2 of 3 questions answered." in text
    assert "| fetch | passed | 1.2 | a \\| b |" in text
    assert "| 1-install | failed | 2.0 | why<br>log: x |" in text
    assert "### 3. Does the button work?\n\nNot answered" in text
    assert "### extra\n\n```text\n1\n```" in text
    assert "line 24\n... 50 lines ...\nline 75" in text


def test_no_line_of_a_guest_ends_its_block():
    """Read by a Markdown parser: as many blocks as were written, and a heading in a console is none."""
    consoles = {"c": ["```", "# not a heading", "````text", "<script>"]}
    tokens = MarkdownIt().parse(markdown("T", Findings(consoles=consoles), []))
    assert [t.content for t in tokens if t.type == "fence"] == ["```\n# not a heading\n````text\n<script>\n"]
    assert [t.tag for t in tokens if t.type == "heading_open"] == ["h1", "h2", "h2", "h2", "h2", "h2", "h3"]


def test_long_answers_are_cut_and_say_so():
    text = markdown("T", Findings(answers={TIME.asks: ["x"] * (LONGEST + 5)}), [TIME])
    assert "\n... 5 more lines\n" in text


def test_all_passed():
    assert "all stages passed; 0 of 0" in markdown("T", Findings(stages=[Stage("fetch", "passed")]), [])
