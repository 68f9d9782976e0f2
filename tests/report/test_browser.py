"""The page in a real browser, where there is one: no script of a model runs, the page's own does."""

import shutil
import subprocess

import pytest

from align.report.page import write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium installed")
def test_the_page_in_chromium(run, tmp_path):
    artifacts, card = run
    page = write_report(artifacts, card, tmp_path / "report.html")
    switches = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    logging = ["--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom"]
    command = [str(BROWSER), *switches.split(), profile, *logging, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "<title>Alignment report</title>" in done.stdout  # a script of the sample would have renamed it
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    assert "20 of 24 prompts" in done.stdout  # our own script ran
    assert 'class="cut"' in done.stdout
    assert "ppo gained most over sft" in done.stdout
