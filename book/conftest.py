"""How nbval runs the book: pictures and cards are not compared letter by letter, claims are held to their records.

With base seed 0 a claim's mean may move from the committed record by two of its standard deviations, at least 2 %:
more means that the outputs on the page are stale.
"""

import os
from collections import defaultdict
from pathlib import Path

import pytest

CLAIM = "application/vnd.companion.claim+json"
SKIP = ("text/html", "image/png", "image/svg+xml", "image/jpeg", "metadata", CLAIM)


def pytest_collectstart(collector):
    """Bytes of pictures differ between processors: leave them out where cells are compared."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare = tuple(dict.fromkeys([*collector.skip_compare, *SKIP]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """After a cell ran, compare the claims it made with those on the page."""
    result = yield
    if not hasattr(item, "test_outputs") or os.environ.get("COMPANION_SEED", "0").strip() != "0":
        return result
    before, now = records(item.cell.get("outputs", [])), records(item.test_outputs or [])
    if found := drift(before, now):
        pytest.fail("\n".join([*found, "the page is stale: run `make notebooks`, then commit it"]), pytrace=False)
    return result


def records(outputs):
    """Return the claim records in the outputs of a cell, by key."""
    found = [output.get("data", {}).get(CLAIM) for output in outputs if output.get("data")]
    return {record["key"]: record for record in found if record}


def drift(before, now):
    """Return how the claims of a run differ from the committed ones, as sentences.

    Args:
        before: committed records by key.
        now: records of this run by key.
    """
    found = [f"the claim {key} is on the page, but the run did not make it" for key in sorted(set(before) - set(now))]
    found += [f"the claim {key} is not on the page" for key in sorted(set(now) - set(before))]
    for key in sorted(set(before) & set(now)):
        old, new = before[key], now[key]
        if old["statement"] != new["statement"]:
            found.append(f"{key} says {new['statement']!r}, the page {old['statement']!r}")
        if set(old["mean"]) != set(new["mean"]):
            found.append(f"{key} measures {sorted(new['mean'])}, the page {sorted(old['mean'])}")
        for name in sorted(set(old["mean"]) & set(new["mean"])):
            allowed = max(2 * old["sd"][name], 0.02 * abs(old["mean"][name]), 1e-9)
            if not abs(new["mean"][name] - old["mean"][name]) <= allowed:
                found.append(
                    f"{key}: the mean of {name} is {new['mean'][name]:.4g}, the page says {old['mean'][name]:.4g} "
                    f"(it may move by {allowed:.2g})"
                )
    return found


SECONDS = pytest.StashKey[dict]()
SLACK = 5  # a busy machine was seen to take three times as long; what runs away is still caught


def pytest_configure(config):
    """Begin to count seconds per notebook."""
    config.stash[SECONDS] = defaultdict(float)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Note in each report which notebook it is about, so that the counting process can add its time."""
    outcome = yield
    if hasattr(item, "test_outputs"):
        outcome.get_result().user_properties.append(("notebook", str(item.path)))


def pytest_sessionfinish(session):
    """Fail the run of a chapter that takes much longer than it may."""
    slow = over_budget(session.config.stash.get(SECONDS, {}))
    for line in slow:
        print(f"\n{line}")
    if slow and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


class _Clock:
    """Adds up reports where they arrive: in the one process, or in the one that hands out work to others."""

    def __init__(self, seconds):
        self.seconds = seconds

    def pytest_runtest_logreport(self, report):
        for name, value in report.user_properties:
            if name == "notebook":
                self.seconds[value] += report.duration


def pytest_sessionstart(session):
    """Start the clock."""
    if not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(_Clock(session.config.stash[SECONDS]))


def over_budget(seconds):
    """Return what is wrong with how long notebooks took, as sentences.

    Args:
        seconds: by notebook; 15 and 8 per paper are allowed, at most 90, several times that on a busy machine.
    """
    from companion import papers

    found = []
    for notebook, taken in sorted(seconds.items()):
        chapter = Path(notebook).stem
        count = len(papers.papers(chapter=chapter)) if chapter in papers.chapters() else 0
        allowed = min(90.0, 15.0 + 8.0 * count)
        if taken > SLACK * allowed:
            found.append(
                f"{chapter} took {taken:.0f} s, its budget is {allowed:.0f} s (8 per paper and 15): train fewer or"
                " smaller models, train them together with fit_many, or split the chapter"
            )
    return found
