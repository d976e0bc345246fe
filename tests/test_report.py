"""report.html, plots/*.png and the table on the terminal, made of an evaluation with made-up numbers."""

import base64
import dataclasses
import html.parser
import io
import itertools
import json
import math
import re

import numpy as np
import pytest
from evaluations import (
    AUTOATTACKED,
    CLEAN,
    DATA,
    FIGURES,
    NETWORKS,
    SOUND,
    SUSPECTED,
    figure,
    full_evaluation,
    make_curves,
    make_evaluation,
    make_strip,
    pgd_figure,
)
from PIL import Image

from timm_lowrank import drawing, text
from timm_lowrank.evaluation.results import (
    Kind,
    NetworkInfo,
    Series,
    Strip,
    StripRow,
    Value,
    evaluation_from_json,
    evaluation_to_json,
    wilson,
)
from timm_lowrank.files import read_json
from timm_lowrank.report import text_table, write_plots, write_report
from timm_lowrank.report.plots import colour_index, panels_of

pytest.importorskip("matplotlib")

DASH = "\u2013"
VOID = {"meta", "img", "br", "link", "input", "hr"}
LONG = "low rank, two branches (layer3: 500, pre_logits: 100)"
MARKED = """1-LR <b>& "friends"</b> 'x' {{ 7 * 7 }}"""


def hard_evaluation():
    """Three networks with long and hostile titles, 100 classes, values that are missing or not a number."""
    renamed = evaluation_to_json(full_evaluation()).replace('"2-LR"', json.dumps(LONG))
    evaluation = evaluation_from_json(json.loads(renamed))
    figures = [
        dataclasses.replace(
            one,
            values={**one.values, **({MARKED: Value.share(7 * row, 360)} if row % 3 else {})},
            protocol=dataclasses.replace(one.protocol, details={"note": MARKED}),
        )
        for row, one in enumerate(evaluation.figures)
    ]
    figures[0] = dataclasses.replace(CLEAN, values={LONG: Value.share(346, 360), "plain": Value(math.nan, 0.9, 1.0)})
    figures[1] = dataclasses.replace(figures[1], label=MARKED, key=MARKED)
    figures[2] = dataclasses.replace(figures[2], values={**figures[2].values, MARKED: Value.share(1, 50000)})
    draws = np.random.default_rng(2)
    points = {"x": tuple(draws.normal(size=300)), "y": tuple(draws.normal(size=300)), "labels": (*range(100),) * 3}
    cloud = Series(network=MARKED, name="pre_logits", **points)
    *curves, plane = evaluation.curves
    return dataclasses.replace(
        evaluation,
        networks=(*evaluation.networks, NetworkInfo(title=MARKED, model=MARKED, branches={MARKED: 3})),
        figures=tuple(figures),
        curves=(*curves, dataclasses.replace(plane, title=MARKED, lines=(*plane.lines, cloud))),
        strips=(make_strip((LONG, "plain", MARKED), 12, "an automobile & a <truck>"),),
        data=dataclasses.replace(DATA, class_names=tuple(f"class <{number}>" for number in range(100))),
        verdicts={LONG: SUSPECTED, MARKED: dataclasses.replace(SOUND, summary=MARKED)},
        warnings=(MARKED,),
        suite=MARKED,
        command=MARKED,
    )


def evaluation_of(count):
    """Networks in a number, all measured."""
    titles = [f"network {number}" for number in range(count)]
    values = {title: Value.share(10 * number, 360) for number, title in enumerate(titles)}
    return make_evaluation(
        networks=tuple(NetworkInfo(title=title) for title in titles),
        figures=tuple(dataclasses.replace(one, values=values) for one in FIGURES[:3]),
        verdicts={},
    )


class Page(html.parser.HTMLParser):
    """What a browser would make of a page, and whether every element is closed where it must be."""

    def __init__(self, content):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.words, self.rows = [], [], [], []
        self.feed(content)
        self.close()
        assert self.open == []
        self.text = " ".join("".join(self.words).replace("\u202f", " ").split())

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), f"an attribute of <{tag}> is given twice"
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append("")

    def handle_startendtag(self, tag, attributes):
        assert "svg" in self.open or tag in VOID
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        if "tr" in self.open and data.strip():
            self.rows[-1] += data.replace("\u202f", " ") + "|"
        self.words.append(data + " ")

    def named(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]

    def row(self, label):
        """The cells of the last row that begins with a label: the one in the full tables."""
        return [cells for cells in self.rows if cells.startswith(label)][-1]

    def image(self, number):
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(self.named("img")[number]["src"].partition(",")[2]))))


