"""What arithmetic says of each Jetson: floors by its data sheet, and at the rates that such boards are seen to keep.

    python -m benchmarks.jetson_floors BUNDLE

Predictions of `paliedge plan` for one answer (a prompt of 16 tokens, 10 tokens out), by device and precision. Nothing
of this was measured on a board.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paliedge.bundle.bundle import Bundle
from paliedge.bundle.manifest import Manifest
from paliedge.planning.devices import DEVICES
from paliedge.planning.memory import estimate_device


def floors(manifest: Manifest) -> list[dict[str, Any]]:
    """A row for each device and each precision that fits it; milliseconds."""
    rows = []
    for device in DEVICES.values():
        for one in estimate_device(manifest, device).precisions:
            if one.residency != "none":
                times = {"floor_ms": asdict(one.floor), "sustained_ms": asdict(one.sustained)}
                about = {"device": device.name, "precision": one.precision, "residency": one.residency}
                rows.append({**about, **times, "memory_bytes": one.memory.both})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="of PaliGemma-3B's size; only its manifest is read")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/jetson_floors.json"))
    arguments = parser.parse_args()
    manifest = Bundle(arguments.bundle, check_hashes=False).manifest
    model = f"{manifest.model.family}, {manifest.model.vision.image_size} pixels"
    content = {"kind": "prediction, nothing was measured on a board", "model": model, "rows": floors(manifest)}
    arguments.results.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
