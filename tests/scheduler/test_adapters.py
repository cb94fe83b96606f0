"""An adapter's life in the scheduler: load, replace, unload, pin, evict, read again, and what is refused."""

from __future__ import annotations

import pytest

from manylora.runtime.messages import CopyAdapter
from tests.scheduler.world import Adapter, World

PROMPT = [1, 2, 3, 4, 5]


def tiers(world: World) -> dict[str, str]:
    return {adapter.lora_name: adapter.tier for adapter in world.state().adapters}


def test_a_load_is_answered_when_every_rank_has_staged_it() -> None:
    world = World(tp_size=2)
    call = world.load("a", "pa")
    world.finish_job()
    world.ack(0)
    assert not call.answered
    assert world.images
    world.ack(0)
    assert call.reply.error is None
    assert call.reply.loaded == {"a": "pa"}
    assert call.reply.lora_version == 1
    assert not world.images
    assert tiers(world) == {"a": "host"}


def test_loaded_adapters_are_listed_in_load_order_a_reloaded_one_last() -> None:
    world = World()
    world.load_now("lora0", "p0")
    world.load_now("lora1", "p1")
    world.unload("lora0")
    assert list(world.load_now("lora0", "p2").reply.loaded.items()) == [("lora1", "p1"), ("lora0", "p2")]


def test_a_failing_rank_fails_the_load_and_leaves_nothing() -> None:
    world = World(tp_size=2)
    call = world.load("a", "pa")
    world.finish_job()
    world.ack(0, fail=True)
    world.ack(0)
    assert call.reply.error.code == "worker_crashed"
    assert call.reply.loaded == {}
    world.assert_nothing_left()


def test_names_that_are_taken_or_malformed_are_refused() -> None:
    world = World()
    world.load_now("a", "pa")
    again = world.load("a", "pa")
    assert again.reply.error.code == "adapter_exists"
    assert again.reply.error.message == "LoRA with name a already exists. Loaded LoRAs: a"
    world.load("b", "pb")
    assert world.load("b", "pb").reply.error.code == "adapter_exists"
    for name in ("", " a", "x\n", "y" * 513):
        assert world.load(name, "p").reply.error.code == "invalid_request"
    assert world.load("algoprog/fact-generation:v1", "").reply.error.param == "lora_path"


def test_a_request_for_an_unknown_name_gets_the_known_text() -> None:
    world = World()
    world.load_now("a", "pa")
    (sequence,) = world.submit(PROMPT, lora="zz")
    error = sequence.finish.error
    assert error.code == "adapter_not_found"
    assert error.message == "The following requested LoRA adapters are not loaded: zz\nLoaded adapters: a"
    missing = world.unload("zz").reply.error
    assert missing.message == "LoRA with name zz does not exist. Loaded LoRAs: a"


def test_a_server_without_lora_refuses_loads_and_requests() -> None:
    world = World(enable_lora=False)
    for call in (world.load("a", "pa"), world.unload("a")):
        assert call.reply.error.code == "lora_disabled"
        assert call.reply.error.message == "LoRA is not enabled. Please set `--enable-lora` to enable LoRA."
    assert world.submit(PROMPT, lora="a")[0].finish.error.code == "lora_disabled"


def test_an_adapter_is_used_only_after_every_rank_has_copied_it() -> None:
    world = World(tp_size=2)
    world.load_now("a", "pa")
    (sequence,) = world.submit(PROMPT, lora="a")
    world.schedule()
    assert [kind for kind, *_ in world.acks()] == ["copy", "copy"]
    world.ack(0)
    world.schedule()
    assert not world.worker.flights
    world.ack(0)
    world.schedule()
    assert world.worker.flights
    world.settle()
    assert sequence.finish.reason == "length"


def test_unload_waits_for_running_requests_and_frees_everything() -> None:
    world = World()
    world.load_now("a", "pa")
    (sequence,) = world.submit(PROMPT, lora="a", max_new=8, ignore_eos=True)
    while not world.worker.flights:
        world.schedule()
        while world.acks():
            world.ack()
    call = world.unload("a")
    assert not call.answered
    assert world.submit(PROMPT, lora="a")[0].finish.error.code == "adapter_not_found"
    newer = world.load_now("a", "pa2")
    assert sequence.finish.reason == "length"
    assert call.reply.error is None
    assert newer.reply.lora_version == 2
    world.assert_nothing_left()


