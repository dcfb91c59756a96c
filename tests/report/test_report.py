"""The page, the tables, the grids and the sentences, from a record made by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image, ImageFont

from fewstep.arms import solver_arm, student_arm
from fewstep.errors import InputError
from fewstep.records import ArmSummary, BenchmarkRecord, Interval, PictureScore, Row
from fewstep.report import markdown, page, results_csv, save_grids, timing_csv, verdict
from fewstep.report.bars import time_bars
from fewstep.report.columns import columns
from fewstep.report.figures import frontier
from fewstep.report.grids import _wrapped
from fewstep.report.verdict import _not_as_fast, decimals, headline, seconds
from tests.report.fakes import (
    PROMPTS,
    interval,
    pictures,
    record,
    summary,
    timing,
    with_options,
    with_real,
    without_answers,
)

VOID = {"meta", "img", "input", "br", "link", "hr"}


class Nesting(HTMLParser):
    """Every element that is opened is closed, in order; addresses are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href"}]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        return

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def found() -> BenchmarkRecord:
    return record()


@pytest.fixture(scope="module")
def text(found: BenchmarkRecord, tmp_path_factory: pytest.TempPathFactory) -> str:
    return page(found, pictures(tmp_path_factory.mktemp("page"), found))


def test_the_page_is_one_whole_file(text: str) -> None:
    parser = Nesting()
    parser.feed(text)
    assert parser.open == []
    assert len(parser.addresses) == 6
    assert all(address.startswith("data:image/jpeg;base64,") for address in parser.addresses)
    assert not re.search(r"https?://|@import|url\(", text)


def test_captions_settings_and_warnings_are_escaped(text: str) -> None:
    assert "<script>alert" not in text and "<b>bold" not in text and "<i>warning" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; two birds" in text
    assert text.count("<script>") == 1


def test_light_dark_and_phones(text: str) -> None:
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text and "@media print" in text


def test_the_head_names_the_base_and_where_that_name_came_from(text: str) -> None:
    assert "· base a base (asked for)" in text


def test_the_page_says_what_a_sceptic_asks_for(text: str) -> None:
    for part in (
        "student-4", "55.0 % (50.0 to 60.0)", "−1.0 (−6.0 to +4.0)", "20.0×", "N = 4 pictures against 10",
        "999 759 499 259", "torch 2.13.0",
    ):  # fmt: skip
        assert part in text


def test_real_pictures_are_a_ceiling_and_no_competitor(found: BenchmarkRecord, tmp_path: Path) -> None:
    whole = with_real(found)
    text = page(whole, pictures(tmp_path, whole))
    Nesting().feed(text)
    assert "Real pictures against real ones at this N: 2.50" in text and "real is no competitor" in text
    assert "real pictures, the ceiling" in text and "real, birds: 70.0 % (68.0 to 72.0)" in text
    assert 'alt="real: a red house"' in text
    # A level in the plot, without a place in time; nothing that it took, nothing in the verdict.
    level = ElementTree.fromstring(frontier(list(whole.summary.values()))).find("line[@class='real level']")
    assert level is not None and level.get("y1") == level.get("y2") and level.findtext("title") == "real pictures: 97.0"
    assert ElementTree.fromstring(frontier(list(whole.summary.values()))).find("circle[@class='real']") is None
    cells = {column.title: column.cells[-1] for column in columns(list(whole.summary.values()))}
    assert cells["All right"] == "97.0 % (92.0 to 102.0)" and cells["Fréchet"] == "2.50 (2.20 to 2.80)"
    for title in ("Evaluations", "Guidance", "Time a picture", "Speed-up", "Peak memory"):
        assert cells[title] == ""
    assert verdict(whole) == verdict(found)
    assert timing_csv(whole).count("\n") == 4
    assert BenchmarkRecord.from_json(whole.to_json()) == whole


