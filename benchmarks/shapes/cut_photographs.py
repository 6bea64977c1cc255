"""Cut the photographs of scikit-image and scikit-learn to squares, as backgrounds of scenes.

pip download --no-deps scikit-image scikit-learn     # and unpack both wheels
python -m benchmarks.shapes.cut_photographs skimage/data sklearn/datasets/images
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageOps

from benchmarks.shapes.scenes import JUDGED_PHOTOGRAPHS, PHOTOGRAPHS, TRAINED_PHOTOGRAPHS

_SIZE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    for name in (*TRAINED_PHOTOGRAPHS, *JUDGED_PHOTOGRAPHS):
        (path,) = (file for folder in parser.parse_args().folders for file in folder.glob(f"{name}.*"))
        square = ImageOps.fit(Image.open(path).convert("RGB"), (_SIZE, _SIZE), Image.Resampling.LANCZOS)
        square.save(PHOTOGRAPHS / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    main()
