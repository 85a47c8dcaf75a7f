"use strict";
// Draws every figure of the page, in the colours of the reader's theme.
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage"]] };
const AXIS = /^[xy]axis\d*$/;

function theme(layout) {
  const themed = { ...layout, font: { ...layout.font, color: css("--ink") } };
  themed.hoverlabel = { ...layout.hoverlabel, bgcolor: css("--card"), bordercolor: css("--rule"), font: { color: css("--ink"), size: 12 } };
  for (const key of Object.keys(layout).filter((k) => AXIS.test(k)))
    themed[key] = { ...layout[key], gridcolor: css("--grid"), linecolor: css("--rule"), tickcolor: css("--rule") };
  return themed;
}

// On a narrow page the names of rows and points take at most a third of it.
function fitted(div, { data, layout }) {
  const most = Math.max(8, Math.floor(div.clientWidth / 3 / 7));
  const half = Math.floor((most - 1) / 2);
  const short = (t) => (typeof t === "string" && t.length > most ? t.slice(0, half) + "…" + t.slice(-half) : t);
  const ticks = layout.yaxis && layout.yaxis.ticktext;
  return {
    data: data.map((d) => (Array.isArray(d.text) && /text/.test(d.mode) ? { ...d, text: d.text.map(short) } : d)),
    layout: ticks ? { ...layout, yaxis: { ...layout.yaxis, ticktext: ticks.map(short) } } : layout,
  };
}

function draw(div, figure) {
  div.figure = figure;
  const { data, layout } = fitted(div, figure);
  return Plotly.react(div, data, theme(layout), config);
}

const read = (id) => JSON.parse(document.getElementById(id).textContent);

// Labels of formats that lie close together go above, below and to the right of their points.
function placements(points) {
  const near = (p, q) => Math.abs(p[1] - q[1]) < 0.4 && Math.abs(Math.log10(p[2] / q[2])) < 0.4;
  return points.map((p) => {
    const others = points.filter((q) => q !== p && near(p, q));
    const above = others.filter((q) => q[2] > p[2]).length, below = others.filter((q) => q[2] < p[2]).length;
    return above === 0 ? "top center" : below === 0 ? "bottom center" : p[1] < others[0][1] ? "middle left" : "middle right";
  });
}

function curveFigure(curve, base) {
  const [formats, bits, nmse] = [0, 1, 2].map((i) => curve.points.map((p) => p[i]));
  const best = [];
  curve.points.forEach((p) => { if (!best.length || p[2] < best[best.length - 1][2]) best.push(p); });
  const escape = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");
  const data = [
    { x: best.map((p) => p[1]), y: best.map((p) => p[2]), mode: "lines", line: { color: "#777", width: 1, dash: "dot" }, name: "best for the bits", hoverinfo: "skip" },
    { x: bits, y: nmse, mode: "markers+text", text: formats, textposition: placements(curve.points), textfont: { size: 11 }, marker: { color: "#3b82c4", size: 8 }, name: "format",
      hovertemplate: "%{text}<br>%{x:.3f} bits per weight<br>NMSE %{y:.3e}<extra></extra>" },
  ];
  const rings = ["#c8641e", "#1b8a6b", "#a8559c", "#94791a", "#7a6fd6", "#c94c5c"];
  curve.chosen.forEach(([plan, format], i) => {
    const at = curve.points.find((p) => p[0] === format);
    if (at) data.push({ x: [at[1]], y: [at[2]], mode: "markers", name: "chosen by " + escape(plan), hoverinfo: "skip",
      marker: { symbol: "circle-open", size: 17 + 6 * i, color: rings[i % rings.length], line: { width: 2 } } });
  });
  return { data, layout: base };
}

for (const div of document.querySelectorAll("[data-figure]")) draw(div, read(div.dataset.figure));
for (const div of document.querySelectorAll("[data-curves]")) {
  const curves = read(div.dataset.curves), base = read(div.dataset.layout).layout;
  const select = document.getElementById(div.dataset.select);
  curves.forEach((c, i) => select.add(new Option(`${c.name}  (${c.role}, ${c.shape})`, i)));
  select.onchange = () => draw(div, curveFigure(curves[select.value], base));
  select.onchange();
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const div of document.querySelectorAll(".plot")) draw(div, div.figure);
});
