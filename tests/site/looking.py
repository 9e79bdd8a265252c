"""What the browser tests share."""

import os

import pytest


def missing(reason):
    """No browser: a reason to skip on a reader's machine, a failure where browsers are required."""
    if os.environ.get("COMPANION_REQUIRE_BROWSER") == "1":
        pytest.fail(f"COMPANION_REQUIRE_BROWSER=1, but {reason}", pytrace=False)
    pytest.skip(reason)