def test_options_stand_beside_the_plain_student(found: BenchmarkRecord, tmp_path: Path) -> None:
    whole = with_options(found)
    text = page(whole, pictures(tmp_path, whole))
    Nesting().feed(text)
    section = text[text.index("What may make it faster") : text.index("The figures")]
    assert re.findall(r"</span>([a-z0-9-]+)</th>", section) == ["student-4", "student-fused-4", "student-bf16-4"]
    for part in ("1.25×", "0.80×", "−20.0 (−21.0 to −19.0)", "80 ms"):
        assert part in section
    circles = ElementTree.fromstring(frontier(list(whole.summary.values()))).findall("circle")
    assert [circle.get("class") for circle in circles].count("student ring") == 2
    # They are no students of their own to the verdict, which says what they are worth.
    told = verdict(whole)
    assert told[:3] == verdict(found)[:3]
    assert told[3].startswith(
        "Of the options, student-fused-4 is the fastest: 1.25 times as fast as student-4, at +0.0"
    )
    plain = whole.summary["student-4"]
    wide = replace(plain.timings[0], end_to_end=replace(plain.timings[0].end_to_end, iqr=0.03))
    unsure = {**whole.summary, "student-4": replace(plain, timings=(wide,))}
    assert verdict(replace(whole, summary=unsure))[3] == (
        "Nothing that was tried makes it faster by more than its timings spread (student-fused-4, student-bf16-4)."
    )
    # One that gains more than its own timings spread does so whatever the fastest one's do.
    fused, bf16 = (whole.summary[f"student-{name}-4"] for name in ("fused", "bf16"))
    loose = replace(fused, timings=(replace(fused.timings[0], end_to_end=wide.end_to_end),))
    sure = replace(bf16, speedup_vs_plain=1.1, timings=(timing(0.085, bf16.arm),))
    either = {**whole.summary, "student-fused-4": loose, "student-bf16-4": sure}
    assert "student-bf16-4 is the fastest: 1.10 times" in verdict(replace(whole, summary=either))[3]
    lines = timing_csv(whole).splitlines()
    assert ",bfloat16," in lines[-1] and ",float32," in lines[-2]


def test_attributes_and_times_as_bars(text: str) -> None:
    plots = [ElementTree.fromstring(found) for found in re.findall(r'<svg class="plot bars".*?</svg>', text, re.DOTALL)]
    titles = [[title.text or "" for title in plot.iter("title")] for plot in plots]
    assert len(plots) == 4
    # The student of the verdict, its teacher and its control, in two attributes.
    assert len(titles[0]) == 6 and "student-4, birds: 70.0 % (68.0 to 72.0)" in titles[0]
    assert "student-4, decode: 25 ms of 100 ms, 25 %" in titles[2] and len(titles[2]) == 3 * 4
    # Each for a desk, and for a phone, whose letters would else be half as large.
    assert [plot.attrib["viewBox"].split()[2] for plot in plots] == ["720", "400", "720", "416"]
    assert titles[1] == titles[0] and titles[3] == titles[2]
    for plot in plots:
        left, _, width, height = map(float, plot.attrib["viewBox"].split())
        for bar in plot.iter("rect"):
            x, y, wide, high = (float(bar.attrib[name]) for name in ("x", "y", "width", "height"))
            assert x >= left and x + wide <= width and y >= 0 and y + high <= height


def test_long_names_of_arms_have_room(found: BenchmarkRecord) -> None:
    named = [replace(arm, arm=replace(arm.arm, id="lcm-lora-of-a-friend-channels-last-4")) for arm in
             found.summary.values()]  # fmt: skip
    left, _, width, _ = map(float, ElementTree.fromstring(time_bars(named)).attrib["viewBox"].split())
    assert left < -100 and width == 720 - left


def test_rows_carry_what_the_student_loses_there(found: BenchmarkRecord, tmp_path: Path) -> None:
    def score(arm: str, prompt: int, right: bool) -> PictureScore:
        answers = {"all_right": right}
        return PictureScore(
            arm=arm,
            prompt_idx=prompt,
            picture_idx=0,
            clip_align_x100=30,
            clip_floor_x100=20,
            preference=None,
            right=answers,
        )

    scores = tuple(score(arm, prompt, arm == "teacher-50" or prompt == 0) for arm in found.summary for prompt in (0, 1))
    text = page(replace(found, scores=scores), pictures(tmp_path, found))
    assert re.findall(r'data-number="(\d)" data-loss="([^"]+)"', text) == [("0", "0.0000"), ("1", "1.0000")]


