"""report.html, plots/*.png and the table on the terminal, made of a sample evaluation with real images of digits."""

import base64
import copy
import html.parser
import io
import itertools
import json
import math
import re
import struct
import zlib

import pytest

from timm_lowrank.errors import EvaluationError
from timm_lowrank.evaluation.intervals import wilson

pytest.importorskip("matplotlib")
datasets = pytest.importorskip("sklearn.datasets")
import numpy as np  # noqa: E402

from timm_lowrank import drawing  # noqa: E402
from timm_lowrank.report import (  # noqa: E402
    text_table,
    wording,
    write_report,
)
from timm_lowrank.report.content import headline  # noqa: E402
from timm_lowrank.report.plots import network_place, panels_of, write_plots  # noqa: E402

VOID = {"meta", "img", "br", "link", "input", "hr"}


def share(hits, of=360):
    low, high = wilson(hits, of)
    return {"value": hits / of, "low": low, "high": high, "hits": hits, "of": of}


def figure(key, group, label, values, unit="share", better="higher", **protocol):
    protocol = {**protocol, "images": 360, "seed": 0}
    return {"key": key, "group": group, "label": label, "unit": unit, "better": better, "protocol": protocol,
            "values": values}  # fmt: skip


def sample_figures(one, two):
    pgd = {"attack": "PGD, L_inf", "step_size": "2/255", "random_start": True, "restarts": 1}
    white = [
        figure(f"pgd-madry-{steps}-{radius}", "White box", f"PGD-{steps}, {radius}/255",
               {one: share(first), two: share(second)}, **pgd, eps=f"{radius}/255", steps=steps)
        for steps, radius, first, second in (
            (7, 8, 203, 171), (20, 2, 330, 322), (20, 8, 148, 137), (20, 16, 31, 12), (20, 20, 9, 0)
        )
    ]  # fmt: skip
    auto = {"attack": "AutoAttack, L_inf, standard", "restarts": 1}
    return [
        figure("clean", "Clean", "Clean images", {one: share(346), two: share(351)}),
        *white,
        figure("ill", "White box", "Iter-LL-FGSM, target hit", {one: share(88), two: share(140)}, better="lower",
               attack="Iter-LL-FGSM, L_inf", eps="8/255", steps=10, step_size="1/255", stop_at_success=False),
        figure("autoattack-linf-2", "AutoAttack", "AutoAttack, 2/255", {one: share(301), two: share(284)}, **auto,
               eps="2/255"),
        figure("autoattack-linf-8", "AutoAttack", "AutoAttack, 8/255", {one: share(4), two: share(0)}, **auto,
               eps="8/255"),
        figure("autoattack-l2", "AutoAttack", "AutoAttack L2, 0.5", {one: share(97)}, attack="AutoAttack, L2",
               eps="0.5", restarts=1),
        figure("transfer-pgd-20-8", "Black box", "PGD-20, 8/255, from the other",
               {one: share(251, 340), two: share(233, 340)}, **pgd, eps="8/255", steps=20, source="other network"),
        *[figure(f"noise-{p}", "Random pixel noise", f"Noise on {p} % of the pixels",
                 {one: share(first), two: share(second)}, attack="pixel noise", probability=p / 100, sigma="128/255")
          for p, first, second in ((40, 240, 201), (80, 120, 118), (100, 88, 70))],
        figure("rho", "Perturbation", "DeepFool, median rho", {
            one: {"value": 0.2113, "low": 0.2011, "high": 0.2291, "of": 346},
            two: {"value": 0.1652, "low": 0.1602, "high": 0.1711, "of": 351}},
            unit="number", attack="DeepFool, L2", steps=50, overshoot=0.02),
        figure("gradient", "Perturbation", "Median norm of the gradient", {
            one: {"value": 3.2e-7, "of": 360}, two: {"value": 0.0419, "of": 360}}, unit="number", better=None),
        figure("compression", "Compression", "Parameters replaced", {one: {"value": 1638400}, two: {"value": 1638400}},
               unit="count", better="lower", directions=10),
    ]  # fmt: skip


