"""plan from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from paliedge.bundle.manifest import MANIFEST
from paliedge.planning.devices import DEVICES
from tests.cli.test_predict import run
from tests.large import PALIGEMMA2_3B, PALIGEMMA_3B, make_manifest, write_hollow_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3B in fp16: six gigabytes of holes."""
    return write_hollow_bundle(tmp_path_factory.mktemp("large") / "paligemma", make_manifest(PALIGEMMA_3B))


def line_of(output: str, start: str) -> str:
    (line,) = (line for line in output.splitlines() if line.startswith(start))
    return line


def test_every_device_gets_a_line_for_the_shipped_bundle() -> None:
    result = run("plan")
    assert result.exit_code == 0
    assert "112 x 112 pixels" in result.stdout
    for key in DEVICES:
        assert "both engines" in line_of(result.stdout, f"{key} ")


def test_one_device_for_the_shipped_bundle() -> None:
    result = run("plan", "--device", "thor")
    assert result.exit_code == 0
    assert "graphs for cpu fp32" in result.stdout
    assert "jetpack7 (JetPack 7.2); both engines" in line_of(result.stdout, "recommended")


def test_an_orin_nano_is_told_that_fp16_does_not_fit(bundle: Path) -> None:
    result = run("plan", bundle, "--device", "orin-nano-8gb")
    assert result.exit_code == 0
    assert "2923.5 million parameters; graphs for jetpack7 fp16" in result.stdout
    assert "5.20 GB usable of 8.59 GB" in result.stdout
    assert "75% of the bandwidth and 53% of the rest" in result.stdout
    memory, times = (line.split() for line in result.stdout.splitlines() if line.startswith("fp16"))
    assert memory[1:3] == ["5.85", "GB"]
    assert memory[-3:] == ["18.16", "GB", "no"]
    # Published for whole layers: 65.3 / 123 and 522 / 739; 5.2 % of that prefill is left out behind the last attention.
    assert " ".join(times[1:]) == "13.2 / 24.9 61.9 / 117 49.2 / 65.7 518 / 732"
    assert "int4 for jetpack7 (JetPack 7.2) or jetpack6 (JetPack 6.2)" in line_of(result.stdout, "recommended")
    assert line_of(result.stdout, "recommended").endswith("; a build wants 0.82 GB of swap")


def test_a_large_board_wants_no_swap(bundle: Path) -> None:
    result = run("plan", bundle, "--device", "agx-orin-64gb")
    assert line_of(result.stdout, "recommended  int4").endswith("; both engines stay loaded")
    assert "swap" not in result.stdout


def test_an_int8_bundle_gets_the_same_plan(bundle: Path, tmp_path: Path) -> None:
    folder = write_hollow_bundle(tmp_path / "int8", make_manifest(PALIGEMMA_3B, precision="int8"))
    wide, narrow = (run("plan", path, "--device", "thor").stdout.splitlines() for path in (bundle, folder))
    assert narrow[1].endswith("2923.5 million parameters; graphs for jetpack7 int8")
    assert narrow[2:] == wide[2:]


def test_a_card_builds_in_the_hosts_memory(bundle: Path) -> None:
    result = run("plan", bundle, "--device", "h200")
    assert "rtx (TensorRT for RTX); both engines stay loaded; a build runs in the host's memory" in result.stdout


def test_one_engine_at_a_time_is_recommended_in_words(tmp_path: Path) -> None:
    folder = write_hollow_bundle(tmp_path / "large", make_manifest(PALIGEMMA2_3B, 896))
    result = run("plan", folder, "--device", "orin-nano-8gb")
    assert "vision freed before the decoder loads" in line_of(result.stdout, "recommended  int8")
    assert "one engine at a time" in line_of(run("plan", folder).stdout, "orin-nano-8gb ")


def test_a_model_too_large_for_the_device_gets_no_precision(tmp_path: Path) -> None:
    deep = replace(PALIGEMMA_3B, text=msgspec.structs.replace(PALIGEMMA_3B.text, num_layers=236))
    folder = write_hollow_bundle(tmp_path / "huge", make_manifest(deep))
    result = run("plan", folder, "--device", "orin-nano-8gb")
    assert result.exit_code == 0
    assert "another device or a smaller model" in line_of(result.stdout, "recommended")
    assert line_of(run("plan", folder).stdout, "orin-nano-8gb ").split()[-4:] == ["none", "no", "-", "-"]


def test_json_holds_the_same_figures(bundle: Path) -> None:
    answer = json.loads(run("plan", bundle, "--device", "orin-nano-8gb", "--json").stdout)
    assert answer["bundle"] == str(bundle)
    (plan,) = answer["plans"]
    assert plan["device"]["key"] == "orin-nano-8gb"
    assert plan["device"]["sustained_compute"] == 0.53
    assert plan["request"] == {"prefix": 272, "new_tokens": 10}
    assert plan["recommended"] in plan["precisions"]
    fp16 = plan["precisions"][0]
    assert (fp16["precision"], fp16["residency"]) == ("fp16", "none")
    assert fp16["memory"]["decoder"] == 2 * (1_981_884_416 + 257216 * 2048)
    assert fp16["floor"]["answer"] == pytest.approx(522 - 0.052 * 65.3, abs=0.5)
    assert len(json.loads(run("plan", bundle, "--json").stdout)["plans"]) == len(DEVICES)


def test_prompt_and_answer_lengths_are_taken(bundle: Path) -> None:
    options = ("--device", "thor", "--prompt-tokens", "100", "--new-tokens", "1")
    assert "256 image and 100 prompt tokens, 1 new tokens" in run("plan", bundle, *options).stdout
    (plan,) = json.loads(run("plan", bundle, *options, "--json").stdout)["plans"]
    assert plan["request"] == {"prefix": 356, "new_tokens": 1}


def test_the_environment_sets_options(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MODEL": str(bundle), "DEVICE": "thor", "PROMPT_TOKENS": "9", "NEW_TOKENS": "3"}.items():
        monkeypatch.setenv(f"PALIEDGE_{name}", value)
    result = run("plan")
    assert "256 image and 9 prompt tokens, 3 new tokens" in result.stdout
    assert "Jetson AGX Thor" in line_of(result.stdout, "device ")


@pytest.mark.parametrize(
    "options",
    [
        ("--device", "toaster"),
        ("--prompt-tokens", "0"),
        ("--prompt-tokens", "129"),
        ("--new-tokens", "257"),
        ("--new-tokens", "many"),
        ("--unknown",),
    ],
    ids=" ".join,
)
def test_bad_options_are_usage_errors(bundle: Path, options: tuple[str, ...]) -> None:
    result = run("plan", bundle, *options)
    assert result.exit_code == 2
    assert not result.stdout
    assert "Traceback" not in result.stderr


def test_a_folder_without_a_bundle_is_refused(tmp_path: Path) -> None:
    result = run("plan", tmp_path)
    assert result.exit_code == 3
    assert MANIFEST in result.stderr


def test_plan_loads_neither_numpy_nor_a_runtime_before_it_runs() -> None:
    code = "import sys; import paliedge.cli.plan; print({'numpy', 'onnxruntime', 'msgspec'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert found.strip() == "set()"
