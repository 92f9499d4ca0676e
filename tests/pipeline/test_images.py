"""The image store: what every model sees is upright RGB, whoever decodes it."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from vcot.pipeline.errors import DataError
from vcot.pipeline.images import ImageStore, media_type, normalise

ORIENTATION = 0x0112


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path)


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(store, ref):
    image = Image.open(io.BytesIO(store.read(ref)))
    image.load()
    return image


def halves(left="red", right="blue", size=(20, 10), mode="RGB"):
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_plain_rgb_keeps_its_bytes(store, kind):
    data = encode(halves(), kind)
    ref = store.put_bytes(data, where="here")
    assert store.read(ref) == data
    assert (ref.width, ref.height) == (20, 10)
    assert media_type(ref) == f"image/{kind.lower()}"
    assert store.put_bytes(data, where="again") == ref


def test_transparency_becomes_white(store):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    stored = decode(store, store.put_bytes(encode(image), where="here"))
    assert stored.mode == "RGB"
    assert stored.getpixel((0, 0)) == (255, 0, 0)
    assert stored.getpixel((3, 3)) == (255, 255, 255)


def test_palette_transparency_becomes_white(store):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    stored = decode(store, store.put_bytes(encode(image, transparency=0), where="here"))
    assert [stored.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (0, 0, 255)]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_rotated_image_is_made_upright(store, kind):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    ref = store.put_bytes(encode(halves(), kind, exif=exif), where="here")
    stored = decode(store, ref)
    assert (ref.width, ref.height) == stored.size == (10, 20)
    assert stored.getexif().get(ORIENTATION, 1) == 1
    top, bottom = stored.getpixel((5, 3)), stored.getpixel((5, 16))
    assert top[0] > 200 > 60 > top[2]
    assert bottom[2] > 200 > 60 > bottom[0]


@pytest.mark.parametrize("mode", ["L", "CMYK", "1", "P"])
def test_other_modes_become_rgb(store, mode):
    kind = "JPEG" if mode in ("L", "CMYK") else "PNG"
    stored = decode(store, store.put_bytes(encode(Image.new(mode, (5, 5)), kind), where="here"))
    assert (stored.mode, stored.format) == ("RGB", "PNG")


def test_other_formats_become_png(store):
    ref = store.put_bytes(encode(halves(), "GIF"), where="here")
    assert (decode(store, ref).format, media_type(ref)) == ("PNG", "image/png")


def test_normalising_twice_changes_nothing(store):
    once = normalise(Image.new("RGBA", (3, 3), (0, 10, 200, 100)))
    assert np.array_equal(np.asarray(normalise(once)), np.asarray(once))


def test_same_pixels_through_png_are_stored_once(store, tmp_path):
    assert store.put_png(halves()) == store.put_png(halves())
    assert len(list((tmp_path / "images").iterdir())) == 1


_DAMAGED = encode(halves(), "AVIF").replace(b"iloc", b"\0\0\0\0")
"""Of which the decoder says neither OSError nor ValueError."""


@pytest.mark.parametrize(
    "data", [b"", b"junk", b"\x89PNG\r\n\x1a\n", encode(halves(size=(200, 200)), "JPEG")[:300], _DAMAGED]
)
def test_corrupt_image_is_one_sentence(store, tmp_path, data):
    with pytest.raises(DataError, match="image of task 7 cannot be read"):
        store.put_bytes(data, where="of task 7")
    assert not (tmp_path / "images").exists()


def test_missing_file_is_one_sentence(store, tmp_path):
    with pytest.raises(DataError, match=r"gone.png cannot be opened \(No such file"):
        store.put_file(tmp_path / "gone.png")


def test_a_name_that_no_file_can_have_is_one_sentence(store, tmp_path):
    with pytest.raises(DataError, match=r"cannot be opened \(embedded null byte\); correct the name"):
        store.put_file(tmp_path / "a\0.png")


def test_stored_image_that_is_gone_or_altered_is_noticed(store, tmp_path):
    ref = store.put_png(halves())
    (tmp_path / ref.path).write_bytes(b"other")
    with pytest.raises(DataError, match="was altered"):
        store.read(ref)
    (tmp_path / ref.path).unlink()
    with pytest.raises(DataError, match="is gone from the run"):
        store.read(ref)


def test_sixteen_bits_of_grey_keep_their_shades(store):
    image = Image.new("I;16", (2, 1))
    image.putpixel((0, 0), 20_000)
    image.putpixel((1, 0), 65_535)
    stored = decode(store, store.put_bytes(encode(image), where="here"))
    assert [stored.getpixel((x, 0)) for x in (0, 1)] == [(78, 78, 78), (255, 255, 255)]


def test_a_transparent_colour_in_rgb_becomes_white(store):
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    stored = decode(store, store.put_bytes(encode(image, transparency=(1, 2, 3)), where="here"))
    assert [stored.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (9, 9, 9)]


def test_a_transparent_grey_among_sixteen_bits_becomes_white_and_no_other(store):
    image = Image.new("I;16", (2, 1))
    image.putpixel((0, 0), 0x1234)
    image.putpixel((1, 0), 0x12FF)
    stored = decode(store, store.put_bytes(encode(image, transparency=0x1234), where="here"))
    assert [stored.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (18, 18, 18)]


def test_a_transparent_colour_of_sixteen_bits_becomes_white():
    image = Image.new("RGB", (2, 1), (18, 18, 18))
    image.putpixel((1, 0), (9, 9, 9))
    image.info["transparency"] = (0x1234, 0x1234, 0x1234)  # as Pillow reads such a PNG
    stored = normalise(image)
    assert [stored.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (9, 9, 9)]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_measurements_are_refused_not_clipped(store, mode):
    image = Image.new(mode, (2, 1), 300)
    with pytest.raises(DataError, match=f"image of task 7 .* mode {mode}, which are no colours: convert it to 8 bits"):
        store.put_bytes(encode(image, "TIFF"), where="of task 7")


def test_a_portable_grey_map_of_sixteen_bits_keeps_its_shades(store):
    data = b"P5 2 1 65535\n" + (20_000).to_bytes(2, "big") + (65_535).to_bytes(2, "big")
    stored = decode(store, store.put_bytes(data, where="here"))
    assert [stored.getpixel((x, 0)) for x in (0, 1)] == [(78, 78, 78), (255, 255, 255)]


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBX", "RGBA", "RGBa", "LA", "PA", "CMYK", "YCbCr", "HSV"])
def test_a_mode_that_is_converted_keeps_its_mid_tones(mode):
    greys = Image.new("L", (2, 1), 60)
    greys.putpixel((1, 0), 190)
    image = greys.convert("RGBA").convert(mode) if mode == "RGBa" else greys.convert(mode)
    dark, light = (sum(pixel) / 3 for pixel in normalise(image).get_flattened_data())
    assert (dark, light) == pytest.approx((60, 190), abs=8)


def test_a_mode_without_a_rule_is_refused():
    with pytest.raises(ValueError, match="mode LAB, which are no colours"):
        normalise(Image.new("LAB", (2, 1)))


def test_threads_that_store_one_image_at_once_all_succeed(tmp_path):
    """With a shared name of the half-written file, one renamed what the other was writing."""
    num_threads, store = 8, ImageStore(tmp_path)
    together = threading.Barrier(num_threads)

    def put(image):
        together.wait()
        return store.put_png(image)

    with ThreadPoolExecutor(num_threads) as pool:
        for number in range(20):
            image = Image.effect_noise((64, 64), number + 1).convert("RGB")
            (ref,) = set(pool.map(put, [image] * num_threads))
            assert store.read(ref)
    assert len(list((tmp_path / "images").iterdir())) == 20
