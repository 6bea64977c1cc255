"""Operations and floors against the published table: models counted with transformers, devices by their data sheets."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
import pytest
from safetensors import safe_open

from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Manifest, Precision, Vocabulary
from paliedge.model import SHIPPED_BUNDLE
from paliedge.planning import roofline
from paliedge.planning.devices import DEVICES
from paliedge.planning.memory import DeviceEstimate, estimate_device
from paliedge.planning.roofline import (
    Times,
    cache_bytes_per_token,
    count_parameters,
    decoder_flops,
    prefill_flops,
    scheme_for,
    vision_flops,
)
from tests.large import COUNTED, PALIGEMMA2_3B, PALIGEMMA_3B, Size, make_manifest
from tests.paths import SHAPES_CHECKPOINT

CHECKPOINT = SHAPES_CHECKPOINT / "model.safetensors"

FLOPS = [
    (PALIGEMMA_3B, 224, "0.220", "1.090"),
    (PALIGEMMA_3B, 448, "0.979", "4.283"),
    (PALIGEMMA_3B, 896, "5.480", "18.79"),
    (PALIGEMMA2_3B, 224, "0.220", "1.118"),
    (PALIGEMMA2_3B, 448, "0.979", "4.442"),
    (PALIGEMMA2_3B, 896, "5.482", "20.25"),
]

# Device, family, pixels: milliseconds of vision and prefill (fp16/int8), a token, the answer's floor and the answer
# in practice (fp16/int8/int4). The table is older than the int4 that is exported: its int4 answers begin with an FP16
# vision encoder.
PUBLISHED = """
orin-nano-8gb-15w 1 224 21.6/10.7 107/53   73.9/37.0/22.9 793/397/334    1129/564/517
orin-nano-8gb-15w 1 448 96/48     420/209  74.1/37.2/23.1 1182/591/723   1862/930/1250
orin-nano-8gb-15w 1 896 537/267   1843/917 74.9/38.0/23.9 3054/1526/2595 5389/2690/4777
orin-nano-8gb-15w 2 224 21.6/10.7 110/55   77.4/38.9/24.5 828/416/352    1176/590/542
orin-nano-8gb     1 224 13.2/6.6  65/33    49.2/24.6/15.2 522/261/216    739/370/331
orin-nano-8gb     1 448 59/29     257/128  49.4/24.8/15.4 759/381/453    1187/595/779
orin-nano-8gb     1 896 328/164   1125/563 49.9/25.3/15.9 1903/955/1597  3342/1675/2934
orin-nano-8gb     2 224 13.2/6.6  67/34    51.6/25.9/16.3 545/274/227    770/387/347
orin-nx-16gb      1 224 14.7/7.3  73/36    49.1/24.6/15.2 529/264/224    753/377/347
orin-nx-16gb      1 448 65/33     286/142  49.2/24.7/15.3 793/397/489    1252/626/846
orin-nx-16gb      1 896 365/182   1253/624 49.7/25.2/15.9 2066/1034/1761 3650/1824/3244
orin-nx-16gb      2 224 14.7/7.3  75/37    51.4/25.8/16.3 552/277/236    785/394/364
agx-orin-64gb     1 224 5.2/2.6   25.6/12.8 24.5/12.3/7.6 251/126/99     352/176/149
agx-orin-64gb     1 448 23/11.5   101/50   24.6/12.3/7.7  345/173/192    528/265/325
agx-orin-64gb     1 896 129/64    441/221  24.9/12.6/7.9  794/398/641    1374/689/1170
agx-orin-64gb     2 224 5.2/2.6   26/13    25.7/12.9/8.1  263/132/105    368/185/157
thor              1 896 21/10.6   73/36    18.7/9.5/6.0   262/132/148    412/207/292
h200              1 224 0.22/0.11 1.1/0.56 1.05/0.52/0.32 11/5/4         13/7/6
h200              1 448 1.0/0.5   4.3/2.2  1.05/0.53/0.33 15/7/8         21/11/14
h200              1 896 5.5/2.8   19/9.5   1.06/0.54/0.34 34/17/28       60/30/52
"""

# On Thor a short prefill is bound by bytes. The published table leaves out the head's; here prefill reads it once,
# since its first token comes from it: (layers + head) x bytes a parameter / 273 GB/s.
THOR = """
thor 1 224 3.0/1.5 18.38/9.19 18.4/9.2/5.7
thor 1 448 3.8/1.9 18.38/9.19 18.5/9.3/5.7
thor 2 224 3.0/1.5 19.17/9.59 19.3/9.7/6.1
"""
SIZES = {"1": PALIGEMMA_3B, "2": PALIGEMMA2_3B}


def rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.strip().splitlines()]


def plan_for(device: str, size: Size, image_size: int) -> DeviceEstimate:
    return estimate_device(make_manifest(size, image_size), DEVICES[device])


def floors(plan: DeviceEstimate, stage: str) -> list[float]:
    return [getattr(one.floor, stage) for one in plan.precisions]


def answers_as_published(times: list[Times]) -> list[float]:
    """Answers in fp16, int8 and int4, the last with the FP16 vision encoder in the place of its own, an INT8 one."""
    fp16, int8, int4 = times
    assert int4.vision == int8.vision
    return [fp16.answer, int8.answer, int4.answer - int8.vision + fp16.vision]


def whole_layers(manifest: Manifest, tokens: int, length: int) -> int:
    """Operations if the last layer were computed for all tokens, as what was published counts them."""
    text = manifest.model.text
    behind = text.hidden_size * (text.num_heads * text.head_dim + 3 * text.intermediate_size)
    return decoder_flops(manifest, tokens, length) + 2 * max(tokens - 1, 0) * behind


def assert_rounds_to(computed: list[float], printed: str) -> None:
    """Off by less than one in the last digit that is printed, so that a rounded term of a sum may differ."""
    texts = printed.split("/")
    assert len(texts) <= len(computed)
    for value, text in zip(computed, texts, strict=False):
        unit = 10.0 ** -len(text.partition(".")[2])
        assert abs(value - float(text)) < unit, (computed, printed)


@pytest.mark.parametrize(("size", "image_size", "vision", "prefill"), FLOPS)
def test_operations_are_those_published(size: Size, image_size: int, vision: str, prefill: str) -> None:
    manifest = make_manifest(size, image_size)
    prefix = manifest.model.vision.num_image_tokens + 16
    assert_rounds_to([vision_flops(manifest.model) / 1e12], vision)
    assert_rounds_to([whole_layers(manifest, prefix, prefix) / 1e12], prefill)


def test_what_is_behind_the_last_attention_is_done_for_the_last_token_alone() -> None:
    """By hand, for Gemma-2B's layer: 2048 x 2048 and three times 2048 x 16384."""
    manifest = make_manifest(PALIGEMMA_3B)
    left_out = 2 * 271 * (2048 * 2048 + 3 * 2048 * 16384)
    assert whole_layers(manifest, 272, 272) - decoder_flops(manifest, 272, 272) == left_out
    assert whole_layers(manifest, 1, 272) == decoder_flops(manifest, 1, 272)
    assert decoder_flops(manifest, 272, 272) - prefill_flops(manifest, 272) == 4 * 271 * 272 * 8 * 256


