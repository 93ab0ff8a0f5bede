"""Images from files and URLs: what comes in, and what is refused with one line."""

import io
import socket
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from shortv_llava.chat import images
from shortv_llava.chat.images import load_image
from shortv_llava.errors import ShortVError
from shortv_llava.evaluation.questions import Question, open_images

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A grey PNG that says how large it is, and has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


@pytest.fixture
def server(monkeypatch):
    """A function from pages, path to answer, to the address that serves them.

    An answer is (status, headers, parts of the body ...); at a part None the server hangs.
    """
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    release, running = threading.Event(), []

    def serve(pages):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path not in pages:
                    return self.send_error(404)
                status, headers, *body = pages[self.path]
                self.send_response(status)
                for header in headers.items():
                    self.send_header(*header)
                self.end_headers()
                for part in body:
                    if part is None:
                        release.wait()
                    else:
                        self.wfile.write(part)

            def log_message(self, *args):
                pass

        running.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        running[0].daemon_threads = True
        threading.Thread(target=running[0].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{running[0].server_port}"

    yield serve
    release.set()
    running[0].shutdown()
    running[0].server_close()


def frame(color) -> Image.Image:
    return Image.new("RGB", (4, 2), color)


def transparent_palette() -> Image.Image:
    image = frame(RED).convert("P")
    image.info["transparency"] = image.getpixel((0, 0))
    return image


def half_transparent() -> Image.Image:
    image = frame(RED).convert("RGBA")
    image.putalpha(128)
    return image


@pytest.mark.parametrize(
    "data, color",
    [
        (encoded(frame(RED)), RED),
        (encoded(frame(RED).convert("P")), RED),
        (encoded(transparent_palette()), WHITE),
        (encoded(half_transparent()), (255, 127, 127)),
        (encoded(Image.new("LA", (4, 2), (0, 0))), WHITE),
        (encoded(Image.new("L", (4, 2), 100)), (100, 100, 100)),
        (encoded(Image.new("I;16", (4, 2), 100 * 256)), (100, 100, 100)),
        (encoded(Image.new("1", (4, 2), 1)), WHITE),
        (encoded(Image.new("CMYK", (4, 2), (0, 0, 0, 0)), "JPEG"), WHITE),
        (encoded(frame(RED), "GIF", save_all=True, append_images=[frame(WHITE)]), RED),
        (encoded(frame(RED), "WEBP", save_all=True, append_images=[frame(WHITE)], lossless=True), RED),
    ],
    ids="plain palette see-through-palette alpha grey-alpha grey grey16 bilevel cmyk gif webp".split(),
)
def test_kinds_of_images(tmp_path, data, color):
    (tmp_path / "image").write_bytes(data)
    image = load_image(str(tmp_path / "image"))
    assert (image.mode, image.size) == ("RGB", (4, 2))
    assert max(abs(got - wanted) for got, wanted in zip(image.getpixel((0, 0)), color)) <= 1


def test_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    frame(RED).save(tmp_path / "photo.jpg", exif=exif)
    assert load_image(str(tmp_path / "photo.jpg")).size == (2, 4)


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    frame(RED).save(tmp_path / "photo.png")
    assert load_image("~/photo.png").getpixel((0, 0)) == RED


JPEG = encoded(Image.effect_noise((64, 64), 50), "JPEG")


@pytest.mark.parametrize(
    "data, reason",
    [
        (png_header(60_000, 60_000), "more than 80,000,000"),
        (png_header(9_500, 9_500), "9500 x 9500 .*more than 80,000,000"),
        (JPEG[: len(JPEG) // 2], "broken image"),
        (png_header(4, 2), "broken image"),
        (b"<html>", "known format"),
        (b"", "known format"),
    ],
    ids=["bomb", "large", "cut-jpeg", "cut-png", "html", "empty"],
)
@pytest.mark.filterwarnings("error")
def test_refused_files(tmp_path, data, reason):
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    with pytest.raises(ShortVError, match=reason) as refusal:
        load_image(str(path))
    assert str(refusal.value).startswith(f"{path}: ")


@pytest.mark.parametrize("source", ["", "nowhere.png", "nul\0", "ftp://127.0.0.1/a.png", "file:///a.png", "data://"])
def test_refused_sources(source):
    with pytest.raises(ShortVError):
        load_image(source)


def test_from_a_url(server):
    picture = encoded(frame(RED))
    address = server(
        {
            "/photo": (200, {"Content-Type": "application/octet-stream"}, picture),
            "/moved": (302, {"Location": "/photo"}),
        }
    )
    for path in ("/photo", "/moved"):
        assert load_image(address + path).getpixel((0, 0)) == RED


@pytest.mark.parametrize(
    "page, reason",
    [
        (None, "404"),
        ((200, {"Content-Type": "text/html"}, b"<html>"), "is a web page"),
        ((200, {}, b"no image"), "known format"),
        ((200, {}, JPEG[:300]), "broken image"),
        ((302, {"Location": "file:///etc/hostname"}), "file:///etc/hostname' is not allowed"),
        ((302, {"Location": "ftp://127.0.0.1/photo"}), "unknown url type: ftp"),
        ((302, {"Location": "/page"}), "infinite loop"),
        ((200, {"Content-Length": str(2 * 2**30)}, bytes(3000), None), "more than 2,000 bytes"),
        ((200, {}, bytes(3000), None), "more than 2,000 bytes"),
    ],
    ids=["missing", "web-page", "text", "cut", "to-file", "to-ftp", "to-itself", "2-gigabytes", "endless"],
)
def test_refused_urls(server, monkeypatch, page, reason):
    monkeypatch.setattr(images, "MAX_DOWNLOAD_BYTES", 2000)
    address = server({} if page is None else {"/page": page}) + "/page"
    with pytest.raises(ShortVError, match=reason) as refusal:
        load_image(address)
    assert str(refusal.value).startswith(f"{address}: ")


@pytest.mark.parametrize("body", [(None,), (b"\x89PNG", None)], ids=["at-once", "half-way"])
def test_url_that_hangs(server, monkeypatch, body):
    monkeypatch.setattr(images, "MAX_DOWNLOAD_SECONDS", 0.3)
    address = server({"/page": (200, {}, *body)}) + "/page"
    with pytest.raises(ShortVError, match="timed out"):
        load_image(address)


def test_nobody_listens(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as taken:  # so that nobody else listens there either
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ShortVError, match="cannot be downloaded .*refused"):
            load_image(f"http://127.0.0.1:{taken.getsockname()[1]}/photo.png")


@pytest.mark.parametrize("size", [(8000, 1), (1, 8000), (201, 1)])
def test_a_picture_too_narrow_to_be_resized(tmp_path, size):
    path = tmp_path / "narrow.png"
    Image.new("RGB", size).save(path)
    for load in (lambda: load_image(str(path)), lambda: open_images(Question("7", "What?", (Image.open(path),)))):
        with pytest.raises(ShortVError, match=f"{size[0]} x {size[1]} .*too narrow"):
            load()
    Image.new("RGB", (200, 1)).save(path)
    load_image(str(path))
