"""What the pages of docs/ and examples/ name exists: flags, routes, codes, metrics, fields, anchors; what they show parses."""

from __future__ import annotations

import ast
import configparser
import contextlib
import io
import json
import re
import subprocess

import promql_parser
import pytest
import yaml

from manylora.lora.adapter_config import IGNORED_FIELDS, KEPT_BASE_INITS, NEUTRAL_VALUES, READ_FIELDS
from manylora.lora.page_layout import DOWN, NUM_MODULES, O, adapter_layout, pool_geometry
from manylora.runtime import errors
from manylora.runtime.errors import ManyloraError
from manylora.runtime.flags import FLAGS
from manylora.runtime.http.adapter_admin_routes import STATUSES  # pyright: ignore[reportPrivateUsage]
from manylora.runtime.http.server import ROUTES
from manylora.runtime.model_config import ModelConfig, RopeConfig
from tests.test_docs import DOCUMENTS, ROOT

TEXTS = {document: (ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS}
OUR_FLAGS = {name for flag in FLAGS for name in (flag.option, *flag.aliases)}
# Of `manylora adapters`, and of programs that the pages call.
OTHER_FLAGS = {
    *(
        "--url",
        "--json",
        "--timeout",
        "--if-version",
        "--pinned",
        "--ttl",
        "--drain",
        "--force",
        "--off",
        "--help",
    ),
    *("--gpus", "--shm-size", "--sweep", "--model-shape", "--only", "--runs", "--out"),
}
PEERS = "docs/migration.md"
# The page speaks of another program's flags, too.
GATEWAY_FLAGS = re.compile(r"--(total|kv|lora-info|cache-info)[\w-]*metric")
BAR = re.compile(r"(?<!\\)\|")  # between two cells
METRIC = re.compile(r"\b(?:manylora|vllm):\w+")


def fences(language: str) -> list[tuple[str, str]]:
    """(document, source) of every fence of a language."""
    pattern = re.compile(rf"^```{language}(?: .*)?\n([\s\S]*?)^```$", flags=re.MULTILINE)
    return [(document, source) for document, text in TEXTS.items() for source in pattern.findall(text)]


def anchors(text: str) -> set[str]:
    """Those of a page's headings, as GitHub makes them."""
    without_code = re.sub(r"^```[\s\S]*?^```$", "", text, flags=re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", without_code, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def rows(text: str, *header: str) -> list[list[str]]:
    """The cells of every table whose header begins so."""
    found: list[list[str]] = []
    start = "| " + " | ".join(header) + " |"
    for part in text.split("\n" + start)[1:]:
        lines = part.split("\n\n", 1)[0].splitlines()[2:]
        found += [[cell.strip().replace(r"\|", "|") for cell in BAR.split(line)[1:-1]] for line in lines]
    return found


# ---- what is shown parses -----------------------------------------------------------------------------------------


def test_every_page_of_the_docs_is_checked() -> None:
    pages = {
        str(path.relative_to(ROOT))
        for folder in ("docs", "examples")
        for path in (ROOT / folder).glob("*.md")
    }
    assert pages <= set(DOCUMENTS)


def test_json_yaml_ini_and_python_parse() -> None:
    for _, source in fences("json"):
        json.loads(source)
    for _, source in fences("yaml"):
        list(yaml.safe_load_all(source))
    for _, source in fences("ini"):
        configparser.ConfigParser(strict=False).read_string(source)
    for document, source in fences("python"):
        ast.parse(source, filename=document)


def test_shell_parses() -> None:
    source = "\n".join(source for _, source in fences("bash"))
    assert source.count("\n") > 50
    result = subprocess.run(
        ["bash", "-n"], input=source, capture_output=True, text=True, timeout=30, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_alerts_are_expressions_of_prometheus() -> None:
    expressions = [cells[1].strip("`") for cells in rows(TEXTS["docs/operations.md"], "alert", "expression")]
    assert len(expressions) > 5
    for expression in expressions:
        promql_parser.parse(expression)


# ---- what is named exists -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS)
def test_anchors_exist(document: str) -> None:
    for path, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", TEXTS[document]):
        target = (ROOT / document).parent / path if path else ROOT / document
        assert anchor in anchors(target.read_text(encoding="utf-8")), f"{path}#{anchor}"


@pytest.mark.parametrize("document", [one for one in DOCUMENTS if one != PEERS])
def test_flags_exist(document: str) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXTS[document]))
    unknown = {flag for flag in named - OUR_FLAGS - OTHER_FLAGS if not GATEWAY_FLAGS.fullmatch(flag)}
    assert unknown == set()


def test_codes_exist_with_their_status() -> None:
    """Where a page writes 404 `some_code` or `some_code` (404)."""
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ManyloraError)
    ]
    known = {(kind.code, kind.status) for kind in kinds} | set(STATUSES.items())
    for document, text in TEXTS.items():
        found = [
            (code, int(status)) for status, code in re.findall(r"\b([45]\d\d)(?: error)? `([a-z_]+)`", text)
        ]
        found += [(code, int(status)) for code, status in re.findall(r"`([a-z_]+)` \(([45]\d\d)\)", text)]
        assert [one for one in found if one not in known] == [], document
    for cells in [
        *rows(TEXTS["docs/api.md"], "status", "codes"),
        *rows(TEXTS["docs/api.md"], "status", "code"),
    ]:
        found = [(code, int(cells[0])) for code in re.findall(r"`(\w+)`", cells[1])]
        assert [one for one in found if one not in known] == []
    at_start = {"bad_config", "model_unsupported", "out_of_memory", "protocol_error"}  # no request gets these
    told = set(re.findall(r"`([a-z_]+)`", "\n".join(TEXTS.values())))
    assert {code for code, _ in known} - told <= at_start


