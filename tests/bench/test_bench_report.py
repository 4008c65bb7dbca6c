"""Benchmark results as tables, plots and HTML, and the section of README that is generated from them."""

import itertools
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import jsonschema
import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from bench.__main__ import main
from bench.harness import records
from bench.report import page, plots, readme
from bench.report.headlines import format_bytes, format_number, format_rate, format_ratio
from tests.support.benching import (
    CASES,
    GPU,
    NAMES,
    PEERS,
    ROOT,
    SCRIPT,
    everything,
    peer,
    row,
    spoilt,
    validate,
    without,
)


def cells(table, *start):
    """The cells of the one Markdown row that begins with `start`."""
    lines = (line.strip("|").split("|") for line in table.splitlines() if line[:1] == "|")
    rows = [[cell.strip() for cell in line] for line in lines]
    (found,) = [r for r in rows if r[: len(start)] == list(start)]
    return found


def drawn(name, found):
    """(text, x0, y0, x1, y1) in pixels of every visible text of a plot, and the size of the plot."""
    texts, draw = [], Text.draw
    with matplotlib.rc_context(plots.STYLE), pytest.MonkeyPatch.context() as patch:
        figure = plots.draw(name, found)
        figure.draw_without_rendering()
        patch.setattr(Text, "draw", lambda self, renderer: (texts.append(self), draw(self, renderer)))
        FigureCanvasAgg(figure).draw()
        boxes = {(t.get_text(), *t.get_window_extent().extents) for t in texts if t.get_text().strip()}
    return boxes, figure.bbox.size


def words(name, found):
    return [text for text, *_ in drawn(name, found)[0]]


def test_records_here_fit_the_schema():
    validate(everything())
    with pytest.raises(jsonschema.ValidationError):
        validate([*everything(), row(sweep="Q")])


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (format_number, 0, "0"), (format_number, 1234.5, "1230"), (format_number, 0.99951, "1.00"),
        (format_number, 12.345, "12.3"), (format_number, 0.0012345, "0.00123"), (format_number, 3.2e-7, "3.20e-07"),
        (format_number, float("nan"), "nan"), (format_number, float("inf"), "inf"), (format_ratio, 1.797, "1.80×"),
        (format_ratio, 31.44, "31.4×"), (format_bytes, 512, "512 B"), (format_bytes, 1.5 * 2**30, "1.50 GiB"),
        (lambda rate: format_rate(rate, "B/s"), 2.77e10, "27.7 GB/s"),
    ],
)  # fmt: skip
def test_numbers_as_text(function, value, text):
    assert function(value) == text


def test_table_has_the_numbers():
    table = readme.tables(everything())
    found = cells(table, "attention", "1x4x4096x64", "fp32")
    assert found[3:] == ["40.0", "50 %", "torch.compile", "48.0", "1.20× (1.08–1.32)", "3 MiB / 12 MiB"]
    assert len(table.splitlines()) == 2 + 2 * len({op for op, *_ in CASES})


def test_best_peer_is_the_fastest_of_the_verified():
    fast = {"seconds": 0.001, "ratio": 0.1, "op": "attention", "case": "1x4x4096x64"}
    cheats = [peer("unverified", **fast, verified=False), peer("wrong", **fast, status="wrong", reason="off")]
    table = readme.tables([*everything(), *cheats])
    assert cells(table, "attention", "1x4x4096x64", "fp32")[5] == "torch.compile"
    found = [*everything(), peer("honest", **fast)]
    best = cells(readme.tables(found), "attention", "1x4x4096x64", "fp32")
    assert best[5:8] == ["honest", "1.00", "0.10×"]


def test_our_fastest_backend_is_named():
    more = {
        "case": "4096x3072 none",
        "flops": 3e8,
        "bytes": 3e8,
        "share_of_roofline": 0.9,
        "backend": "triton",
    }
    table = readme.tables([*everything(), row(**more, seconds=0.03)])
    assert cells(table, "gelu", "4096x3072 none", "fp32")[3:5] == ["30.0 triton", "90 %"]
    assert cells(table, "gelu", "4096x3072 none", "bf16")[3] == "40.0 cpp"


def test_wrong_result_of_ours_has_no_ratio():
    found = spoilt("off by | <b>", op="add_layer_norm", dtype="bf16")
    table = readme.tables(found)
    where = "add_layer_norm", "4096x768"
    assert cells(table, *where, "bf16")[3:8] == ["wrong", "—", "torch.compile", "48.0", "—"]
    assert cells(table, *where, "fp32")[7].startswith("1.20×")
    assert table.endswith("\n\nWrong: fastgpt cpp, add_layer_norm 4096x768 bf16: off by &#124; &lt;b&gt;")
    assert "wrong: off by | &lt;b&gt;" in page.html([found])
    assert "add_layer_norm fp32" in (shown := words("speedup", found)) and "add_layer_norm bf16" not in shown


