"""The page of a trace: its blocks (blocks.py) as HTML.

The page carries its style with it and nothing else: no script, no font, nothing from elsewhere. Every colour of a
ground has its colour of text beside it, in a light and a dark set, so that it reads the same in a notebook of either
kind. What users and models wrote is escaped by the template, which escapes everything.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from minift.study.trace.blocks import Station


def as_html(title: str, stations: Sequence[Station]) -> str:
    """The whole as a part of a page."""
    return _template(FRAGMENT).render(title=title, stations=stations, style=STYLE)


def as_page(title: str, stations: Sequence[Station]) -> str:
    """The whole as a page of its own."""
    return _template(PAGE).render(title=title, body=as_html(title, stations))


@cache
def _template(source: str) -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(source)


LIGHT = {
    "ground": "#ffffff", "text": "#1a1a1a", "quiet": "#555d66", "box": "#f3f5f7", "box-text": "#1a1a1a",
    "line": "#c8ced6", "mark": "#0072b2", "mark-text": "#ffffff", "trained": "#cfe7f7", "trained-text": "#06283d",
    "heat0": "#f3f5f7", "heat0-text": "#1a1a1a", "heat1": "#fbe3b8", "heat1-text": "#2b1d00",
    "heat2": "#f0a850", "heat2-text": "#1f1200", "heat3": "#a63c00", "heat3-text": "#ffffff",
}  # fmt: skip
DARK = {
    "ground": "#14181d", "text": "#e8eaed", "quiet": "#a9b2bc", "box": "#222830", "box-text": "#e8eaed",
    "line": "#434c57", "mark": "#56b4e9", "mark-text": "#06202f", "trained": "#0d4468", "trained-text": "#eaf6ff",
    "heat0": "#222830", "heat0-text": "#e8eaed", "heat1": "#4d3a12", "heat1-text": "#fff3d6",
    "heat2": "#9a6310", "heat2-text": "#ffffff", "heat3": "#ffb27a", "heat3-text": "#2a0f00",
}  # fmt: skip


def _variables(colors: dict[str, str]) -> str:
    return ";".join(f"--{name}:{color}" for name, color in colors.items())


STYLE = (
    f".minift-trace{{{_variables(LIGHT)}}}\n@media (prefers-color-scheme:dark){{.minift-trace{{{_variables(DARK)}}}}}\n"
    """.minift-trace{background:var(--ground);color:var(--text);font:16px/1.5 system-ui,sans-serif;
box-sizing:border-box;max-width:60rem;margin:0 auto;padding:1rem;overflow-wrap:anywhere}
.minift-trace *{box-sizing:border-box}
.minift-trace h1{font-size:1.5rem;line-height:1.25;margin:.3rem 0 .6rem;color:inherit}
.minift-trace h2{font-size:1.15rem;margin:2rem 0 .3rem;padding-top:.8rem;border-top:1px solid var(--line);color:inherit}
.minift-trace p{margin:.4rem 0}
.minift-trace ol.way{display:flex;flex-wrap:wrap;gap:.2rem .4rem;list-style:none;margin:.5rem 0;padding:0}
.minift-trace ol.way li{background:var(--box);color:var(--box-text);border-radius:.3rem;padding:0 .5rem;margin:0;
font-size:.85rem}
.minift-trace .uses{color:var(--quiet);font-size:.85rem}
.minift-trace .uses span,.minift-trace pre,.minift-trace .chip,.minift-trace .name{
font-family:ui-monospace,Menlo,Consolas,monospace}
.minift-trace .uses span{font-size:.8rem}
.minift-trace pre{background:var(--box);color:var(--box-text);border-radius:.3rem;padding:.6rem;margin:.5rem 0;
white-space:pre-wrap;word-break:normal!important;font-size:.85rem;line-height:1.5}
.minift-trace .above{margin:.7rem 0 0;font-weight:600}
.minift-trace .wide{overflow-x:auto;margin:.6rem 0}
.minift-trace table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;margin:0;
background:var(--ground);color:var(--text)}
.minift-trace tr,.minift-trace tr:hover{background:var(--ground)!important;color:var(--text)!important}
.minift-trace th,.minift-trace td{padding:.15rem .5rem;text-align:right;border-bottom:1px solid var(--line);
overflow-wrap:normal;color:inherit}
.minift-trace th{vertical-align:bottom}
.minift-trace td{white-space:nowrap}
.minift-trace th:first-child,.minift-trace td:first-child{text-align:left;padding-left:0}
.minift-trace .chips{display:flex;flex-wrap:wrap;gap:.25rem;margin:.6rem 0}
.minift-trace .chip{display:inline-flex;flex-direction:column;align-items:center;border:1px solid var(--line);
border-radius:.3rem;padding:0 .3rem;font-size:.85rem;line-height:1.4;background:var(--box);color:var(--box-text)}
.minift-trace .chip small{font-size:.7rem}
.minift-trace .chip.control b{font-weight:700;font-style:italic}
.minift-trace .chip b{font-weight:400}
.minift-trace .chip.trained{background:var(--trained);color:var(--trained-text);border:2px solid var(--mark)}
"""
    + "\n".join(f".minift-trace .chip.heat{n}{{background:var(--heat{n});color:var(--heat{n}-text)}}" for n in range(4))
    + """
