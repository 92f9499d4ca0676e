"""Images from addresses, for tables that hold those in place of files and are allowed to."""

from __future__ import annotations

from vcot.pipeline.errors import DataError

_MAX_BYTES = 64 * 2**20
_TIMEOUT_S = 30.0
_NUM_TRIES = 3


def download_image(url: str) -> bytes:
    """What stands at `url`. Raises DataError where nothing does after three tries, or more than 64 MiB."""
    import httpx  # slow to import, and of no use to others

    fault = ""
    for _ in range(_NUM_TRIES):
        try:
            return _download(url)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            fault = " ".join(str(error).split()) or type(error).__name__
    raise DataError(f"image {url} cannot be downloaded ({fault}); correct the address or leave the row out")


def _download(url: str) -> bytes:
    import httpx

    with httpx.stream("GET", url, follow_redirects=True, timeout=_TIMEOUT_S) as answer:
        answer.raise_for_status()
        data = bytearray()
        for chunk in answer.iter_bytes():
            data += chunk
            if len(data) > _MAX_BYTES:
                raise DataError(f"image {url} is larger than {_MAX_BYTES >> 20} MiB; leave the row out")
    return bytes(data)
