"""info, verify, demo and export from the command line."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paliedge.cli import main
from paliedge.cli.demo import DEMO_SCENES
from paliedge.cli.help import GROUPS, VerbCommand
from paliedge.model import SHIPPED_BUNDLE
from tests.cli.test_predict import run
from tests.paths import SHAPES_CHECKPOINT


def test_info_shows_dimensions_target_and_comparison() -> None:
    result = run("info")
    assert result.exit_code == 0
    for words in ("112 x 112 pixels", "5 layers of width 128", "target cpu", "fp32", "transformers"):
        assert words in result.stdout


def test_info_json_is_the_manifest() -> None:
    assert json.loads(run("info", "--json").stdout) == json.loads((SHIPPED_BUNDLE / "bundle.json").read_text())


def test_verify_repeats_the_golden_answers() -> None:
    report = json.loads(run("verify", "--json").stdout)
    assert report["golden"]["num_answers"] == 6
    assert report["golden"]["num_equal"] + report["golden"]["num_ties"] == 6


def test_verify_finds_a_changed_byte(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(SHIPPED_BUNDLE, bundle)
    weights = next(bundle.glob("decoder.*.weights"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    result = run("verify", bundle)
    assert result.exit_code == 3
    assert weights.name in result.stderr


def test_verify_finds_a_machine_that_computes_something_else(tmp_path: Path) -> None:
    """Goldens that the graphs do not give stand for a machine whose arithmetic is wrong."""
    from paliedge.bundle.bundle import Bundle
    from paliedge.bundle.digests import describe_file
    from paliedge.bundle.manifest import write_manifest

    bundle = tmp_path / "bundle"
    shutil.copytree(SHIPPED_BUNDLE, bundle)
    golden_path = bundle / "golden.npz"
    with np.load(golden_path) as golden:
        arrays = {name: golden[name] for name in golden.files}
    arrays["token_ids"] = arrays["token_ids"] + 1
    arrays["log_probs"] = arrays["log_probs"] - 1
    np.savez_compressed(golden_path, **arrays)
    import msgspec

    manifest = Bundle(SHIPPED_BUNDLE).manifest
    files = manifest.files | {"golden.npz": describe_file(golden_path)}
    write_manifest(bundle, msgspec.structs.replace(manifest, files=files))
    result = run("verify", bundle)
    assert result.exit_code == 3
    assert "instead of" in result.stderr


def test_verify_finds_a_machine_that_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from paliedge.backends.ort import OrtSession
    from paliedge.backends.session import GeneratedToken
    from paliedge.bundle.bundle import Bundle

    eos = Bundle(SHIPPED_BUNDLE).manifest.tokens.eos
    monkeypatch.setattr(OrtSession, "prefill", lambda *_: GeneratedToken(eos, 0.0))
    result = run("verify")
    assert result.exit_code == 3
    assert "tokens [] instead of" in result.stderr


def test_demo_answers_five_prompts_a_scene_and_leaves_pictures(tmp_path: Path) -> None:
    result = run("demo", "--save", tmp_path)
    scenes = json.loads((DEMO_SCENES / "scenes.json").read_text())
    assert result.exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(scene["file"] for scene in scenes)
    for scene in scenes:
        for prompt in ("detect ", "segment ", "caption en", "answer en ", "ocr"):
            assert f"{scene['file']}: {prompt}" in result.stdout


def test_export_prints_one_line_and_makes_a_bundle_that_answers(tmp_path: Path) -> None:
    result = run("export", SHAPES_CHECKPOINT, "-o", tmp_path / "bundle")
    assert result.exit_code == 0
    (line,) = result.stdout.splitlines()
    assert "cosine of features" in line
    assert "100.0% of tokens equal" in line
    assert run("caption", DEMO_SCENES, "-m", tmp_path / "bundle").stdout == run("caption", DEMO_SCENES).stdout


def test_the_shipped_bundle_is_the_export_of_the_shipped_checkpoint(tmp_path: Path) -> None:
    assert run("export", SHAPES_CHECKPOINT, "-o", tmp_path / "bundle", "--no-compare").exit_code == 0
    for path in (tmp_path / "bundle").glob("*.weights"):
        assert path.read_bytes() == (SHIPPED_BUNDLE / path.name).read_bytes()
    assert (tmp_path / "bundle" / "tokenizer.json").read_bytes() == (SHIPPED_BUNDLE / "tokenizer.json").read_bytes()


def test_export_refuses_a_folder_with_other_content(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("keep me")
    result = run("export", SHAPES_CHECKPOINT, "-o", tmp_path, "--no-compare")
    assert result.exit_code == 2
    assert (tmp_path / "letter.txt").read_text() == "keep me"


def test_export_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.startswith("paliedge_export.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    result = run("export", SHAPES_CHECKPOINT, "-o", tmp_path / "bundle")
    assert result.exit_code == 1
    assert 'pip install "paliedge[cpu,export]"' in result.stderr


def test_help_names_every_verb_and_is_fast() -> None:
    command = [sys.executable, "-c", "from paliedge.cli import main; main()", "--help"]
    times = []
    for _ in range(5):  # processor time: what a quiet machine's clock would show
        before = os.times()
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        after = os.times()
        used = (after.children_user + after.children_system) - (before.children_user + before.children_system)
        times.append(used)
    rows = output.split("Begin:\n")[1].splitlines()
    shown = [line.split()[0] for line in rows if line.startswith("  ") and line[2:3].strip()]
    expected = "demo doctor export info plan build verify push cache detect segment caption ask question ocr predict"
    assert " ".join(shown) == f"{expected} eval bench"
    assert min(times) < 0.3


def test_every_option_has_its_twin_in_the_environment() -> None:
    import click

    with click.Context(main) as context:
        for verb in main.list_commands(context):
            command = main.get_command(context, verb)
            assert command is not None
            for parameter in command.params:
                if isinstance(parameter, click.Option):
                    assert str(parameter.envvar).startswith("PALIEDGE_"), (verb, parameter.name)
                    name = max(parameter.opts, key=len).removeprefix("--").replace("-", "_").upper()
                    assert str(parameter.envvar).endswith(name), (verb, parameter.name)


def test_help_lists_options_in_groups_and_ends_with_examples_that_exist() -> None:
    import click

    with click.Context(main) as context:
        for verb in main.list_commands(context):
            command = main.get_command(context, verb)
            assert isinstance(command, VerbCommand), verb
            text = run(verb, "--help").stdout
            groups = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
            assert groups[-1] == "Examples", verb
            assert set(groups[:-2]) <= set(GROUPS), verb
            for example in command.examples:
                words = shlex.split(example.split(" > ")[0])
                assert words[:2] == ["paliedge", verb]
                flags = {word for word in words if word.startswith("-") and word != "-"}
                known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
                assert flags <= known, example


def test_verbose_says_what_is_done_and_where_an_error_comes_from(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    quiet, loud = (run("ocr", tmp_path / "a.png", *more) for more in ((), ("-v",)))
    assert quiet.exit_code == loud.exit_code == 5
    assert "Traceback" not in quiet.stderr
    assert "UnidentifiedImageError" in loud.stderr
    assert "loaded" in loud.stderr
    assert quiet.stderr == run("ocr", tmp_path / "a.png").stderr, "the handler went with its verb"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes checkpoint in int8, with a ranking of its layers."""
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    result = run("export", SHAPES_CHECKPOINT, "-o", folder, "--precision", "int8", "--sensitivity", "10")
    assert result.exit_code == 0, result.stderr
    assert "layer 36 of 36: " in result.stderr
    assert "boxes overlap by" in result.stdout
    return folder


