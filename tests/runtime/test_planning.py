"""What fits where, what is recommended, and what `build` refuses. Times: test_roofline.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from paliedge.bundle import Bundle
from paliedge.devices import DEVICES, TARGET_NAMES, Device
from paliedge.errors import ResourceError, UsageError
from paliedge.model import SHIPPED_BUNDLE
from paliedge.planning import (
    BUILD_FACTOR,
    EXPORTED_PRECISIONS,
    OVERHEAD_BYTES,
    DevicePlan,
    FreeMemory,
    PrecisionPlan,
    available_memory,
    cache_bytes,
    check_build_memory,
    estimate_decoder_workspace,
    estimate_vision_workspace,
    plan_bundle,
)
from tests.large import PALIGEMMA2_3B, PALIGEMMA_3B, Size, make_manifest

NANO, AGX = DEVICES["orin-nano-8gb"], DEVICES["agx-orin-64gb"]
GB = 10**9


def plan_of(precision: str, plan: DevicePlan) -> PrecisionPlan:
    (found,) = (one for one in plan.precisions if one.precision == precision)
    return found


def with_usable(device: Device, num_bytes: int) -> Device:
    return replace(device, usable_bytes=num_bytes)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_devices_are_consistent(device: Device) -> None:
    assert DEVICES[device.key] is device
    assert 0 < device.usable_bytes <= device.memory_bytes
    assert device.int8_ops == pytest.approx(2 * device.fp16_flops, rel=0.01)
    assert 0 < device.sustained_compute < device.sustained_bandwidth < 1
    assert device.targets
    assert set(device.targets) <= set(TARGET_NAMES)


def test_only_orins_take_jetpack_6() -> None:
    takes = {key for key, device in DEVICES.items() if "jetpack6" in device.targets}
    assert takes == {key for key in DEVICES if "orin" in key}
    assert all("rtx" in device.targets for device in DEVICES.values() if not device.unified)


@pytest.mark.parametrize(
    ("size", "weights"),
    [
        (PALIGEMMA_3B, {"fp16": 5.85, "int8": 2.92, "int4": 2.38}),
        (PALIGEMMA2_3B, {"fp16": 6.06, "int8": 3.03, "int4": 2.47}),
    ],
    ids=["paligemma", "paligemma2"],
)
def test_weights_are_those_published(size: Size, weights: dict[str, float]) -> None:
    for plan in plan_bundle(make_manifest(size), AGX).precisions:
        assert (plan.memory.vision + plan.memory.decoder) / GB == pytest.approx(weights[plan.precision], abs=0.006)


def test_the_cache_holds_prefix_and_answer_of_the_limits() -> None:
    assert cache_bytes(make_manifest(PALIGEMMA_3B, 224)) == 18_432 * (256 + 128 + 256)
    assert cache_bytes(make_manifest(PALIGEMMA2_3B, 896)) == 106_496 * (4096 + 128 + 256)


def test_the_table_is_mapped_and_not_resident() -> None:
    tied, untied = (plan_bundle(make_manifest(tied=tied), AGX).precisions[0].memory for tied in (True, False))
    assert tied == untied
    assert tied.table == 257216 * 2048 * 2
    assert tied.both == sum(
        (tied.vision, tied.decoder, tied.cache, tied.vision_workspace, tied.decoder_workspace, OVERHEAD_BYTES)
    )


def test_one_engine_at_a_time_takes_the_larger_stage() -> None:
    memory = plan_bundle(make_manifest(PALIGEMMA_3B), AGX).precisions[0].memory
    assert memory.sequential == OVERHEAD_BYTES + memory.decoder + memory.cache + memory.decoder_workspace
    assert memory.sequential < memory.both
    text = msgspec.structs.replace(PALIGEMMA_3B.text, num_layers=1)
    shallow = make_manifest(replace(PALIGEMMA_3B, text=text, layers_millions=110, rows=2048), 896)
    memory = plan_bundle(shallow, AGX).precisions[0].memory
    assert memory.sequential == OVERHEAD_BYTES + memory.vision + memory.vision_workspace


def test_workspace_is_the_larger_of_attention_and_mlp() -> None:
    """By hand: at 224 pixels the decoder's gate and up are larger than its scores, at 896 the scores are larger."""
    small, large = make_manifest(PALIGEMMA_3B, 224), make_manifest(PALIGEMMA_3B, 896)
    assert estimate_decoder_workspace(small) == 384 * 2048 * 4 + 2 * 384 * 16384 * 2 + 257216 * 4 + 384 * 18432
    attention = 4224 * (8 + 2) * 256 * 2 + 8 * 4224 * (4224 + 256) * 4
    assert estimate_decoder_workspace(large) == 4224 * 2048 * 4 + attention + 257216 * 4 + 4224 * 18432
    assert estimate_vision_workspace(small.model) == 256 * 1152 * 4 + 3 * 256 * 1152 * 2 + 18 * 256**2 * 4
    assert estimate_vision_workspace(large.model) == 4096 * 1152 * 4 + 3 * 4096 * 1152 * 2 + 18 * 4096**2 * 4


