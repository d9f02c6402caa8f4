"use strict";
// A report's charts to explore: lines over the slots, and probes' maps layer by layer, with values
// under the pointer.
const part = (anchor, name) => document.getElementById(`${anchor}-${name}`);

// A closed part has no width, so its chart is drawn when it is opened.
function drawnWhenOpen(place, draw) {
  place.addEventListener("toggle", () => place.open && draw());
  place.hidden = false;
}

function exploreLines(anchor, charts) {
  const choice = part(anchor, "lines");
  choice.replaceChildren(...charts.map((chart, i) => new Option(chart.label, i)));
  const draw = () => {
    const { rows, ...about } = charts[choice.value];
    const slots = [...new Set(rows.map((row) => row.slot))].sort((a, b) => a - b);
    curves(anchor, rows, { ...about, slots });
  };
  choice.addEventListener("change", draw);
  drawnWhenOpen(part(anchor, "explore"), draw);
}

function exploreMaps(anchor, maps) {
  const axis = part(anchor, "axis");
  const layer = part(anchor, "layer");
  axis.replaceChildren(...maps.map((map, i) => new Option(map.label, i)));
  layer.value = layer.max; // the last layer is the one that the language model gets
  const draw = () => {
    const { sites, classes, values } = maps[axis.value];
    const site = sites[layer.value];
    part(anchor, "site").textContent = `${layer.value}: ${site}`;
    layer.setAttribute("aria-valuetext", site);
    grids(`${anchor}-map`, values[layer.value], { label: "mean probability", names: classes });
  };
  axis.addEventListener("change", draw);
  layer.addEventListener("input", draw);
  drawnWhenOpen(part(anchor, "maps"), draw);
}

for (const [anchor, { charts, maps }] of Object.entries(JSON.parse(document.getElementById("explored").textContent))) {
  if (charts.length) exploreLines(anchor, charts);
  if (maps.length) exploreMaps(anchor, maps);
}
document.documentElement.dataset.ready = "yes";
