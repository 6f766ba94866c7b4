"""The HTML report: every section, nothing loaded, nothing run, nothing injected; opened in chromium where there is one."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.report import plots
from compiler.report.comparison import render_html as render_comparison
from compiler.report.comparison import render_markdown as comparison_markdown
from compiler.report.document import CheckRow, read_document
from compiler.report.html import layer_kind, render_html, series_limits
from compiler.report.verdict import FAIL, INCONCLUSIVE, PASS

VOID = {"meta", "link", "br", "img", "input", "hr"}
LOADING = {"src", "href", "srcset", "data", "action", "poster", "background", "xlink:href", "formaction"}
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


class Page(HTMLParser):
    """Tags, attributes and text of a page; `open` must be empty at the end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def assert_inert(text: str) -> None:
    """No script, no handler, nothing that loads."""
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object", "embed", "form", "base", "a", "image", "use"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in LOADING or name.startswith("on") or name == "style"]
    style = re.search(r"<style>(.*?)</style>", text, re.S)
    assert style is not None and "url(" not in style[1] and "@import" not in style[1] and "@font-face" not in style[1]
    assert "default-src 'none'" in text


def test_noise_side_effects_position_and_savings(full: dict[str, Any]) -> None:
    text = render_html(full)
    assert_inert(text)
    page = Page(text).text
    titles = ("With noisy input", "Outside of the task", "Among the builds of this model", "What the build cost", "What it saves")
    places = [page.index(title) for title in titles]
    assert places == sorted(places)
    for fact in (
        "0.86 → 0.8", "0.84 → 0.7", "+0.08 (0.01 to 0.15)", "more than the full model", "as much as the full model, as far as this shows",
        "-0.12 (-0.2 to -0.04)", "the deltas", "1.1 times (1.06 to 1.15)", "No build of these models on these data is smaller and loses less.",
        "Answer under load", "emulation another machine stood in for the target (1 core by affinity", "6.2 ×", "0.8 kWh", "watts 15", "Processor time", "86 MB",
    ):  # fmt: skip
        assert fact in page, fact
    assert "&lt;now&gt;" in text and "<now>" not in text
    beaten = {**full["position"], "builds": [{**row, "this": row["scheme"] == "int4-g32"} for row in full["position"]["builds"]]}
    assert "2 other builds are no larger and lose less" in Page(render_html(full | {"position": beaten})).text
    unstated = {**full["economics"], "inputs": {}, "savings": full["economics"]["savings"][:1]}
    assert "Energy" not in Page(render_html(full | {"economics": unstated})).text
    alone = {**full["position"], "builds": full["position"]["builds"][:1]}
    assert "Among the builds" not in Page(render_html(full | {"position": alone})).text


def test_page_answers_the_question_and_holds_every_section(document: dict[str, Any]) -> None:
    text = render_html(document)
    assert_inert(text)
    page = Page(text).text
    titles = ("Limits", "Measured without a limit", "The task, before and after", "Latency", "Answers side by side", "Where accuracy was lost")
    titles += ("Where the bytes are", "What the build cost", "Lineage", "The machine", "Files of the bundle", "How to read this")
    places = [page.index(title) for title in ("Yes: support-assistant may go on", *titles)]
    assert places == sorted(places)
    for fact in (
        "86.4 MB",
        "≤ 105 MB",
        "0.0391 to 0.0478",
        "662 samples, 11 dropped as disturbed",
        "model.layers.29.mlp.down_proj",
        "請求書の宛名を変更したい。",
        "0f" * 32,
    ):
        assert fact in page, fact
    assert "differs from full model, not as expected" in page


@pytest.mark.parametrize(("fixture", "outcome", "title"), [("failed", FAIL, "No: support-assistant must not go"), ("unproven", INCONCLUSIVE, "Not yet:")])
def test_other_verdicts(request: pytest.FixtureRequest, fixture: str, outcome: str, title: str) -> None:
    text = render_html(request.getfixturevalue(fixture))
    assert f'verdict {outcome}"' in text and title in Page(text).text


def test_behaviours_that_hold_stand_apart_from_what_only_informs(document: dict[str, Any]) -> None:
    row = {"measured": 0.25, "limit": 0.5, "kind": "behaviour"}
    tried = {**row, "name": "activation_rounding", "outcome": "PASS"}
    skipped = {**row, "name": "threads_2", "outcome": "INFO"}
    broken = {**row, "name": "batch_invariance", "measured": 0.75, "outcome": "FAIL"}
    checks = [*document["verdict"]["checks"], tried, skipped, broken]
    page = Page(render_html(document | {"verdict": {"target": "here", "outcome": "FAIL", "checks": checks}})).text
    limits, behaviours, infos = (
        page.index(title) for title in ("The bar is what was measured", "one that is broken fails the verdict", "they do not change the verdict")
    )
    assert limits < page.index("batch invariance", limits) < behaviours < page.index("activation rounding", behaviours) < infos
    assert "not tried" in page[behaviours:infos] and "≤ 0.5" in page[behaviours:infos]
    assert not any(name in page[infos:].split("Latency")[0] for name in ("activation rounding", "threads 2", "batch invariance"))