def sample_curves(one, two):
    draws = np.random.default_rng(0)
    steps = list(range(11))
    lines = [
        {"network": network, "name": name, "x": steps, "y": [0.97 * math.exp(-rate * step) for step in steps]}
        for network, slow in ((one, 0.12), (two, 0.2))
        for name, rate in (("instantaneous", slow), ("cumulative", 1.3 * slow))
    ]  # fmt: skip
    edges = np.linspace(0, 1, 21)
    cushions = [
        {"network": network, "name": layer, "edges": edges.tolist(),
         "counts": np.histogram(draws.beta(a, 6, 360), edges)[0].tolist()}
        for layer in ("layer3.0.conv1", "pre_logits") for network, a in ((one, 4), (two, 2))
    ]  # fmt: skip
    data = datasets.load_digits()
    planes = []
    for place, network in enumerate((one, two)):
        rows = slice(360 * place, 360 * place + 360)
        centred = data.data[rows] - data.data[rows].mean(0)
        points = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
        planes.append({"network": network, "name": "pre_logits", "x": points[:, 0].tolist(),
                       "y": points[:, 1].tolist(), "label": data.target[rows].tolist()})  # fmt: skip
    radii = [{"network": network, "name": "", "x": [2, 4, 8, 16], "y": [0.9, 0.7, 0.41 + shift, 0.05]}
             for network, shift in ((one, 0), (two, -0.03))]  # fmt: skip
    return [
        {"key": "steps-ifgsm", "group": "White box", "title": "Accuracy over attack steps", "kind": "line",
         "x_label": "steps", "y_label": "accuracy", "x_log": False, "y_share": True,
         "protocol": {"attack": "Iter-FGSM, L_inf", "step_size": "1/255", "images": 360}, "lines": lines},
        {"key": "radii", "group": "White box", "title": "Accuracy by radius", "kind": "line",
         "x_label": "radius, 1/255", "y_label": "accuracy", "x_log": True, "y_share": True,
         "protocol": {"attack": "PGD, L_inf", "steps": 20}, "lines": radii},
        {"key": "cushion", "group": "Representations", "title": "Layer cushion", "kind": "histogram",
         "x_label": "cushion", "y_label": "share of images", "x_log": False, "y_share": True, "protocol": {},
         "lines": cushions},
        {"key": "plane", "group": "Representations", "title": "First two principal components", "kind": "scatter",
         "x_label": "first", "y_label": "second", "x_log": False, "y_share": False, "protocol": {"images": 360},
         "lines": planes},
    ]  # fmt: skip


def sample_strip(networks, count=6):
    data = datasets.load_digits()
    original = np.rint(data.images[:count] * 255 / 16).astype(np.uint8)[:, None]
    noise = np.random.default_rng(1).integers(-40, 41, original.shape)
    rows = []
    for shift, network in enumerate(networks):
        adversarial = np.clip(original.astype(int) + noise + 5 * shift, 0, 255).astype(np.uint8)
        truth, wrong = data.target[:count].tolist(), ((data.target[:count] + 3 + shift) % 10).tolist()
        for name, images, labels, notes in (
            ("original", original, truth, []),
            ("adversarial", adversarial, wrong, [f"rho {0.05 + 0.01 * place:.2f}" for place in range(count)]),
            ("difference x10", np.clip(128 + 3 * noise, 0, 255).astype(np.uint8), [""] * count, []),
        ):
            rows.append({"network": network, "name": name, "pixels": base64.b64encode(images.tobytes()).decode(),
                         "captions": [str(label) for label in labels], "notes": notes})  # fmt: skip
    return {"key": "deepfool", "title": "DeepFool", "shape": list(original.shape), "rows": rows,
            "protocol": {"attack": "DeepFool, L2", "steps": 50, "overshoot": 0.02}}  # fmt: skip


def sample_verdicts(one, two):
    def check(name, passed, value, limit, says):
        return {"name": name, "passed": passed, "value": value, "limit": limit, "says": says}

    failed = "One of eight checks failed: AutoAttack finds far more than PGD."
    return {
        one: {"verdict": "suspect", "summary": failed, "checks": [
            check("Black box is no stronger", True, -0.31, 0.02, "Transferred PGD leaves 73.8 %, PGD 41.1 %."),
            check("AutoAttack close to PGD", False, 0.4, 0.1, "AutoAttack leaves 1.1 % where PGD-20 leaves 41.1 %."),
            check("Gradients are there", True, 3.2e-7, 0, "No image has a gradient of zero; the smallest is 3.2e-07."),
            check("Smooth loss", None, None, None, "Not checked: fewer than 100 images."),
        ]},
        two: {"verdict": "no sign of gradient masking", "summary": "All eight checks passed.", "checks": [
            check("Black box is no stronger", True, -0.27, 0.02, "Transferred PGD leaves 68.5 %, PGD 38.1 %."),
        ]},
    }  # fmt: skip


