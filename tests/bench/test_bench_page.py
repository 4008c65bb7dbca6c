"""The HTML report, opened in a real browser where there is one."""

import html as markup
import json
import re
import shutil
import subprocess
from functools import cache

import pytest

from bench.report import page
from tests.support.benching import CASES, NAMES, SCRIPT, everything


@cache
def whole_page():
    return page.html(everything())


def test_page_needs_nothing_from_elsewhere():
    text = whole_page()
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert "<title>fastgpt benchmarks: Some CPU &lt;2 cores&gt;</title>" in text
    assert not re.search(r"//|@import|<(link|iframe|object|embed|base|img)\b", text)
    ids = re.findall(r'\sid="(.*?)"', text)
    targets = re.findall(r'(?:href|src|srcset)="(.*?)"', text) + re.findall(r"url\((.*?)\)", text)
    assert len(ids) == len(set(ids)) and len(targets) > len(NAMES)
    assert {t[0] for t in targets} == {"#"} and {t[1:] for t in targets} <= set(ids)
    assert len(re.findall(r'<svg role="img" aria-label="[^"]+"\s+viewBox="[^"]+">', text)) == len(NAMES)
    # Nothing that records say is markup.
    assert "alert(" in text and text.count("<script") == 1
    assert "<missing" not in text and "<2 cores" not in text


def test_page_has_every_record():
    rows = [
        (kind, [markup.unescape(cell) for cell in re.findall("<td.*?>(.*?)</td>", line)])
        for kind, line in re.findall('<tr class="(.*?)".*?>(.*?)</tr>', whole_page())
    ]
    ours = [words for kind, words in rows if (kind, words[:1]) == ("ours", ["fastgpt cpp"])]
    assert len(ours) == 2 * len(CASES) + 2 and {words[-1] for words in ours} == {
        "ok"
    }  # dtypes; training steps
    for status in ("missing", "failed", "wrong"):
        off = [words for kind, words in rows if (kind, words[:1]) == ("off", [f"<{status} peer>"])]
        assert len(off) == 2 * len(CASES) and {words[-1] for words in off} == {f"{status}: {SCRIPT}"}
    said = {tuple(words) for _, words in rows}
    ratio, roof = "1.20× (1.08–1.32)", "42 % compute"
    assert ("torch.compile", "fp32", "14.4", "48.0", "2 %", ratio, roof, "12 MiB", "0.400", "ok") in said
    assert ("attention", "fp32", "fastgpt cpp", "T", "seconds", "2.00", "2.00", "as theory") in said
    assert ("attention", "fp32", "PyTorch", "T", "peak bytes", "2.00", "1.00", "departs from theory") in said
    assert ("a faster copy", "PyTorch", "fp32", "50.0", "—", "20.0 GB/s", "ok") in said


def test_page_of_a_rehearsal_says_so():
    text = page.html(everything(rehearsal=True)[:1])
    assert "A rehearsal" in text and "<svg" not in text


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium or Chrome on the PATH")
EARLY = """<script>window.errors = [];
addEventListener("error", e => errors.push(String(e.message)));
addEventListener("securitypolicyviolation", e => errors.push("reaches for " + e.blockedURI));</script>
<meta http-equiv="Content-Security-Policy" content="default-src 'unsafe-inline'">"""
PROBE = """<script>
function look() {
  const box = e => { const b = e.getBoundingClientRect(); return [b.width, b.height, b.right]; };
  const all = selector => [...document.querySelectorAll(selector)];
  const column = th => [...th.closest("table").tBodies[0].rows].map(r => r.cells[th.cellIndex].textContent);
  const sorts = (button, times) => {
    const th = button.closest("th"), state = () => [th.getAttribute("aria-sort"), column(th)], states = [state()];
    for (let i = 0; i < times; i++) { button.focus(); button.click(); states.push(state()); }
    return [...states, document.activeElement === button];
  };
  const toggle = document.getElementById("theme"), ours = document.querySelector("svg [style*='--ours']");
  const look = (e, what) => getComputedStyle(e)[what];
  const theme = () => [look(document.body, "backgroundColor"), look(ours, "fill"), toggle.textContent];
  const themes = [theme()];
  for (let i = 0; i < 2; i++) { toggle.click(); themes.push(theme()); }
  return {
    width: innerWidth, wide: document.documentElement.scrollWidth, pictures: all("img, svg").map(box), errors, themes,
    boxes: all(".box").map(e => [e.clientWidth, e.scrollWidth]), first: sorts(all("th button")[0], 2),
    times: sorts(all("#ops th button").find(b => b.textContent.includes("ms")), 2), hidden: toggle.hidden,
  };
}</script>"""
COLLECT = """<script>addEventListener("load", () => {
  const pre = document.body.appendChild(document.createElement("pre"));
  pre.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(f => f.contentWindow.look()));
});</script>"""


def chromium(folder, *arguments):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}", *arguments, (folder / "page.html").as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=True).stdout


@pytest.mark.slow
@needs_browser
def test_page_in_a_browser(tmp_path):
    text = whole_page().replace("<head>", "<head>" + EARLY, 1).replace("</body>", PROBE + "</body>", 1)
    # In frames, since a window has a least width that is above a phone's.
    frame = f'<iframe width="{{}}" height="900" srcdoc="{markup.escape(text)}"></iframe>'
    frames = frame.replace("{}", "390", 1) + frame.replace("{}", "1200", 1)
    (tmp_path / "page.html").write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{COLLECT}{frames}</body>")
    dump = chromium(tmp_path, "--window-size=1300,900", "--dump-dom")
    narrow, broad = json.loads(markup.unescape(re.search(r"<pre>(\[.*\])</pre>", dump)[1]))
    assert (narrow["width"], broad["width"]) == (390, 1200)
    assert any(inner > outer for outer, inner in narrow["boxes"])  # tables scroll in their own boxes
    for found in (narrow, broad):
        assert found["errors"] == [] and found["wide"] <= found["width"]
        assert len(found["pictures"]) == len(NAMES)
        assert all(w > 200 and h > 50 and right <= found["width"] for w, h, right in found["pictures"])
        (none, start), (up, ascending), (down, descending), focused = found["first"]
        assert (none, up, down, focused) == ("none", "ascending", "descending", True)
        assert start != ascending == sorted(start) and descending == sorted(start, reverse=True)
        # By the number rather than by its text, and what has none last whichever way.
        for (_, texts), reverse in ((found["times"][1], False), (found["times"][2], True)):
            assert [float(t) for t in texts[:8]] == sorted([12, 14.4, 18, 36] * 2, reverse=reverse)
            assert len(texts) == 14 and all(SCRIPT in t for t in texts[8:])
        light = ["rgb(255, 255, 255)", "rgb(209, 68, 12)", "Dark theme"]
        dark = ["rgb(13, 17, 23)", "rgb(255, 129, 66)", "Light theme"]
        assert found["themes"] in ([light, dark, light], [dark, light, dark]) and not found["hidden"]


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(("scheme", "low", "high"), [(1, 0.8, 1.0), (0, 0.0, 0.25)], ids=["light", "dark"])
def test_page_follows_the_system_theme(tmp_path, scheme, low, high):
    from matplotlib.image import imread

    (tmp_path / "page.html").write_text(whole_page())
    chromium(tmp_path, "--window-size=1200,2000", f"--blink-settings=preferredColorScheme={scheme}",
             f"--screenshot={tmp_path / 'shot.png'}")  # fmt: skip
    shot = imread(tmp_path / "shot.png")[..., :3]
    assert shot.shape[:2] == (2000, 1200)
    assert low < shot.mean() < high and shot.std() > 0.05