def test_replace_switches_new_requests_and_lets_old_ones_finish() -> None:
    world = World()
    first = world.load_now("a", "pa").reply.lora_version
    (old,) = world.submit(PROMPT, lora="a", max_new=12, ignore_eos=True)
    world.step()
    call = world.load("a", "pa2", replace=True)
    (between,) = world.submit(PROMPT, lora="a")
    world.finish_job()
    while not call.answered:
        world.ack()
    (new,) = world.submit(PROMPT, lora="a")
    world.settle()
    assert (old.version, between.version, new.version) == (first, first, first + 1)
    assert new.cached == 0
    assert world.state().live_versions == 1


def test_at_most_one_less_than_the_batch_may_be_pinned() -> None:
    world = World(max_loras=3, num_slices=16)
    assert world.load_now("a", "pa", pinned=True).reply.error is None
    assert world.load_now("b", "pb", pinned=True).reply.error is None
    refused = world.load("c", "pc", pinned=True).reply.error
    assert refused.code == "adapter_limit"
    assert "It is not allowed to pin all slots in the LoRA memory pool to avoid starvation" in refused.message
    assert world.load_now("b", "pb2", pinned=True, replace=True).reply.error is None
    assert tiers(world) == {"a": "resident", "b": "resident"}


def test_a_pin_may_be_replaced_when_only_one_host_copy_is_allowed() -> None:
    world = World(max_loaded=1)
    world.load_now("a", "pa", pinned=True)
    assert world.load_now("a", "pb", replace=True).reply.error is None
    assert world.run(*world.submit(PROMPT, lora="a"))
    world.assert_nothing_left()


def test_an_unload_is_answered_after_the_last_token_of_its_requests() -> None:
    world = World(overlap=False, max_running=1)
    world.load_now("a", "pa")
    (sequence,) = world.submit(PROMPT, lora="a", max_new=2, ignore_eos=True)
    while not sequence.generated:
        world.step()
        while world.acks():
            world.ack()
    call = world.unload("a")
    world.schedule()
    world.scheduler.on_worker(world.worker.flights.popleft().output)
    assert [type(message).__name__ for message in world.scheduler.to_front] == ["StepOutput", "AdapterReply"]
    world.settle()
    assert call.reply.error is None


def test_a_pinned_adapter_survives_pressure_an_idle_one_is_evicted() -> None:
    world = World(num_pages=8, max_running=1)
    world.load_now("pin", "pp", pinned=True)
    world.load_now("a", "pa")
    world.run(*world.submit(PROMPT, lora="a"))
    assert tiers(world) == {"pin": "resident", "a": "resident"}
    world.run(*world.submit([9] * 20, max_new=7, ignore_eos=True))
    assert tiers(world) == {"pin": "resident", "a": "host"}


def test_what_is_unused_for_longest_goes_first_prefix_or_adapter() -> None:
    for adapter_first in (True, False):
        world = World(num_pages=10, max_running=1)
        world.load_now("a", "pa")
        uses = [
            lambda w=world: w.submit(PROMPT, lora="a", max_new=1),
            lambda w=world: w.submit([9] * 8, max_new=1),
        ]
        for use in uses if adapter_first else reversed(uses):
            use()
            world.settle()
        world.run(
            *world.submit([8] * 32, max_new=1)
        )  # 8 pages; 5 are free, 2 and 1 go with the adapter, 2 are [9]s
        assert tiers(world)["a"] == ("host" if adapter_first else "resident")


def test_a_pin_that_leaves_a_live_request_no_room_is_refused() -> None:
    world = World(num_pages=8, max_running=1)
    world.submit([1] * 25, max_new=4)
    world.step()
    refused = world.load_now("a", "pa", pinned=True).reply
    assert refused.error is None  # the request had ended by then: 7 pages beside 1 of the pin
    world = World(num_pages=8, files={"pa": Adapter(num_pages=2)})
    world.submit([1] * 25, max_new=4)
    call = world.load("a", "pa", pinned=True)
    world.finish_job()
    assert call.reply.error.code == "adapter_limit"
    assert not world.images


def test_an_adapter_that_can_never_fit_is_refused() -> None:
    for size in (Adapter(num_pages=24), Adapter(num_slices=9), Adapter(num_pages=9)):
        world = World(files={"pa": size})
        assert world.load_now("a", "pa").reply.error.code == "adapter_limit"
        world.assert_nothing_left()


