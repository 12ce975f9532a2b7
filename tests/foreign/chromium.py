"""Chromium without a window, which loads `page.html` from our origins over HTTP/3 and shows whether all
went well: in its DOM and in its picture."""

import html
import json
import os
import re
import shutil

from common import Missing, expect

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "page.html")
SCRIPT = "visit.js"
WHITE, GREEN = (255, 255, 255), (0, 128, 0)


def command(host, port, public_key, profile, picture):
    """What loads the page from the listener at `host` and `port`, prints its DOM, and writes its picture
    to a file. `profile` is a folder of its own."""
    binary = shutil.which("chromium")
    if binary is None:
        raise Missing("Chromium could not be installed")
    return (
        binary, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={profile}",
        f"--host-resolver-rules=MAP lb.test {host}",
        f"--origin-to-force-quic-on=lb.test:{port}",
        f"--ignore-certificate-errors-spki-list={public_key}",
        "--window-size=640,480", f"--screenshot={picture}", "--dump-dom",
        f"https://lb.test:{port}/page.html",
    )  # fmt: skip


def visit(host, ports, public_key, profile, page):
    """What loads a script from the listeners at `host` and each of `ports`, all at once, and prints the
    DOM that says which of them have come; see `visited`. `page` is a file to be made."""
    scripts = [f'<script async src="https://lb.test:{port}/{SCRIPT}"></script>' for port in ports]
    with open(page, "w") as out:
        out.write("<!doctype html><pre id=result></pre>" + "".join(scripts))
    base = command(host, ports[0], public_key, profile, "")
    forced = ",".join(f"lb.test:{port}" for port in ports)
    kept = [word for word in base[:-1] if not word.startswith(("--screenshot", "--origin-to-force"))]
    return (*kept, f"--origin-to-force-quic-on={forced}", f"file://{page}")


def visited(dom):
    """The ports that a script has come from."""
    found = re.search(r'<pre id="result"[^>]*>(.*?)</pre>', dom, re.S)
    expect(found, f"the page has no result: {dom[-1000:]}")
    return {int(port) for port in found[1].split()}


def write_script(folder, octets):
    """Writes into `folder` what `visit` loads, of about so many octets."""
    with open(os.path.join(folder, SCRIPT), "w") as out:
        print("/*", "x" * octets, "*/", file=out)
        # Only a script that is whole runs.
        print("result.append(new URL(document.currentScript.src).port + ' ');", file=out)


def result(dom):
    """What the page says: `/whoami` at first and in the end."""
    found = re.search(r'<pre id="result"[^>]*>(.*?)</pre>', dom, re.S)
    expect(found and found[1], f"the page has no result: {dom[-1000:]}")
    said = json.loads(html.unescape(found[1]))
    expect(said.get("error") is None, said.get("error"))
    expect(said["protocols"] == ["h3"], f"over {said['protocols']}")
    return said


def check_picture(picture):
    """The origin's own page is white and above; below, it is green if all went well."""
    try:
        from PIL import Image
    except ImportError:
        raise Missing("pillow could not be installed") from None
    image = Image.open(picture).convert("RGB")
    width, height = image.size
    columns = (2, width // 2, width - 3)
    for row, wanted in ((2, WHITE), (height - 30, GREEN), (height - 3, GREEN)):
        seen = {image.getpixel((column, row)) for column in columns}
        expect(seen == {wanted}, f"row {row} of the page looks like {seen}")
