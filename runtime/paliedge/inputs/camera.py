"""A Jetson's CSI camera through GStreamer. Knows the system's `gi` bindings, which no wheel has, and nothing else.

`nvvidconv` copies each frame out of the camera's own memory and makes RGBA of it on the way.
"""

# Tests: tests/inputs/test_sources.py.
from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from importlib import import_module
from typing import Any

from PIL import Image

from paliedge.errors import ImageError, MissingExtraError

_PIPELINE = (
    "nvarguscamerasrc sensor-id={sensor} ! nvvidconv ! video/x-raw,format=RGBA "
    "! appsink name=sink max-buffers=1 drop=true sync=false"
)
_WAIT_NS = 500_000_000


def import_gst() -> Any:
    """GStreamer's bindings, initialised.

    Raises:
        MissingExtraError: they are not there.
    """
    try:
        gi = import_module("gi")
        gi.require_version("Gst", "1.0")
        gst = import_module("gi.repository.Gst")
    except (ImportError, ValueError) as error:  # ValueError: gi without GStreamer
        raise MissingExtraError(
            expected="GStreamer's Python bindings, for csi://",
            found="no `gi` with Gst 1.0",
            action="Run `apt install python3-gi gir1.2-gstreamer-1.0` and make the virtual environment "
            "with --system-site-packages.",
        ) from error
    gst.init(None)
    return gst


def read_csi(sensor: int) -> Generator[Callable[[], Image.Image] | None, None, None]:
    """The frames of the camera `sensor`, each as what makes its picture; None while there is no new one.

    Raises:
        ImageError: the camera does not start, or stopped with an error.
        MissingExtraError: see `import_gst`.
    """
    gst = import_gst()
    try:
        pipeline = gst.parse_launch(_PIPELINE.format(sensor=sensor))
    except Exception as error:  # GLib.Error, which only gi knows: no nvarguscamerasrc
        raise _no_camera(sensor, str(error)) from error
    try:
        pipeline.set_state(gst.State.PLAYING)
        sink, bus = pipeline.get_by_name("sink"), pipeline.get_bus()
        while True:
            sample = sink.emit("try-pull-sample", _WAIT_NS)
            if sample is None:
                if message := bus.pop_filtered(gst.MessageType.ERROR):
                    raise _no_camera(sensor, str(message.parse_error()[0]))
                if sink.get_property("eos"):
                    return
            yield partial(_image_from_sample, gst, sample) if sample else None
    finally:
        pipeline.set_state(gst.State.NULL)


def _image_from_sample(gst: Any, sample: Any) -> Image.Image:
    shape, buffer = sample.get_caps().get_structure(0), sample.get_buffer()
    is_mapped, mapped = buffer.map(gst.MapFlags.READ)
    if not is_mapped:
        raise ImageError(
            expected="a frame in memory", found="one that cannot be mapped", action="Start the camera again."
        )
    try:
        size_wh = (shape.get_value("width"), shape.get_value("height"))
        return Image.frombytes("RGBA", size_wh, bytes(mapped.data)).convert("RGB")
    finally:
        buffer.unmap(mapped)


def _no_camera(sensor: int, found: str) -> ImageError:
    return ImageError(
        expected=f"a CSI camera at csi://{sensor}",
        found=found,
        action="Check its cable and number; `nvgstcapture-1.0` shows whether the system sees it.",
    )
