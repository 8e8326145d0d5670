"""Reports as JSON."""

from __future__ import annotations

import json
import math

import pytest

from paddock.cli.bench.figures import print_json


def test_what_is_not_finite_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON has no infinity, and the perplexity of a spoilt model is one."""
    print_json({"perplexity": math.inf, "nats": 3.5e6, "windows": [{"kl": math.nan, "tokens": 4}, (-math.inf, "x", None, True)]})
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert report == {"perplexity": None, "nats": 3.5e6, "windows": [{"kl": None, "tokens": 4}, [None, "x", None, True]]}