def test_a_gallery_of_many_prompts_is_cut_and_says_so(found: BenchmarkRecord, tmp_path: Path) -> None:
    many = replace(found, prompts=PROMPTS * 22)
    folders = pictures(tmp_path, many, side=8, count=1)
    text = page(many, {"student-4": folders["student-4"]})
    assert text.count("data:image/jpeg") == 40 and "4 more prompts are in the images folder" in text
    assert re.findall(r'data-number="(\d+)"', text) == [str(number) for number in range(40)]


def test_the_worst_prompts_of_all_are_in_the_gallery(found: BenchmarkRecord, tmp_path: Path) -> None:
    many = replace(found, prompts=tuple(f"prompt {number}" for number in range(60)))
    folders = pictures(tmp_path, many, side=8, count=1)

    def score(arm: str, prompt: int) -> PictureScore:
        right = {"all_right": arm == "teacher-50" or prompt not in (45, 59)}
        return PictureScore(arm=arm, prompt_idx=prompt, picture_idx=0, clip_align_x100=30, clip_floor_x100=20,
                            preference=None, right=right)  # fmt: skip

    scores = tuple(score(arm, prompt) for arm in ("teacher-50", "student-4") for prompt in range(60))
    text = page(replace(many, scores=scores), {"student-4": folders["student-4"]})
    rows = dict(re.findall(r'data-number="(\d+)" data-loss="([^"]+)"', text))
    assert len(rows) == 40 and (rows["45"], rows["59"]) == ("1.0000", "1.0000") and "37" in rows and "39" not in rows
    assert "data-worst>" in text
    assert "data-worst>" not in page(found, folders), "nothing to sort by"


def test_big_pictures_are_made_small(found: BenchmarkRecord, tmp_path: Path) -> None:
    folders = pictures(tmp_path, found, side=512, count=1)
    assert len(page(found, folders)) < 500_000


def test_without_answer_key_nothing_is_said_about_one(found: BenchmarkRecord, tmp_path: Path) -> None:
    bare = without_answers(found)
    text = page(bare, pictures(tmp_path, bare))
    assert "All right" not in text and "Fréchet" not in text and "Attribute by attribute" not in text
    assert "alignment (100 × cosine)" in text


# ----------------------------------------------------------------------------------------------------------- verdict


def test_the_verdict(found: BenchmarkRecord) -> None:
    quality, cost, control, distribution = verdict(found)
    assert quality.startswith("student-4 gets everything in the caption right in 55.0 % (50.0 to 60.0)")
    assert "−1.0 (−6.0 to +4.0) points, no difference that 2 prompts can show" in quality
    assert "100 ms a picture" in cost and "20.0 times as fast as teacher-50" in cost
    assert "4 network evaluations instead of 100" in cost
    assert "(base-4) reach 32.0 %" in control and "worth +23.0 (+18.0 to +28.0) points." in control
    assert "+0.30 (+0.20 to +0.40) against the teacher's (worse; N = 4)" in distribution


def test_three_sentences_are_the_verdict_and_the_rest_stands_below(found: BenchmarkRecord, text: str) -> None:
    box, below = text[text.index('aria-label="Verdict"') :].split("</section>", 1)
    assert [unescape(one) for one in re.findall(r"<p>(.*?)</p>", box)] == verdict(found)[:3]
    listed = re.findall(r"<li>(.*?)</li>", below[: below.index("</ul>")])
    assert [unescape(one) for one in listed] == verdict(found)[3:] != []