def test_same_document_same_bytes(document: dict[str, Any]) -> None:
    assert render_html(document) == render_html(document)
    assert not re.search(r"20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d", render_html(document))


def test_any_section_may_be_missing(document: dict[str, Any]) -> None:
    assert_inert(render_html({}))
    for key in document:
        assert_inert(render_html({name: value for name, value in document.items() if name != key}))
        assert_inert(render_html({key: document[key]}))


def poisoned(value: Any, poison: str) -> Any:
    """Every free text of the document replaced by the poison; fixed words and numbers stay."""
    if isinstance(value, str):
        return value if value in (PASS, FAIL, INCONCLUSIVE, "INFO") else poison
    if isinstance(value, dict):
        return {key: poisoned(item, poison) for key, item in value.items()}
    return [poisoned(item, poison) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "poison", ["</title></style><script>alert(1)</script>", '"><img src=//evil onerror=x>', "' onload='x", "{{ 7*7 }}{% raw %}", "<!--\x00\ud800"]
)
def test_untrusted_text_stays_text(document: dict[str, Any], poison: str) -> None:
    document["latency"] = {poison: [1.0, 2.0], "ttft_ms": [3.0]}
    document["lineage"]["recipe"][poison] = poison
    text = render_html(poisoned(document, poison))
    assert_inert(text)
    assert "49" not in Page(render_html({"name": poison})).text
    text.encode("utf-8")


def test_percentile_limits_find_their_series(document: dict[str, Any]) -> None:
    report = read_document(document)
    assert [limit.value for limit in series_limits(report, "ttft_ms")] == [400.0]
    assert [limit.value for limit in series_limits(report, "tpot_ms")] == [12.0]
    check = document["verdict"]["checks"][4] | {"name": "encode_p95_ms"}
    verdict = {"target": "here", "outcome": PASS, "checks": [check]}
    one = read_document(document | {"verdict": verdict, "latency": {"encode_ms@1x32": [1.0]}})
    two = read_document(document | {"verdict": verdict, "latency": {"encode_ms@1x32": [1.0], "encode_ms@8x128": [1.0]}})
    assert len(series_limits(one, "encode_ms@1x32")) == 1 and series_limits(two, "encode_ms@1x32") == []


def test_too_few_samples_show_no_high_percentile(document: dict[str, Any]) -> None:
    page = Page(render_html(document | {"latency": {"ttft_ms": [1.0, 2.0, 3.0]}})).text
    assert "p50 2" in page and "p99 too few samples" in page


def test_percentiles_are_order_statistics() -> None:
    ordered = [float(k) for k in range(1, 101)]
    assert [plots.percentile(ordered, p) for p in (50, 90, 95, 99, 100)] == [50, 90, 95, 99, 100]
    assert plots.percentile([7.0], 99) == 7.0
    assert not plots.enough(99, 99) and plots.enough(100, 99)


def test_histogram_counts_every_sample_inside_its_axis() -> None:
    ordered = sorted([1.0] * 50 + [2.0] * 49 + [500.0])
    axis = plots.axis_for(ordered, [])
    assert sum(count for _, _, count in plots.bins(ordered, axis)) == sum(x <= axis.high for x in ordered) == 99


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e9, allow_subnormal=False), min_size=1, max_size=80), st.lists(st.floats(0, 1e9, allow_subnormal=False), max_size=2))
def test_any_samples_can_be_drawn(samples: list[float], bounds: list[float]) -> None:
    limits = [plots.Limit(95.0, bound, PASS) for bound in bounds]
    for drawing in (plots.histogram(samples, limits, "n"), plots.cumulative(samples, limits, "n")):
        assert "nan" not in drawing and "inf" not in drawing
        assert Page(str(drawing)).open == []
        xs = [float(x) for x in re.findall(r' x="([-0-9.]+)"', drawing)]
        assert all(0 <= x <= plots.WIDTH for x in xs)


