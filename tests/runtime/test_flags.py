"""The flags: what a command line and keyword arguments mean, and one line for everything they may not."""

import argparse

import msgspec
import pytest

from manylora.runtime.config import HttpArgs, LoRAPath, ServerConfig
from manylora.runtime.errors import ConfigError
from manylora.runtime.flags import FLAGS, config_from_kwargs, make_parser, parse_flags

MODEL = ["--model-path", "some/model"]

# Every launch of the documents whose interface this is, as a shell-less launcher reads it: see `as_launched`.
LAUNCHES = (
    """
python3 -m sglang.launch_server --model-path meta-llama/Meta-Llama-3.1-8B-Instruct \\
 --lora-paths lora0=algoprog/fact-generation-llama-3.1-8b-instruct-lora \\
 --max-loras-per-batch 1 --lora-backend triton \\
 --disable-radix-cache
""",
    """
python3 -m sglang.launch_server --model-path meta-llama/Meta-Llama-3.1-8B-Instruct \\
    --enable-lora \\
    --lora-paths lora0=algoprog/fact-generation-llama-3.1-8b-instruct-lora \\
    lora1=Nutanix/Meta-Llama-3.1-8B-Instruct_lora_4_alpha_16 \\
    --max-loras-per-batch 2 --lora-backend triton \\
""",
    """
    python3 -m sglang.launch_server --model-path meta-llama/Meta-Llama-3.1-8B-Instruct \\
    --enable-lora \\
    --cuda-graph-max-bs 2 \\
    --max-loras-per-batch 2 --lora-backend triton \\
    --max-lora-rank 256
    --lora-target-modules all
    """,
    """
    python3 -m sglang.launch_server --model-path meta-llama/Meta-Llama-3.1-8B-Instruct \\
    --enable-lora \\
    --cuda-graph-max-bs 8 \\
    --max-loras-per-batch 3 --lora-backend triton \\
    --max-lora-rank 256 \\
    --lora-target-modules all \\
    --lora-paths \\
        {"lora_name":"lora0","lora_path":"Nutanix/Meta-Llama-3.1-8B-Instruct_lora_4_alpha_16","pinned":true} \\
        {"lora_name":"lora1","lora_path":"algoprog/fact-generation-llama-3.1-8b-instruct-lora"} \\
        lora2=philschmid/code-llama-3-1-8b-text-to-sql-lora
    """,
)


def as_launched(command: str) -> list[str]:
    """The flags of a launch line after the launcher's treatment: continuations to blanks, split, no shell."""
    words = command.replace("\\\n", " ").replace("\\", " ").split()
    assert words[:3] == ["python3", "-m", "sglang.launch_server"]
    extra = "--port 31000 --max-running-requests 128 --max-total-tokens 20480 --cuda-graph-max-bs 4"
    return [*words[3:], *extra.split()]


@pytest.mark.parametrize("command", LAUNCHES)
def test_every_launch_of_the_documents_parses(command: str) -> None:
    config = parse_flags(as_launched(command))
    assert config.model.model_path == "meta-llama/Meta-Llama-3.1-8B-Instruct"
    assert config.lora.enable_lora
    assert config.http.port == 31000
    assert config.cache.max_total_tokens == 20480


def test_the_three_forms_of_lora_paths_mix() -> None:
    lora = parse_flags(as_launched(LAUNCHES[3])).lora
    assert lora.lora_paths == (
        LoRAPath("lora0", "Nutanix/Meta-Llama-3.1-8B-Instruct_lora_4_alpha_16", pinned=True),
        LoRAPath("lora1", "algoprog/fact-generation-llama-3.1-8b-instruct-lora"),
        LoRAPath("lora2", "philschmid/code-llama-3-1-8b-text-to-sql-lora"),
    )
    assert (lora.max_lora_rank, lora.target_modules) == (256, None)