def test_a_loss_is_called_a_loss(found: BenchmarkRecord) -> None:
    worse = replace(found.summary["student-4"], delta_all_right=interval(-0.2, 0.05), saturation=(0.8, 1.0, 1.0, 1.0))
    sentences = verdict(replace(found, summary=found.summary | {"student-4": worse}))
    assert "a loss beyond the interval" in sentences[0]
    assert "The latents of student-4 spread −20.0 %" in sentences[-1] and "it may be chance" in sentences[-1]
    sure = replace(worse, mean_saturation=interval(0.9, 0.03))
    sentences = verdict(replace(found, summary=found.summary | {"student-4": sure}))
    assert "−20.0 %" in sentences[-1]
    assert sentences[-1].endswith("all channels together less, −10.0 (−13.0 to −7.0) %: pictures are washed out.")
    # That much only where the whole interval says so.
    pale = replace(worse, mean_saturation=interval(0.94, 0.03))
    sentences = verdict(replace(found, summary=found.summary | {"student-4": pale}))
    assert sentences[-1].endswith("all channels together less, −6.0 (−9.0 to −3.0) %.")
    # What the worst channel says and what all together say are two things where they point apart.
    mixed = replace(sure, saturation=(1.10, 0.92, 0.92, 0.92), mean_saturation=interval(0.965, 0.01))
    sentences = verdict(replace(found, summary=found.summary | {"student-4": mixed}))
    assert "+10.0 %" in sentences[-1] and "together less, −3.5 (−4.5 to −2.5) %." in sentences[-1]


def test_small_distances_keep_digits_that_say_something(found: BenchmarkRecord) -> None:
    """As over embeddings of length 1, where all of them are."""
    assert [decimals(value) for value in (0.0, 12.3, 1.0, 0.85, 0.056, -0.0056, 1e-9)] == [2, 2, 2, 3, 4, 5, 6]
    student = found.summary["student-4"]
    assert student.frechet is not None
    near = replace(student.frechet, through_vae=interval(0.0341, 0.002), difference=interval(0.0021, 0.001))
    small = replace(student, frechet=near, distances={"kid": interval(0.0000561, 0.00001)})
    changed = replace(found, summary=found.summary | {"student-4": small})
    told = next(line for line in verdict(changed) if "Fréchet distance of student-4" in line)
    assert "is 0.0341, +0.0021 (+0.0011 to +0.0031) against" in told
    assert "0.0561 (0.0461 to 0.0661)" in page(changed, {})  # KID × 1000


def test_an_adapter_that_does_not_help_is_told(found: BenchmarkRecord) -> None:
    useless = replace(found.summary["student-4"], gain_all_right=interval(0.01, 0.05))
    assert (
        "nothing here shows that it helps"
        in verdict(replace(found, summary={**found.summary, "student-4": useless}))[2]
    )


def test_what_too_few_prompts_cannot_judge_is_told(found: BenchmarkRecord) -> None:
    unsure = replace(found.summary["student-4"], gain_all_right=Interval(value=0.1))
    told = verdict(replace(found, summary={**found.summary, "student-4": unsure}))[2]
    assert told.endswith("the adapter is worth +10.0 points, which 2 prompts cannot judge.")


