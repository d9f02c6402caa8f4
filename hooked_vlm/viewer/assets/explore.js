"use strict";
// A report's charts to explore: a choice of lines over the slots, with values under the pointer.
for (const [anchor, charts] of Object.entries(JSON.parse(document.getElementById("explored").textContent))) {
  const place = document.getElementById(`${anchor}-explore`);
  const choice = document.getElementById(`${anchor}-lines`);
  choice.replaceChildren(...charts.map((chart, i) => new Option(chart.label, i)));
  const draw = () => {
    const { rows, ...about } = charts[choice.value];
    const slots = [...new Set(rows.map((row) => row.slot))].sort((a, b) => a - b);
    curves(anchor, rows, { ...about, slots });
  };
  choice.addEventListener("change", draw);
  // A closed part has no width, so its chart is drawn when it is opened.
  place.addEventListener("toggle", () => place.open && draw());
  place.hidden = false;
}
document.documentElement.dataset.ready = "yes";