def sample(one="2-LR", two="plain"):
    """An evaluation as `recipes/evaluate.py` writes it; the numbers are made up."""
    networks = [
        {"title": one, "path": "runs/digits", "model": "resnet10_cifar", "parameters": 1234567,
         "branches": {"layer3": 20, "pre_logits": 10}, "weights": "5f" * 32},
        {"title": two, "path": "runs/digits/twin", "model": "resnet10_cifar", "parameters": 1234567, "branches": {},
         "weights": "a0" * 32},
    ]  # fmt: skip
    return {
        "format": 1, "suite": "quick", "seed": 0, "chunk": 100, "device": "cpu", "seconds": 93.1,
        "created": "2026-11-22T17:00:00+00:00", "confidence": 0.95,
        "versions": {"python": "3.11.7", "torch": "2.15.0", "timm": "1.0.31", "timm_lowrank": "0.1.0",
                     "pyautoattack": "0.2.0"},
        "data": {"source": "digits", "split": "test", "images": 360, "image_size": [1, 8, 8],
                 "class_names": [str(digit) for digit in range(10)], "fingerprint": "9f3c2b"},
        "networks": networks, "figures": sample_figures(one, two), "curves": sample_curves(one, two),
        "strips": [sample_strip((one, two))], "verdicts": sample_verdicts(one, two),
        "warnings": ["All AutoAttack figures on digits use 9 target classes."],
    }  # fmt: skip


def three():
    """Three networks with long titles, 100 classes, and what else makes a layout hard."""
    one, two = "low rank, two branches (layer3: 500, pre_logits: 100)", "plain"
    evaluation = sample(one, two)
    third = '1-LR <b>& "friends"</b>'
    evaluation["networks"].append({**evaluation["networks"][1], "title": third, "path": "runs/other"})
    for place, figure in enumerate(evaluation["figures"]):
        if figure["unit"] == "share" and place % 3:
            figure["values"][third] = share(7 * place)
    evaluation["figures"][0]["values"][two]["value"] = math.nan
    evaluation["figures"][1]["values"][third] = {"value": None}
    evaluation["figures"][2]["values"][third] = {**share(1, 50000)}
    evaluation["data"]["class_names"] = [f"class <{place}>" for place in range(100)]
    draws = np.random.default_rng(2)
    points = {"x": draws.normal(size=300).tolist(), "y": draws.normal(size=300).tolist(), "label": [*range(100)] * 3}
    evaluation["curves"][3]["lines"].append({"network": third, "name": "pre_logits", **points})
    strip = sample_strip((one, two, third), 12)
    strip["rows"] = [{**row, "captions": ["an automobile & a <truck>"] * 12} for row in strip["rows"]]
    evaluation["strips"] = [strip]
    return evaluation


class Page(html.parser.HTMLParser):
    """What a browser would make of a page, and whether every element is closed where it must be."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.words, self.cells = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join("".join(self.words).replace("\u202f", " ").split())

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), f"an attribute of <{tag}> is given twice"
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("tr", "p", "li", "dt", "h1", "h2", "h3"):
            self.words.append("\n")
        if tag == "tr":
            self.cells.append("")

    def handle_startendtag(self, tag, attributes):
        assert "svg" in self.open or tag in VOID
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        if "tr" in self.open:
            self.cells[-1] += data.replace("\u202f", " ") + "|"
        self.words.append(data + " ")

    def named(self, *tags):
        return [(tag, attributes) for tag, attributes in self.elements if tag in tags]


def rendered(evaluation, folder):
    return Page(write_report(evaluation, folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return rendered(sample(), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def hard_page(tmp_path_factory):
    return rendered(three(), tmp_path_factory.mktemp("report"))


def bare(**changes):
    """A small evaluation without pictures."""
    evaluation = sample()
    return {**evaluation, "figures": evaluation["figures"][:3], "curves": [], "strips": [], **changes}


def row(page, label):
    """The cells of the last row that begins with a label: the one in the full tables."""
    return [cells for cells in page.cells if cells.startswith(label)][-1]


def decoded_png(data):
    """Width, height and the number of different bytes in the pixels, with every checksum compared."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, header, packed = 8, None, b""
    while place < len(data):
        size, kind = struct.unpack(">I4s", data[place : place + 8])
        body = data[place + 8 : place + 8 + size]
        assert struct.unpack(">I", data[place + 8 + size : place + 12 + size])[0] == zlib.crc32(kind + body)
        header = struct.unpack(">II", body[:8]) if kind == b"IHDR" else header
        packed += body if kind == b"IDAT" else b""
        place += 12 + size
    return *header, len(set(zlib.decompress(packed)))


