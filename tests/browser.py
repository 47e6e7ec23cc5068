"""A headless Chromium for pages: what a reader sees, and what the page's scripts do."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for found in map(shutil.which, BROWSERS) if found), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


def chromium(page: Path, profile: Path, *options: str, after: str = "") -> str:
    """Open a page in a browser of its own and give back what it prints."""
    assert BROWSER is not None
    command = [BROWSER, *QUIET, f"--user-data-dir={profile}", *options, f"{page.as_uri()}{after}"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        return process.communicate(timeout=180)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        pytest.fail(f"the browser did not end within 180 s: {' '.join(command)}")


PROBE = """
<script type="module">
const one = name => document.querySelector(name), all = name => [...document.querySelectorAll(name)];
const seen = {};
const count = () => all(".panel").map(panel => panel.querySelectorAll(".canvas .point").length);
const order = () => all("table.sortable tbody tr").filter(row => !row.hidden).map(row => row.id);
const press = key => one(".panel svg").dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
%s
document.body.dataset.probe = JSON.stringify(seen);
</script>"""


def probe(page: Path, tmp_path: Path, script: str, *options: str, after: str = "") -> dict:
    """Run a script in the page and give back what it put into `seen`."""
    copy = tmp_path / "probe.html"
    copy.write_text(page.read_text().replace("</body>", PROBE % script + "</body>"))
    dumped = chromium(copy, tmp_path / "profile", *options, "--virtual-time-budget=4000", "--dump-dom", after=after)
    found = re.search(r'data-probe="([^"]*)"', dumped)
    assert found, dumped[-2000:]
    return json.loads(html.unescape(found[1]))