def rendered(evaluation, folder):
    return Page(write_report(evaluation, folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return rendered(full_evaluation(), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def hard_page(tmp_path_factory):
    return rendered(hard_evaluation(), tmp_path_factory.mktemp("report"))


@pytest.fixture(params=["page", "hard_page"])
def any_page(request):
    return request.getfixturevalue(request.param)


# ------------------------------------------------------------------------------------------------------------ the page


def test_the_page_is_one_sound_file_that_needs_nothing_else(any_page):
    assert not any_page.named("script", "link", "iframe", "object", "base", "form")
    assert len(any_page.named("style")) == 1
    links = [attributes[key] for _, attributes in any_page.elements for key in ("src", "href") if key in attributes]
    ids = [attributes["id"] for _, attributes in any_page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert {re.split(r"[,;]", link)[0] for link in links if not link.startswith("#")} == {"data:image/png"}
    values = [str(value) for _, attributes in any_page.elements for value in attributes.values()]
    assert not any(re.search(r"url\((?!#)|@import|https?:", value) for value in values)


def test_the_page_can_be_read_without_seeing_it(any_page):
    levels = [int(tag[1]) for tag, _ in any_page.elements if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert all(attributes.get("scope") in ("col", "row") for attributes in any_page.named("th"))
    assert all(attributes.get("alt") for attributes in any_page.named("img"))
    assert all("aria-label" in attributes or "aria-hidden" in attributes for attributes in any_page.named("svg"))
    assert any_page.elements[0] == ("html", {"lang": "en"})
    assert len(any_page.named("caption")) == len(any_page.named("table"))


def luminance(colour):
    """Relative luminance as WCAG 2 defines it."""
    shares = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_style_asks_for_nothing_from_outside_and_can_be_read_in_light_and_dark(tmp_path):
    content = write_report(make_evaluation(), tmp_path).read_text(encoding="utf-8")
    style = re.search("<style>(.*?)</style>", content, re.DOTALL)[1]
    assert not re.search(r"url\(|@import|https?:|@font-face", style)
    assert all(rule in style for rule in ("@media print", "prefers-color-scheme: dark", "max-width: 44rem"))
    for block in style.split(":root {")[1:3]:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        least = dict.fromkeys(("ink", "soft", "link", "amber", "red"), 4.5)
        least |= {f"network-{index}": 3 for index in range(len(drawing.NETWORKS))}
        for name, contrast in least.items():
            low, high = sorted((luminance(colours[name]), luminance(colours["paper"])))
            assert (high + 0.05) / (low + 0.05) >= contrast, name


def test_every_figure_stands_there_with_its_interval_and_its_counts(page):
    cells = page.row("PGD-20, 8/255|PGD, L∞ · radius 8/255 · 20 steps of 2/255 · random start · 1 restart|")
    low, high = wilson(148, 360)
    interval = f"{100 * low:.1f} {DASH} {100 * high:.1f}"
    assert all(cell in cells for cell in ("41.1 %", interval, "148 of 360", "38.1 %", "137 of 360", "≈|+3.1"))
    assert "≠|+8.9" in page.row("PGD-7, 8/255")
    assert "\u2248|\u22121.4|\u22124.2 to +1.3|within chance" in page.row("Clean images")
    assert "lower is better" in page.row("Iter-LL-FGSM, target hit")
    assert "higher is better" not in page.text
    assert (
        "In every row: radii in parts of the pixel range, 1 restart, 360 images, seed 0. Higher is better." in page.text
    )
    assert "not measured" in page.row("AutoAttack L2, 0.5")
    assert {"cx": "41.11%", "cy": "6", "r": "3", "class": "network-0"} in page.named("circle")
    assert f"0.211|0.201 {DASH} 0.229|346 images" in page.row("DeepFool, median rho")
    assert f"3.2 {text.TIMES} 10⁻⁷" in page.row("Median norm of the gradient")
    assert "1,638,400" in page.row("Parameters replaced")
    for one in FIGURES:
        assert page.row(one.label)
        assert one.group in page.text
    # dots and lines: of every share in its row and of the three in the summary
    assert len(page.named("circle")) == sum(len(one.values) for one in FIGURES if one.unit == "share") + 6


@pytest.mark.parametrize(
    "words",
    [
        "digits, test split", "360 images", "seed 0", "22 November 2026", "2-LR : suspected gradient masking",
        "plain : no sign of gradient masking", "One of eight checks failed: AutoAttack finds far more than PGD.",
        "Recognises 96.1 % of the images as they are, 41.1 % under PGD-20 (8/255) and 1.1 % under AutoAttack (8/255).",
        "Accuracy of 2-LR under PGD is no evidence of robustness", "There is one warning below",
    ],
)  # fmt: skip
def test_the_first_screen_says_what_matters(page, words):
    assert words in page.text[: page.text.index("How it was measured")]


def test_what_the_branches_are_for_comes_before_the_diagnosis(tmp_path):
    ranks = dataclasses.replace(CLEAN, key="rank", kind=Kind.EFFECTIVE_RANK, label="rank of layer3", unit="number")
    text = rendered(make_evaluation(figures=(CLEAN, ranks)), tmp_path).text
    summary = text[text.index("In short") : text.index("How it was measured")]
    assert summary.index("rank of layer3") < summary.index("suspected gradient masking")
    assert "Directions that hold" not in rendered(make_evaluation(figures=(CLEAN,)), tmp_path).text


def test_the_summary_names_the_variance_in_about_ten_directions_of_each_layer(tmp_path):
    variances = [
        dataclasses.replace(
            CLEAN, key=f"{layer}-{count}", kind=Kind.VARIANCE, label=f"{layer}: {count} directions", layer=layer,
            directions=count,
        )
        for layer, counts in (("layer3", (5, 10, 20)), ("pre_logits", (2, 5)))
        for count in counts
    ]  # fmt: skip
    text = rendered(make_evaluation(figures=(CLEAN, *variances)), tmp_path).text
    summary = text[text.index("In short") : text.index("How it was measured")]
    summary = summary[: summary.index("suspected gradient masking")]
    shown = [one.label for one in variances if one.label in summary]
    assert shown == ["layer3: 10 directions", "pre_logits: 5 directions"]


def test_every_row_has_a_dot_or_there_is_no_column_for_it(tmp_path):
    share = dataclasses.replace(CLEAN, key="bare", label="No interval", values={"2-LR": Value(0.25)})
    unknown = dataclasses.replace(CLEAN, key="unknown", label="Not computed", values={"2-LR": Value(math.nan)})
    number = dataclasses.replace(CLEAN, key="number", label="A length", unit="number", values={"2-LR": Value(0.5)})
    evaluation = make_evaluation(figures=(number, share, unknown))
    page, source = rendered(evaluation, tmp_path), (tmp_path / "report.html").read_text(encoding="utf-8")
    assert {"cx": "25.00%", "cy": "6", "r": "3", "class": "network-0"} in page.named("circle")
    assert len(page.named("circle")) == 1
    shares, numbers = source.split('id="figures"')[1].split("</table>")[:2]
    assert [name in shares for name in ("No interval", "Not computed", "A length", "<span>100 %</span>")] == [
        True, True, False, True,
    ]  # fmt: skip
    assert [name in numbers for name in ("A length", "<span>100 %</span>")] == [True, False]


def test_pgd_without_autoattack_is_called_an_upper_bound(tmp_path, page):
    said = "AutoAttack was not measured. What is left after PGD is an upper bound"
    assert said in rendered(make_evaluation(), tmp_path).text
    assert said not in page.text
    assert said not in rendered(make_evaluation(figures=(CLEAN,)), tmp_path).text


def test_the_evidence_is_told_in_words(page):
    cells = page.row("AutoAttack close to PGD")
    assert "✕| failed|AutoAttack leaves 1.1 % where PGD-20 leaves 41.1 %.|Value|0.4|Limit|0.1|" in cells
    assert f"{DASH}| not checked|" in page.row("Smooth loss")
    assert f"{DASH}| undecided|" in page.row("Single step")
    assert "✓| passed|" in page.row("Gradients are there")


@pytest.mark.parametrize(
    "words",
    [
        "timm-lowrank evaluate runs/digits --against runs/digits/twin --suite quick --limit 360",
        "torch 2.15.0", "in 93 seconds on cpu", "22 November 2026, 17:00 UTC", "100 images at a time", "9f3c2b",
        "layer3 (target rank 20), pre_logits (target rank 10)", "1,234,567 parameters", "95 % confidence",
        f"360 images of 1 {text.TIMES} 8 {text.TIMES} 8", "All AutoAttack figures on digits use 9 target classes.",
        "while training none",
    ],
)  # fmt: skip
def test_how_it_was_measured(page, words):
    assert words in page.text


def test_names_are_escaped_and_long_ones_do_not_break_anything(hard_page):
    assert not hard_page.named("truck", "friends")
    assert all(attributes == {"class": "name", "aria-hidden": "true"} for attributes in hard_page.named("b"))
    assert MARKED in hard_page.row(MARKED)
    assert not re.search("&(lt|gt|amp|quot|#);", hard_page.text)  # nothing is escaped twice
    for words in (
        f"Evaluation: {LONG}, plain and {MARKED}", f"suite {MARKED}", "an automobile & a <truck>", "100: class <0>",
        f"{MARKED} (target rank 3)", f"note {MARKED}, 360 images", "… class <99>",
        "colours are classes, and repeat", f"Checks for {MARKED}",
    ):  # fmt: skip
        assert words in hard_page.text
    assert any(MARKED in attributes.get("aria-label", "") for attributes in hard_page.named("svg"))
    assert "0.002 %" in hard_page.row("PGD-20, 2/255")


def test_what_is_not_a_number_is_called_so_and_warned_of(hard_page):
    assert "not a number" in hard_page.row("Clean images")
    assert "plain, Clean images: not a number" in hard_page.text
    assert "nan" not in hard_page.text.casefold().replace("instantaneous", "")
    assert "nan%" not in "".join(str(attributes) for _, attributes in hard_page.elements)


def test_one_network_and_nothing_measured(tmp_path):
    evaluation = make_evaluation(figures=(), verdicts={}, warnings=(), networks=NETWORKS[1:])
    page = rendered(evaluation, tmp_path)
    for words in ("No figures were measured.", "No curves were measured.", "No images were kept.", "None.",
                  "plain : gradient masking was not looked for"):  # fmt: skip
        assert words in page.text
    assert not page.named("table")
    assert write_plots(evaluation, tmp_path) == []
    assert text_table(evaluation) == ""


@pytest.mark.parametrize("count", [1, 2, 5])
def test_each_network_has_a_column_and_a_difference_to_the_first(tmp_path, count):
    page = rendered(evaluation_of(count), tmp_path)
    row = page.row("Clean images")
    assert [row.count(f"{10 * number} of 360|") for number in range(1, count)] == [1] * (count - 1)
    assert sum(row.count(words) for words in ("beyond chance", "within chance")) == count - 1
    assert ("Differences are figures of network 0" in page.text) == (count > 1)
    assert f"Of the {3 * (count - 1)} differences tested here" in page.text or count == 1


def test_empty_parts_are_left_out(tmp_path):
    evaluation = make_evaluation(
        figures=(CLEAN, figure("pgd", "PGD-7, 8/255")),
        curves=(dataclasses.replace(make_curves()[0], lines=()),),
        strips=(dataclasses.replace(make_strip(()), rows=()),),
        verdicts={"plain": dataclasses.replace(SOUND, checks=())},
    )
    page = rendered(evaluation, tmp_path)
    assert "PGD-7, 8/255" not in page.text
    for words in ("Nothing was measured.", "No images were kept.", "No check was made."):
        assert words in page.text
    assert write_plots(evaluation, tmp_path) == []


def test_the_same_evaluation_gives_the_same_bytes(tmp_path):
    evaluation = full_evaluation(curves=(make_curves()[0], make_curves()[3]))
    (tmp_path / "evaluation.json").write_text(evaluation_to_json(evaluation))
    again = evaluation_from_json(read_json(tmp_path / "evaluation.json"))
    first = write_report(evaluation, tmp_path / "a").read_bytes()
    assert write_report(again, tmp_path / "b").read_bytes() == first
    assert write_report(evaluation, tmp_path / "a").read_bytes() == first


# ----------------------------------------------------------------------------------------------------------- pictures


def test_images_are_shown_pixel_by_pixel(page):
    assert len(page.named("img")) == 36
    assert page.named("img")[6]["alt"] == "adversarial, image 1 of 6; 0; rho 0.05"
    assert (page.named("img")[1]["width"], page.named("img")[1]["height"]) == ("8", "8")
    pixels = np.frombuffer(make_strip(["plain"]).rows[0].pixels, np.uint8).reshape(6, 8, 8)
    # twelve for each pixel, so that paper shows squares
    np.testing.assert_array_equal(page.image(1), pixels[1].repeat(12, axis=0).repeat(12, axis=1))


@pytest.mark.parametrize("channels", [3, 4])
def test_colour_images_keep_their_channels(tmp_path, channels):
    pixels = np.random.default_rng(3).integers(0, 256, (1, channels, 4, 5), dtype=np.uint8)
    row = StripRow(network="plain", name="original", captions=("",), pixels=pixels.tobytes())
    strip = Strip(key="s", title="S", shape=pixels.shape, rows=(row,))
    shown = rendered(make_evaluation(strips=(strip,)), tmp_path).image(0)
    expected = pixels[0].transpose(1, 2, 0) if channels == 3 else pixels[0].sum(0) // channels
    assert shown.shape[:2] == (4 * 19, 5 * 19)
    np.testing.assert_array_equal(shown[::19, ::19], expected)
    np.testing.assert_array_equal(shown[18::19, 18::19], expected)


@pytest.mark.parametrize(("images", "wide", "narrow"), [(1, 1, 1), (6, 6, 6), (8, 8, 4), (10, 5, 5), (12, 6, 6)])
def test_rows_of_images_are_of_one_length(tmp_path, images, wide, narrow):
    page = rendered(make_evaluation(strips=(make_strip(["plain"], images),)), tmp_path)
    styles = [attributes["style"] for attributes in page.named("figure")]
    assert styles == [f"--wide: {wide}; --narrow: {narrow}"]


def test_plots_in_the_page_take_its_colours_and_say_what_they_show(page):
    plots = [attributes for attributes in page.named("svg") if attributes.get("class") == "plot"]
    assert len(plots) == 1 + 1 + 2 + 2  # lines, radii, a histogram for each layer, a cloud for each network
    assert "2-LR instantaneous from 97.0 % at 0 to 29.2 % at 10" in plots[0]["aria-label"].replace("\u202f", " ")
    styles = " ".join(attributes.get("style", "") for _, attributes in page.elements)
    for role in ("--ink", "--grid", "--axis", "--network-0", "--network-1"):
        assert f"var({role})" in styles
    for colour in (drawing.INK, drawing.GRID, drawing.AXIS, *drawing.NETWORKS):
        assert colour not in styles
    assert {"100 %", "steps", "2-LR, instantaneous", "pre_logits"} <= {word.strip() for word in page.words}


def test_every_network_stands_in_the_legend_whatever_its_title(tmp_path):
    titles = ("_draft: " + 60 * "a" + ", low rank " + 60 * "b", "_draft: " + 60 * "a" + ", plain " + 60 * "b")
    networks = tuple(NetworkInfo(title=title) for title in titles)
    lines = (Series(network=title, x=(0.0, 1.0), y=(0.5, 0.25)) for title in titles)
    curve = dataclasses.replace(make_curves()[0], lines=tuple(lines))
    page = rendered(make_evaluation(networks=networks, figures=(), verdicts={}, curves=(curve,)), tmp_path)
    assert page.text.count("_draft: aaaaaaaaa\u2026bbbbbbbbbbbbbbbb") == 2


def test_plots_are_written_and_not_blank(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    paths = write_plots(full_evaluation(), tmp_path / "plots")
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "plots/steps-ifgsm.png", "plots/radii.png", "plots/cushion.png", "plots/plane.png"
    ]  # fmt: skip
    for path in paths:
        image = Image.open(path).convert("L")
        assert image.width > 500
        assert image.height > 400
        assert len(set(image.tobytes())) > 50
    assert dict(matplotlib.rcParams) == before


def test_curves_with_holes_are_drawn_in_the_folder_alone(tmp_path):
    line = Series(network="plain", name="a", x=(0.0, 1.0, 2.0), y=(math.nan, 0.5, math.nan))
    curve = dataclasses.replace(make_curves()[0], key="../../up and away", lines=(line,), x_log=True)
    page = rendered(make_evaluation(curves=(curve,)), tmp_path)
    assert "plain a from not a number at 0 to not a number at 2" in str(page.elements)
    (path,) = write_plots(make_evaluation(curves=(curve,)), tmp_path / "run")
    assert path.parent == tmp_path / "run"
    assert path.exists()


def test_clouds_without_classes_can_be_compared(tmp_path):
    cloud = make_curves()[3]
    assert "colours are classes" in rendered(make_evaluation(curves=(cloud,)), tmp_path).text
    lines = [dataclasses.replace(line, labels=(0,) * 360, name=line.network) for line in cloud.lines]
    plain = dataclasses.replace(cloud, lines=tuple(lines))
    one, two = panels_of(plain, make_evaluation())
    assert (one.title, two.title) == ("2-LR", "plain")
    assert one.limits == two.limits
    for (low, high), values in zip(one.limits, ([*lines[0].x, *lines[1].x], [*lines[0].y, *lines[1].y]), strict=True):
        assert low < min(values)
        assert high > max(values)
    assert "colours are classes" not in rendered(make_evaluation(curves=(plain,)), tmp_path).text


def test_plain_is_grey_wherever_it_stands():
    colours = [drawing.NETWORKS[colour_index(title, ["a", "plain", "b"])] for title in ("a", "plain", "b")]
    assert colours == [drawing.LOWRANK, drawing.PLAIN, drawing.NETWORKS[2]]
    assert drawing.NETWORKS[colour_index("b", ["plain", "b"])] == drawing.LOWRANK
    assert [colour_index(title, ["a", "b", "c"]) for title in "abc"] == [0, 1, 2]


# ----------------------------------------------------------------------------------------- numbers in words, terminal


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (0.411111, "share", "41.1 %"), (0, "share", "0.0 %"), (1, "share", "100.0 %"), (0.0004, "share", "0.04 %"),
        (0.9997, "share", "99.97 %"), (1e-9, "share", "1.0 \u00d7 10⁻⁷ %"), (1 - 1e-9, "share", "99.9999999 %"),
        (math.nan, "share", "not a number"), (math.nan, "number", "not a number"), (math.inf, "number", "not a number"),
        (0.0, "number", "0"), (20.0, "number", "20"), (1234567, "count", "1,234,567"), (0.16, "number", "0.160"),
        (-0.05, "number", "-0.0500"), (12345.6, "number", "12,346"), (2.5e-8, "number", "2.5 \u00d7 10⁻⁸"),
    ],
)  # fmt: skip
def test_numbers_keep_their_leading_digits(value, unit, words):
    assert text.quantity(value, unit) == words


def test_how_something_was_measured_in_words():
    entries = {"attack": "FGSM, L_inf", "steps": 1, "random_start": False, "images": 1, "restarts": 2, "layers": "a, b"}
    expected = ["FGSM, L_inf", "1 step", "no random start", "1 image", "2 restarts", "layers a, b"]
    assert text.phrases(entries) == expected


@pytest.mark.parametrize("evaluation", [full_evaluation(), hard_evaluation(), *map(evaluation_of, (1, 2, 5, 6))])
def test_the_table_for_a_terminal_fits(evaluation):
    lines = text_table(evaluation).splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert all(any(line.startswith(one.label[:20]) for line in lines) for one in evaluation.figures)
    networks = len(evaluation.networks)
    assert sum(line.startswith("Clean images") for line in lines) == (networks + 3) // 4
    assert any("difference" in line for line in lines) == (networks == 2)


def test_the_table_for_a_terminal_has_the_figures():
    table = text_table(full_evaluation())
    assert re.search(r"PGD-20, 8/255 +41\.1 % \(36\.1-46\.3\) +38\.1 % \(33\.2-43\.2\) +\+3\.1$", table, re.MULTILINE)
    assert re.search(r"PGD-7, 8/255 .*\+8\.9\*$", table, re.MULTILINE)
    assert re.search(r"AutoAttack L2, 0\.5 +26\.9 %.* -$", table, re.MULTILINE)
    assert table.splitlines()[0].startswith("2-LR: suspect. One of eight checks failed")
    assert "* the 95 % interval of the difference leaves out zero" in table
    assert "*" not in text_table(make_evaluation(figures=(CLEAN, AUTOATTACKED, pgd_figure(20, 8, 148, 137))))