@pytest.mark.parametrize(("measured", "limit"), [(math.nan, 1.0), (1.0, math.inf), (-0.02, 0.03), (0.0, 0.0), (5e9, 1.0)])
def test_limit_bar_of_odd_values(measured: float, limit: float) -> None:
    bar = plots.limit_bar(CheckRow(name="accuracy_drop", measured=measured, limit=limit, outcome=FAIL, low=measured, high=measured))
    assert "nan" not in bar and "inf" not in bar
    assert all(0 <= float(x) <= 100 for x in re.findall(r'(?:x|x1|width)="([-0-9.]+)%"', bar))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lm_head", "Embedding and output head"),
        ("model.embed_tokens", "Embedding and output head"),
        ("model.layers.3.attn.qkv_proj", "Attention"),
        ("encoder.layer.0.attention.output.dense", "Attention"),
        ("encoder.layer.0.output.dense", "Feed-forward"),
        ("model.layers.3.mlp.down_proj", "Feed-forward"),
        ("model.layers.3.post_attention_layernorm", "Norms"),
        ("classifier", "Classifier"),
        ("mystery", "Other"),
    ],
)
def test_layer_kinds(name: str, kind: str) -> None:
    assert layer_kind(name) == kind


def opened(page: Path) -> tuple[str, set[str], list[str]]:
    """Open a file in headless chromium: the DOM, the hosts asked for, the console messages.

    All traffic goes to a dead proxy. Chromium's own calls home (updates, time) also stand in its network log and are left out.
    """
    profile, log = page.parent / f"{page.stem}-profile", page.parent / f"{page.stem}-net.json"
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    flags += f" --proxy-server=http://127.0.0.1:9 --enable-logging=stderr --dump-dom --user-data-dir={profile} --log-net-log={log}"
    done = subprocess.run([str(CHROMIUM), *flags.split(), page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    hosts = set(re.findall(r'"url":"(?:https?|wss?|ftp)://([^/"]+)', log.read_text(errors="replace")))
    own = (".google.com", ".googleapis.com", ".gstatic.com", "gvt1.com")
    return done.stdout, {host for host in hosts if not host.split(":")[0].endswith(own)}, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_chromium_opens_it_without_request_or_console_message(failed: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(render_html(failed), encoding="utf-8")
    dom, hosts, console = opened(page)
    assert Page(dom).text.startswith("No: support-assistant must not go on")
    assert (hosts, console) == (set(), [])


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_chromium_opens_the_new_sections_and_a_comparison(full: dict[str, Any], tmp_path: Path) -> None:
    for name, text, begins in (("full", render_html(full), "Yes: support-assistant"), ("compared", render_comparison(comparison()), "2 bundles compared")):
        page = tmp_path / f"{name}.html"
        page.write_text(text, encoding="utf-8")
        dom, hosts, console = opened(page)
        assert begins in Page(dom).text[:80] and (hosts, console) == (set(), [])


def comparison() -> dict[str, Any]:
    one = {"folder": "a", "name": "<b>evil</b>\x1b[31m", "target": "here", "digest": "0" * 64, "scheme": "int8-g64", "base": "b", "deltas": ["d"]}
    rows = [
        {
            "metric": "tpot_ms",
            "unit": "ms",
            "values": [10.0, 5.0],
            "against_first": [{"ratio": 0.5, "low": 0.4, "high": 0.6, "p": 0.01}],
            "samples": 5,
            "note": "",
        },
        {
            "metric": "kl_mean",
            "unit": "nats",
            "values": [math.nan, 0.1],
            "against_first": [{"value": 0.1, "low": 0.09, "high": 0.11}],
            "samples": 9,
            "note": "",
        },
        {
            "metric": "ttft_ms",
            "unit": "ms",
            "values": [math.nan] * 2,
            "against_first": [{"ratio": math.nan, "low": None, "high": None}],
            "samples": 0,
            "note": "",
        },
    ]
    samples = [{"prompt": "<script>alert(1)</script>", "expected": None, "answers": ["a", "b"]}]
    return {"bundles": [one, {**one, "scheme": "int4-g64"}], "rows": rows, "samples": samples, "machine": "m"}


def test_a_comparison_is_inert_and_names_what_differs() -> None:
    text = render_comparison(comparison())
    assert_inert(text)
    page = Page(text).text
    assert "against A: time per further token 0.5 times." in page and "Drift from A (mean KL)" in page
    assert "\x1b" not in text and "<script" not in text and "&lt;b&gt;evil" in text
    markdown = comparison_markdown(comparison())
    assert "<script" not in markdown and "<b>" not in markdown and "0.5 times (0.4 to 0.6)" in markdown


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_chromium_test_can_fail(tmp_path: Path) -> None:
    """Its teeth: an image without the policy is a request, an image under the policy is a console message."""
    image = '<img src="http://report.invalid/x.png">'
    loose, strict = tmp_path / "loose.html", tmp_path / "strict.html"
    loose.write_text(f"<!doctype html><body>{image}</body>")
    strict.write_text(render_html({}).replace("<main>", f"<main>{image}"), encoding="utf-8")
    assert opened(loose)[1] == {"report.invalid"}
    _, hosts, console = opened(strict)
    assert hosts == set() and "Content Security Policy" in " ".join(console)