def test_the_page_is_one_sound_file_that_needs_nothing_else(page, hard_page):
    for one in (page, hard_page):
        assert not one.named("script", "link", "iframe", "object", "base", "form")
        assert len(one.named("style")) == 1
        links = [attributes[key] for _, attributes in one.elements for key in ("src", "href") if key in attributes]
        ids = [attributes["id"] for _, attributes in one.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
        assert {re.split(r"[,;]", link)[0] for link in links if not link.startswith("#")} == {"data:image/png"}
        assert not any(re.search(r"url\((?!#)|@import|https?:", str(value)) for _, attributes in one.elements
                       for value in attributes.values())  # fmt: skip


def test_the_style_asks_for_nothing_from_outside(tmp_path):
    text = write_report(bare(), tmp_path).read_text(encoding="utf-8")
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)[1]
    assert not re.search(r"url\(|@import|https?:|@font-face", style)
    assert all(rule in style for rule in ("@media print", "prefers-color-scheme: dark", "max-width: 44rem"))


def luminance(colour):
    """Relative luminance as WCAG 2 defines it."""
    shares = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_letters_and_marks_stand_out_in_light_and_dark(tmp_path):
    text = write_report(bare(), tmp_path).read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in text.split(":root {")[1:3])
    for colours in (light, dark):
        marks = [f"network-{place}" for place in range(len(drawing.NETWORKS))]
        for name, least in [*((name, 4.5) for name in ("ink", "soft", "link", "amber", "red")),
                            *((name, 3) for name in marks)]:  # fmt: skip
            low, high = sorted((luminance(colours[name]), luminance(colours["paper"])))
            assert (high + 0.05) / (low + 0.05) >= least, name


def test_the_page_can_be_read_without_seeing_it(page, hard_page):
    for one in (page, hard_page):
        levels = [int(tag[1]) for tag, _ in one.named("h1", "h2", "h3", "h4")]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
        assert all(attributes.get("scope") in ("col", "row") for _, attributes in one.named("th"))
        assert all(attributes.get("alt") for _, attributes in one.named("img"))
        assert all("aria-label" in attributes or "aria-hidden" in attributes for _, attributes in one.named("svg"))
        assert one.elements[0] == ("html", {"lang": "en"})
        assert len(one.named("caption")) == len(one.named("table"))


def test_every_figure_stands_there_with_its_interval_and_its_counts(page):
    cells = row(page, "PGD-20, 8/255|PGD, L∞ · radius 8/255 · 20 steps of 2/255 · random start · 1 restart")
    low, high = wilson(148, 360)
    for text in (
        "41.1 %",
        f"{100 * low:.1f} {wording.DASH} {100 * high:.1f}",
        "148 of 360",
        "38.1 %",
        "137 of 360",
        "≈|+3.1",
    ):
        assert text in cells
    assert "≠|+8.9" in row(page, "PGD-7, 8/255")
    assert "lower is better" in row(page, "Iter-LL-FGSM, target hit")
    assert "higher is better" not in page.text
    assert "not measured" in row(page, "AutoAttack L2, 0.5")
    assert f"0.211|0.201 {wording.DASH} 0.229|346 images" in row(page, "DeepFool, median rho")
    assert f"3.2 {wording.TIMES} 10⁻⁷" in row(page, "Median norm of the gradient")
    assert "1,638,400" in row(page, "Parameters replaced")
    for one in sample()["figures"]:
        assert row(page, one["label"])
        assert one["group"] in page.text


