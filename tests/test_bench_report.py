"""Benchmark results as tables, plots and a page; the page is opened in a browser where there is one."""

import html as markup
import json
import os
import re
import shutil
import subprocess
import sys
import types
import xml.etree.ElementTree as ET
from functools import cache
from pathlib import Path

import jsonschema
import pytest

from bench import plots, records, report

ROOT = Path(__file__).parent.parent
NAMES = tuple(report.PLOTS)
SCRIPT = "does not build: <script>alert('x')</script> & more"
EMPTY = {
    "reason": None, "verified": True, "error": None, "seconds": None, "spread": None, "rounds": 9, "ratio": None,
    "ratio_low": None, "ratio_high": None, "flops": 1e9, "bytes": 10**9, "roof": None, "share_of_roof": None,
    "bound": "memory", "peak_bytes": None, "status": "ok", "dims": {}, "peer": None, "backend": "cpp",
    "group": "ops", "direction": "fwd+bwd", "dtype": "fp32", "op": "gelu", "case": "64x64",
}  # fmt: skip
MACHINE = {
    "device": "Some CPU <2 cores>", "torch": "2.13.0", "triton": None, "commit": "0123456789abcdef", "dirty": False,
    "date": "2026-01-01T00:00:00+00:00", "command": "python -m bench all", "python": "3.11.7", "threads": 2,
    "heap": "kept", "driver": None, "cuda": None, "cudnn": None, "clocks": None, "packages": {"torch": "2.13.0"},
    "rehearsal": False, "datasheet_flops": None,
}  # fmt: skip
GPU = {"device": "NVIDIA H200", "cuda": "12.8", "driver": "570", "datasheet_flops": {"bf16": 989e12}}
PEERS = {"PyTorch": 1.5, "torch.compile": 1.2, "cut-cross-entropy (torch.compile)": 3.0}
CASES = (
    ("linear_cross_entropy", "2048x768x50304", 4e11, 9e8),
    ("attention", "16x6x256x64", 2e9, 1e8), ("attention", "1x4x4096x64", 1.5e10, 2e8),
    ("gelu", "4096x3072 none", 3e8, 3e8), ("gelu", "4096x3072 tanh", 3e8, 3e8),
    ("add_layer_norm", "4096x768", 7e7, 1e8),
)  # fmt: skip


def row(**fields):
    return EMPTY | fields


def peer(name, **fields):
    return row(peer=name, backend="torch", **fields)


def bad(status, **fields):
    return row(status=status, reason=SCRIPT, verified=False, rounds=0) | fields | {"seconds": None}


def roofs(dtype):
    copy = peer("PyTorch", op="roof", group="roof", case="copy", dtype=dtype, direction="copy", seconds=0.1)
    gemm = copy | {"case": "matrix product", "direction": "gemm", "flops": 2e11, "seconds": 1.0}
    return [copy, copy | {"seconds": 0.05, "case": "a faster copy"}, gemm]


def timed(op, case, flops, moved, dtype, direction):
    """Ours, three peers that are fine and three that are not."""
    seconds = {"fwd": 0.012, "fwd+bwd": 0.04}[direction]
    shape = {"op": op, "case": case, "dtype": dtype, "direction": direction, "flops": flops, "bytes": moved}
    shape |= {"roof": seconds / 2, "bound": "compute" if flops / moved > 10 else "memory", "error": 0.4}
    yield row(**shape, seconds=seconds, spread=0.02, share_of_roof=0.5, peak_bytes=3 << 20)
    for name, r in PEERS.items():
        more = {"seconds": seconds * r, "spread": 0.02, "share_of_roof": 0.5 / r, "peak_bytes": 12 << 20}
        yield peer(name, **shape, **more, ratio=r, ratio_low=0.9 * r, ratio_high=1.1 * r)
    for status in ("missing", "failed", "wrong"):
        yield bad(status, **shape | {"peer": f"<{status} peer>", "error": None})


def series():
    """PyTorch runs out of memory at the largest size."""
    for t in range(256, 2049, 256):
        shape = {
            "op": "attention",
            "group": "scaling",
            "sweep": "T",
            "dims": {"B": 1, "T": t},
            "case": f"1 {t}",
        }
        yield row(**shape, seconds=1e-8 * t**2, peak_bytes=1000 * t)
        yield peer("torch.compile", **shape, seconds=2e-8 * t**2, peak_bytes=1100 * t)
        eager = peer("PyTorch", **shape, seconds=3e-8 * t**2, peak_bytes=10 * t**2)
        yield eager if t < 2048 else bad("failed", **shape, peer="PyTorch")


