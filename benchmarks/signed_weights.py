"""An int8 bundle as paliedge wrote them before its weights lost their sign: for comparisons with today's."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto

from paliedge.bundle.bundle import Bundle
from paliedge.bundle.digests import describe_file
from paliedge.bundle.manifest import write_manifest


def sign_weights(bundle: Path, output: Path) -> None:
    """Copy a bundle for `cpu`; 8-bit weights of DynamicQuantizeMatMul become int8 and lose their zero point."""
    shutil.copytree(bundle, output)
    num_changed = 0
    for path in output.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "DynamicQuantizeMatMul":
                _sign(output, tensors[node.input[1]])
                node.input[3] = ""
                while not node.input[-1]:  # as they were written
                    node.input.pop()
                num_changed += 1
        onnx.save_model(model, path)
    assert num_changed
    manifest = Bundle(bundle).manifest
    producer = msgspec.structs.replace(manifest.producer, paliedge="0.1.0")
    files = {name: describe_file(output / name) for name in manifest.files}
    write_manifest(output, msgspec.structs.replace(manifest, files=files, producer=producer))


def _sign(folder: Path, tensor: onnx.TensorProto) -> None:
    assert tensor.data_type == TensorProto.UINT8
    tensor.data_type = TensorProto.INT8
    where = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / where["location"]).open("r+b") as file:
        file.seek(int(where["offset"]))
        codes = np.frombuffer(file.read(int(where["length"])), np.uint8) ^ np.uint8(128)
        file.seek(int(where["offset"]))
        file.write(codes.tobytes())
