"""A web server on 127.0.0.1 that misbehaves as told, for tests of downloads."""

import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Page:
    """One address.

    Args:
        data: the content.
        etag: as sent; None sends none.
        date: Last-Modified as sent.
        ranges: whether parts can be asked for.
        if_range: whether If-Range is known.
        length: whether the length is announced.
        faults: one for each coming request, from the front; "" for none. "stall N", "cut N", "slow", "corrupt",
            "more", "html", "status 503", "redirect /there", "shift" (another part than asked for).
    """

    data: bytes
    etag: str | None = '"one"'
    date: str | None = None
    ranges: bool = True
    if_range: bool = True
    length: bool = True
    faults: list[str] = field(default_factory=list)


class Web:
    """Pages by path, and what was asked for: dicts of path, range, if_range, auth."""

    def __init__(self):
        self.pages, self.log, self.closing = {}, [], threading.Event()
        web = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                headers = self.headers
                names = {"range": "Range", "if_range": "If-Range", "auth": "Authorization"}
                path = self.path.split("?")[0]
                web.log.append({"path": path, **{key: headers.get(name) for key, name in names.items()}})
                web.answer(self, path)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler, path):
        page = self.pages.get(path)
        if page is None:
            handler.send_error(404)
            return
        fault, _, value = (page.faults.pop(0) if page.faults else "").partition(" ")
        if fault == "status":
            handler.send_response(int(value.split()[0]))
            for header in value.split()[1:]:
                handler.send_header(*header.split("="))
            handler.end_headers()
            return
        if fault == "redirect":
            handler.send_response(302)
            handler.send_header("Location", value)
            handler.end_headers()
            return
        data, start, total = page.data, 0, len(page.data)
        asked = handler.headers.get("Range")
        valid = not page.if_range or handler.headers.get("If-Range") in (None, page.etag, page.date)
        if asked and page.ranges and valid:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= total:
                handler.send_response(416)
                handler.send_header("Content-Range", f"bytes */{total}")
                handler.end_headers()
                return
            start += 7 if fault == "shift" else 0
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            handler.send_response(200)
        data = bytearray(data[start:])
        if fault == "corrupt":
            data[len(data) // 2] ^= 0xFF
        if fault == "more":
            data += b"more" * 100
        handler.send_header("Content-Type", "text/html" if fault == "html" else "application/octet-stream")
        if page.length:
            handler.send_header("Content-Length", str(total - start))
        for name, value_ in (("ETag", page.etag), ("Last-Modified", page.date)):
            if value_:
                handler.send_header(name, value_)
        handler.end_headers()
        try:
            if fault == "slow":
                for byte in data:
                    handler.wfile.write(bytes([byte]))
                    handler.wfile.flush()
                    if self.closing.wait(0.05):
                        return
            elif fault in ("cut", "stall"):
                handler.wfile.write(data[: int(value)])
                handler.wfile.flush()
                if fault == "stall":
                    self.closing.wait(60)
                else:
                    time.sleep(0.01)
            else:
                handler.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            pass
