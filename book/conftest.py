"""How nbval runs the book: pictures and cards are not compared letter by letter, claims are held to their records.

With base seed 0 a claim's mean may move from the committed record by two of its standard deviations, at least 2 %:
more means that the outputs on the page are stale.
"""

import os

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