def test_the_first_screen_says_what_matters(page):
    summary = page.text[: page.text.index("How it was measured")]
    for text in (
        "digits, test split", "360 images", "seed 0", "22 November 2026", "2-LR : suspected gradient masking",
        "plain : no sign of gradient masking", "One of eight checks failed: AutoAttack finds far more than PGD.",
        "Recognises 96.1 % of the images as they are, 41.1 % under PGD-20 (8/255) and 1.1 % under AutoAttack (8/255).",
        "Accuracy of 2-LR under PGD is no evidence of robustness", "There is one warning below",
    ):  # fmt: skip
        assert text in summary
    assert "AutoAttack was not measured" not in page.text


def test_pgd_without_autoattack_is_called_an_upper_bound(tmp_path):
    page = rendered(bare(), tmp_path)
    assert "AutoAttack was not measured. What is left after PGD is an upper bound" in page.text


def test_the_evidence_is_told_in_words(page):
    assert "✕| failed|AutoAttack leaves 1.1 % where PGD-20 leaves 41.1 %.|Value|0.4|Limit|0.1|" in row(
        page, "AutoAttack close to PGD"
    )
    assert f"{wording.DASH}| not checked|" in row(page, "Smooth loss")
    assert "✓| passed|" in row(page, "Gradients are there")


def test_how_it_was_measured(page):
    for text in (
        "accelerate launch recipes/evaluate.py runs/digits --against runs/digits/twin --suite quick --limit 360",
        "torch 2.15.0", "in 93 seconds on cpu", "22 November 2026, 17:00 UTC", "100 images at a time", "9f3c2b",
        "layer3 (target rank 20), pre_logits (target rank 10)", "1,234,567 parameters", "95 % confidence",
        "All AutoAttack figures on digits use 9 target classes.",
    ):  # fmt: skip
        assert text in page.text


def test_images_are_shown_pixel_by_pixel(page):
    images = [attributes for _, attributes in page.named("img")]
    assert len(images) == 36
    assert images[6]["alt"] == "adversarial, image 1 of 6; 3; rho 0.05"
    width, height, shades = decoded_png(base64.b64decode(images[0]["src"].partition(",")[2]))
    assert (width, height) == (96, 96)  # twelve for each pixel, so that paper shows squares
    assert shades > 8
    image = pytest.importorskip("PIL.Image")
    shown = np.asarray(image.open(io.BytesIO(base64.b64decode(images[1]["src"].partition(",")[2]))))
    pixels = np.rint(datasets.load_digits().images[1] * 255 / 16).astype(np.uint8)
    np.testing.assert_array_equal(shown, pixels.repeat(12, axis=0).repeat(12, axis=1))
    assert (images[1]["width"], images[1]["height"]) == ("8", "8")


def test_colour_images_keep_their_channels(tmp_path):
    pixels = np.random.default_rng(3).integers(0, 256, (1, 3, 4, 5), dtype=np.uint8)
    strip = {"key": "s", "title": "S", "shape": [1, 3, 4, 5], "rows": [
        {"network": "plain", "name": "original", "captions": [""],
         "pixels": base64.b64encode(pixels.tobytes()).decode()}
    ]}  # fmt: skip
    url = rendered(bare(strips=[strip]), tmp_path).named("img")[0][1]["src"]
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    shown = np.asarray(image)
    assert shown.shape == (4 * 19, 5 * 19, 3)
    np.testing.assert_array_equal(shown[::19, ::19], pixels[0].transpose(1, 2, 0))
    np.testing.assert_array_equal(shown[18::19, 18::19], pixels[0].transpose(1, 2, 0))


def test_plots_in_the_page_take_its_colours_and_say_what_they_show(page):
    plots = [attributes for _, attributes in page.named("svg") if attributes.get("class") == "plot"]
    assert len(plots) == 1 + 1 + 2 + 2  # lines, radii, a histogram for each layer, a cloud for each network
    assert "2-LR instantaneous from 97.0 % at 0 to 29.2 % at 10" in plots[0]["aria-label"].replace(wording.THIN, " ")
    styles = " ".join(attributes.get("style", "") for _, attributes in page.elements)
    for role in ("--ink", "--grid", "--axis", "--network-0", "--network-1"):
        assert f"var({role})" in styles
    for colour in (drawing.INK, drawing.GRID, drawing.AXIS, *drawing.NETWORKS):
        assert colour not in styles
    assert {"100 %", "steps", "2-LR, instantaneous", "pre_logits"} <= {word.strip() for word in page.words}


