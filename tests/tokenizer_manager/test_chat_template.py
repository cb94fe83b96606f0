"""Chat templates: found where models keep them, rendered as transformers does, and stopped when they run away."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from manylora.runtime.errors import ChatTemplateError, ModelUnsupportedError, NoChatTemplateError
from manylora.tokenizer_manager.chat_template import MAX_RENDERERS, ChatTemplate, find_chat_template
from tests.tokenizer_manager.fake_scheduler import in_loop, until
from tests.tokenizer_manager.tiny_tokenizer import save_byte_level

TALK = [
    {"role": "system", "content": "Be <b>brief</b> & kind."},
    {"role": "user", "content": "Grüße, 日本 🙂"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "  and now?\n"},
]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


async def render(template: str, messages: list[dict[str, Any]] = TALK, **options: Any) -> str:
    chat = ChatTemplate(template, {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}, **options)
    try:
        return await chat.render(messages)
    finally:
        chat.close()


def write_config(directory: Path, config: Any) -> Path:
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] | trim }}\n{% endfor %}[assistant]",
    # Blocks on lines of their own leave nothing behind.
    "{% for m in messages %}\n    {% if loop.first %}\n    {{- bos_token }}\n    {% endif %}\n{{ m.content }}{{ eos_token }}\n{% endfor %}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% continue %}{% endif %}{% if loop.last %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}",
    "{{ messages | tojson(indent=2) }}|{{ messages[0] | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true) }}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ ns.n }}{% if tools is none and add_generation_prompt %}!{% endif %}",
    "{{ '{0.__class__}'.format(messages) }}",  # the sandbox gives nothing
    "{{ strftime_now('%Y') | length }}{{ undefined_thing }}{{ messages[0].missing is defined }}",
    "{%- macro turn(m) -%}<{{ m.role }}>{{ m.content }}{%- endmacro -%}{% for m in messages[1:] %}{{ turn(m) }}{% endfor %}",
]


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_renders_as_transformers(template: str, tmp_path: Path) -> None:
    directory = save_byte_level(tmp_path)
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), bos_token="<|bos|>", eos_token="<|eos|>"
    )
    expected = reference.apply_chat_template(
        TALK, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert asyncio.run(render(template)) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "failed: roles must alternate"),
        ("{% if %}", "failed: Expected an expression"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[0] + 1 }}", "TypeError"),
        ("{{ 'a' * 3000000000 }}", "too much memory"),
        ("{{ 'a' * 70000000 }}", "70000000 bytes"),
        ("{{ '\\ud800' }}", "UnicodeEncodeError"),
    ],
)
@in_loop
async def test_a_template_that_fails_says_why(template: str, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message) as caught:
        await render(template)
    assert (caught.value.info().status, caught.value.info().code) == (400, "chat_template_failed")


@in_loop
async def test_a_runaway_is_stopped_and_the_next_chat_is_served() -> None:
    template = ChatTemplate(f"{{% if messages | length > 1 %}}{ENDLESS}{{% endif %}}ok", limit_s=0.3)
    for _ in range(2):
        with pytest.raises(ChatTemplateError, match=r"longer than 0\.3 s"):
            await template.render(TALK)
        assert await template.render(TALK[:1]) == "ok"
    template.close()


@in_loop
async def test_a_slow_chat_does_not_hold_up_another() -> None:
    template = ChatTemplate(f"{{% if messages | length > 1 %}}{ENDLESS}{{% endif %}}ok", limit_s=5.0)
    slow = asyncio.create_task(template.render(TALK))
    await asyncio.sleep(0)
    assert await template.render(TALK[:1]) == "ok"
    assert not slow.done()
    slow.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slow
    template.close()


@in_loop
async def test_many_at_once_get_each_its_own() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    texts = [f"{index}" * 50_000 for index in range(5 * MAX_RENDERERS)]
    answers = await asyncio.gather(*(template.render([{"content": text}]) for text in texts))
    assert answers == texts
    template.close()


@in_loop
async def test_the_answer_of_a_caller_that_left_goes_to_nobody_else() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    for index in range(5):
        leaving = asyncio.create_task(template.render([{"content": "old" * 100_000}]))
        await asyncio.sleep(0.001 * index)
        leaving.cancel()
        assert await template.render([{"content": "new"}]) == "new"
    template.close()


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


@in_loop
async def test_a_process_that_was_killed_is_replaced() -> None:
    template = ChatTemplate("ok")
    before = set(children())
    assert await template.render(TALK) == "ok"
    [process] = set(children()) - before
    os.kill(process, signal.SIGKILL)
    await until(lambda: Path(f"/proc/{process}/stat").read_text().split()[2] == "Z")
    assert await template.render(TALK) == "ok"
    template.close()
    assert set(children()) == before


@in_loop
async def test_without_a_template() -> None:
    with pytest.raises(NoChatTemplateError, match="no chat template") as caught:
        await ChatTemplate().render(TALK)
    assert (caught.value.info().status, caught.value.info().code) == (400, "no_chat_template")


def test_where_templates_are_found(tmp_path: Path) -> None:
    assert find_chat_template(tmp_path) is None
    write_config(tmp_path, {"bos_token": "x"})
    assert find_chat_template(tmp_path) is None
    write_config(tmp_path, {"chat_template": "of the config"})
    assert find_chat_template(tmp_path) == "of the config"
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "the default"}]
    write_config(tmp_path, {"chat_template": named})
    assert find_chat_template(tmp_path) == "the default"
    write_config(tmp_path, {"chat_template": named[:1]})
    assert find_chat_template(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("of the file")
    assert find_chat_template(tmp_path) == "of the file"
    (tmp_path / "mine").write_text("mine")
    assert find_chat_template(tmp_path, str(tmp_path / "mine")) == "mine"


@pytest.mark.parametrize("config", [{"chat_template": 7}, {"chat_template": {"default": "x"}}])
def test_a_template_that_is_none_is_refused(tmp_path: Path, config: Any) -> None:
    with pytest.raises(ModelUnsupportedError, match="chat_template"):
        find_chat_template(write_config(tmp_path, config))
