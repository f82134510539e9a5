"""What Prometheus reads."""

from __future__ import annotations

import re

from mlx_starflow.server.metrics import Metrics


def test_the_format(server):
    server.post("/api/generate", prompt="a cat", seed=1)
    server.client.get("/nope")
    answer = server.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    line = re.compile(r'[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [0-9.]+(e[+-][0-9]+)?')
    lines = [each for each in answer.text.splitlines() if not each.startswith("#")]
    assert all(line.fullmatch(each) for each in lines)
    values = dict(each.rsplit(" ", 1) for each in lines)
    assert float(values['mlx_starflow_jobs_total{kind="generate",state="done"}']) >= 1
    # Paths that clients make up make no new lines.
    assert 'mlx_starflow_requests_total{route="other",status="404"}' in values
    assert float(values["mlx_starflow_resident_bytes"]) > 1e7
    assert values["mlx_starflow_models_loaded"] == "1"


def test_labels_are_quoted():
    metrics = Metrics()
    metrics.count("requests", route='a"b\\c\nd', status="200")
    assert r'{route="a\"b\\c\nd",status="200"} 1' in metrics.text({})