def test_the_verdict_sets_the_student_against_what_costs_no_training(found: BenchmarkRecord) -> None:
    alpha_bar = [1 - (t + 1) / 1001 for t in range(1000)]

    def told(seconds: float, right: float, name: str = "student-4") -> str:
        solver = summary(solver_arm(8, 7.5, alpha_bar, karras=False), seconds, right, 33.0)
        student = found.summary["student-4"]
        assert student.all_right is not None
        over = student.all_right.value - right
        student = replace(student, over_solvers={name: Interval(value=over, low=over - 0.01, high=over + 0.01)})
        return verdict(replace(found, summary={**found.summary, "student-4": student, "dpmpp-8": solver}))[2]

    assert told(0.3, 0.6, "dpmpp-8").startswith("dpmpp-8 needs no training, is as good and takes 3.0 times as long")
    assert "at equal time this student has no reason to exist" in told(0.1, 0.55, "dpmpp-8")
    assert told(0.05, 0.3, "dpmpp-8") == "No untrained solver that was drawn is as good (dpmpp-8)."
    # A solver as fast as the student was not drawn: the verdict is not to be had without.
    near = "none took as little time as the student, which 2 steps of one would come near."
    assert told(0.3, 0.3, "dpmpp-8") == f"No untrained solver that was drawn is as good (dpmpp-8); {near}"
    assert told(0.3, 0.6, "dpmpp-8").endswith(f"3.0 times as long; {near}")
    # Two guided steps, the fewest of a solver of second order, are four evaluations.
    solver = summary(solver_arm(8, 7.5, alpha_bar, karras=False), 0.3, 0.3, 33.0)
    for steps in (1, 2, 3):
        student = summary(student_arm(steps, 1.0, 1000), 0.1, 0.5, 33.0)
        none = "none took as little time as the student, and none can: 2 steps, the fewest, are 4 evaluations"
        assert _not_as_fast(student, [solver]) == f"; {none}"
    # Of another run, or over too few prompts, there is no difference on the same pictures: that is said.
    alone = "this is by the figures alone, for not all of these arms have a paired interval."
    assert told(0.05, 0.3) == f"No untrained solver that was drawn is as good (dpmpp-8); {alone}"
    assert told(0.1, 0.55).endswith(f"no reason to exist; {alone}")


def test_a_student_has_to_be_shown_to_be_better_than_what_costs_no_training(found: BenchmarkRecord) -> None:
    """Not by its figure alone: by the paired difference, on the same prompts and noise."""
    alpha_bar = [1 - (t + 1) / 1001 for t in range(1000)]
    solver = summary(solver_arm(2, 7.5, alpha_bar, karras=False), 0.1, 0.54, 33.0)

    def told(low: float) -> str:
        over = {"dpmpp-2": Interval(value=0.01, low=low, high=0.03)}
        student = replace(found.summary["student-4"], over_solvers=over)
        return verdict(replace(found, summary={**found.summary, "student-4": student, "dpmpp-2": solver}))[2]

    assert told(-0.01).startswith("dpmpp-2 needs no training, is not shown to be worse and takes 100 ms: at equal time")
    assert told(0.005) == "No untrained solver that was drawn is as good (dpmpp-2)."


def test_the_verdict_by_alignment(found: BenchmarkRecord) -> None:
    quality, _, control = verdict(without_answers(found))
    assert "scores 32.50 in alignment, where shuffled captions score 20.00" in quality
    assert "−0.50 (−0.90 to −0.10), a loss beyond the interval" in quality and "it keeps 96.2 %" in quality
    assert "reach 27.00: the adapter is worth +5.50" in control


def test_one_prompt_cannot_judge(found: BenchmarkRecord) -> None:
    lone = replace(found.summary["student-4"], delta_all_right=Interval(value=-0.5))
    sentences = verdict(replace(found, prompts=("one",), summary={**found.summary, "student-4": lone}))
    assert "which 1 prompt cannot judge" in sentences[0]


def test_the_headline_is_the_fewest_steps_that_are_not_worse(found: BenchmarkRecord) -> None:
    good = found.summary["student-4"]
    slower = replace(good, arm=replace(good.arm, id="student-8", steps=8, timesteps=tuple(range(999, 0, -124))[:8]))
    bad = replace(
        good,
        arm=replace(good.arm, id="student-1", steps=1, timesteps=(999,)),
        all_right=interval(0.2, 0.05),
        delta_all_right=interval(-0.3, 0.05),
    )
    assert headline([slower, good, bad]) is good
    assert headline([bad]) is bad
    assert headline([found.summary["base-4"]]) is None


def test_where_all_are_worse_the_headline_is_the_fewest_steps_as_good_as_the_best(found: BenchmarkRecord) -> None:
    def student(steps: int, share: float) -> ArmSummary:
        arm = replace(
            found.summary["student-4"].arm,
            id=f"student-{steps}",
            steps=steps,
            timesteps=tuple(range(999, 999 - steps, -1)),
        )
        lost = interval(share - 0.99, 0.02)
        return replace(found.summary["student-4"], arm=arm, all_right=interval(share, 0.03), delta_all_right=lost)

    two, four, eight = student(2, 0.75), student(4, 0.93), student(8, 0.935)
    assert headline([eight, two, four]) is four
    assert headline([eight, two]) is eight
    assert headline([two, four]) is four