def test_fp16_of_3b_neither_runs_nor_builds_on_an_orin_nano() -> None:
    plan = plan_bundle(make_manifest(PALIGEMMA_3B), NANO)
    fp16 = plan_of("fp16", plan)
    assert fp16.residency == "none"
    assert fp16.memory.sequential > NANO.usable_bytes
    assert fp16.memory.build_peak > NANO.memory_bytes
    assert fp16.build_swap == fp16.memory.build_peak - NANO.usable_bytes
    assert plan.exportable is None
    assert {plan_of(name, plan).residency for name in ("int8", "int4")} == {"both"}


@pytest.mark.parametrize("key", ["orin-nx-16gb", "agx-orin-64gb", "thor", "h200"])
def test_fp16_of_3b_runs_on_larger_devices(key: str) -> None:
    plan = plan_bundle(make_manifest(PALIGEMMA_3B), DEVICES[key])
    assert plan_of("fp16", plan).residency == "both"
    assert plan.exportable is plan_of("fp16", plan)


def test_a_build_on_16_gb_wants_swap_in_fp16_and_none_in_int8() -> None:
    plan = plan_bundle(make_manifest(PALIGEMMA_3B), DEVICES["orin-nx-16gb"])
    assert plan_of("fp16", plan).build_swap == pytest.approx(
        18.16 * GB - DEVICES["orin-nx-16gb"].usable_bytes, rel=0.01
    )
    assert plan_of("int8", plan).build_swap == 0


def test_a_build_for_a_card_of_its_own_takes_the_hosts_memory() -> None:
    card = with_usable(DEVICES["h200"], 8 * GB)
    assert plan_of("fp16", plan_bundle(make_manifest(PALIGEMMA_3B), card)).build_swap == 0


def test_build_peak_counts_the_larger_graph_once() -> None:
    memory = plan_bundle(make_manifest(PALIGEMMA_3B), AGX).precisions[0].memory
    assert memory.build_peak == OVERHEAD_BYTES + round(BUILD_FACTOR * memory.decoder)


@pytest.mark.parametrize(
    ("key", "image_size", "expected"),
    [
        ("orin-nano-8gb", 448, "int8"),
        ("agx-orin-64gb", 224, "int4"),
        ("agx-orin-64gb", 448, "int8"),
        ("agx-orin-64gb", 896, "int8"),
        ("thor", 224, "int4"),
        ("thor", 896, "int8"),
    ],
)
def test_the_fastest_in_practice_is_recommended(key: str, image_size: int, expected: str) -> None:
    """Short prefixes are bound by decoder bytes, which int4 has fewest of; long ones by operations, int8's strength."""
    plan = plan_bundle(make_manifest(PALIGEMMA_3B, image_size), DEVICES[key])
    assert plan.recommended is not None
    assert plan.recommended.precision == expected
    assert plan.recommended.sustained.answer == min(one.sustained.answer for one in plan.precisions)


def test_a_wider_precision_wins_where_it_is_about_as_fast() -> None:
    plan = plan_bundle(make_manifest(PALIGEMMA_3B), DEVICES["orin-nx-16gb"])
    int8, int4 = plan_of("int8", plan), plan_of("int4", plan)
    assert int4.sustained.answer < int8.sustained.answer < int4.sustained.answer / 0.9
    assert plan.recommended is int8


def test_one_engine_at_a_time_is_recommended_where_both_do_not_fit() -> None:
    plan = plan_bundle(make_manifest(PALIGEMMA2_3B, 896), NANO)
    assert [one.residency for one in plan.precisions] == ["none", "sequential", "sequential"]
    assert plan.recommended is plan_of("int8", plan)


def test_both_engines_loaded_go_before_a_faster_precision() -> None:
    plan = plan_bundle(make_manifest(PALIGEMMA_3B, 896), NANO)
    assert [one.residency for one in plan.precisions] == ["none", "sequential", "both"]
    assert plan_of("int8", plan).sustained.answer < plan_of("int4", plan).sustained.answer
    assert plan.recommended is plan_of("int4", plan)


def test_residency_changes_at_the_byte() -> None:
    manifest = make_manifest(PALIGEMMA_3B)
    memory = plan_bundle(manifest, AGX).precisions[0].memory
    for usable, expected in (
        (memory.both, "both"),
        (memory.both - 1, "sequential"),
        (memory.sequential, "sequential"),
        (memory.sequential - 1, "none"),
    ):
        assert plan_bundle(manifest, with_usable(AGX, usable)).precisions[0].residency == expected