def training():
    shape = {"op": "train", "group": "train", "case": "6x6x384", "direction": "step", "dtype": "bf16"}
    for name, r in {None: 1.0, **PEERS}.items():
        more = {"losses": [5.0 - 0.1 * i + 1e-4 * r for i in range(8)], "mfu_measured": 0.4 / r}
        more |= {"seconds": r, "tokens_per_second": 9000 / r, "ratio": r if name else None}
        yield row(**shape, **more, peer=name)
    yield bad("wrong", **shape, peer="Liger-Kernel", losses=[6.0] * 8, tokens_per_second=9000)


def everything(**machine):
    found = [r for dtype in ("fp32", "bf16") for r in roofs(dtype)]
    kinds = [(dtype, direction) for dtype in ("fp32", "bf16") for direction in ("fwd", "fwd+bwd")]
    found += [r for case in CASES for kind in kinds for r in timed(*case, *kind)]
    return [found[0] | MACHINE | machine, *found[1:], *series(), *training()]


def without(group):
    return [r for r in everything() if r["group"] != group]


def spoilt(reason, **which):
    """Everything, with those of our own records wrong that have these values."""
    which["peer"] = None
    wrong = {"status": "wrong", "verified": False, "seconds": None, "reason": reason}
    return [r | wrong if all(r[k] == which[k] for k in which) else r for r in everything()]


@pytest.fixture(autouse=True)
def fits(monkeypatch):
    fit = {"op": "attention", "dtype": "fp32", "sweep": "T", "quantity": "seconds", "theory": 2.0}
    rows = [fit | {"contender": "fastgpt cpp", "exponent": 2.01, "departs": False},
            fit | {"contender": "<PyTorch>", "exponent": 2.5, "departs": True}]  # fmt: skip
    module = types.ModuleType("bench.scaling")
    module.fits = lambda records: rows
    monkeypatch.setitem(sys.modules, "bench.scaling", module)


@cache
def whole_page():
    return report.html(everything())


def cells(table, *start):
    """The cells of the one Markdown row that begins so."""
    lines = (line.strip("|").split("|") for line in table.splitlines() if line[:1] == "|")
    rows = [[cell.strip() for cell in line] for line in lines]
    (found,) = [r for r in rows if r[: len(start)] == list(start)]
    return found


def test_records_here_fit_the_schema():
    schema = json.loads((ROOT / "bench" / "schema.json").read_text())
    jsonschema.validate(everything(), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate([*everything(), row(sweep="Q")], schema)


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (report.digits, 0, "0"), (report.digits, 1234.5, "1230"), (report.digits, 0.99951, "1.00"),
        (report.digits, 12.345, "12.3"), (report.digits, 0.0012345, "0.00123"), (report.digits, 3.2e-7, "3.20e-07"),
        (report.digits, float("nan"), "nan"), (report.digits, float("inf"), "inf"), (report.times, 1.797, "1.80×"),
        (report.times, 31.44, "31.4×"), (report.size, 512, "512 B"), (report.size, 1.5 * 2**30, "1.50 GiB"),
    ],
)  # fmt: skip
def test_numbers_as_text(function, value, text):
    assert function(value) == text


def test_table_has_the_numbers():
    table = report.tables(everything())
    found = cells(table, "attention", "1x4x4096x64", "fp32")
    assert found[3:] == ["40.0", "50 %", "torch.compile", "48.0", "1.20× (1.08–1.32)", "3 MiB / 12 MiB"]
    assert len(table.splitlines()) == 2 + 2 * len({op for op, *_ in CASES})


def test_best_peer_is_the_fastest_of_the_verified():
    fast = {"seconds": 0.001, "ratio": 0.1, "op": "attention", "case": "1x4x4096x64"}
    cheats = [peer("unverified", **fast, verified=False), peer("wrong", **fast, status="wrong", reason="off")]
    table = report.tables([*everything(), *cheats])
    assert cells(table, "attention", "1x4x4096x64", "fp32")[5] == "torch.compile"
    found = [*everything(), peer("honest", **fast)]
    best = cells(report.tables(found), "attention", "1x4x4096x64", "fp32")
    assert best[5:8] == ["honest", "1.00", "0.10×"]
    for some, broken in ((everything(), False), (found, True)):  # the bars of the others
        assert any("broken bar" in words for *_, words in drawn("bars", some)) == broken


def test_our_fastest_backend_is_named():
    more = {"case": "4096x3072 none", "flops": 3e8, "bytes": 3e8, "share_of_roof": 0.9, "backend": "triton"}
    table = report.tables([*everything(), row(**more, seconds=0.03)])
    assert cells(table, "gelu", "4096x3072 none", "fp32")[3:5] == ["30.0 triton", "90 %"]
    assert cells(table, "gelu", "4096x3072 none", "bf16")[3] == "40.0 cpp"