def test_a_bare_path_is_its_name_and_the_first_equals_sign_splits() -> None:
    lora = parse_flags([*MODEL, "--lora-paths", "/data/a", "b=/data/x=1"]).lora
    assert lora.lora_paths == (LoRAPath("/data/a", "/data/a"), LoRAPath("b", "/data/x=1"))


def test_a_flag_sets_the_field_of_its_name() -> None:
    config = parse_flags(
        [*MODEL, "--tp", "4", "--dtype", "half", "--chunked-prefill-size", "-1", "--device=cpu"]
    )
    assert config.parallel.tp_size == 4
    assert config.model.dtype == "float16"
    assert config.model.device == "cpu"
    assert config.schedule.chunked_prefill_size == -1
    fused = parse_flags([*MODEL, "--lora-target-modules", "qkv_proj", "down_proj"])
    assert fused.lora.target_modules == ("q_proj", "k_proj", "v_proj", "down_proj")


def test_defaults_are_the_configs_own() -> None:
    config = parse_flags(MODEL)
    assert config == ServerConfig(model=msgspec.structs.replace(config.model, model_path="some/model"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "--model-path is required"),
        ("--model-path", "argument --model-path/--model: expected one argument"),
        ("--model-path m --no-such-flag", "unrecognized arguments: --no-such-flag"),
        ("--model-path m --max-lora 3", "unrecognized arguments: --max-lora 3"),
        ("--model-path m --tp-size two", "--tp-size must be an integer, got 'two'"),
        ("--model-path m --tp-size 0", "--tp-size must be at least 1, got 0"),
        ("--model-path m --port 70000", "--port must be in [0, 65535], got 70000"),
        ("--model-path m --mem-fraction-static nan", "--mem-fraction-static must be in [0.01, 1], got nan"),
        ("--model-path m --device tpu", "--device must be one of auto, cuda, cpu, got 'tpu'"),
        ("--model-path m --lora-backend csgmv", "--lora-backend must be one of triton, got 'csgmv'"),
        (
            "--model-path m --chunked-prefill-size 0",
            "--chunked-prefill-size must be -1 or at least 1, got 0",
        ),
        (
            "--model-path m --max-loaded-loras 3",
            "--max-loaded-loras (3) must be at least --max-loras-per-batch (8)",
        ),
        (
            "--model-path m --max-loras-per-batch 1 --max-loaded-loras 1 --lora-paths a b",
            "--max-loaded-loras (1) must be at least the number of --lora-paths (2)",
        ),
        ("--model-path m --lora-paths a=x a=y", "--lora-paths names 'a' twice"),
        ("--model-path m --lora-paths =x", "--lora-paths: '=x' lacks a name or a path"),
        (
            '--model-path m --lora-paths {"lora_name":"a"}',
            '--lora-paths: {"lora_name":"a"} looks like JSON but does not contain the keys lora_name and lora_path',
        ),
        (
            '--model-path m --lora-paths {"lora_name":"a","lora_path":"b","pin":true}',
            '--lora-paths: {"lora_name":"a","lora_path":"b","pin":true}: Object contains unknown field `pin`',
        ),
        (
            '--model-path m --max-loras-per-batch 1 --lora-paths {"lora_name":"a","lora_path":"b","pinned":true}',
            "--lora-paths pins 1 adapters; at most --max-loras-per-batch - 1 (0) may be pinned, "
            "so that the others are not starved",
        ),
        (
            "--model-path m --lora-target-modules all q_proj",
            "--lora-target-modules: `all` cannot be combined with others",
        ),
        (
            "--model-path m --lora-target-modules lm_head",
            "--lora-target-modules: 'lm_head' is not supported; supported are q_proj, k_proj, v_proj, o_proj, "
            "gate_proj, up_proj, down_proj, qkv_proj, gate_up_proj and all",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_flags(line.split())
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("localhost", True),
        ("LocalHost", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("::ffff:0.0.0.0", False),
        ("::ffff:10.0.0.1", False),
        ("10.0.0.1", False),
        ("fe80::1%eth0", False),
        ("", False),
        ("0", False),
        ("127.1", False),  # means loopback, but why write it so
        ("127.0.0.1.example.org", False),
        ("localhost.example.org", False),
        ("my-machine", False),
    ],
)
def test_a_public_address_needs_an_api_key(host: str, loopback: bool) -> None:
    """Whatever is not surely loopback is public. A key for the admin alone leaves the rest open."""
    given = [*MODEL, f"--host={host}"]
    assert HttpArgs(host=host).is_loopback is loopback
    for more in ([], ["--admin-key-file=keys"]):
        if loopback:
            parse_flags([*given, *more])
        else:
            with pytest.raises(ConfigError) as caught:
                parse_flags([*given, *more])
            assert caught.value.message == (
                f"--host {host or repr('')} may be reached from other machines: give --api-key-file, or --insecure to "
                "serve without keys"
            )
    for more in ("--api-key-file=keys", "--insecure"):
        assert parse_flags([*given, more]).http.host == host


def test_roots_add_up() -> None:
    access = parse_flags([*MODEL, "--adapter-root", "a", "--allow-hub", "--adapter-root=b"]).access
    assert (access.adapter_root, access.allow_hub, access.asks_for_keys) == (("a", "b"), True, False)
    assert config_from_kwargs(model_path="m", adapter_root="a").access.adapter_root == ("a",)


def test_json_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not valid JSON") as caught:
        parse_flags([*MODEL, "--lora-paths", "{lora_name:a}"])
    assert caught.value.param == "lora_paths"


@pytest.mark.parametrize(
    "lora_paths",
    [
        {"a": "x", "b": "y"},
        ["a=x", "b=y"],
        [{"lora_name": "a", "lora_path": "x"}, LoRAPath("b", "y")],
    ],
)
def test_keyword_arguments_take_paths_in_any_form(lora_paths: object) -> None:
    config = config_from_kwargs(model_path="m", tp_size=2, lora_paths=lora_paths)
    assert config.lora.lora_paths == (LoRAPath("a", "x"), LoRAPath("b", "y"))
    assert config.lora.enable_lora


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model_path": "m", "tp_sise": 2}, "there is no flag 'tp_sise'"),
        ({"model_path": "m", "tp_size": "2"}, "--tp-size must be an integer, got '2'"),
        ({"model_path": "m", "port": None}, "--port must be an integer, got None"),
        ({"model_path": "m", "lora_paths": "a=b"}, "--lora-paths takes a list, got 'a=b'"),
        ({"model_path": "m", "lora_paths": [3]}, "--lora-paths: 3 is neither text nor a dict"),
        ({"model_path": "m", "lora_paths": ["a"], "enable_lora": False}, "--lora-paths needs --enable-lora"),
        ({}, "--model-path is required"),
    ],
)
def test_keyword_arguments_are_checked_as_flags_are(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_kwargs(**flags)
    assert caught.value.message == message


def test_every_field_a_user_may_set_has_one_flag() -> None:
    """Only what the supervisor fills in has none."""
    targets = [(flag.section, flag.target.name) for flag in FLAGS]
    assert len(set(targets)) == len(targets)
    inner = {
        "model": {"model_dir"},
        "": {
            "model",
            "lora",
            "cache",
            "schedule",
            "parallel",
            "http",
            "access",
            "run_dir",
            "shm_dir",
            "supervisor_pid",
            "epoch",
        },
    }
    config = parse_flags(MODEL)
    for section in ("model", "lora", "cache", "schedule", "parallel", "http", "access", ""):
        struct = getattr(config, section) if section else config
        fields = {field.name for field in msgspec.structs.fields(struct)}
        flagged = {name for part, name in targets if part == section}
        assert fields - flagged == inner.get(section, set())


def test_help_names_every_flag() -> None:
    text = make_parser("manylora serve").format_help()
    assert isinstance(make_parser("x"), argparse.ArgumentParser)
    for flag in FLAGS:
        assert flag.option in text
