"""The report's page in a browser: it logs no error, asks the network for nothing, and fits a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from jobs.report_html import facts_of, render_html
from tests.unit.test_report_html import made

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
#: What each page is opened in: a frame of the wanted width, since a headless window is no narrower than 500 px.
FRAME = """<!doctype html><body style="margin:0"><iframe id="f" src="page.html" style="border:0;width:{width}px;height:900px">
</iframe><script>
document.getElementById("f").onload = function () {{
  const page = this.contentDocument, root = page.documentElement;
  const wide = [...page.querySelectorAll("body *")].filter(
    e => !e.closest("svg > *") && e.getBoundingClientRect().right > {width} + 0.5).map(e => e.outerHTML.slice(0, 120));
  document.body.dataset.seen = JSON.stringify({{
    scroll: root.scrollWidth, client: root.clientWidth, wide, sections: page.querySelectorAll("section").length,
    rects: page.querySelectorAll("rect").length, styled: getComputedStyle(page.querySelector("section")).borderRadius}});
}};
</script></body>"""

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    pytest.mark.timeout(300),
]


def browse(folder: Path, page: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Open a page below `folder` in headless Chromium and print its DOM; nothing can be resolved."""
    assert CHROMIUM
    return subprocess.run(
        [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--allow-file-access-from-files",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={folder / 'profile'}",
            "--enable-logging=stderr",
            "--virtual-time-budget=5000",
            "--dump-dom",
            *more,
            (folder / page).as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def asked(log: Path) -> set[str]:
    """URLs of the requests in a net log, but for those that the browser makes of itself, to its maker's hosts."""
    urls = re.findall(r'"url":"((?:https?|wss?|ftp)://[^"]*)"', log.read_text())
    own = re.compile(r"\w+://[\w.-]*\b(google|googleapis|gstatic|gvt1)\.com[:/]")
    return {url for url in urls if not own.match(url)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two compared runs, with failed rows, very long words and markup in them."""
    folder = tmp_path_factory.mktemp("page")
    ours = made(folder, name="a" * 100)
    theirs = made(folder, "other", sampling={"max_tokens": 8})
    page = render_html(facts_of(ours.storage), facts_of(theirs.storage))
    (folder / "page.html").write_text(page)
    return folder


def test_no_error_and_no_request(folder: Path) -> None:
    browsed = browse(folder, "page.html", f"--log-net-log={folder / 'net.json'}")
    assert "Compared with" in browsed.stdout
    assert not [line for line in browsed.stderr.splitlines() if "CONSOLE" in line]
    bad = folder / "bad.html"
    bad.write_text(
        (folder / "page.html")
        .read_text()
        .replace("default-src 'none'", "default-src *")
        .replace("img-src data:", "img-src *")
        .replace("<h1>", '<img src="http://example.test/x.png"><h1>')
    )
    other = browse(folder, "bad.html", f"--log-net-log={folder / 'bad.json'}")
    # The log does show a request where a page makes one, and the console an error.
    assert asked(folder / "bad.json") == {"http://example.test/x.png"}
    assert "CONSOLE" in other.stderr
    assert not asked(folder / "net.json")


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_it_fits_the_width(folder: Path, width: int) -> None:
    (folder / "frame.html").write_text(FRAME.format(width=width))
    dom = browse(folder, "frame.html", f"--window-size={max(width, 500)},900").stdout
    found = re.search(r'data-seen="([^"]*)"', dom)
    assert found, dom[-2000:]
    seen = json.loads(unescape(found[1]))
    assert seen["sections"] > 5
    assert seen["rects"] > 20
    assert seen["styled"] != "0px"
    assert seen["scroll"] <= width, seen["wide"]
    assert not seen["wide"]
