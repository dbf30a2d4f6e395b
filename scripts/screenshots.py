"""Pictures of the report and the dashboard for the documentation, from a finished run.

    python scripts/screenshots.py [RUN]           default: runs/main

Writes docs/images/report.png (the session viewer) and docs/images/dashboard.png (the replay of a session, paused).
Needs Playwright and the distribution's Chromium, as the browser tests do (`./run_testbed.sh test`).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
IMAGES = ROOT / "docs" / "images"
WIDTH, SCALE = 1000, 1.5
OURS = "kvstream"
"""The scheme that is shown, in a run that has it."""
STOP_AT = 0.6
"""Of the session's length."""


def main(arguments: list[str]) -> int:
    from playwright.sync_api import sync_playwright

    from kvstream.testbed.dashboard.live import live_dashboard

    run = Path(arguments[0]) if arguments else ROOT / "runs" / "main"
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with live_dashboard(run) as url, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        context = browser.new_context(viewport={"width": WIDTH, "height": 700}, device_scale_factor=SCALE)
        report = context.new_page()
        report.goto((run / "report.html").resolve().as_uri())
        ours = report.locator(f"#picker label:has(input[value='{OURS}'])")
        if ours.count():
            ours.click()
        unit, scheme = shown(report)
        report.locator("section[aria-labelledby=sessions]").screenshot(path=str(IMAGES / "report.png"))
        page = context.new_page()
        page.goto(url)
        page.select_option("#session", value=f"{unit} {scheme}")
        page.locator(".v-title").filter(has_text="first token").wait_for()
        slider = page.locator("#time")
        slider.fill(str(round(STOP_AT * float(slider.get_attribute("max") or 1) / 0.005) * 0.005))
        page.screenshot(path=str(IMAGES / "dashboard.png"), full_page=True)
        browser.close()
    print(IMAGES / "report.png", IMAGES / "dashboard.png", sep="\n")
    return 0


def shown(report: Any) -> tuple[str, str]:
    """(unit, scheme) of the session that the report shows."""
    return str(report.locator("#unit").input_value()), str(report.locator("#picker :checked[type=radio]").input_value())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
