"""What fits where, what is recommended, and what `build` refuses. Times: test_roofline.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Precision, Vocabulary
from paliedge.errors import ResourceError, UsageError
from paliedge.model import SHIPPED_BUNDLE
from paliedge.planning.devices import DEVICES, TARGET_NAMES, Device
from paliedge.planning.memory import (
    BUILD_FACTOR,
    OVERHEAD_BYTES,
    DeviceEstimate,
    FreeMemory,
    PrecisionEstimate,
    available_memory,
    cache_bytes,
    check_build_memory,
    check_run_memory,
    estimate_decoder_workspace,
    estimate_device,
    estimate_vision_workspace,
)
from tests.large import COUNTED, PALIGEMMA2_3B, PALIGEMMA_3B, Size, make_manifest

pytestmark = pytest.mark.bare

SHALLOW = replace(PALIGEMMA_3B, text=msgspec.structs.replace(PALIGEMMA_3B.text, num_layers=1), rows=2048)
"""A decoder that is smaller than the vision encoder."""
NANO, AGX = DEVICES["orin-nano-8gb"], DEVICES["agx-orin-64gb"]
GB = 10**9


def estimate_of(precision: str, estimate: DeviceEstimate) -> PrecisionEstimate:
    (found,) = (one for one in estimate.precisions if one.precision == precision)
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
        (PALIGEMMA_3B, {"fp16": 5.85, "int8": 2.92, "int4": 2.38 - 0.415}),
        (PALIGEMMA2_3B, {"fp16": 6.06, "int8": 3.03, "int4": 2.47 - 0.415}),
    ],
    ids=["paligemma", "paligemma2"],
)
def test_weights_are_those_published(size: Size, weights: dict[str, float]) -> None:
    """The published int4 has 2 bytes for each of the vision encoder's 0.415 billion parameters, the exported one 1."""
    for estimate in estimate_device(make_manifest(size), AGX).precisions:
        assert (estimate.memory.vision + estimate.memory.decoder) / GB == pytest.approx(
            weights[estimate.precision], abs=0.006
        )