def test_headline_is_the_largest_correct_case():
    table = readme.tables(spoilt("off", case="1x4x4096x64"))
    assert cells(table, "attention", "16x6x256x64", "fp32")[3] == "40.0"
    assert "Wrong: fastgpt cpp, attention 1x4x4096x64 fp32: off" in table


@pytest.mark.parametrize(("ops", "root", "plot"), [(False, "", "training"), (True, "../", "speedup")])
def test_pages_round_trip(ops, root, plot, tmp_path):
    results, path = tmp_path / "results", tmp_path / "README.md"
    folder = results / "some cpu"
    records.save(folder / "results.json", everything())
    assert readme.write_plots(folder / "results.json") == [folder / f"{name}.svg" for name in readme.SHOWN]
    before, after = "# Title\n\n", "\n\n## Next\n"
    path.write_text(f"{before}{readme.BEGIN}\nold{readme.END}{after}")
    block = readme.block(results, ops=ops, root=root)
    assert readme.update(path, block)
    text = path.read_text()
    assert text == f"{before}{readme.BEGIN}\n{block}\n{readme.END}{after}"
    assert not readme.update(path, block)
    assert (
        "**Some CPU &lt;2 cores&gt;**: torch 2.13.0, commit 0123456789ab, 2 threads, malloc trimming" in text
    )
    assert ("| gelu | 4096x3072 none | bf16 |" in text) is ops
    assert ("| training step |" in text) is not ops
    assert re.findall(r'src="(.*?)"', text) == [f"{root}bench/results/some%20cpu/{plot}.svg"]
    assert text.count("Nothing is measured on a GPU yet.") == 1
    # A plot without data is deleted; other files stay.
    (folder / "mine.svg").touch()
    records.save(folder / "results.json", without("train"))
    readme.write_plots(folder / "results.json")
    assert {p.name for p in folder.iterdir()} == {"results.json", "mine.svg", "speedup.svg"}


def test_training_steps_are_compared_with_plain_and_compiled_pytorch():
    facts = row(
        op="accelerate",
        group="train",
        case="GPT2LMHeadModel 1x2x32x16x2x50257",
        dims={"L": 1, "H": 2, "C": 32, "T": 16, "B": 2, "V": 50257},
        dtype="bf16",
    )
    peers = {"unmodified": (0.2, 400), "torch.compile": (0.15, 200), "another": (0.01, 1)}
    found = [facts | {"peer": None, "backend": "cpp", "seconds": 0.1, "ratio": None, "peak_bytes": 100}]
    found += [
        facts | {"peer": name, "backend": None, "seconds": seconds, "ratio": 10 * seconds, "peak_bytes": size}
        for name, (seconds, size) in peers.items()
    ]
    rows = readme.steps_table(found).splitlines()
    step = "GPT2LMHeadModel, accelerated: 1 × 32, vocabulary 50,257, 2 × 16 tokens"
    assert rows[2:] == [f"| {step} | bf16 | 100 ms | 200 ms (2.00×) | 150 ms (1.50×) | 25 % |"]
    assert readme.steps_table(found[1:]) == ""
    uncompiled = [r for r in found if r["peer"] != "torch.compile"]
    assert rows[2].replace("150 ms (1.50×)", "—") in readme.steps_table(uncompiled)


def test_pages_tell_measurements_on_a_gpu_from_rehearsals(tmp_path):
    assert readme.block(tmp_path, ops=True, root="") == "Nothing is measured on a GPU yet."
    records.save(tmp_path / "b" / "results.json", everything(**GPU, rehearsal=True))
    assert "Nothing is measured on a GPU yet." in readme.block(tmp_path, ops=True, root="")
    records.save(tmp_path / "a" / "results.json", everything(**GPU | {"dirty": True}))
    block = readme.block(tmp_path, ops=True, root="")
    assert "Nothing is measured" not in block
    assert 0 < block.index("commit 0123456789ab with changes") < block.index("A rehearsal")  # a before b


@pytest.mark.parametrize("text", ["", readme.BEGIN, readme.END + readme.BEGIN])
def test_a_page_without_markers(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="Add both where the results belong"):
        readme.update(path, "text")
    assert path.read_text() == text


