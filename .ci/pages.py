"""What a browser says of the built pages: ``python .ci/pages.py SITE BROWSER``, called by ``.ci/pages``."""

from __future__ import annotations

import functools
import http.server
import json
import queue
import re
import subprocess
import sys
import tempfile
import threading
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

WIDTHS = (1280, 390)
SECONDS = 300
LOOK = Path(__file__).with_suffix(".html")


class Files(http.server.SimpleHTTPRequestHandler):
    """A server of files that says nothing, and keeps what the page sends back."""

    found: queue.Queue[list[list[object]]] = queue.Queue()

    def do_POST(self) -> None:
        """Take what was found."""
        self.found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Say nothing."""


class Server(http.server.ThreadingHTTPServer):
    """A server that doesn't mind a browser which goes before it has all."""

    def handle_error(self, *args: object) -> None:
        """Say nothing: what a page lacks is found on the page."""


def pages_of(site: Path) -> list[str]:
    """Addresses of all pages but that of what isn't found."""
    return sorted(
        "/" + str(path.relative_to(site)).removesuffix("index.html")
        for path in site.rglob("*.html")
        if path.name == "index.html"
    )


def dead_links(site: Path) -> list[str]:
    """Links between pages that lead nowhere, to a page or to a place on it."""
    texts = {page: (site / page[1:] / "index.html").read_text(encoding="utf-8") for page in pages_of(site)}
    places = {page: set(re.findall(r'\s(?:id|name)="?([^"\s>]+)', text)) for page, text in texts.items()}
    dead = []
    for page, text in texts.items():
        for link in re.findall(r'<(?:a|link|img|script)\s[^>]*?(?:href|src)="?([^"\s>]+)', text):
            target, place = urldefrag(urljoin(page, unescape(link)))
            if urlsplit(target).scheme:
                continue
            path = site / unquote(target)[1:]
            known = target in places and (not place or unquote(place) in places[target])
            if not known and not (path.is_file() and not place):
                dead.append(f"{page}: {link}")
    return sorted(set(dead))


def seen(site: Path, browser: str, width: int, port: int) -> list[list[object]]:
    """What a browser finds on the pages at a width."""
    look = LOOK.read_text(encoding="utf-8").replace("WIDTHpx", f"{width}px")
    look = look.replace("of PAGES", f"of {json.dumps(pages_of(site))}")
    (site / "_look.html").write_text(look, encoding="utf-8")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        command = [browser, *options, f"--user-data-dir={profile}", f"http://127.0.0.1:{port}/_look.html"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return Files.found.get(timeout=SECONDS)
        except queue.Empty:
            raise SystemExit(
                f"The browser didn't come to the last page at {width} pixels in {SECONDS} s."
            ) from None
        finally:
            process.terminate()
            process.wait()
            (site / "_look.html").unlink()


def main(site: Path, browser: str) -> int:
    """Print what is wrong, and return how much that is."""
    server = Server(("127.0.0.1", 0), functools.partial(Files, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    wrong = [f"dead link on {link}" for link in dead_links(site)]
    for width in WIDTHS:
        wrong += [
            f"{width} pixels: {page} {what}: {which}"
            for page, what, which in seen(site, browser, width, server.server_port)
        ]
    server.shutdown()
    for line in wrong:
        print(line)
    print(
        f"{len(pages_of(site))} pages at {' and '.join(map(str, WIDTHS))} pixels: {len(wrong) or 'nothing'} wrong"
    )
    return len(wrong)


if __name__ == "__main__":
    raise SystemExit(bool(main(Path(sys.argv[1]).resolve(), sys.argv[2])))
