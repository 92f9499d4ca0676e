"""Images, normalised once at the source and stored by content.

What a model sees must not depend on who decodes it: vLLM turns EXIF-rotated images upright and puts transparency on
white, plain Pillow does neither. So every image is made upright RGB here, before anything else reads it. A file that
already is so keeps its bytes; any other is written anew as PNG. Grey of 16 bits keeps its upper eight; pixels that are
measurements (32-bit integers, floats) have no brightness of their own and are refused, where Pillow would clip them.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image, ImageOps

from vcot.pipeline.errors import DataError
from vcot.pipeline.files import replace_file
from vcot.pipeline.records import ImageRef

_EXIF_ORIENTATION = 0x0112
_SUFFIXES = {"PNG": ".png", "JPEG": ".jpg"}
_MAX_EIGHT = 255
_PLAIN_MODES = frozenset(("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"))
"""Those that Pillow converts to RGB without clipping or transparency."""
_CLEAR_MODES = {"RGBA": "RGBA", "LA": "RGBA", "PA": "RGBA", "RGBa": "RGBA", "La": "LA"}
"""Those with transparency, and what each is converted to on the way to RGBA."""


class ImageStore:
    """Images under `<run>/images/<sha256>.<png|jpg>`; a write is atomic and repeating it changes nothing."""

    def __init__(self, run_directory: Path) -> None:
        self._root = run_directory

    def put_bytes(self, data: bytes, *, where: str) -> ImageRef:
        """Store an encoded image. Raises DataError, naming `where`, if it is corrupt or empty."""
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                kept = image.format if _is_normal(image) else None
                size, upright = image.size, normalise(image)
        except Exception as error:  # noqa: BLE001 - a decoder may raise anything of a damaged file
            raise DataError(f"image {where} cannot be read ({error}); replace the file or leave the task out") from None
        return self._write(data, _SUFFIXES[kept], size) if kept else self.put_png(upright)

    def put_file(self, path: Path) -> ImageRef:
        """Store an image file. Raises DataError if it is missing or corrupt."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"image {path} cannot be opened ({error.strerror}); check the data set's folder") from None
        except ValueError as error:  # a name that no file can have
            raise DataError(f"image {str(path)!r} cannot be opened ({error}); correct the name") from None
        return self.put_bytes(data, where=str(path))

    def put_png(self, image: Image.Image) -> ImageRef:
        """Store a decoded RGB image losslessly."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return self._write(buffer.getvalue(), ".png", image.size)

    def derive(self, ref: ImageRef, how: str, make: Callable[[Image.Image], Image.Image]) -> ImageRef:
        """What `make` makes of a stored image, kept under the name `how`: it is made once. Raises DataError as `read`."""
        note = self._root / "images" / "derived" / f"{how}-{ref.sha256}.json"
        if note.is_file() and (self._root / (kept := ImageRef.model_validate_json(note.read_bytes())).path).is_file():
            return kept
        with Image.open(io.BytesIO(self.read(ref))) as image:
            made = self.put_png(make(image.convert("RGB")))
        note.parent.mkdir(parents=True, exist_ok=True)
        replace_file(note, made.model_dump_json())
        return made

    def read(self, ref: ImageRef) -> bytes:
        """The stored bytes. Raises DataError where the file is gone or was altered."""
        path = self._root / ref.path
        try:
            data = self.fetch(ref)
        except OSError:
            raise DataError(
                f"image {path} is gone from the run; delete the run's tasks/ folder to load it again"
            ) from None
        if hashlib.sha256(data).hexdigest() != ref.sha256:
            raise DataError(f"image {path} was altered after it was stored; delete it and the run's tasks/ folder")
        return data

    def fetch(self, ref: ImageRef) -> bytes:
        """The bytes as they lie there. Raises OSError."""
        return (self._root / ref.path).read_bytes()

    def read_all(self, refs: Iterable[ImageRef]) -> list[tuple[ImageRef, bytes]]:
        """Each with its bytes. Raises DataError as `read` does."""
        return [(ref, self.read(ref)) for ref in refs]

    def _write(self, data: bytes, suffix: str, size: tuple[int, int]) -> ImageRef:
        sha256 = hashlib.sha256(data).hexdigest()
        path = Path("images") / f"{sha256}{suffix}"
        target = self._root / path
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            replace_file(target, data)
        return ImageRef(sha256=sha256, path=path.as_posix(), width=size[0], height=size[1])


def normalise(image: Image.Image) -> Image.Image:
    """An upright RGB copy, transparency on white, as vLLM sees it. Raises ValueError for pixels that are no colours."""
    upright = ImageOps.exif_transpose(image)
    is_deep_grey = upright.mode.startswith("I;16") or (upright.mode == "I" and image.format in ("PNG", "PPM"))
    if is_deep_grey:
        upright = _to_eight_bits(upright)
    clear = upright.info.get("transparency")
    if upright.mode == "RGB" and isinstance(clear, tuple) and max(clear) > _MAX_EIGHT:  # of a PNG of 16 bits
        upright.info["transparency"] = tuple(value // 256 for value in clear)
    if upright.mode in _CLEAR_MODES or "transparency" in upright.info:
        rgba = upright.convert(_CLEAR_MODES.get(upright.mode, "RGBA")).convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    if upright.mode not in _PLAIN_MODES:
        raise ValueError(f"its pixels are of mode {upright.mode}, which are no colours: convert it to 8 bits")
    return upright.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits by its upper eight; where one grey is transparent, it is found among all of them."""
    deep, clear = image.convert("I"), image.info.get("transparency")
    grey = deep.point(lambda value: value / 256).convert("L")
    if clear is None:
        return grey
    import numpy as np

    alpha = Image.fromarray(np.where(np.asarray(deep) == clear, 0, _MAX_EIGHT).astype("uint8"))
    return Image.merge("LA", (grey, alpha))


def _is_normal(image: Image.Image) -> bool:
    """Whether every decoder sees this file alike, so that its bytes can be kept."""
    is_upright = image.getexif().get(_EXIF_ORIENTATION, 1) == 1
    return image.format in _SUFFIXES and image.mode == "RGB" and is_upright and "transparency" not in image.info


def media_type(ref: ImageRef) -> str:
    """For a data URL: `image/png` or `image/jpeg`."""
    return "image/png" if ref.path.endswith(".png") else "image/jpeg"