def test_ours_wrong_has_no_ratio_and_says_so():
    found = spoilt("off by | <b>", op="add_layer_norm", dtype="bf16")
    table = report.tables(found)
    where = "add_layer_norm", "4096x768"
    assert cells(table, *where, "bf16")[3:8] == ["wrong", "—", "torch.compile", "48.0", "—"]
    assert cells(table, *where, "fp32")[7].startswith("1.20×")
    assert table.endswith("\n\nWrong: fastgpt cpp, add_layer_norm 4096x768 bf16: off by &#124; &lt;b&gt;")
    assert "wrong: off by | &lt;b&gt;" in report.html(found)
    words = [words for *_, words in drawn("speedup", found)]
    assert {"fp32", "bf16"} & set(words[words.index("add_layer_norm") :]) == {"fp32"}


def test_headline_is_the_largest_case_that_is_right():
    table = report.tables(spoilt("off", case="1x4x4096x64"))
    assert cells(table, "attention", "16x6x256x64", "fp32")[3] == "40.0"
    assert "Wrong: fastgpt cpp, attention 1x4x4096x64 fp32: off" in table


def test_readme_round_trip(tmp_path):
    results, readme = tmp_path / "results", tmp_path / "README.md"
    records.save(results / "some cpu" / "results.json", everything())
    for write in (plots.bars, plots.speedup):
        write(everything(), results / "some cpu" / "plots")
    before, after = "# Title\n\n", "\n\n## Next\n"
    readme.write_text(f"{before}{report.BEGIN}\nold{report.END}{after}")
    assert report.update_readme(readme, results)
    text = readme.read_text()
    assert text == f"{before}{report.BEGIN}\n{report.readme_block(results)}\n{report.END}{after}"
    assert not report.update_readme(readme, results)
    assert "**Some CPU &lt;2 cores&gt;**: torch 2.13.0, commit 0123456789ab, 2 threads, heap: kept." in text
    assert cells(text, "gelu", "4096x3072 none", "bf16")
    sources = [f"bench/results/some%20cpu/plots/{name}-dark.svg" for name in ("speedup", "bars")]
    assert re.findall(r'srcset="(.*?)"', text) == sources
    assert text.count('width="49%"') == 2 and text.count("Nothing is measured on a GPU yet.") == 1


def test_readme_says_what_was_measured_on_a_gpu(tmp_path):
    assert report.readme_block(tmp_path) == "Nothing is measured on a GPU yet."
    records.save(tmp_path / "b" / "results.json", everything(**GPU, rehearsal=True))
    assert "Nothing is measured on a GPU yet." in report.readme_block(tmp_path)
    records.save(tmp_path / "a" / "results.json", everything(**GPU | {"dirty": True}))
    block = report.readme_block(tmp_path)
    assert "Nothing is measured" not in block
    assert 0 < block.index("commit 0123456789ab with changes") < block.index("A rehearsal")  # a before b


@pytest.mark.parametrize("text", ["", report.BEGIN, report.END + report.BEGIN])
def test_readme_without_markers(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match="put both where the results belong"):
        report.update_readme(readme, tmp_path)
    assert readme.read_text() == text