# ------------------------------------------------------------------------------------------------- figures and tables


def test_the_frontier_is_well_formed_and_inside_its_frame(found: BenchmarkRecord) -> None:
    svg = ElementTree.fromstring(frontier(list(found.summary.values())))
    circles = svg.findall("circle")
    assert [circle.get("class") for circle in circles] == ["teacher", "student", "base"]
    for circle in circles:
        assert 64 <= float(circle.get("cx", "")) <= 696 and 24 <= float(circle.get("cy", "")) <= 344
    # The slow teacher stands right of the student, the base below it.
    teacher, student, base = circles
    assert float(teacher.get("cx", "")) > float(student.get("cx", ""))
    assert float(base.get("cy", "")) > float(student.get("cy", ""))


def test_one_arm_and_no_quality_make_no_trouble(found: BenchmarkRecord) -> None:
    alone = found.summary["student-4"]
    same = Interval(value=0.5)
    ElementTree.fromstring(frontier([replace(alone, all_right=same)]))
    assert frontier([replace(alone, all_right=None, alignment=None)]) == ""


def labels(svg: str, kind: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(svg).findall(f"text[@class='{kind}']")]


@pytest.mark.parametrize("times", [(0.3,), (0.75,), (2.7,), (0.21, 0.22), (0.2, 0.3), (0.05, 12.0), (0.013, 0.02)])
@pytest.mark.parametrize("alignment", [93.1234, 0.0])
def test_axes_have_labels_that_differ(found: BenchmarkRecord, times: tuple[float, ...], alignment: float) -> None:
    """Also where there is one arm, where all take as long, or where all are as good and nobody knows how sure it is."""
    plain = replace(found.summary["teacher-50"], all_right=None, alignment=Interval(value=alignment))
    arms = [replace(plain, time_per_image_s=time) for time in times]
    ticks = labels(frontier(arms), "tick")
    for axis in ([tick for tick in ticks if tick.endswith("s")], [tick for tick in ticks if not tick.endswith("s")]):
        assert 2 <= len(axis) <= 12 and len(set(axis)) == len(axis)


def test_curves_of_one_colour_are_named(found: BenchmarkRecord) -> None:
    alpha_bar = [0.99 ** (t + 1) for t in range(1000)]
    solvers = [solver_arm(steps, 7.5, alpha_bar, karras=karras) for karras in (False, True) for steps in (8, 20)]
    arms = [summary(arm, 0.1 * arm.steps, 0.5, 33.0) for arm in solvers]
    names = {"dpmpp", "dpmpp-karras"}
    drawn = [text.text for text in ElementTree.fromstring(frontier(arms)).iter("text")]
    assert [name for name in drawn if name in names] == ["dpmpp", "dpmpp-karras"]
    alone = [text.text for text in ElementTree.fromstring(frontier(arms[:2])).iter("text")]
    assert not names & set(alone)


def test_without_quality_the_arm_is_named_and_the_lack_said(found: BenchmarkRecord) -> None:
    arms = {
        name: replace(arm, all_right=None, alignment=None, delta_all_right=None, delta_alignment=None)
        for name, arm in found.summary.items()
    }
    told = verdict(replace(found, summary=arms))
    assert told[0].startswith("Quality was not measured. student-4 takes 100 ms a picture at batch 1")


def test_just_under_a_second_is_a_second() -> None:
    assert [seconds(value) for value in (0.9994, 0.99951, 0.086, 1.324)] == ["999 ms", "1.00 s", "86 ms", "1.32 s"]


def test_columns_without_figures_are_left_out(found: BenchmarkRecord) -> None:
    titles = [column.title for column in columns(list(without_answers(found).summary.values()))]
    assert "All right" not in titles and "Alignment" in titles