def test_a_reduced_head_multiplies_its_own_rows_alone() -> None:
    manifest = make_manifest(PALIGEMMA_3B)
    reduced = msgspec.structs.replace(manifest, vocabulary=Vocabulary(labels=("cat",), num_tokens=1500))
    assert decoder_flops(reduced, tokens=0, length=0) == 2 * 1500 * 2048
    assert count_parameters(reduced) == replace(count_parameters(manifest), head=1500 * 2048)


def test_the_head_at_every_position_would_cost_what_is_published() -> None:
    head = decoder_flops(make_manifest(PALIGEMMA_3B), tokens=0, length=0)
    assert_rounds_to([271 * head / 1e12], "0.286")


@pytest.mark.parametrize("row", rows(PUBLISHED), ids=" ".join)
def test_times_are_those_published(row: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "decoder_flops", whole_layers)
    device, family, pixels, vision, prefill, token, answer, sustained = row
    plan = plan_for(device, SIZES[family], int(pixels))
    for stage, printed in (("vision", vision), ("prefill", prefill), ("token", token)):
        assert_rounds_to(floors(plan, stage), printed)
    assert_rounds_to(answers_as_published([one.floor for one in plan.precisions]), answer)
    assert_rounds_to(answers_as_published([one.sustained for one in plan.precisions]), sustained)


@pytest.mark.parametrize("row", rows(THOR), ids=" ".join)
def test_a_prefill_bound_by_bytes_reads_the_head_too(row: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "decoder_flops", whole_layers)
    device, family, pixels, vision, prefill, token = row
    plan = plan_for(device, SIZES[family], int(pixels))
    for stage, printed in (("vision", vision), ("prefill", prefill), ("token", token)):
        assert_rounds_to(floors(plan, stage), printed)