def test_names_are_escaped_and_long_ones_do_not_break_anything(hard_page):
    assert not hard_page.named("truck", "friends")
    assert '1-LR <b>& "friends"</b>' in hard_page.text
    assert "an automobile & a <truck>" in hard_page.text
    assert "low rank, two branches (layer3: 500, pre_logits: 100), plain and 1-LR" in hard_page.text
    assert "0.002 %" in row(hard_page, "PGD-20, 2/255")
    assert "100: class <0>" in hard_page.text
    assert "class <99>" in hard_page.text
    assert "colours are classes, and repeat" in hard_page.text


def test_what_is_not_a_number_is_called_so_and_warned_of(hard_page):
    assert "not a number" in row(hard_page, "Clean images")
    assert "Clean images of plain is not a number" in hard_page.text
    assert "nan" not in hard_page.text.casefold().replace("instantaneous", "")
    assert "NaN%" not in "".join(str(attributes) for _, attributes in hard_page.elements)


def test_one_network_and_nothing_measured(tmp_path):
    evaluation = bare(figures=[], verdicts={}, warnings=[])
    evaluation["networks"] = evaluation["networks"][1:]
    page = rendered(evaluation, tmp_path)
    for text in ("No figures were measured.", "No curves were measured.", "No images were kept.", "None.",
                 "plain : gradient masking was not looked for"):  # fmt: skip
        assert text in page.text
    assert not page.named("table")
    assert write_plots(evaluation, tmp_path) == []


def test_empty_parts_are_left_out(tmp_path):
    evaluation = bare()
    evaluation["figures"][1]["values"] = {}
    evaluation["curves"] = [{**sample()["curves"][0], "lines": []}]
    evaluation["strips"] = [{**sample_strip(["plain"]), "rows": []}]
    evaluation["verdicts"]["plain"]["checks"] = []
    page = rendered(evaluation, tmp_path)
    assert "PGD-7, 8/255" not in page.text
    assert "Nothing was measured." in page.text
    assert "No images were kept." in page.text
    assert "No check was made." in page.text
    assert write_plots(evaluation, tmp_path) == []


def test_the_same_content_gives_the_same_bytes(tmp_path):
    evaluation = sample()
    evaluation["curves"] = [evaluation["curves"][0], evaluation["curves"][3]]
    before = copy.deepcopy(evaluation)
    first = write_report(evaluation, tmp_path / "a").read_bytes()
    second = write_report(json.loads(json.dumps(evaluation)), tmp_path / "b").read_bytes()
    assert first == second
    assert evaluation == before


def test_plots_are_written_and_not_blank(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    paths = write_plots(sample(), tmp_path / "plots")
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "plots/steps-ifgsm.png", "plots/radii.png", "plots/cushion.png", "plots/plane.png"
    ]  # fmt: skip
    for path in paths:
        width, height, values = decoded_png(path.read_bytes())
        assert width > 500
        assert height > 400
        assert values > 50
    assert dict(matplotlib.rcParams) == before


def test_a_key_cannot_lead_out_of_the_folder(tmp_path):
    evaluation = bare(curves=[{**sample()["curves"][1], "key": "../../up and away"}])
    (path,) = write_plots(evaluation, tmp_path / "run")
    assert path.parent == tmp_path / "run"
    assert path.exists()


def test_curves_with_holes_are_drawn(tmp_path):
    line = {"network": "plain", "name": "a", "x": [0, 1, 2], "y": [None, 0.5, math.nan]}
    curve = {**sample()["curves"][0], "lines": [line], "x_log": True}
    del curve["protocol"]
    page = rendered(bare(curves=[curve]), tmp_path)
    assert "plain a from not a number at 0 to not a number at 2" in str(page.elements)
    assert write_plots(bare(curves=[curve]), tmp_path)


def test_clouds_without_classes_can_be_compared(tmp_path):
    curve = copy.deepcopy(sample()["curves"][3])
    assert "colours are classes" in rendered(bare(curves=[curve]), tmp_path).text
    for line in curve["lines"]:
        line.update(label=[0] * len(line["x"]), name=line["network"])
    one, two = panels_of(curve, sample())
    assert (one.title, two.title) == ("2-LR", "plain")
    assert one.limits == two.limits
    for place, column in enumerate(("x", "y")):
        values = [value for line in curve["lines"] for value in line[column]]
        assert one.limits[place][0] < min(values)
        assert one.limits[place][1] > max(values)
    assert "colours are classes" not in rendered(bare(curves=[curve]), tmp_path).text