def test_report_is_the_same_in_another_process(tmp_path):
    source = tmp_path / "results.json"
    records.save(source, everything())
    written = report.write_report(source, tmp_path / "here")
    kinds = [f"{mode}.{kind}" for mode in ("light", "dark") for kind in ("svg", "png")]
    assert [p.name for p in written] == [f"{n}-{kind}" for n in NAMES for kind in kinds] + ["report.html"]
    code = (
        "import sys, types; from pathlib import Path; from bench import report\n"
        "sys.modules['bench.scaling'] = types.SimpleNamespace(fits=lambda records: [])\n"
        "report.write_report(*map(Path, sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, source, tmp_path / "there"]
    env = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    subprocess.run(command, check=True, cwd=ROOT, env=env)
    for path in written[:-1]:
        assert path.read_bytes() == (tmp_path / "there" / "plots" / path.name).read_bytes(), path.name
    assert len({path.read_bytes() for path in written}) == len(written)
    # What an earlier run had more to show of is gone, what others put there is not.
    (tmp_path / "here" / "plots" / "mine.svg").touch()
    records.save(source, without("train"))
    report.write_report(source, tmp_path / "here")
    left = {path.name.split("-")[0] for path in (tmp_path / "here" / "plots").iterdir()}
    assert left == {*NAMES, "mine.svg"} - {"train"}


@pytest.mark.parametrize("name", NAMES)
def test_svg_or_nothing_without_data(tmp_path, name):
    light, dark = (plots.svg(name, everything(), report.THEMES[mode]) for mode in ("light", "dark"))
    assert ET.fromstring(light).tag.endswith("svg")
    assert "<text" not in light and "dc:date" not in light
    assert "#ffffff" in light and "#0d1117" in dark and "#ffffff" not in dark
    group = {"memory": "scaling", "scaling": "scaling", "train": "train"}.get(name, "ops")
    for found in (without(group), everything()[:1]):
        assert getattr(plots, name)(found, tmp_path / "out") == []
    assert not (tmp_path / "out").exists()


def drawn(name, found):
    """(width of the sheet, its height, x, y, keywords of the text, words) for every text of a plot."""
    said = []
    text = plots.Sheet.text

    def spy(self, x, y, words, colour, points=plots.SMALL, **more):
        width, height = self.figure.get_size_inches() * 72
        said.append((width, height, x, y, {"points": points, **more}, words))
        text(self, x, y, words, colour, points, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots.Sheet, "text", spy)
        assert plots.svg(name, found, report.THEMES["light"])
    return said


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_clipped_or_on_another(name, gpu):
    found = everything()
    if gpu:  # two of ours, three dtypes, an op much like another, peers neck and neck, ratios far apart
        right = [r for r in found if r["seconds"]]
        found += [r | {"backend": "triton", "seconds": 1.07 * r["seconds"]} for r in right if not r["peer"]]
        found += [r | {"op": "bias_gelu"} for r in found if r["op"] == "gelu"]
        found += [r | {"peer": r["peer"] + " (max-autotune)"} for r in found if r["peer"] in PEERS]
        half = [r | {"dtype": "fp16"} for r in right if r["dtype"] == "bf16"]
        found += [r | {k: r[k] and 99 * r[k] for k in r if "ratio" in k} for r in half]
    boxes = []
    for width, height, x, y, more, words in drawn(name, found):
        wide, half = plots.wide(words, more["points"], more.get("weight", "normal")), 0.45 * more["points"]
        left = x - wide * {"left": 0, "center": 0.5, "right": 1}[more.get("ha", "left")]
        if words:
            boxes.append((left, y - half, left + wide, y + half, words))
            assert left >= 0 and y - half >= 0 and left + wide <= width and y + half <= height, words
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3], (a, b)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "roofline"])
def test_only_what_counts_is_drawn(name):
    words = {words for *_, words in drawn(name, everything())}
    assert name == "speedup" or "fastgpt cpp" in words
    assert "torch.compile" in words
    assert not [w for w in words if "peer>" in w or "Liger" in w]
    assert any("failed beyond" in w for w in words) == (name in ("memory", "scaling"))
    finds = [r for r in everything() if (r["group"], r["status"]) != ("scaling", "failed")]
    assert not any("failed beyond" in words for *_, words in drawn(name, finds))


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
    assert len(ours) == 2 * len(CASES) + 1 and {words[-1] for words in ours} == {"ok"}  # dtypes; training
    for status in ("missing", "failed", "wrong"):
        off = [words for kind, words in rows if (kind, words[:1]) == ("off", [f"<{status} peer>"])]
        assert len(off) == 2 * len(CASES) and {words[-1] for words in off} == {f"{status}: {SCRIPT}"}
    said = {tuple(words) for _, words in rows}
    ratio, roof = "1.20× (1.08–1.32)", "42 % compute"
    assert ("torch.compile", "fp32", "14.4", "48.0", "2 %", ratio, roof, "12 MiB", "0.400", "ok") in said
    assert ("attention", "fp32", "<PyTorch>", "T", "seconds", "2.50", "2", "departs from theory") in said
    assert ("a faster copy", "PyTorch", "fp32", "50.0", "—", "20.0 GB/s", "ok") in said


def test_page_without_scaling_asks_for_no_fits(monkeypatch):
    monkeypatch.setitem(sys.modules, "bench.scaling", None)  # importing it fails
    text = report.html(everything(rehearsal=True)[:1])
    assert "A rehearsal" in text and "<svg" not in text
    with pytest.raises(ImportError):
        report.html(everything())


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium or Chrome on the PATH")
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


@browser
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


@browser
@pytest.mark.parametrize(("scheme", "low", "high"), [(1, 0.8, 1.0), (0, 0.0, 0.25)], ids=["light", "dark"])
def test_page_follows_the_system_theme(tmp_path, scheme, low, high):
    from matplotlib.image import imread

    (tmp_path / "page.html").write_text(whole_page())
    chromium(tmp_path, "--window-size=1200,2000", f"--blink-settings=preferredColorScheme={scheme}",
             f"--screenshot={tmp_path / 'shot.png'}")  # fmt: skip
    shot = imread(tmp_path / "shot.png")[..., :3]
    assert shot.shape[:2] == (2000, 1200)
    assert low < shot.mean() < high and shot.std() > 0.05