@pytest.mark.slow
def test_plots_are_the_same_in_another_process(tmp_path):
    source = tmp_path / "results.json"
    records.save(source, everything())
    code = (
        "import sys; from pathlib import Path; from bench.harness.records import load; from bench.report import plots\n"
        "for n in plots.PLOTS: print(plots.svg(n, load(Path(sys.argv[1]))), end='')"
    )
    env = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    command = [sys.executable, "-c", code, source]
    there = subprocess.run(command, check=True, cwd=ROOT, env=env, capture_output=True, text=True).stdout
    assert there == "".join(plots.svg(name, everything()) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_svg_or_nothing_without_data(name):
    text = plots.svg(name, everything())
    assert ET.fromstring(text).tag.endswith("svg")
    assert "<text" not in text and "dc:date" not in text and plots.digest(everything()) in text
    group = {"memory": "scaling", "training": "train"}.get(name, "ops")
    for found in (without(group), everything()[:1]):
        assert plots.svg(name, found) is None


def luminance(color):
    """Relative luminance, from 0 to 1 (WCAG 2)."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(color)
    ]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("color", [plots.TEXT, plots.OURS, plots.PEER, *plots.COLORS])
def test_colors_are_readable_on_light_and_dark_pages(color):
    for paper in ("#ffffff", "#0d1117"):
        low, high = sorted(map(luminance, (color, paper)))
        assert (high + 0.05) / (low + 0.05) > (3 if color in (plots.TEXT, plots.OURS) else 2.7)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_clipped_or_on_another(name, gpu):
    found = everything()
    if gpu:  # two backends, three dtypes, two similar ops, peers of equal speed, ratios far apart
        good = [r for r in found if r["seconds"]]
        found += [r | {"backend": "triton", "seconds": 1.07 * r["seconds"]} for r in good if not r["peer"]]
        found += [r | {"op": "bias_gelu"} for r in found if r["op"] == "gelu"]
        found += [r | {"peer": r["peer"] + " (max-autotune)"} for r in found if r["peer"] in PEERS]
        half = [r | {"dtype": "fp16"} for r in good if r["dtype"] == "bf16"]
        found += [r | {k: r[k] and 99 * r[k] for k in r if "ratio" in k} for r in half]
    boxes, (width, height) = drawn(name, found)
    for text, x0, y0, x1, y1 in boxes:
        assert min(x0, y0) >= -1 and x1 <= width + 1 and y1 <= height + 1, text
    for a, b in itertools.combinations(boxes, 2):
        apart = a[1] >= b[3] - 1 or b[1] >= a[3] - 1 or a[2] >= b[4] - 1 or b[2] >= a[4] - 1
        assert apart, (a, b)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "roofline"])
def test_only_verified_results_are_drawn(name):
    shown = words(name, everything())
    assert name == "speedup" or "fastgpt cpp" in shown
    assert any("torch.compile" in w for w in shown)
    assert not [w for w in shown if "peer>" in w or "Liger" in w]
    assert any("the next size failed" in w for w in shown) == (name == "memory")


def test_html_is_well_formed_and_escapes_text():
    text = page.html([everything(), everything(**GPU, rehearsal=True)])
    root = ET.fromstring(text.removeprefix("<!DOCTYPE html>"))
    assert not root.findall(".//script")
    assert [h.text for h in root.iter("h2")] == ["Some CPU <2 cores>", "NVIDIA H200"]
    assert len(root.findall(".//img")) == 2 * len(NAMES) and text.count("A rehearsal") == 1
    assert all(img.get("src").startswith("data:image/svg+xml;base64,") for img in root.iter("img"))
    rows = [["".join(cell.itertext()) for cell in line] for line in root.iter("tr")]
    bad = [line for line in rows if line[-1] == f"wrong: {SCRIPT}"]
    assert len(bad) == 2 * 2 * 2 * len(CASES) + 2 * 2  # runs, dtypes, directions; training steps
    assert ["attention", "fp32", "PyTorch", "peak bytes", "T^2.00", "T^1.00", "differs"] in rows
    assert ["attention", "fp32", "fastgpt cpp", "seconds", "T^2.00", "T^2.00", ""] in rows
    (copy,) = {line[-1] for line in rows if line[1:2] == ["a faster copy"]}
    assert copy == "20.0 GB/s"


def test_report_writes_html_on_demand(tmp_path, capsys):
    assert main(["report", "--html", str(tmp_path / "report.html")]) == 0
    assert "wrote" in capsys.readouterr().out
    assert "AMD EPYC" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("page", "ops", "root"), [("README.md", False, ""), ("docs/benchmarks.md", True, "../")]
)
def test_pages_match_the_results(page, ops, root):
    """The tables are generated from bench/results by `python -m bench report`."""
    text = (ROOT / page).read_text()
    block = text.partition(readme.BEGIN)[2].partition(readme.END)[0].strip()
    assert block == readme.block(ROOT / "bench" / "results", ops=ops, root=root)


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("*/results.json")), ids=str)
def test_committed_plots_match_the_results(path):
    """By the digest in each file: another version of matplotlib may draw a little differently."""
    found = records.load(path)
    names = {f"{name}.svg" for name in readme.SHOWN if plots.draw(name, found)}
    assert {p.name for p in path.parent.iterdir()} == {"results.json", *names}
    for name in names:
        text = (path.parent / name).read_text()
        assert plots.digest(found) in text, f"{name} is out of date. Run python -m bench report."