def test_metrics_exist() -> None:
    """docs/metrics.md itself is compared with what a server publishes, in tests/runtime/."""
    listed = set(METRIC.findall(TEXTS["docs/metrics.md"]))
    for document, text in TEXTS.items():
        named = {re.sub(r"_(bucket|sum|count)$", "", name) for name in METRIC.findall(text)}
        assert named - listed == set(), document


# ---- pages about others and ourselves -----------------------------------------------------------------------------


@pytest.mark.parametrize("peer", ["SGLang", "vLLM"])
def test_what_is_the_same_elsewhere_is_ours(peer: str) -> None:
    """In the tables of the migration page: `same` is a flag or a route of ours, and so is whatever stands in our column."""
    paths = {route.published_path for route in ROUTES}
    num_flags = num_paths = 0
    for theirs, ours, *rest in rows(TEXTS[PEERS], peer, "manylora", "differences"):
        names = re.findall(r"`([^`]+)`", theirs if ours == "same" else ours)
        assert names or ours in ("not needed", "not there"), theirs
        for name in (one.split(" ")[-1] for one in names):
            assert name in (paths if "/" in name else OUR_FLAGS), theirs
            num_flags += "/" not in name
            num_paths += "/" in name
        for flag in re.findall(r"`(--[\w-]+)`", "".join(rest)):
            assert flag in OUR_FLAGS, theirs
    assert num_flags > 15
    assert num_paths > 4


def test_every_flag_of_ours_about_adapters_has_a_counterpart_or_is_ours_alone() -> None:
    ours_alone = {"--host-fraction", "--adapter-root", "--allow-hub", "--insecure"}
    told = {flag for flag in OUR_FLAGS if f"`{flag}`" in TEXTS[PEERS]}
    assert OUR_FLAGS - told <= ours_alone | {"--log-format"}


def test_every_field_of_an_adapters_configuration_is_told() -> None:
    text = TEXTS["docs/adapters.md"]
    fields = IGNORED_FIELDS | NEUTRAL_VALUES.keys() | READ_FIELDS
    assert [field for field in fields if f"`{field}`" not in text] == []
    assert [init for init in KEPT_BASE_INITS if isinstance(init, str) and f"`{init}`" not in text] == []


def test_the_digest_is_what_the_page_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    [source] = [source for document, source in fences("python") if document == "docs/adapters.md"]
    monkeypatch.chdir(ROOT)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(source, "docs/adapters.md", "exec"), {})
    digest = re.search(r'"digest": "(\w+)", "rank": 16', " ".join(TEXTS["docs/api.md"].split()))
    assert digest is not None
    assert output.getvalue().strip() == digest[1]


def test_times_of_the_operations_page_are_measured_ones() -> None:
    [paragraph] = [
        part for part in TEXTS["docs/operations.md"].split("\n\n") if part.startswith("What it costs")
    ]
    numbers = re.findall(r"\d+\.\d+|\d{4}|\d+(?= ms)", paragraph)
    assert len(numbers) == 5
    assert [number for number in numbers if number not in TEXTS["docs/benchmarks.md"]] == []


def test_sizes_of_the_example_are_those_of_the_layout() -> None:
    """Llama-3.1-8B: bytes of a rank, pages of an adapter, KV of a token."""
    model = ModelConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope=RopeConfig(500000.0),
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        dtype="bfloat16",
        bos_token_id=None,
        eos_token_ids=(),
    )
    geometry = pool_geometry(model, tp_size=1, sharding="slora", page_size=16, itemsize=2)
    assert (geometry.page_bytes, geometry.kv_bytes // 16) == (2 << 20, 128 << 10)
    table = rows(TEXTS["docs/operations.md"], "rank", "all seven modules")
    assert len(table) == 6
    for rank, *told in table:
        got: list[str] = []
        for last in (DOWN, O):
            ranks = [[int(rank) if module <= last else 0 for module in range(NUM_MODULES)]] * model.num_layers
            layout = adapter_layout(geometry, ranks)
            got += [f"{layout.num_bytes >> 20} MiB", str(layout.num_pages)]
        assert told == got
    for tp_size, factor in ((2, 1.5), (4, 2.1)):
        pages = [
            adapter_layout(
                pool_geometry(model, tp_size=tp_size, sharding=sharding, page_size=16, itemsize=2),
                [[16] * NUM_MODULES] * model.num_layers,
            ).num_pages
            for sharding in ("replicated", "slora")
        ]
        assert pages[0] / pages[1] == pytest.approx(factor, abs=0.05)
