"""The class report as one web page: everything in one file, light or dark as the reader's system is, printable.

Names, paths and messages come from submissions, so the template escapes all of them.
"""

from jinja2 import Environment

from minift.course.class_report import ClassReport

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Class report</title>
<style>
:root { color-scheme: light dark; --text: #1c1e21; --faint: #667; --ground: #fff; --line: #d5d8de; --soft: #f1f3f6;
  --good: #1f7a4d; --part: #b5790b; --bad: #b3372f; --bar: #3b6fb5; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6ea; --faint: #9aa3af; --ground: #16181c; --line: #343a43;
  --soft: #20242a; --good: #5cc38f; --part: #e0b04c; --bad: #ee8077; --bar: #6fa3e8; } }
body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.25; } h3 { margin: 0; } p { margin: .4rem 0; }
.faint { color: var(--faint); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { position: sticky; top: 0; background: var(--ground); }
td.number, th.number { text-align: right; white-space: nowrap; }
.good { color: var(--good); } .part { color: var(--part); } .bad { color: var(--bad); } .none { color: var(--faint); }
section { border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; margin: 1rem 0; break-inside: avoid; }
.bar { display: inline-block; width: 8rem; height: .7rem; background: var(--soft); border: 1px solid var(--line); }
.bar > span { display: block; height: 100%; background: var(--bar); }
ul { margin: .4rem 0; padding-left: 1.2rem; }
</style>
</head>
<body>
<h1>Class report</h1>
<p>{{ report.students | length }} submissions, {{ "%.1f" | format(report.average) }} of {{ report.points }} points on
average.</p>

<h2>Students</h2>
<div class="scroll"><table>
<thead><tr><th>student</th><th class="number">points</th>
{%- for one in report.exercises %}<th class="number"><a href="#{{ one.id }}">{{ one.id }}</a></th>{% endfor -%}
</tr></thead>
<tbody>
{%- for student in report.students %}
<tr><td>{{ student.student }}{% if student.problem %}<br><span class="bad">{{ student.problem }}</span>{% endif %}</td>
<td class="number">{{ student.earned }}</td>
{%- for one in report.exercises %}{% set row = student.exercises.get(one.id) %}
{%- if row %}<td class="number {{ colour(row) }}" title="{{ row.status | replace('_', ' ') }}
{%- if row.misconception %}: {{ row.explanation }}{% endif %}">
{%- if row.status == "not_started" %}-{% else %}{{ row.earned }}
{%- if row.status not in ("pass", "fail") %} {{ row.status | replace("_", " ") }}{% endif %}{% endif %}</td>
{%- else %}<td></td>{% endif %}{% endfor -%}
</tr>
{%- endfor %}
</tbody>
</table></div>

<h2>Exercises</h2>
{%- for one in report.exercises %}
<section id="{{ one.id }}">
<h3>{{ one.id }} {{ one.title }}</h3>
<p class="faint">{{ "%.1f" | format(one.earned) }} of {{ one.points }} points on average;
{% for word, count in one.statuses %}{{ count }} {{ word | replace("_", " ") }}{{ ", " if not loop.last }}{% endfor %};
{% if one.hints %}hints taken by {{ one.hints }}; {% endif %}{{ "%.2f" | format(one.seconds) }} s to grade</p>
<table>
{%- for sentence, percent in one.checks %}
<tr><td class="number">{{ percent }} %</td><td><span class="bar"><span style="width: {{ percent }}%"></span></span></td>
<td>{{ sentence }}</td></tr>
{%- endfor %}
</table>
{%- if one.mistakes %}
<p>Recognised mistakes, "this is exactly what you get when ...":</p>
<ul>
{%- for label, text, count in one.mistakes %}
<li><b>{{ count }} x</b> {{ text }} <span class="faint">({{ label }})</span></li>
{%- endfor %}
</ul>
{%- endif %}
</section>
{%- endfor %}

<h2>The same but for names and comments</h2>
<p class="faint">A lead to look at, not a proof: a short exercise has few solutions.</p>
{%- if report.same %}
<ul>{% for name, students in report.same %}<li>{{ name }}: {{ students | join(", ") }}</li>{% endfor %}</ul>
{%- else %}
<p>None.</p>
{%- endif %}
</body>
</html>
"""


def _colour(row: dict) -> str:
    if row["status"] in ("not_started", "not_graded"):
        return "none"
    return "good" if row["earned"] == row["points"] else "part" if row["earned"] else "bad"


def class_page(report: ClassReport) -> str:
    """The text of the page."""
    template = Environment(autoescape=True).from_string(_TEMPLATE)
    return template.render(report=report, colour=_colour)