def test_a_request_beside_pinned_adapters_is_refused_if_it_can_never_fit() -> None:
    world = World(num_pages=8, files={"pa": Adapter(num_pages=3)})
    world.load_now("a", "pa", pinned=True)
    assert world.submit([1] * 21, max_new=1)[0].finish.error.code == "context_length_exceeded"
    assert world.run(*world.submit([1] * 20, max_new=1))


def test_max_loaded_loras_sends_the_unused_one_to_disk_and_reads_it_again() -> None:
    world = World(max_loaded=1)
    world.load_now("a", "pa")
    world.load_now("b", "pb")
    assert tiers(world) == {"a": "disk", "b": "host"}
    (sequence,) = world.submit(PROMPT, lora="a")
    world.schedule()
    assert [(job.lora_path, job.digest) for job in world.jobs] == [("pa", "pa@0")]
    world.settle()
    assert sequence.finish.reason == "length"
    assert sequence.version == 1


@pytest.mark.parametrize("careless", [True, False])
def test_files_that_changed_fail_the_request_and_nothing_else(careless: bool) -> None:
    world = World(max_loaded=1)
    world.load_now("a", "pa")
    world.load_now("b", "pb")
    world.files["pa"].edition = 1
    (sequence,) = world.submit(PROMPT, lora="a")
    world.schedule()
    world.finish_job(careless=careless)
    assert sequence.finish.error.code == "adapter_changed"
    assert world.run(*world.submit(PROMPT, lora="b"))
    world.assert_nothing_left()


def test_a_lost_loader_fails_what_it_was_asked_for() -> None:
    world = World(max_loaded=1)
    world.load_now("a", "pa")
    world.load_now("b", "pb")
    (waiting,) = world.submit(PROMPT, lora="a")
    world.schedule()
    call = world.load("c", "pc")
    world.lose_loader()
    assert waiting.finish.error.code == call.reply.error.code == "worker_crashed"
    assert world.run(*world.submit(PROMPT, lora="a"))


def test_an_image_that_nobody_wants_any_more_is_released() -> None:
    world = World(max_loaded=1)
    world.load_now("a", "pa")
    world.load_now("b", "pb")
    (waiting,) = world.submit(PROMPT, lora="a")
    world.schedule()
    world.abort(waiting)
    assert world.unload("a").reply.error is None
    world.finish_job()
    assert not world.images
    world.assert_nothing_left()


def test_an_adapter_copy_waits_until_no_step_touches_its_pages() -> None:
    world = World(num_pages=4, max_running=2, files={"pa": Adapter(num_pages=2)})
    world.load_now("a", "pa")
    (base,) = world.submit([1, 2, 3, 4, 5, 6], max_new=3, ignore_eos=True)
    (adapted,) = world.submit([1, 2], lora="a", max_new=1)
    copies_at: list[int] = []
    receive = world.worker.receive

    def record(message: object) -> None:
        if isinstance(message, CopyAdapter):
            copies_at.append(len(world.worker.flights))
        receive(message)  # type: ignore[arg-type]

    world.worker.receive = record  # type: ignore[method-assign]
    world.settle()
    assert base.finish.reason == adapted.finish.reason == "length"
    assert copies_at


def test_a_pin_waits_for_room_and_nobody_enters_before_it() -> None:
    world = World(num_pages=6, max_running=2)
    (running,) = world.submit([1] * 12, max_new=9, ignore_eos=True)
    world.step()
    world.step()
    call = world.load("a", "pa", pinned=True)
    world.finish_job()
    while not call.answered:
        world.ack()
    assert call.reply.error is None
    world.submit([2] * 4, max_new=1)
    for _ in range(30):
        world.step()
        while world.acks():
            world.ack()
    assert running.finish.reason == "length"
    assert tiers(world) == {"a": "resident"}
    world.settle()


def test_requests_whose_copy_fails_get_the_error() -> None:
    world = World(tp_size=2)
    world.load_now("a", "pa")
    (sequence,) = world.submit(PROMPT, lora="a")
    world.schedule()
    world.ack(0, fail=True)
    assert not sequence.ended
    world.ack(0)
    assert sequence.finish.error.code == "worker_crashed"
    world.assert_nothing_left()