@pytest.mark.parametrize(("size", "image_size", "vision", "layers", "head"), COUNTED)
def test_weights_are_parameters_by_their_bytes(
    size: Size, image_size: int, vision: int, layers: int, head: int
) -> None:
    found = [one.memory for one in estimate_device(make_manifest(size, image_size), AGX).precisions]
    assert [memory.vision for memory in found] == [2 * vision, vision, vision]
    assert [memory.decoder for memory in found] == [2 * (layers + head), layers + head, layers * 33 // 64 + head]


def test_a_reduced_head_is_resident_and_the_whole_table_is_mapped() -> None:
    manifest = make_manifest(PALIGEMMA_3B)
    reduced = msgspec.structs.replace(manifest, vocabulary=Vocabulary(labels=("cat",), num_tokens=1500))
    for whole, small in zip(
        estimate_device(manifest, AGX).precisions, estimate_device(reduced, AGX).precisions, strict=True
    ):
        head_bytes = {"fp16": 2, "int8": 1, "int4": 1}[small.precision]
        assert small.memory.table == whole.memory.table == 257216 * 2048 * head_bytes
        assert whole.memory.decoder - small.memory.decoder == (257216 - 1500) * 2048 * head_bytes


def test_the_cache_holds_prefix_and_answer_of_the_limits() -> None:
    assert cache_bytes(make_manifest(PALIGEMMA_3B, 224)) == 18_432 * (256 + 128 + 256)
    assert cache_bytes(make_manifest(PALIGEMMA2_3B, 896)) == 106_496 * (4096 + 128 + 256)


def test_the_table_is_mapped_and_not_resident() -> None:
    tied, untied = (estimate_device(make_manifest(tied=tied), AGX).precisions[0].memory for tied in (True, False))
    assert tied == untied
    assert tied.table == 257216 * 2048 * 2
    assert tied.both == sum(
        (tied.vision, tied.decoder, tied.cache, tied.vision_workspace, tied.decoder_workspace, OVERHEAD_BYTES)
    )


def test_one_engine_at_a_time_takes_the_larger_stage() -> None:
    memory = estimate_device(make_manifest(PALIGEMMA_3B), AGX).precisions[0].memory
    assert memory.sequential == OVERHEAD_BYTES + memory.decoder + memory.cache + memory.decoder_workspace
    assert memory.sequential < memory.both
    memory = estimate_device(make_manifest(SHALLOW, 896), AGX).precisions[0].memory
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
    estimate = estimate_device(make_manifest(PALIGEMMA_3B), NANO)
    fp16 = estimate_of("fp16", estimate)
    assert fp16.residency == "none"
    assert fp16.memory.sequential > NANO.usable_bytes
    assert fp16.memory.build_peak > NANO.memory_bytes
    assert fp16.build_swap == fp16.memory.build_peak - NANO.usable_bytes
    assert {estimate_of(name, estimate).residency for name in ("int8", "int4")} == {"both"}


@pytest.mark.parametrize("key", ["orin-nx-16gb", "agx-orin-64gb", "thor", "h200"])
def test_fp16_of_3b_runs_on_larger_devices(key: str) -> None:
    assert estimate_of("fp16", estimate_device(make_manifest(PALIGEMMA_3B), DEVICES[key])).residency == "both"


def test_a_build_on_16_gb_wants_swap_in_fp16_and_none_in_int8() -> None:
    estimate = estimate_device(make_manifest(PALIGEMMA_3B), DEVICES["orin-nx-16gb"])
    assert estimate_of("fp16", estimate).build_swap == pytest.approx(
        18.16 * GB - DEVICES["orin-nx-16gb"].usable_bytes, rel=0.01
    )
    assert estimate_of("int8", estimate).build_swap == 0


def test_a_build_for_a_card_of_its_own_takes_the_hosts_memory() -> None:
    card = with_usable(DEVICES["h200"], 8 * GB)
    assert estimate_of("fp16", estimate_device(make_manifest(PALIGEMMA_3B), card)).build_swap == 0


def test_build_peak_counts_the_larger_graph_once() -> None:
    memory = estimate_device(make_manifest(PALIGEMMA_3B), AGX).precisions[0].memory
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
    estimate = estimate_device(make_manifest(PALIGEMMA_3B, image_size), DEVICES[key])
    assert estimate.recommended is not None
    assert estimate.recommended.precision == expected
    assert estimate.recommended.sustained.answer == min(one.sustained.answer for one in estimate.precisions)


def test_a_wider_precision_wins_where_it_is_about_as_fast() -> None:
    estimate = estimate_device(make_manifest(PALIGEMMA_3B), DEVICES["orin-nx-16gb"], new_tokens=8)
    int8, int4 = estimate_of("int8", estimate), estimate_of("int4", estimate)
    assert int4.sustained.answer < int8.sustained.answer < int4.sustained.answer / 0.9
    assert estimate.recommended is int8


def test_one_engine_at_a_time_is_recommended_where_both_do_not_fit() -> None:
    estimate = estimate_device(make_manifest(PALIGEMMA2_3B, 896), NANO)
    assert [one.residency for one in estimate.precisions] == ["none", "sequential", "sequential"]
    assert estimate.recommended is estimate_of("int8", estimate)


def test_both_engines_loaded_go_before_a_faster_precision() -> None:
    estimate = estimate_device(make_manifest(PALIGEMMA_3B, 896), NANO)
    assert [one.residency for one in estimate.precisions] == ["none", "sequential", "both"]
    assert estimate_of("int8", estimate).sustained.answer < estimate_of("int4", estimate).sustained.answer
    assert estimate.recommended is estimate_of("int4", estimate)


def test_residency_changes_at_the_byte() -> None:
    manifest = make_manifest(PALIGEMMA_3B)
    memory = estimate_device(manifest, AGX).precisions[0].memory
    for usable, expected in (
        (memory.both, "both"),
        (memory.both - 1, "sequential"),
        (memory.sequential, "sequential"),
        (memory.sequential - 1, "none"),
    ):
        assert estimate_device(manifest, with_usable(AGX, usable)).precisions[0].residency == expected


def test_where_nothing_fits_nothing_is_recommended() -> None:
    assert estimate_device(make_manifest(PALIGEMMA_3B), with_usable(NANO, GB)).recommended is None


def test_the_shipped_bundle_fits_everywhere() -> None:
    manifest = Bundle(SHIPPED_BUNDLE, check_hashes=False).manifest
    for device in DEVICES.values():
        estimate = estimate_device(manifest, device)
        assert all(one.residency == "both" and one.build_swap == 0 for one in estimate.precisions)


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens"])
def test_more_tokens_than_the_bundle_takes_are_refused(name: str) -> None:
    manifest = make_manifest(PALIGEMMA_3B)
    limit = {"prompt_tokens": 128, "new_tokens": 256}[name]
    estimate_device(manifest, AGX, **{name: limit})
    for wrong in (limit + 1, 0):
        with pytest.raises(UsageError, match=f"1 to {limit} {name.replace('_', ' ')}.*found {wrong}"):
            estimate_device(manifest, AGX, **{name: wrong})


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
    assert "In int8 a build takes 9.4 GB." in error.action
    assert "Jetson AGX Orin 64GB with JetPack 7.2 has enough as it is." in error.action


def test_advice_names_only_what_would_fit() -> None:
    with pytest.raises(ResourceError) as caught:
        check_build_memory(make_manifest(PALIGEMMA_3B), "jetpack7", GB)
    assert caught.value.action.startswith("Add 18 GB of swap. Jetson AGX Orin")


@pytest.mark.parametrize(
    ("precision", "available", "action"),
    [
        ("fp32", 20 * GB, "Add 16 GB of swap. In fp16 a build takes 18.2 GB."),
        ("bf16", 10 * GB, "Add 9 GB of swap. In int8 a build takes 9.4 GB."),
        ("int8", 9 * GB, "Add 1 GB of swap. In int4 a build takes 6.0 GB."),
        ("int4", 6 * GB, "Add 1 GB of swap."),
    ],
)
def test_a_narrower_precision_is_advised_where_there_is_one(precision: Precision, available: int, action: str) -> None:
    with pytest.raises(ResourceError) as caught:
        check_build_memory(make_manifest(PALIGEMMA_3B, precision=precision, target="rtx"), "rtx", available)
    assert caught.value.action == action


def test_advice_never_names_the_bundles_own_precision() -> None:
    """Layers kept in 16 bits make a bundle larger than its precision is taken to be."""
    manifest = make_manifest(PALIGEMMA_3B, precision="int4", target="rtx")
    decoder = msgspec.structs.replace(manifest.files["decoder.weights"], size=2 * GB)
    larger = msgspec.structs.replace(manifest, files=manifest.files | {"decoder.weights": decoder})
    with pytest.raises(ResourceError) as caught:
        check_build_memory(larger, "rtx", 8 * GB)
    assert caught.value.action == "Add 2 GB of swap."


def test_a_build_is_refused_below_its_peak_and_not_at_it() -> None:
    manifest = make_manifest(PALIGEMMA_3B)
    peak = estimate_device(manifest, AGX).precisions[0].memory.build_peak
    check_build_memory(manifest, "jetpack7", peak)
    with pytest.raises(ResourceError):
        check_build_memory(manifest, "jetpack7", peak - 1)


def test_the_larger_graph_may_be_the_vision_encoder() -> None:
    with pytest.raises(ResourceError, match="build the vision encoder of 'jetpack7'"):
        check_build_memory(make_manifest(SHALLOW), "jetpack7", GB)


@pytest.mark.parametrize(("precision", "scheme"), [("fp16", 0), ("bf16", 0), ("int8", 1), ("int4", 2)])
def test_a_run_needs_what_the_bundles_own_precision_takes(precision: Precision, scheme: int) -> None:
    manifest = make_manifest(PALIGEMMA_3B, precision=precision)
    memory = estimate_device(manifest, AGX).precisions[scheme].memory
    assert check_run_memory(manifest, memory.both) == "both"
    assert check_run_memory(manifest, memory.both - 1) == "sequential"
    assert check_run_memory(manifest, memory.sequential) == "sequential"
    with pytest.raises(ResourceError, match=f"to run checkpoint in {precision}, one engine at a time"):
        check_run_memory(manifest, memory.sequential - 1)


def test_a_run_in_32_bits_needs_twice_the_weights_of_16() -> None:
    manifest = make_manifest(PALIGEMMA_3B, precision="fp32", target="cpu")
    fp16 = estimate_device(manifest, AGX).precisions[0].memory
    needed = fp16.sequential + fp16.decoder
    assert check_run_memory(manifest, needed) == "sequential"
    with pytest.raises(ResourceError, match="in fp32"):
        check_run_memory(manifest, needed - 1)


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("bf16", "5.7 GB of memory to run checkpoint in bf16, one engine at a time (6.5 GB with both)"),
        ("int8", "3.2 GB of memory to run checkpoint in int8, one engine at a time (3.6 GB with both)"),
    ],
)
def test_a_run_that_cannot_fit_is_refused_with_figures_and_a_way_out(precision: Precision, expected: str) -> None:
    with pytest.raises(ResourceError) as caught:
        check_run_memory(make_manifest(PALIGEMMA_3B, precision=precision), 3 * GB)
    error = caught.value
    assert (error.expected, error.found) == (expected, "3.0 GB free")
    assert error.action.startswith("Close other programs, or take a larger device: ")
    assert "Jetson AGX Orin 64GB" in error.action
    assert error.action.endswith(". In int4 it takes 2.2 GB.")


def test_below_int4_there_is_no_precision_to_advise() -> None:
    with pytest.raises(ResourceError) as caught:
        check_run_memory(make_manifest(PALIGEMMA_3B, precision="int4"), 2 * GB)
    assert " In " not in caught.value.action


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
