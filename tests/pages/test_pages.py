"""Pages lead where they say, are as short as they are meant to be, and quote messages that the programs have."""

from __future__ import annotations

import subprocess

import pytest

from tests.pages.messages import is_said
from tests.pages.page import PAGES, README, TROUBLE, Page, codes
from tests.support.processes import ROOT

PRODUCED = (".github/", "tests/golden/stored/")  # read on their own, or written by runs
MOST_WORDS = {
    "README.md": 930,
    "launch/README.md": 2560,
    "launch/TROUBLESHOOTING.md": 2000,
    "launch/WATCHING.md": 900,
    "launch/BLAME.md": 700,
    "launch/CHECK.md": 700,
    "launch/REMOTE.md": 800,
    "launch/TABLES.md": 900,
    "launch/MIXTURES.md": 900,
    "data_prep/README.md": 1600,
    "data_prep/DATASETS.md": 600,
    "vltrain/README.md": 2600,
}


def tracked_pages() -> list[Page]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return [Page(name) for name in sorted(listed.stdout.split("\0")) if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("page", tracked_pages() or PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in page.links():
        if link.startswith(("https://", "http://")):
            continue
        place, _, anchor = link.partition("#")
        target = (page.path.parent / place).resolve() if place else page.path
        assert target.exists() and target.is_relative_to(ROOT), f"{page.name}: {link}"
        if anchor:
            assert anchor in Page(str(target.relative_to(ROOT))).anchors(), f"{page.name}: {link}"


def test_every_page_is_reached_from_the_readme():
    reached, ahead = set(), {README.name}
    while ahead:
        page = Page(ahead.pop())
        reached.add(page.name)
        targets = {
            (page.path.parent / link.partition("#")[0]).resolve()
            for link in page.links()
            if ":" not in link and link[0] != "#"
        }
        ahead |= {str(target.relative_to(ROOT)) for target in targets if target.suffix == ".md"} - reached
    assert {page.name for page in (*PAGES, *tracked_pages()) if not page.name.startswith(PRODUCED)} <= reached


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_not_longer_than_it_is_meant_to_be(page):
    assert len(page.text.split()) <= MOST_WORDS[page.name]


def test_the_readme_names_its_two_commands():
    first = [command.text.partition("#")[0].strip() for command in README.commands()[:2]]
    assert first == ["bash launch/quickstart.sh", "bash tests/run.sh"]


def quoted_messages() -> list[str]:
    """What the page of troubles quotes: in the first column of its tables."""
    rows = [line.strip("|").split(" | ")[0] for line in TROUBLE.text.splitlines() if line.startswith("| ")]
    return [quoted for row in rows for quoted in codes(row)]


def test_there_are_messages():
    assert len(quoted_messages()) >= 40


@pytest.mark.parametrize("quoted", quoted_messages())
def test_a_quoted_message_is_the_programs(quoted):
    assert is_said(quoted)


def test_a_message_that_nobody_says_is_found():
    assert (
        is_said("...: exists already; remove it or name another output")
        and not is_said("...: exists already; take it away")
        and not is_said("remove it ... exists already")
    )
