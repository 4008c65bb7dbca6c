"""Benchmark results as tables and plots, and the README as their mirror."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import jsonschema
import pytest

from bench.harness import records
from bench.report import page, plots, sheet
from bench.report import write as report
from bench.report.headlines import digits, size, times
from tests.support.benching import (
    CASES,
    GPU,
    NAMES,
    PEERS,
    ROOT,
    everything,
    peer,
    row,
    spoilt,
    validate,
    without,
)


def cells(table, *start):
    """The cells of the one Markdown row that begins so."""
    lines = (line.strip("|").split("|") for line in table.splitlines() if line[:1] == "|")
    rows = [[cell.strip() for cell in line] for line in lines]
    (found,) = [r for r in rows if r[: len(start)] == list(start)]
    return found


def test_records_here_fit_the_schema():
    validate(everything())
    with pytest.raises(jsonschema.ValidationError):
        validate([*everything(), row(sweep="Q")])


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (digits, 0, "0"), (digits, 1234.5, "1230"), (digits, 0.99951, "1.00"),
        (digits, 12.345, "12.3"), (digits, 0.0012345, "0.00123"), (digits, 3.2e-7, "3.20e-07"),
        (digits, float("nan"), "nan"), (digits, float("inf"), "inf"), (times, 1.797, "1.80×"),
        (times, 31.44, "31.4×"), (size, 512, "512 B"), (size, 1.5 * 2**30, "1.50 GiB"),
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
    assert "wrong: off by | &lt;b&gt;" in page.html(found)
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


@pytest.mark.slow
def test_report_is_the_same_in_another_process(tmp_path):
    source = tmp_path / "results.json"
    records.save(source, everything())
    written = report.write_report(source, tmp_path / "here")
    kinds = [f"{mode}.{kind}" for mode in ("light", "dark") for kind in ("svg", "png")]
    assert [p.name for p in written] == [f"{n}-{kind}" for n in NAMES for kind in kinds] + ["report.html"]
    code = (
        "import sys; from pathlib import Path; from bench import report\n"
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
    assert left == {*NAMES, "mine.svg"} - {"train", "accelerate"}


@pytest.mark.parametrize("name", NAMES)
def test_svg_or_nothing_without_data(tmp_path, name):
    light, dark = (plots.svg(name, everything(), sheet.THEMES[mode]) for mode in ("light", "dark"))
    assert ET.fromstring(light).tag.endswith("svg")
    assert "<text" not in light and "dc:date" not in light
    assert "#ffffff" in light and "#0d1117" in dark and "#ffffff" not in dark
    group = {"memory": "scaling", "scaling": "scaling", "train": "train", "accelerate": "train"}.get(
        name, "ops"
    )
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
        assert plots.svg(name, found, sheet.THEMES["light"])
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


def test_readme_says_what_the_results_say():
    """The README's tables are those of bench/results; `python -m bench report` brings them up to date."""
    text = (ROOT / "README.md").read_text()
    block = text.partition(report.BEGIN)[2].partition(report.END)[0].strip()
    assert block == report.readme_block(ROOT / "bench" / "results")
    for picture in re.findall(r'(?:src|srcset)="(.*?)"', block):
        assert (ROOT / picture).exists(), picture


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("*/results.json")), ids=str)
def test_plots_are_those_of_the_results(path):
    """By the digest in each: another version of matplotlib may draw a little differently."""
    shown = [p for p in (path.parent / "plots").glob("*.svg")]
    found = records.load(path)
    drawn = {name for name in NAMES if plots.svg(name, found, sheet.THEMES["light"])}
    assert {plot.stem for plot in shown} == {f"{name}-{mode}" for name in drawn for mode in sheet.THEMES}
    for plot in shown:
        assert plots.digest(found) in plot.read_text(), f"{plot.name} is stale: python -m bench report"
