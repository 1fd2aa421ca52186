"""The looks of a report, and the few lines of script that show the values under a pointer.

Colours of runs are those of Okabe and Ito (Color Universal Design, 2008), moved until they have a
contrast of 3 to 1 on the page and any two of them are 25 apart in CIELAB (the first three 34) for
normal, red-blind, green-blind and blue-blind eyes (Machado et al. 2009). After six runs they come
again, dashed.
"""

from __future__ import annotations

NUM_COLOURS = 6

_LIGHT = ("#1a3991", "#d86003", "#2e9569", "#af478c", "#694300", "#403a39")
_DARK = ("#088fd2", "#fd893c", "#5af3b7", "#d68bb2", "#feee47", "#dcf0ff")

_STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --text: #1d1d1f; --soft: #5c5f66;
  --rule: #dcdcda; --mark: #fdf0c4; LIGHT }
@media (prefers-color-scheme: dark) { :root { --page: #131416; --card: #1d1f22; --text: #ececec;
  --soft: #a5a9b0; --rule: #393c41; --mark: #4a3f17; DARK } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1360px; margin: 0 auto; padding: 0 16px 48px; }
h1 { font-size: 1.5rem; margin: 20px 0 4px; }
h2 { font-size: 1.15rem; margin: 32px 0 10px; }
h3 { font-size: 1rem; margin: 0; }
p { margin: 0; }
.soft, figcaption p { color: var(--soft); font-size: .85rem; }
.legend { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: 4px 18px;
  margin: 12px -16px 0; padding: 8px 16px; background: var(--page);
  border-bottom: 1px solid var(--rule); max-height: 22vh; overflow-y: auto; }
.legend label { display: inline-flex; align-items: center; gap: 6px; cursor: pointer;
  overflow-wrap: anywhere; min-height: 28px; }
.legend input { margin: 0; width: 16px; height: 16px; accent-color: var(--soft); }
.swatch { flex: none; width: 22px; height: 0; border-top: 3px solid var(--run); }
.charts { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
.chart { position: relative; margin: 0; padding: 12px 10px 8px; background: var(--card);
  border: 1px solid var(--rule); border-radius: 8px; display: flex; flex-direction: column;
  justify-content: space-between; }
figcaption { padding: 0 4px 8px; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
.grid { stroke: var(--rule); fill: none; }
text { font-size: 12px; fill: var(--soft); }
.curve { fill: none; stroke: var(--run); stroke-width: 1.8; stroke-linejoin: round; }
.dot { fill: var(--run); }
.band { fill: var(--run); opacity: .16; }
.reference { stroke: var(--soft); stroke-dasharray: 2 3; fill: none; }
.cursor { stroke: var(--soft); }
.values { position: absolute; z-index: 1; padding: 5px 8px; font-size: .8rem;
  background: var(--card); border: 1px solid var(--rule); border-radius: 6px; max-width: 52%;
  pointer-events: none; box-shadow: 0 1px 4px #0004; }
.values div { display: flex; gap: 6px; align-items: center; white-space: nowrap; }
.values span { overflow: hidden; text-overflow: ellipsis; }
.values b { margin-left: auto; padding-left: 8px; font-variant-numeric: tabular-nums; }
.table { overflow-x: auto; width: fit-content; max-width: 100%; margin-top: 12px;
  background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: 5px 12px; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
tr:last-child > * { border-bottom: 0; }
td { min-width: 110px; max-width: 240px; overflow-wrap: break-word;
  font-variant-numeric: tabular-nums; }
th { font-weight: 600; } tbody th { font-weight: 400; color: var(--soft); }
thead th { min-width: 110px; overflow-wrap: anywhere; }
th:first-child { position: sticky; left: 0; background: var(--card); min-width: 120px;
  max-width: 300px; overflow-wrap: anywhere; }
tr.differs > td, tr.differs > th { background: var(--mark); color: var(--text); }
details { margin-top: 12px; } summary { cursor: pointer; padding: 6px 0; }
@media (max-width: 600px) { main { padding: 0 10px 32px; } .legend { margin: 10px -10px 0;
  padding: 6px 10px; } th, td { padding: 5px 7px; } td, thead th { min-width: 84px; }
  th:first-child { min-width: 104px; max-width: 140px; } }
"""

# The runs' swatches and names are taken from the legend, values from where a curve lies.
SCRIPT = """
"use strict";
const [LEFT, RIGHT, TOP, BOTTOM, WIDTH] = [GEOMETRY];
const labels = [...document.querySelectorAll(".legend label")];
const shown = run => labels[run].querySelector("input").checked;
function count(value) {
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= size) return +(value / size).toPrecision(4) + unit;
  return String(+value.toPrecision(4));
}
function written(value, form, digits) {
  if (form == "count") return count(value);
  if (form == "scientific") return value.toExponential(2);
  return form == "percent" ? (100 * value).toFixed(digits) + "%" : value.toFixed(digits);
}
function nearest(curve, x) {
  let best = null;
  for (const point of curve.points)
    if (!best || Math.abs(point.x - x) < Math.abs(best.x - x)) best = point;
  return best;
}
function clear(chart) {
  chart.querySelectorAll(".values, .cursor").forEach(each => each.remove());
}
function show(chart, event) {
  clear(chart);
  const svg = chart.querySelector("svg"), box = svg.getBoundingClientRect();
  const x = Math.min(Math.max((event.clientX - box.left) * WIDTH / box.width, LEFT), RIGHT);
  const {x: end, low, high, form, digits} = chart.dataset;
  const values = document.createElement("div");
  values.className = "values";
  const head = values.appendChild(document.createElement("div"));
  head.textContent = count((x - LEFT) / (RIGHT - LEFT) * end) + " tokens";
  for (const curve of chart.querySelectorAll(".curve")) {
    const run = +curve.dataset.run, point = nearest(curve, x);
    const points = curve.points;
    if (!shown(run) || x > points[points.length - 1].x + 4) continue;
    const row = values.appendChild(document.createElement("div"));
    row.append(labels[run].querySelector(".swatch").cloneNode());
    const name = row.appendChild(document.createElement("span"));
    name.textContent = labels[run].innerText;
    const value = +low + (BOTTOM - point.y) / (BOTTOM - TOP) * (high - low);
    row.appendChild(document.createElement("b")).textContent = written(value, form, digits);
  }
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("d", `M${x} ${TOP}V${BOTTOM}`);
  svg.append(cursor);
  chart.append(values);
  if (x > (LEFT + RIGHT) / 2) values.style.left = "14%";
  else values.style.right = "5%";
  values.style.top = box.top - chart.getBoundingClientRect().top + "px";
}
for (const chart of document.querySelectorAll(".chart")) {
  const svg = chart.querySelector("svg");
  for (const kind of ["pointermove", "pointerdown"])
    svg.addEventListener(kind, event => show(chart, event));
  svg.addEventListener("pointerleave", () => clear(chart));
}
labels.forEach((label, run) => label.querySelector("input").addEventListener("change", () => {
  for (const each of document.querySelectorAll("svg .r" + run))
    each.style.display = shown(run) ? "" : "none";
}));
"""


def style() -> str:
    """The style sheet, with the colours for a light and a dark page."""
    sheet = _STYLE
    for word, colours in (("LIGHT", _LIGHT), ("DARK", _DARK)):
        sheet = sheet.replace(
            word, " ".join(f"--c{i}: {colour};" for i, colour in enumerate(colours))
        )
    return sheet


def run_styles(num_runs: int) -> str:
    """The colour of each run, and dashes when the colours come again."""
    rules = []
    for run in range(num_runs):
        rules.append(f".r{run} {{ --run: var(--c{run % NUM_COLOURS}); }}")
        if run // NUM_COLOURS % 2:
            rules.append(f".curve.r{run} {{ stroke-dasharray: 5 3; }}")
            rules.append(f".swatch.r{run} {{ border-top-style: dashed; }}")
    return "\n".join(rules)