def test_info_prints_the_precision_report(quantized: Path) -> None:
    shown = run("info", "--precision-report", quantized).stdout
    assert "calibrated with 32 images of calibration" in shown
    assert shown.count("  behind ") == 9
    assert shown.count(".png: ") == 32
    assert "language_model.layers.4.mlp.down_proj in 8 bits alone" in shown
    assert "kept in 16 bits" in shown
    report = json.loads(run("info", "--precision-report", "--json", quantized).stdout)
    assert set(report["targets"]) == {"cpu"}
    assert len(report["sensitivity"]) == 36


def test_a_quantised_bundle_answers_and_verifies(quantized: Path) -> None:
    found = run("detect", DEMO_SCENES / "scene-1.png", "yellow star", "-m", quantized, "--json")
    assert len(json.loads(found.stdout)["detections"]) == 2
    golden = json.loads(run("verify", "--json", quantized).stdout)["golden"]
    assert golden["num_equal"] == golden["num_answers"]


def test_a_bundle_that_was_not_compared_has_no_report(tmp_path: Path) -> None:
    run("export", SHAPES_CHECKPOINT, "-o", tmp_path / "b", "--no-compare")
    result = run("info", "--precision-report", tmp_path / "b")
    assert result.exit_code == 2
    assert "without --no-compare" in result.stderr
