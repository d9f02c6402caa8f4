"use strict";
// Charts of Observable Plot, each with its values as a table.
const OKABE_ITO = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A"];

function put(id, ...nodes) {
  const place = document.getElementById(id);
  place.replaceChildren(...nodes);
  // The name of a chart is its own; groups inside have no role, and may have no name.
  for (const svg of place.querySelectorAll("svg[aria-label]")) svg.setAttribute("role", "img");
  for (const group of place.querySelectorAll("g[aria-label]")) {
    group.dataset.mark = group.getAttribute("aria-label");
    group.removeAttribute("aria-label");
  }
}

function widthOf(panel) {
  return Math.max(260, Math.min(620, document.getElementById(`${panel}-chart`).clientWidth || 480));
}

// Lines over slots. `rows` are {slot, value, name}, and {low, high} where there is an interval;
// `chosen` is the slot that is marked, if any.
function curves(id, rows, { label, names, colors = OKABE_ITO, chosen, slots, domain, zero }) {
  const symbol = { domain: names, legend: true };
  const bounded = rows.filter((row) => row.low !== undefined);
  const chart = Plot.plot({
    width: widthOf(id), height: 260, marginLeft: 48, style: { background: "none", fontSize: "12px" },
    x: { label: "slot", ticks: slots.length > 12 ? 8 : slots, tickFormat: "d", domain: [slots[0] - 0.3, slots.at(-1) + 0.3] },
    y: { label, grid: true, domain, nice: !domain },
    color: { domain: names, range: colors }, symbol,
    ariaLabel: `${label} by slot`,
    marks: [
      Plot.ruleX(chosen === undefined ? [] : [chosen], { stroke: "currentColor", strokeOpacity: 0.35, strokeWidth: 6 }),
      ...(zero ? [Plot.ruleY([0])] : []),
      Plot.areaY(bounded, { x: "slot", y1: "low", y2: "high", fill: "name", fillOpacity: 0.12 }),
      Plot.lineY(rows, { x: "slot", y: "value", stroke: "name", strokeWidth: 1.8 }),
      Plot.dot(rows, { x: "slot", y: "value", stroke: "name", fill: "name", symbol: "name", r: 3.5 }),
      Plot.tip(rows, Plot.pointer({ x: "slot", y: "value", title: (d) => `${d.name}\nslot ${d.slot}: ${withInterval(d)}`, fill: "var(--card)" })),
    ],
  });
  put(`${id}-chart`, chart);
  put(`${id}-table`, slotTable(rows, names, slots, chosen));
}

function withInterval({ value, low, high }) {
  return low === undefined ? shown(value) : `${shown(value)} [${shown(low)}, ${shown(high)}]`;
}

function slotTable(rows, names, slots, chosen) {
  const found = new Map(rows.map((row) => [`${row.slot} ${row.name}`, row.value]));
  const lines = slots.map((slot) => ({
    head: slot, now: slot === chosen, cells: names.map((name) => found.get(`${slot} ${name}`)),
  }));
  return table(["slot", ...names], lines);
}

// Squares by layer and head; `pick(layer, head)` is called for a click.
function squares(id, rows, { label, chosen, pick }) {
  const layers = [...new Set(rows.map((row) => row.layer))];
  const heads = [...new Set(rows.map((row) => row.head))];
  const marked = rows.filter((row) => row.layer === chosen.layer && (chosen.head === "mean" || row.head === chosen.head));
  const chart = Plot.plot({
    width: widthOf(id), height: Math.max(160, 60 + 26 * layers.length), marginLeft: 48, padding: 0,
    style: { background: "none", fontSize: "12px", cursor: "pointer" },
    x: { label: "head", domain: heads, type: "band" }, y: { label: "layer", domain: layers, type: "band" },
    color: { scheme: "cividis", label, legend: true },
    ariaLabel: `${label} by layer and head`,
    marks: [
      Plot.cell(rows, { x: "head", y: "layer", fill: "value", inset: 0.5 }),
      Plot.cell(marked, { x: "head", y: "layer", fill: "none", stroke: "#fff", strokeWidth: 4, inset: 1.5 }),
      Plot.cell(marked, { x: "head", y: "layer", fill: "none", stroke: "#000", strokeWidth: 1.5, inset: 1.5 }),
      Plot.tip(rows, Plot.pointer({ x: "head", y: "layer", title: (d) => `layer ${d.layer}, head ${d.head}: ${shown(d.value)}`, fill: "var(--card)" })),
    ],
  });
  const drawn = chart.querySelector("svg:last-of-type");
  const source = chart.value === undefined && drawn ? drawn : chart;
  chart.addEventListener("click", () => {
    const at = source.value ?? chart.value;
    if (at) pick(at.layer, at.head);
  });
  put(`${id}-chart`, chart);
  const found = new Map(rows.map((row) => [`${row.layer} ${row.head}`, row.value]));
  const lines = layers.map((layer) => ({
    head: layer, now: layer === chosen.layer, cells: heads.map((head) => found.get(`${layer} ${head}`)),
  }));
  put(`${id}-table`, table(["layer", ...heads.map((head) => `head ${head}`)], lines));
}

// One map for each name, side by side: `values` are probabilities by map, row and column.
function grids(id, values, { label, names }) {
  const rows = values.flatMap((map, i) => map.flatMap((line, row) => line.map((value, column) => ({ map: names[i], row, column, value }))));
  const width = widthOf(id);
  const gap = 0.06; // between maps, as a share of a map and its gap
  const side = ((width - 16) / (names.length - gap)) * (1 - gap); // of one map, so that cells are square
  const chart = Plot.plot({
    width, height: 36 + Math.round((side * values[0].length) / values[0][0].length), padding: 0,
    marginLeft: 8, marginRight: 8, marginBottom: 8, marginTop: 28, style: { background: "none", fontSize: "12px" },
    x: { axis: null, type: "band" }, y: { axis: null, type: "band" }, fx: { label: null, axis: "top", domain: names, padding: gap },
    color: { scheme: "cividis", domain: [0, 1], label, legend: true },
    ariaLabel: `${label} over the picture, by class`,
    marks: [
      Plot.cell(rows, { fx: "map", x: "column", y: "row", fill: "value" }),
      Plot.tip(rows, Plot.pointer({ fx: "map", x: "column", y: "row", title: (d) => `${d.map}\nrow ${d.row}, column ${d.column}: ${shown(d.value)}`, fill: "var(--card)" })),
    ],
  });
  put(`${id}-chart`, chart);
  const header = names.flatMap((name) => values[0][0].map((_, column) => `${name}, column ${column}`));
  const lines = values[0].map((_, row) => ({ head: row, cells: values.flatMap((map) => map[row]) }));
  put(`${id}-table`, table(["row", ...header], lines));
}

function table(header, lines) {
  const made = document.createElement("table");
  const head = made.createTHead().insertRow();
  header.forEach((name, i) => {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = name;
    if (i) cell.className = "number";
    head.append(cell);
  });
  const body = made.createTBody();
  for (const line of lines) {
    const row = body.insertRow();
    if (line.now) row.className = "now";
    row.insertCell().textContent = line.head;
    for (const value of line.cells) row.insertCell().textContent = shown(value);
  }
  return made;
}