def test_decode_bytes_and_cache_are_those_published() -> None:
    """18,432 and 106,496 bytes a token; 5.017, 2.509 and 1.549 GB a step."""
    assert cache_bytes_per_token(PALIGEMMA_3B.text) == 18_432
    assert cache_bytes_per_token(PALIGEMMA2_3B.text) == 106_496
    decoders = [one.memory.decoder / 1e9 for one in plan_for("thor", PALIGEMMA_3B, 224).precisions]
    assert_rounds_to(decoders, "5.017/2.509/1.549")


def test_nothing_sustained_is_faster_than_the_floor() -> None:
    for device in DEVICES:
        for one in plan_for(device, PALIGEMMA_3B, 448).precisions:
            for stage in Times.__dataclass_fields__:
                assert getattr(one.sustained, stage) > getattr(one.floor, stage)


def test_an_answer_is_vision_prefill_and_the_steps_behind_the_first_token() -> None:
    manifest, device = make_manifest(), DEVICES["agx-orin-64gb"]
    one = estimate_device(manifest, device, new_tokens=1).precisions[0].floor
    assert one.answer == one.vision + one.prefill
    many = estimate_device(manifest, device, new_tokens=256).precisions[0].floor
    assert many.answer == pytest.approx(many.vision + many.prefill + 255 * many.token)


def test_a_longer_prompt_costs_prefill_and_a_little_cache() -> None:
    manifest, device = make_manifest(), DEVICES["agx-orin-64gb"]
    short, long = (estimate_device(manifest, device, prompt_tokens=count).precisions[0].floor for count in (16, 128))
    assert long.vision == short.vision
    assert long.prefill / short.prefill == pytest.approx(384 / 272, rel=0.01)
    assert 1 < long.token / short.token < 1.001


@pytest.mark.parametrize(("size", "image_size", "vision", "layers", "head"), COUNTED)
def test_parameters_are_those_that_transformers_counts(
    size: Size, image_size: int, vision: int, layers: int, head: int
) -> None:
    parameters = count_parameters(make_manifest(size, image_size))
    assert (parameters.vision, parameters.layers, parameters.head) == (vision, layers, head)


def test_the_published_total() -> None:
    parameters = count_parameters(make_manifest(PALIGEMMA_3B))
    assert parameters.vision + parameters.layers + parameters.head == 2_923_466_480


def test_parameters_are_those_of_the_shipped_bundles_checkpoint() -> None:
    counts = {"vision": 0, "layers": 0}
    with safe_open(CHECKPOINT, framework="np") as file:
        for name in file.keys():  # noqa: SIM118  safe_open is no mapping
            if "embed_tokens" not in name:
                part = "layers" if name.startswith("language_model") else "vision"
                counts[part] += math.prod(file.get_slice(name).get_shape())
    manifest = Bundle(SHIPPED_BUNDLE, check_hashes=False).manifest
    parameters = count_parameters(manifest)
    assert counts == {"vision": parameters.vision, "layers": parameters.layers}
    assert parameters.head == manifest.tokens.vocab_size * 128


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_do_not_depend_on_what_was_exported(precision: Precision, tied: bool) -> None:
    parameters = count_parameters(make_manifest(PALIGEMMA_3B, precision=precision, target="cpu", tied=tied))
    assert parameters == replace(count_parameters(make_manifest(PALIGEMMA_3B)), tied=tied)


def test_a_table_in_the_order_of_one_target_is_the_head_there_alone() -> None:
    """An integer bundle has a table for `cpu` and one for TensorRT; the manifest's is one of them."""
    manifest, other = make_manifest(target="jetpack7"), make_manifest(target="cpu", tied=False)
    targets = {**other.targets, **manifest.targets}
    assert count_parameters(msgspec.structs.replace(manifest, targets=targets)).tied


@pytest.mark.parametrize(
    ("precision", "name", "num_bytes"),
    [
        ("fp32", "fp32", (4, 4, 4)),
        ("fp16", "fp16", (2, 2, 2)),
        ("bf16", "fp16", (2, 2, 2)),
        ("int8", "int8", (1, 1, 1)),
        ("int4", "int4", (1, 0.515625, 1)),
    ],
)
def test_a_bundles_precision_has_its_scheme(
    precision: Precision, name: str, num_bytes: tuple[float, float, float]
) -> None:
    scheme = scheme_for(precision)
    assert (scheme.name, scheme.vision, scheme.layers, scheme.head) == (name, *num_bytes)