.minift-trace .cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(22rem,100%),1fr));gap:.6rem;
margin:.6rem 0}
.minift-trace .card{background:var(--box);color:var(--box-text);border-radius:.3rem;padding:.5rem .6rem;
font-size:.85rem;min-width:0}
.minift-trace .bar{display:grid;grid-template-columns:8rem 1fr 3.6rem;gap:.4rem;align-items:center}
.minift-trace .bar .name{white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.minift-trace .bar i{display:block;height:.7rem;background:var(--quiet);color:var(--ground);border-radius:.15rem;
min-width:1px}
.minift-trace .bar.marked{font-weight:700}
.minift-trace .bar.marked i{background:var(--mark);color:var(--mark-text)}
.minift-trace .bar .number{text-align:right;font-variant-numeric:tabular-nums}
.minift-trace .lane{display:flex;margin:.2rem 0;font-size:.8rem;line-height:1.7}
.minift-trace .lane span{border:1px solid var(--ground);border-radius:.2rem;background:var(--trained);
color:var(--trained-text);text-align:center;white-space:nowrap;overflow:hidden;min-width:0;flex:1 1 0}
.minift-trace .lane .free{background:var(--ground);color:var(--quiet);border:1px dashed var(--line)}
.minift-trace .lane .marked{background:var(--mark);color:var(--mark-text);font-weight:700}
.minift-trace figure{margin:.8rem 0}
.minift-trace img{width:auto;max-width:min(100%,40rem);height:auto;background:#fff;color:#000;
border-radius:.3rem;display:block}
.minift-trace figcaption{color:var(--quiet);font-size:.85rem;margin-top:.3rem}
@media (max-width:32rem){
.minift-trace th,.minift-trace td{padding:.15rem .25rem;font-size:.75rem}}"""
)

# tex2jax_ignore: a dollar sign in a row is no formula to be typeset by a notebook.
FRAGMENT = """\
<div class="minift-trace tex2jax_ignore mathjax_ignore">
<style>
{{ style|safe }}
</style>
<h1>{{ title }}</h1>
<ol class="way">
{% for station in stations %}
<li>{{ loop.index }} {{ station.title }}</li>
{% endfor %}
</ol>
{% for station in stations %}
<section>
<h2>{{ loop.index }}. {{ station.title }}</h2>
{% for paragraph in station.paragraphs %}
<p>{{ paragraph }}</p>
{% endfor %}
<p class="uses">{% for name in station.uses %}<span>{{ name }}</span>{{ "" if loop.last else ", " }}{% endfor %}</p>
{% for block in station.blocks %}
{% if block.kind == "text" %}
{% if block.title %}<p class="above">{{ block.title }}</p>{% endif %}
<pre>{{ block.text }}</pre>
{% elif block.kind == "table" %}
<div class="wide"><table>
<tr>{% for cell in block.head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in block.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% elif block.kind == "chips" %}
<div class="chips">
{% for chip in block.chips %}
<span class="chip {{ chip.kind }}{{ ' control' if chip.is_control else '' }}">\
<b>{{ chip.text }}</b> <small>{{ chip.below }}</small></span>
{% endfor %}
</div>
{% elif block.kind == "cards" %}
<div class="cards">
{% for card in block.cards %}
<div class="card"><div>{{ card.title }}</div>
{% for bar in card.bars %}
<div class="bar{{ ' marked' if bar.is_marked else '' }}"><span class="name" title="{{ bar.name }}">{{ bar.name }}</span>
<i style="width:{{ '%.1f'|format(100 * bar.share) }}%"></i> <span class="number">{{ bar.number }}</span></div>
{% endfor %}
</div>
{% endfor %}
</div>
{% elif block.kind == "lanes" %}
{% for lane in block.lanes %}
<div class="lane" title="{{ lane.name }}">
{% for name, size, marked in lane.parts %}
<span{% if marked %} class="marked"{% endif %} style="flex-grow:{{ size }}" title="{{ name }}, {{ size }} tokens">\
{{ lane.labels[loop.index0] }}</span>
{% endfor %}
{% if lane.free %}<span class="free" style="flex-grow:{{ lane.free }}" title="free, {{ lane.free }} tokens">\
{{ lane.free_label }}</span>{% endif %}
</div>
{% endfor %}
{% elif block.kind == "figure" %}
<figure><img src="{{ block.data }}" alt="{{ block.caption }}"><figcaption>{{ block.caption }}</figcaption></figure>
{% endif %}
{% endfor %}
</section>
{% endfor %}
</div>
"""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
html{color-scheme:light dark}
body{margin:0;background:#ffffff;color:#1a1a1a}
@media (prefers-color-scheme:dark){body{background:#14181d;color:#e8eaed}}
</style>
</head>
<body>
{{ body|safe }}
</body>
</html>
"""
