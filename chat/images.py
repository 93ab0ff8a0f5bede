"""Images from files and URLs, within limits."""

import io
import queue
import threading
import urllib.request
import warnings
from pathlib import Path
from typing import BinaryIO
from urllib.error import URLError

from PIL import Image, ImageOps, UnidentifiedImageError

from shortv_llava.errors import ShortVError, one_line, reason

MAX_PIXELS = 80_000_000
MAX_SIDES_RATIO = 200  # processors resize the shorter side and keep the ratio, with no limit for the longer side
MAX_DOWNLOAD_BYTES = 50_000_000
MAX_DOWNLOAD_SECONDS = 30.0


def load_image(source: str) -> Image.Image:
    """The picture in a file or at an http(s) URL: upright, RGB, transparent parts white, only the first frame.

    Raises:
        ShortVError: if it cannot be loaded within the limits above, or is no image.
    """
    if source.lower().startswith(("http://", "https://")):
        return _decode(io.BytesIO(_download(source)), source)
    if "://" in source:
        raise ShortVError(f"{source}: images are read from files, http:// and https:// alone")
    return open_image(Path(source).expanduser())


def open_image(path: Path) -> Image.Image:
    """The picture in a file, as [`load_image`] returns it.

    Raises:
        ShortVError: if the file is missing, no image, broken, or larger than MAX_PIXELS.
    """
    try:
        with open(path, "rb") as file:
            return _decode(file, str(path))
    except FileNotFoundError:
        raise ShortVError(f"{path}: no such image") from None
    except (OSError, ValueError) as error:
        raise ShortVError(f"{path}: cannot be read ({reason(error)})") from error


def check_sides(image: Image.Image, source: str) -> None:
    """Raises [`ShortVError`] for a picture that is too narrow to be resized."""
    if max(image.size) > MAX_SIDES_RATIO * min(image.size):
        size = f"{image.width} x {image.height} pixels"
        raise ShortVError(f"{source}: {size} are too narrow; one side may be {MAX_SIDES_RATIO} times the other at most")


def _decode(file: BinaryIO, source: str) -> Image.Image:
    passing = Image.DecompressionBombError, UnidentifiedImageError
    try:
        with warnings.catch_warnings(), one_line(lambda error: f"{source}: is a broken image ({error})", *passing):
            warnings.simplefilter("ignore")  # Pillow warns of its own pixel limit and of broken metadata
            with Image.open(file) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ShortVError(f"{source}: {image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
                check_sides(image, source)
                return _to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        raise ShortVError(f"{source}: has more than {MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise ShortVError(f"{source}: is no image of a known format") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, of which Pillow would keep the lowest 8 bits
        return image.convert("I").point(lambda value: value / 256).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _download(url: str) -> bytes:
    """The bytes at a URL.

    A socket's time-out restarts with every byte and does not cover the name look-up. So a thread does the download, and
    is abandoned when the time is over.
    """
    outcome = queue.SimpleQueue()

    def failed(why: object) -> str:
        return f"{url}: cannot be downloaded ({why})"

    def work():
        try:
            with one_line(lambda error: failed(error.reason if type(error) is URLError else error)):
                outcome.put(_fetch(url))
        except ShortVError as error:
            outcome.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        result = outcome.get(timeout=MAX_DOWNLOAD_SECONDS)
    except queue.Empty:
        result = ShortVError(failed("timed out"))  # a socket's words
    if isinstance(result, ShortVError):
        raise result
    return result


def _fetch(url: str) -> bytes:
    opener = urllib.request.OpenerDirector()  # the default opener also follows redirects to ftp:
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    request = urllib.request.Request(url, headers={"User-Agent": "shortv-llava"})  # some sites refuse Python's own
    with opener.open(request, timeout=MAX_DOWNLOAD_SECONDS) as response:
        if response.headers.get_content_type() == "text/html":
            raise ShortVError(f"{url}: is a web page, not an image; give the address of the image itself")
        data = response.read(MAX_DOWNLOAD_BYTES + 1)  # does not rely on the server's Content-Length
    if len(data) > MAX_DOWNLOAD_BYTES:
        raise ShortVError(f"{url}: has more than {MAX_DOWNLOAD_BYTES:,} bytes")
    return data
