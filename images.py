"""Images from files, within limits."""

from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from shortv_llava.errors import ShortVError

MAX_PIXELS = 80_000_000


def open_image(path: Path) -> Image.Image:
    """The picture in a file, upright, RGB.

    Raises:
        ShortVError: if the file is missing, no image, broken, or larger than MAX_PIXELS.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ShortVError(f"{path}: {image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise ShortVError(f"{path}: no such image") from None
    except Image.DecompressionBombError:
        raise ShortVError(f"{path}: has more than {MAX_PIXELS:,} pixels") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ShortVError(f"{path}: cannot be read as an image ({error})") from error