def test_the_printed_table_is_aligned_markdown(found: BenchmarkRecord) -> None:
    lines = markdown(list(found.summary.values())).splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    assert lines[0].startswith("| Arm ") and set(lines[1]) <= set("|- ")


def test_empty_cells_and_attributes_in_results_csv() -> None:
    row = Row(
        arm="student-4", steps=4, is_baseline=False, prompt_idx=0, avg_clip_align_x100=31.25, std_clip_align_x100=None,
        time_total_s=1.5, time_per_image_s=0.1, speedup_vs_baseline=None, delta_clip_vs_baseline=None, num_images=1,
        guidance=1.0, sampler="lcm", adapter=True, clip_floor_x100=None, all_right_share=None,
        delta_all_right_vs_baseline=None, avg_preference=None, delta_preference_vs_baseline=None, option=None,
        speedup_vs_plain=None, delta_clip_vs_plain=None, delta_all_right_vs_plain=None, prompt='a "red", house',
        attributes={"sky": 0.5},
    )  # fmt: skip
    head, line = results_csv([row]).splitlines()
    assert head.startswith(
        "arm,steps,is_baseline,prompt_idx,avg_clip_align_x100,std_clip_align_x100,time_total_s,time_per_image_s,"
        "speedup_vs_baseline,delta_clip_vs_baseline,"
    )
    assert head.endswith("prompt,right_sky")
    assert line == 'student-4,4,False,0,31.25,,1.5,0.1,,,1,1,lcm,True,,,,,,,,,,"a ""red"", house",0.5'


def test_timing_csv(found: BenchmarkRecord) -> None:
    lines = timing_csv(found).splitlines()
    assert len(lines) == 4 and lines[2].startswith("student-4,4,1,5,0.1,0.01,0.1,")
    assert lines[2].endswith(",A CPU of 2 cores,float32,2,321,0.1,0.025,0.25,0.04")


def test_the_decoders_share_and_the_floors_are_in_the_table(found: BenchmarkRecord) -> None:
    cells = {column.title: column.cells[1] for column in columns(list(found.summary.values()))}
    assert (
        cells["Decoder"] == "25 %, 40 %" and cells["Share of the floor"] == "25 %" and cells["Peak memory"] == "321 MB"
    )


# -------------------------------------------------------------------------------------------------- record and grids


def test_the_record_reads_back_as_it_was(found: BenchmarkRecord) -> None:
    assert BenchmarkRecord.from_json(found.to_json()) == found


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema_version": 1}'])
def test_what_is_no_record_is_refused_in_one_line(content: str) -> None:
    with pytest.raises(InputError, match="no benchmark record") as caught:
        BenchmarkRecord.from_json(content)
    assert "\n" not in str(caught.value)


def test_another_schema_is_refused(found: BenchmarkRecord) -> None:
    with pytest.raises(InputError, match="schema_version 9"):
        BenchmarkRecord.from_json(replace(found, schema_version=9).to_json())


def test_grids_hold_every_picture(found: BenchmarkRecord, tmp_path: Path) -> None:
    folders = pictures(tmp_path, found, side=32, count=3)
    paths = save_grids(tmp_path / "grids", folders, found.prompts, 3)
    assert len(paths) == 2 * (3 + 1)
    with Image.open(tmp_path / "grids" / "001_student-4.png") as one:
        assert one.size == (4 + 2 * 36, 4 + 2 * 36)  # two columns, two rows
    with Image.open(tmp_path / "grids" / "000_compare.png") as compare:
        assert compare.width > 4 + 3 * 36 and compare.height >= 4 + 3 * 36
        left = compare.convert("L").crop((0, 20, 40, compare.height))
        assert left.getextrema()[0] < 128, "the arms are named at the left"


def test_words_wider_than_the_grid_are_broken_inside() -> None:
    font = ImageFont.load_default(size=12)
    text = "a " + "日本の赤い家と三羽の鳥" * 8 + " by the sea"
    lines = _wrapped(text, font, 100)
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert _wrapped("a red house", font, 1000) == ["a red house"] and _wrapped("", font, 100) == [""]