@pytest.mark.parametrize(("images", "wide", "narrow"), [(1, 1, 1), (6, 6, 6), (8, 8, 4), (10, 5, 5), (12, 6, 6)])
def test_rows_of_images_are_of_one_length(tmp_path, images, wide, narrow):
    page = rendered(bare(strips=[sample_strip(["plain"], images)]), tmp_path)
    styles = [attributes["style"] for _, attributes in page.named("figure")]
    assert styles == [f"--wide: {wide}; --narrow: {narrow}"]


def test_plain_is_grey_wherever_it_stands():
    colours = [drawing.NETWORKS[network_place(title, ["a", "plain", "b"])] for title in ("a", "plain", "b")]
    assert colours == [drawing.LOWRANK, drawing.PLAIN, drawing.NETWORKS[2]]
    assert drawing.NETWORKS[network_place("b", ["plain", "b"])] == drawing.LOWRANK
    assert [network_place(title, ["a", "b", "c"]) for title in "abc"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e.update(format=2), "format 1, not 2"),
        (lambda e: e.pop("format"), "format 1, not None"),
        (lambda e: [e.pop("seed"), e.pop("curves")], "evaluation.json lacks seed, curves"),
        (lambda e: e["figures"][0].pop("unit"), r"figures\[0\] lacks unit"),
        (lambda e: e["figures"][0].update(unit="apples"), "unit 'apples'"),
        (lambda e: e["figures"][0]["values"].update(other=share(1)), "the network 'other', which is not among '2-LR'"),
        (lambda e: e["figures"][0]["values"].update(plain={"value": "much"}), "no number as the value of 'plain'"),
        (lambda e: e["networks"].append(e["networks"][0]), "each another one"),
        (lambda e: e["curves"][0].update(kind="pie"), "kind 'pie', not one of line, scatter, histogram"),
        (lambda e: e["curves"][0]["lines"][0]["y"].pop(), "'steps-ifgsm' needs x, y of fitting lengths"),
        (lambda e: e["strips"][0].update(shape=[6, 3, 8, 8]), "does not hold images of the shape"),
        (lambda e: e["strips"][0]["rows"][0].update(pixels="?"), "does not hold images of the shape"),
        (lambda e: e["strips"][0]["rows"][0]["captions"].pop(), "a caption for each of its 6 images"),
        (lambda e: e["verdicts"]["plain"].update(verdict="robust"), "'robust', not one of no sign"),
        (lambda e: e["verdicts"]["plain"]["checks"][0].pop("passed"), "check 0 lacks passed"),
    ],
)
def test_content_that_cannot_be_read_is_one_clear_error(tmp_path, change, words):
    evaluation = copy.deepcopy(sample())
    change(evaluation)
    for function in (write_report, write_plots):
        with pytest.raises(EvaluationError, match=words):
            function(evaluation, tmp_path)
    with pytest.raises(EvaluationError, match=words):
        text_table(evaluation)
    assert not list(tmp_path.iterdir())


def test_all_problems_come_in_one_message():
    evaluation = bare()
    for one in evaluation["figures"]:
        del one["label"]
    with pytest.raises(EvaluationError, match=r"figures\[0\] lacks label; figures\[1\].*figures\[2\]"):
        text_table(evaluation)


def test_the_headline_is_the_strongest_common_attack():
    def chosen(*figures):
        return {name: one and one["key"] for name, one in headline({"figures": figures}).items()}

    everything = sample()["figures"]
    assert chosen(*everything) == {"clean": "clean", "PGD": "pgd-madry-20-8", "AutoAttack": "autoattack-linf-8"}
    assert chosen(*[one for one in everything if "8/255" not in one["label"]])["PGD"] == "pgd-madry-20-2"
    assert chosen(*[one for one in everything if "PGD" not in one["label"]])["PGD"] is None
    alone = copy.deepcopy(everything)
    for one in alone:
        if one["key"] == "pgd-madry-20-8":
            del one["values"]["plain"]
    assert chosen(*alone)["PGD"] == "pgd-madry-7-8"  # the one that both networks have
    whole = next(one for one in everything if one["key"] == "autoattack-linf-8")
    part = {**whole, "key": "autoattack-linf-8-square", "label": "broken by square", "better": None}
    assert chosen(part, *everything)["AutoAttack"] == "autoattack-linf-8"
    assert chosen() == {"clean": None, "PGD": None, "AutoAttack": None}