def test_where_nothing_fits_nothing_is_recommended() -> None:
    plan = plan_bundle(make_manifest(PALIGEMMA_3B), with_usable(NANO, GB))
    assert plan.recommended is plan.exportable is None


def test_what_is_not_exported_yet_is_marked() -> None:
    plan = plan_bundle(make_manifest(PALIGEMMA_3B), AGX)
    assert {one.precision: one.exported for one in plan.precisions} == {"fp16": True, "int8": False, "int4": False}
    assert plan.exportable is plan_of("fp16", plan)
    assert "fp16" in EXPORTED_PRECISIONS


def test_the_shipped_bundle_fits_everywhere() -> None:
    manifest = Bundle(SHIPPED_BUNDLE, check_hashes=False).manifest
    for device in DEVICES.values():
        plan = plan_bundle(manifest, device)
        assert all(one.residency == "both" and one.build_swap == 0 for one in plan.precisions)
        assert plan.exportable is not None


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens"])
def test_more_tokens_than_the_bundle_takes_are_refused(name: str) -> None:
    manifest = make_manifest(PALIGEMMA_3B)
    limit = {"prompt_tokens": 128, "new_tokens": 256}[name]
    plan_bundle(manifest, AGX, **{name: limit})
    for wrong in (limit + 1, 0):
        with pytest.raises(UsageError, match=f"1 to {limit} {name.replace('_', ' ')}.*found {wrong}"):
            plan_bundle(manifest, AGX, **{name: wrong})


def test_a_build_that_cannot_fit_is_refused_with_figures_and_a_way_out() -> None:
    with pytest.raises(ResourceError) as caught:
        check_build_memory(make_manifest(PALIGEMMA_3B), "jetpack7", 10 * GB)
    error = caught.value
    assert error.exit_code == 4
    assert "18.2 GB" in error.expected
    assert "3.5 x its 5.0 GB of fp16 weights" in error.expected
    assert "decoder" in error.expected
    assert error.found == "10.0 GB free"
    assert "Add 9 GB of swap." in error.action
    assert "In int8 a build takes 9.4 GB, which this version does not export (only fp16 and bf16)." in error.action
    assert "Jetson AGX Orin 64GB with JetPack 7.2 has enough as it is." in error.action


def test_advice_names_only_what_would_fit() -> None:
    with pytest.raises(ResourceError) as caught:
        check_build_memory(make_manifest(PALIGEMMA_3B), "jetpack7", GB)
    assert caught.value.action.startswith("Add 18 GB of swap. Jetson AGX Orin")


def test_advice_for_a_wide_precision_is_one_that_can_be_exported() -> None:
    with pytest.raises(ResourceError) as caught:
        check_build_memory(make_manifest(PALIGEMMA_3B, precision="fp32", target="rtx"), "rtx", 20 * GB)
    assert caught.value.action == "Add 16 GB of swap. In fp16 a build takes 18.2 GB."


def test_a_build_is_refused_below_its_peak_and_not_at_it() -> None:
    manifest = make_manifest(PALIGEMMA_3B)
    peak = plan_bundle(manifest, AGX).precisions[0].memory.build_peak
    check_build_memory(manifest, "jetpack7", peak)
    with pytest.raises(ResourceError):
        check_build_memory(manifest, "jetpack7", peak - 1)


def test_the_larger_graph_may_be_the_vision_encoder() -> None:
    small = replace(PALIGEMMA_3B, layers_millions=1, rows=2048)
    with pytest.raises(ResourceError, match="build the vision encoder of 'jetpack7'"):
        check_build_memory(make_manifest(small), "jetpack7", GB)


def test_free_memory_and_swap_are_read_in_bytes(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 7790000 kB\nMemAvailable:  5000000 kB\nSwapTotal: 9 kB\nSwapFree:  3000000 kB\n")
    assert available_memory(meminfo) == FreeMemory(5_000_000 * 1024, 3_000_000 * 1024)


def test_this_machines_memory_is_plausible() -> None:
    free = available_memory()
    assert 10**8 < free.available < 10**14
    assert 0 <= free.swap < 10**14


@pytest.mark.parametrize(
    "content",
    ["", "MemAvailable: 5 kB", "MemAvailable: x kB\nSwapFree: 1 kB", "no colon", "a:\nMemAvailable:\nSwapFree:"],
)
def test_a_file_that_is_not_linuxs_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "meminfo").write_text(content)
    with pytest.raises(ResourceError, match="MemAvailable and SwapFree"):
        available_memory(tmp_path / "meminfo")


def test_without_the_file_there_is_no_answer(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="MemAvailable and SwapFree"):
        available_memory(tmp_path / "missing")
