"""docs/grafana.json: complete for Grafana's own types, and every query parses and asks for what `/metrics` answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = {"$__rate_interval": "1m", "$instance": ".+", "$adapter": ".+"}
COLUMNS = 24


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads((ROOT / "docs/grafana.json").read_text())


def documented() -> dict[str, tuple[str, set[str]]]:
    """Name -> type and labels; tests/runtime/test_http_metrics.py compares the document with what is exported."""
    text = (ROOT / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| `(\w+:\w+)` \| (\w+) \| (.*?) ?\| .* \|$", text, re.MULTILINE)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def targets(dashboard: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every query with its panel's title."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target


def queries(dashboard: dict[str, Any]) -> list[str]:
    """Every expression with its variables filled in."""
    found: list[str] = []
    for _, target in targets(dashboard):
        query = target["expr"]
        for name, value in VARIABLES.items():
            query = query.replace(name, value)
        found.append(query)
    return found


def selectors(query: str) -> list[Any]:
    found: list[Any] = []

    def note(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(query), pre_visit=note)
    return found


def test_grafana_knows_every_field(dashboard: dict[str, Any]) -> None:
    """Read by the types that Grafana publishes and written again, nothing is lost."""
    register_default_plugins()
    assert list(lost(dashboard, read_and_written(dashboard))) == []
    spoilt = {"panels": [{"type": "stat", "titel": "x", "options": {"graphMood": "area"}}]}
    assert list(lost(spoilt, read_and_written(spoilt))) == ["/panels/0/titel", "/panels/0/options/graphMood"]


def read_and_written(dashboard: dict[str, Any]) -> Any:
    return json.loads(JSONEncoder(sort_keys=True, indent=2).encode(Dashboard.from_json(dashboard)))


def lost(given: Any, kept: Any, place: str = "") -> Iterator[str]:
    """Where `given` says something that `kept` does not."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            if key not in kept:
                yield f"{place}/{key}"
            else:
                yield from lost(value, kept[key], f"{place}/{key}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for index, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{place}/{index}")
    elif given != kept:
        yield place


def test_panels_have_ids_titles_and_places_of_their_own(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["title"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < COLUMNS
        assert not cells & taken, panel["title"]
        taken |= cells
        assert (panel["type"] == "row") == ("targets" not in panel)
        assert len({target["refId"] for target in panel.get("targets", ())}) == len(panel.get("targets", ()))


def test_the_data_source_and_what_is_shown_are_chosen_by_variables(dashboard: dict[str, Any]) -> None:
    variables = {one["name"]: one for one in dashboard["templating"]["list"]}
    assert set(variables) == {"datasource", "instance", "adapter"}
    assert variables["datasource"]["type"] == "datasource"
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert all(variables[name]["datasource"] == chosen for name in ("instance", "adapter"))
    for title, target in targets(dashboard):
        assert target["datasource"] == chosen, title
        assert 'instance=~"$instance"' in target["expr"], title
        assert ('adapter=~"$adapter"' in target["expr"]) == ("manylora:adapter_" in target["expr"]), title
    assert "__inputs" not in dashboard  # an import asks for nothing


def test_every_query_asks_for_what_is_exported(dashboard: dict[str, Any]) -> None:
    exported = documented()
    used: set[str] = set()
    for query in queries(dashboard):
        found = selectors(query)
        assert found, query
        for selector in found:
            name = re.sub(r"_(bucket|count|sum)\Z", "", selector.name)
            kind, labels = exported[name]
            assert (name != selector.name) == (kind == "histogram"), query
            asked = {matcher.name for matcher in selector.matchers.matchers}
            assert asked <= labels | {"instance", "le"}, query
            used.add(name)
    for variable in dashboard["templating"]["list"][1:]:
        [(metric, label)] = re.findall(r"label_values\(([\w:]+).*, (\w+)\)", variable["query"]["query"])
        assert label in exported[metric][1] | {"instance"}
        used.add(metric)
    ours = {name for name in exported if name.startswith("manylora:")}
    assert ours - used == {"manylora:model_info", "manylora:page_bytes"}  # everything else can be seen


def test_labels_that_legends_and_groups_name_exist(dashboard: dict[str, Any]) -> None:
    exported = documented()
    for title, target in targets(dashboard):
        names = {
            re.sub(r"_(bucket|count|sum)\Z", "", name) for name in re.findall(r"manylora:\w+", target["expr"])
        }
        labels = set[str]().union(*(exported[name][1] for name in names)) | {"instance", "le"}
        named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        grouped = {
            label for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in group.split(", ")
        }
        assert named | grouped <= labels, title


def test_counters_are_rated_and_gauges_are_not(dashboard: dict[str, Any]) -> None:
    exported = documented()
    for query in queries(dashboard):
        rated = set(re.findall(r"rate\(([\w:]+)", query))
        for selector in selectors(query):
            kind = exported[re.sub(r"_(bucket|count|sum)\Z", "", selector.name)][0]
            assert (selector.name in rated) == (kind in ("counter", "histogram")), query