def test_differences_follow_newcombe():
    """His example (1998, Table II, row a, method 10): 56/70 - 48/80 = 0.20, from 0.0524 to 0.3339."""
    gap = wording.difference(share(56, 70), share(48, 80))
    assert gap.value == pytest.approx(0.2)
    assert (gap.low, gap.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert gap.distinguishable
    mirrored = wording.difference(share(48, 80), share(56, 70))
    assert (mirrored.low, mirrored.high) == pytest.approx((-gap.high, -gap.low))
    assert wording.difference(share(10, 10), share(0, 10)).high == pytest.approx(1)
    # intervals of the two overlap, and yet their difference is beyond chance
    one, two = share(60, 100), share(45, 100)
    assert one["low"] < two["high"]
    assert wording.difference(one, two).distinguishable
    assert wording.difference({"value": 1.0}, {"value": 0.5}).distinguishable is None
    assert wording.difference(None, one) is None
    assert wording.difference({"value": math.nan}, one) is None


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.411111, "share", "41.1 %"), (0, "share", "0.0 %"), (1, "share", "100.0 %"), (0.0004, "share", "0.04 %"),
        (0.9997, "share", "99.97 %"), (1e-9, "share", "1.0 \u00d7 10⁻⁷ %"), (1 - 1e-9, "share", "99.9999999 %"),
        (math.nan, "share", "not a number"), (math.inf, "number", "infinite"), (None, "number", "not a number"),
        (0.0, "number", "0"), (20.0, "number", "20"), (1234567, "count", "1,234,567"), (0.16, "number", "0.160"),
        (-0.05, "number", "-0.0500"), (12345.6, "number", "12,346"), (2.5e-8, "number", "2.5 \u00d7 10⁻⁸"),
    ],
)  # fmt: skip
def test_numbers_keep_their_leading_digits(value, unit, text):
    assert wording.plain(wording.figure_text(value, unit)) == text


def test_what_all_rows_share_is_said_once():
    protocols = [{"attack": "PGD", "eps": "8/255", "steps": steps, "restarts": 2, "norm": None} for steps in (7, 20)]
    shared = wording.shared_protocol(protocols)
    assert wording.protocol_phrases(shared) == ["PGD", "radius 8/255", "2 restarts"]
    assert wording.protocol_phrases(protocols[1], list(shared)) == ["20 steps"]
    assert wording.shared_protocol(protocols[:1]) == {}
    others = {"attack": "FGSM, L_inf", "random_start": False, "images": 1, "layers": ["a", "b"]}
    assert wording.protocol_phrases(others) == ["FGSM, L∞", "no random start", "1 image", "layers a, b"]


@pytest.mark.parametrize("change", [sample, three, lambda: bare(figures=[], verdicts={})])
def test_the_table_for_a_terminal_fits(change):
    evaluation = change()
    lines = text_table(evaluation).splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert all(any(line.startswith(one["label"][:20]) for line in lines) for one in evaluation["figures"])


def test_the_table_for_a_terminal_has_the_figures():
    table = text_table(sample())
    assert re.search(r"PGD-20, 8/255 +41\.1 % \(36\.1-46\.3\) +38\.1 % \(33\.2-43\.2\) +\+3\.1$", table, re.MULTILINE)
    assert re.search(r"PGD-7, 8/255 .*\+8\.9\*$", table, re.MULTILINE)
    assert re.search(r"AutoAttack L2, 0\.5 +26\.9 %.* -$", table, re.MULTILINE)
    assert table.splitlines()[0].startswith("2-LR: suspect. One of eight checks failed")
    assert "* the 95 % interval of the difference leaves out zero" in table


def test_more_networks_than_fit_get_tables_of_their_own():
    evaluation = bare(verdicts={})
    evaluation["networks"] = [{**evaluation["networks"][0], "title": f"network {place}"} for place in range(6)]
    for one in evaluation["figures"]:
        one["values"] = {f"network {place}": share(10 * place) for place in range(6)}
    lines = text_table(evaluation).splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert sum(line.startswith("Clean images") for line in lines) == 2
    assert "network 5" in lines[-1 - 2]
