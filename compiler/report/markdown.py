"""Markdown: `render_markdown` for a pull request, `model_card` for the bundle's README.md. Both are written from the records only.

Names and outputs are untrusted. `escaped` turns every character that Markdown, HTML or a forge would act on into an
entity, so that no text can make a link, a mention, an image or a heading; `code` is used where a code span is safe.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compiler.report import sections, words
from compiler.report.document import CheckRow, Report, TaskRow, read_document
from compiler.report.html import facts, size_by_kind, subtitle
from compiler.report.verdict import FAIL, INCONCLUSIVE, PASS

ACTIVE = re.compile(r"[&<>|`*\[\]@#~\\!$]|(?<![^\W_])_|_(?![^\W_])|(?<=[A-Za-z]):(?=//)|(?<=www)\.")
PLAIN_CODE = re.compile(r"[^`|\n]+")
SIGNS = {PASS: "✅", FAIL: "❌", INCONCLUSIVE: "⚠️"}
SAMPLES_SHOWN = 5

GENAI = """```python
import json
import onnxruntime_genai as og

model = og.Model(".")  # this folder
tokenizer = og.Tokenizer(model)
messages = json.dumps([{"role": "user", "content": "..."}])
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=512, do_sample=False)
generator = og.Generator(model, parameters)
generator.append_tokens(tokenizer.encode(prompt))
stream = tokenizer.create_stream()
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
```"""
CHAT_LINES = {  # what changes in GENAI for a model without a chat template
    'messages = json.dumps([{"role": "user", "content": "..."}])\n': "",
    "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)": 'prompt = "..."',
    "import json\n": "",
}
ORT = """```python
import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_padding()
session = ort.InferenceSession("model.onnx")
batch = tokenizer.encode_batch(["..."])
feeds = {
    "input_ids": np.array([row.ids for row in batch], np.int64),
    "attention_mask": np.array([row.attention_mask for row in batch], np.int64),
    "token_type_ids": np.array([row.type_ids for row in batch], np.int64),
}
wanted = {each.name for each in session.get_inputs()}
outputs = session.run(None, {name: value for name, value in feeds.items() if name in wanted})
```"""


def render_markdown(document: Mapping[str, Any] | Report) -> str:
    """A comment for a pull request: verdict first, limits as a table, the rest folded."""
    report = read_document(document)
    top = words.headline(report)
    parts = [f"## {SIGNS.get(top.outcome, '❔')} {escaped(top.title)}", escaped(top.sentence), escaped(words.emulation(report)), escaped(subtitle(report))]
    if report.verdict and report.verdict.told:
        parts += [limits_table(report.verdict.told), words.behaviours(report)]
    if report.task:
        parts.append(folded("The task, before and after", task_table(report.task)))
    if report.adapters:
        parts.append(folded("What unmerged adapters cost", task_table(report.adapters)))
    if report.stages:
        lines = [[code(row.stage), code(row.metric), words.number(row.value)] for row in report.stages]
        parts.append(folded("Where accuracy was lost", table(("after", "metric", "value"), lines)))
    parts += [folded(title, body) for title, body in extra_tables(report)]
    if any(row.bytes for row in report.layers):
        rows = [
            [row["kind"], str(row["count"]), words.size(row["bytes"]), words.percent(row["share"]), escaped(row["schemes"])]
            for row in size_by_kind(report.layers)
        ]
        parts.append(folded("Where the bytes are", table(("kind", "layers", "stored", "share", "scheme"), rows)))
    if report.records:
        parts.append(folded("What the build cost", build_table(report)))
    if report.samples:
        parts.append(folded("Answers side by side", samples_table(report)))
    if report.lineage.base or report.lineage.deltas:
        parts.append(folded("Lineage", lineage_table(report)))
    return "\n\n".join(part for part in parts if part) + "\n"


def extra_tables(report: Report) -> Iterator[tuple[str, str]]:
    """Title and table of noise, side effects and savings, those that the report holds."""
    if report.robustness:
        rows = [
            [code(line["row"].noise), escaped(line["label"]), line["reference"], line["bundle"], escaped(line["excess"])]
            for line in sections.robustness(report)
        ]
        yield "With noisy input", table(("noise", "metric", "full model", "bundle", "costs the bundle more by"), rows)
    told = sections.student(report)
    if told:
        rows = [["teacher", told["sizes"][0], "0"], ["student as cut", told["sizes"][1], words.number(told["row"].before)]]
        rows.append(["student as trained", told["sizes"][1], words.number(told["row"].after)])
        body = table(("model", "parameters", escaped(told["row"].measure) + ", held out"), rows)
        yield "The student", f"{body}\n\n{escaped(told['sentence'])} Data: {escaped(told['data'])}."
    if report.side_effects:
        rows = [[escaped(line["label"]), *line["values"], escaped(line["change"]), escaped(line["whose"])] for line in sections.side_effects(report)]
        yield "Outside of the task", table(("metric", "base", "full model", "bundle", "change", "mostly due to"), rows)
    if report.economics and report.economics.savings:
        rows = [
            [escaped(line["row"].what), line["alternative"], line["bundle"], line["times"], escaped(line["row"].formula)] for line in sections.savings(report)
        ]
        yield "What it saves", table(("what", "alternative", "bundle", "times", "how"), rows)


def model_card(document: Mapping[str, Any] | Report) -> str:
    """The bundle's README.md: what it is, how to run it, limits and verdict, lineage, licence. Deterministic."""
    report = read_document(document)
    parts = [front_matter(report), f"# {escaped(report.name)}", what_it_is(report), "## Run it", how_to_run(report)]
    top = words.headline(report)
    parts += ["## May it be released?", f"**{escaped(top.title)}** {escaped(top.sentence)}"]
    if report.verdict and report.verdict.told:
        parts += [limits_table(report.verdict.told), words.behaviours(report)]
    parts.append("The figures belong to the machine below and to no other.")
    machine = facts(report.target.model_dump())
    if machine:
        parts.append(table(("machine", ""), [[escaped(name), escaped(value)] for name, value in machine]))
    if report.task:
        parts += ["## What the delta brought", task_table(report.task)]
    if report.adapters:
        parts += ["## What unmerged adapters cost", task_table(report.adapters)]
    if report.lineage.base or report.lineage.deltas:
        parts += ["## Where it comes from", lineage_table(report)]
    if report.lineage.tools:
        parts.append("Built with " + ", ".join(f"{escaped(tool)} {escaped(version)}" for tool, version in report.lineage.tools.items()) + ".")
    parts += ["## Licence", licence_text(report), "## Proof", proof(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(report: Report) -> str:
    """The YAML head that model hubs read; JSON strings are YAML strings."""
    lines = ["---", f"license: {json.dumps(licence(report) or 'unknown')}", "library_name: onnx"]
    if report.model.task and re.fullmatch(r"[a-z-]{1,40}", report.model.task):
        lines.append(f"pipeline_tag: {report.model.task}")
    return "\n".join([*lines, "tags: [onnx, onnxruntime, trimtab]", "---"])


def what_it_is(report: Report) -> str:
    """One paragraph from the lineage: "A bundle for onnxruntime: base X with 1 delta merged in ..."."""
    lineage = report.lineage
    text = "A deployment bundle for onnxruntime, compiled by trimtab"
    if lineage.base and lineage.base.origin:
        text += f" from {code(lineage.base.origin)}"
    adapters = [str(row.get("name")) for row in report.model.extras().get("adapters") or () if isinstance(row, Mapping)]
    if adapters:
        text += f" with {len(adapters)} unmerged adapter{'s' if len(adapters) > 1 else ''} to choose from ({', '.join(code(name) for name in adapters)})"
    elif lineage.deltas:
        text += f" with {len(lineage.deltas)} trained delta{'s' if len(lineage.deltas) > 1 else ''} merged in"
    text += f" for the machine {code(report.target_id)}." if report.target_id else "."
    about = escaped(subtitle(report))
    labels = report.model.extras().get("labels")
    if isinstance(labels, (list, tuple)) and labels:
        about += f"\n\nLabels, in the order of the output: {', '.join(code(label) for label in labels)}."
    return f"{text}\n\n{about}" if about else text


def how_to_run(report: Report) -> str:
    """The commands for this kind of model; it needs nothing of trimtab."""
    names = {file.path for file in report.files}
    ours = '```\ntrimtab run . "..."\n```'
    if report.model.kind == "decoder":
        chat = any("chat_template" in name for name in names) or "tokenizer_config.json" in names or not names
        snippet = GENAI
        for old, new in () if chat else CHAT_LINES.items():
            snippet = snippet.replace(old, new)
        return f"With onnxruntime-genai, and nothing of trimtab:\n\n{snippet}\n\nOr with trimtab:\n\n{ours}"
    return f"With onnxruntime, and nothing of trimtab:\n\n{ORT}\n\nOr with trimtab:\n\n{ours}"


def licence(report: Report) -> str:
    """The licence stated for the base or the model, "" when none is. Both spellings of the key are read."""
    for part in (report.model, report.lineage.base):
        stated = (part.extras().get("licence") or part.extras().get("license")) if part else None
        if stated:
            return words.one_line(stated, 80)
    return ""


def licence_text(report: Report) -> str:
    stated = licence(report)
    if not stated:
        return "Unknown: neither the base nor the deltas state one. Ask their authors before you pass this on."
    return f"{escaped(stated)}, as stated by the base. The deltas may bind you to more."


def proof(report: Report) -> str:
    """How to check the bundle."""
    total = sum(file.bytes or 0 for file in report.files)
    what = f"{len(report.files)} files, {words.size(total)}. " if report.files else ""
    return f"{what}`manifest.json` holds the SHA-256 of every file; `trimtab verify .` checks them and runs the self-test. `report.html` shows every figure."


def limits_table(checks: Sequence[CheckRow]) -> str:
    rows = []
    for check in checks:
        limit = f"{words.limit_sign(check)} {words.figure(check.limit, check.unit, against=check.measured)}" if check.limit is not None else "–"
        name = f"{escaped(words.label(check.name))} {code(check.name)}"
        evidence = [words.interval(check), f"{check.samples:,}", words.percent(check.confidence), words.percent(check.false_pass)]
        measured = escaped(words.figure(check.measured, check.unit, against=check.limit))
        rows.append([f"{SIGNS.get(check.outcome, '')} {check.outcome}".strip(), name, measured, escaped(limit), *evidence])
    return table(("result", "what", "measured", "limit", "true value in", "samples", "confidence", "false pass at most"), rows)


def task_table(systems: Sequence[TaskRow]) -> str:
    rows = []
    for row in systems:
        bounds = f"{words.number(row.low)} to {words.number(row.high)}" if row.low is not None and row.high is not None else "–"
        rows.append([escaped(row.system), escaped(words.label(row.metric)), words.number(row.value), bounds, words.number(row.samples)])
    return table(("system", "metric", "value", "interval", "samples"), rows)


def build_table(report: Report) -> str:
    rows = []
    for record in report.records:
        peak = words.figure(record.peak_rss_mb, "MB")
        rows.append([escaped(record.stage), words.seconds(record.seconds), peak, "yes" if record.cached else "no"])
    return table(("stage", "time", "peak memory", "from the cache"), rows)


def samples_table(report: Report) -> str:
    rows = [
        [escaped(words.one_line(text or "–", 200)) for text in (row.prompt, row.expected, row.reference, row.bundle)] for row in report.samples[:SAMPLES_SHOWN]
    ]
    return table(("prompt", "expected", "full model", "bundle"), rows)


def lineage_table(report: Report) -> str:
    rows = [["base", code(report.lineage.base.origin), "", code(report.lineage.base.digest)]] if report.lineage.base else []
    rows += [[f"delta {escaped(delta.kind)}", code(delta.origin), words.number(delta.weight), code(delta.digest)] for delta in report.lineage.deltas]
    notes = "".join(f"\n* {escaped(note)}" for note in report.lineage.notes)
    return table(("part", "origin", "weight", "digest"), rows) + (f"\n{notes}" if notes else "")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A pipe table of cells that are already Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def escaped(text: object) -> str:
    """Untrusted text on one line, with every active character as an entity."""
    return ACTIVE.sub(lambda match: f"&#{ord(match[0])};", words.one_line(text))


def code(text: object) -> str:
    """A code span where that is safe (no backtick, no pipe, no line break), else escaped text."""
    plain = words.one_line(text, 200)
    return f"`{plain}`" if PLAIN_CODE.fullmatch(plain) else escaped(plain)
