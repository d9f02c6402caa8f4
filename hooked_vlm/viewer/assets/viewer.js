"use strict";
// The page's state, its controls and its panels.  The state is in the address, after "#".
readPage().then(start).catch((error) => {
  document.getElementById("status").textContent = `The page's numbers cannot be read: ${error}`;
});

function start(page) {
  const { arrays, slots, layers, answers, regions, probes } = page;
  const by = (id) => document.getElementById(id);
  const rows = page.y.length - 1;
  const cols = page.x.length - 1;
  const nHeads = arrays.attention ? arrays.attention.shape[2] : 0;
  const chips = [...document.querySelectorAll("input[name=token]")];
  const maps = [...by("map").options].map((option) => option.value);
  const heads = ["mean", ...Array(nHeads).keys()].map(String);
  // For each part of the state: the values that it may have.
  const range = (n) => [...Array(n).keys()].map(String);
  const allowed = {
    map: maps, answer: range(answers.length), layer: layers.map((l) => String(l.layer)), head: heads,
    slot: slots.map((s) => String(s.slot)), token: chips.map((chip) => chip.value),
    row: range(rows), col: range(cols), region: range(regions.length), read: ["cell", "token"],
  };
  const state = {
    map: maps[0], answer: "0", layer: allowed.layer[Math.floor(layers.length / 2)], head: "mean",
    slot: allowed.slot[Math.floor(slots.length / 2)], token: allowed.token.at(-1),
    row: String(Math.floor(rows / 2)), col: String(Math.floor(cols / 2)), region: "0", read: "cell",
  };

  function fromAddress() {
    for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
      if (allowed[name]?.includes(value)) state[name] = value;
    }
  }

  function set(changes) {
    Object.assign(state, changes);
    const known = Object.entries(state).filter(([name, value]) => allowed[name].length && value !== undefined);
    const hash = `#${new URLSearchParams(known)}`;
    try {
      history.replaceState(null, "", hash);
    } catch {
      // A frame without an address of its own, as in a notebook: the state is kept in memory.
    }
    render();
  }

  const cellOf = (row, col) => row * cols + col;
  const chosenCell = () => cellOf(Number(state.row), Number(state.col));
  const position = () => (state.token === "cell" ? page.positions[chosenCell()] : Number(state.token));
  const tokenName = () => (state.token === "cell" ? cellName() : JSON.stringify(page.tokens[position()]));
  const cellName = () => `row ${state.row}, column ${state.col}`;
  const slotIndex = () => allowed.slot.indexOf(state.slot);
  const layerIndex = () => allowed.layer.indexOf(state.layer);

  function attentionAt(layer, query, head, row, col) {
    const chosen = head === "mean" ? [...Array(nHeads).keys()] : [Number(head)];
    return chosen.reduce((sum, h) => sum + arrays.attention.at(layer, query, h, row, col), 0) / chosen.length;
  }

  // The chosen map: its value in a cell, what it is, and its colours.
  function map() {
    const answer = Number(state.answer);
    const slot = slotIndex();
    const word = JSON.stringify(answers[answer]);
    if (state.map === "attention") {
      const what = `attention from ${tokenName()}, ${layers[layerIndex()].site}, ${state.head === "mean" ? "mean over heads" : `head ${state.head}`}`;
      return { what, at: (r, c) => attentionAt(layerIndex(), position(), state.head, r, c) };
    }
    if (state.map === "lens") {
      const at = (r, c) => arrays.lens.at(slot, page.positions[cellOf(r, c)], answer);
      return { what: `P(${word}) by the lens, ${slots[slot].site}`, at, domain: [0, 1] };
    }
    if (state.map === "patches") {
      const all = arrays.patches;
      let most = 0;
      for (let s = 0; s < slots.length; s++) {
        for (let p = 0; p < rows * cols; p++) most = Math.max(most, Math.abs(all.at(s, p, answer)));
      }
      const at = (r, c) => all.at(slot, cellOf(r, c), answer);
      return { what: `change of the log odds of ${word}, ${slots[slot].site}`, at, domain: [-most || -1, most || 1], diverging: true };
    }
    if (state.map.startsWith("probe ")) {
      const [number, one] = state.map.split(" ").slice(1).map(Number);
      const own = probes[number];
      const index = own.slots.indexOf(Number(state.slot));
      const what = `P(${own.classes[one]}) by the probe ${own.name}, ${slots[slot].site}`;
      if (index < 0) return { what: `no probe ${own.name} at this slot` };
      return { what, at: (r, c) => arrays[`probes.${own.name}`].at(index, one, r, c), domain: [0, 1] };
    }
    return { what: "the picture alone" };
  }

  let current = { what: "" };

  function renderCells() {
    current = map();
    const { at, domain, diverging } = current;
    const values = [...cells].map((_, i) => (at ? at(Math.floor(i / cols), i % cols) : null));
    const span = domain ?? [0, Math.max(...values) || 1];
    const scheme = diverging ? "PuOr" : "cividis";
    const colour = diverging ? d3.scaleDiverging([span[0], 0, span[1]], d3.interpolatePuOr) : d3.scaleSequential(span, d3.interpolateCividis);
    const inRegion = new Set(state.map === "patches" && regions.length ? regions[Number(state.region)].cells : []);
    cells.forEach((cell, i) => {
      const here = i === chosenCell();
      const opacity = Number(by("opacity").value) / 100;
      const fill = d3.color(at ? colour(values[i]) : "transparent");
      cell.style.backgroundColor = at ? `rgb(${fill.rgb().r} ${fill.rgb().g} ${fill.rgb().b} / ${opacity})` : "transparent";
      cell.setAttribute("aria-selected", String(here));
      cell.tabIndex = here ? 0 : -1;
      cell.style.setProperty("--edges", inRegion.has(i) ? edges(i, inRegion) : "none");
      cell.setAttribute("aria-label", said(i, values[i]));
    });
    say(chosenCell());
    const legend = at && Plot.legend({
      color: { scheme, domain: span, type: diverging ? "diverging" : "linear" },
      width: Math.min(320, by("legend").clientWidth || 320), style: { background: "none" },
    });
    put("legend", ...(legend ? [legend] : []));
  }

  // The border of a region, on the sides of a cell where it ends.
  function edges(i, region) {
    const [row, col] = [Math.floor(i / cols), i % cols];
    const sides = [
      [row > 0 && region.has(i - cols), "0 3px"], [row < rows - 1 && region.has(i + cols), "0 -3px"],
      [col > 0 && region.has(i - 1), "3px 0"], [col < cols - 1 && region.has(i + 1), "-3px 0"],
    ];
    return sides.filter(([goesOn]) => !goesOn).map(([, side]) => `inset ${side} #000`).join(", ") || "none";
  }

  function said(i, value) {
    const place = `Row ${Math.floor(i / cols)}, column ${i % cols}`;
    return value === null || value === undefined ? place : `${place}: ${shown(value)}`;
  }

  function say(i) {
    const { what, at } = current;
    const value = at ? at(Math.floor(i / cols), i % cols) : null;
    by("status").textContent = `${said(i, value)} (${what}; position ${page.positions[i]})`;
  }

  function renderAttention() {
    if (!arrays.attention) return;
    const query = position();
    const found = [];
    layers.forEach(({ layer }, l) => {
      for (let head = 0; head < nHeads; head++) found.push({ layer, head, value: arrays.attention_share.at(l, query, head) });
    });
    const chosen = { layer: Number(state.layer), head: state.head === "mean" ? "mean" : Number(state.head) };
    const picked = found.filter((row) => row.layer === chosen.layer && (chosen.head === "mean" || row.head === chosen.head));
    const mean = picked.reduce((sum, row) => sum + row.value, 0) / picked.length;
    by("attention-here").textContent = `Token ${tokenName()} (position ${query}), ${layers[layerIndex()].site}, ${state.head === "mean" ? "mean over heads" : `head ${state.head}`}: ${shown(mean)} of its attention is on the picture.`;
    squares("attention", found, {
      label: "share of attention on the picture", chosen,
      pick: (layer, head) => set({ layer: String(layer), head: String(head), map: "attention" }),
    });
  }

  function renderLens() {
    if (!arrays.lens) return;
    const at = state.read === "cell" ? page.positions[chosenCell()] : position();
    const name = state.read === "cell" ? cellName() : tokenName();
    by("lens-here").textContent = `At ${name} (position ${at}), ${slots[slotIndex()].site}.`;
    const top = arrays.top_ids.shape[2];
    const lines = [...Array(top).keys()].map((rank) => {
      const row = document.createElement("tr");
      const word = row.insertCell();
      word.textContent = JSON.stringify(page.words[arrays.top_ids.at(slotIndex(), at, rank)]);
      const value = row.insertCell();
      value.className = "number";
      value.textContent = shown(arrays.top_probabilities.at(slotIndex(), at, rank));
      return row;
    });
    by("lens-top").tBodies[0].replaceChildren(...lines);
    const names = answers.map((word) => JSON.stringify(word));
    const found = slots.flatMap(({ slot }, s) => names.map((word, i) => ({ slot, name: word, value: arrays.lens.at(s, at, i) })));
    curves("lens", found, { label: "probability", names, chosen: Number(state.slot), slots: slots.map((s) => s.slot), domain: [0, 1] });
  }

  function renderPatches() {
    if (!arrays.patches) return;
    const answer = Number(state.answer);
    const names = [`cell ${state.row}, ${state.col}`, ...(regions.length ? [regions[Number(state.region)].name] : [])];
    const places = [chosenCell(), rows * cols + Number(state.region)];
    const found = slots.flatMap(({ slot }, s) => names.map((name, i) => ({ slot, name, value: arrays.patches.at(s, places[i], answer) })));
    const clean = arrays.final.at(answer);
    by("patches-here").textContent = `Answer ${JSON.stringify(answers[answer])}, whose probability without an edit is ${shown(clean)}. Edits act at ${slots[slotIndex()].site} where the line is marked.`;
    curves("patches", found, { label: "change of log odds", names, chosen: Number(state.slot), slots: slots.map((s) => s.slot), zero: true });
  }

  function renderProbes() {
    probes.forEach((own, number) => {
      const found = own.slots.flatMap((slot, s) => own.classes.map((name, i) => (
        { slot, name, value: arrays[`probes.${own.name}`].at(s, i, Number(state.row), Number(state.col)) })));
      const index = own.slots.indexOf(Number(state.slot));
      const accuracy = index < 0 ? null : own.accuracy[index];
      by(`probe-${number}-here`).textContent = index < 0 ? "There is no probe at this slot." : `Cell ${cellName()}, ${slots[slotIndex()].site}${accuracy === null ? "" : `; accuracy of this slot's probe ${shown(accuracy)}`}.`;
      curves(`probe-${number}`, found, { label: "probability", names: own.classes, chosen: Number(state.slot), slots: own.slots, domain: [0, 1] });
    });
  }

  function renderControls() {
    for (const id of ["map", "answer", "head", "region", "read"]) if (by(id)) by(id).value = state[id];
    by("slot").value = slotIndex();
    by("slot-name").textContent = `${state.slot} · ${slots[slotIndex()].site}`;
    if (by("layer")) {
      by("layer").value = layerIndex();
      by("layer-name").textContent = `${state.layer} · ${layers[layerIndex()].site}`;
      by("layer").setAttribute("aria-valuetext", by("layer-name").textContent);
    }
    by("slot").setAttribute("aria-valuetext", by("slot-name").textContent);
    for (const chip of chips) chip.checked = chip.value === state.token;
  }

  function render() {
    renderControls();
    renderCells();
    renderAttention();
    renderLens();
    renderPatches();
    renderProbes();
  }

  function choices(id, names) {
    by(id)?.replaceChildren(...names.map((name, i) => new Option(name[0], name[1] ?? String(i))));
  }

  function makeCells() {
    const made = [];
    for (let r = 0; r < rows; r++) {
      const row = document.createElement("div");
      row.setAttribute("role", "row");
      for (let c = 0; c < cols; c++) {
        const cell = document.createElement("div");
        cell.className = "cell";
        cell.setAttribute("role", "gridcell");
        Object.assign(cell.style, {
          left: `${100 * page.x[c]}%`, top: `${100 * page.y[r]}%`,
          width: `${100 * (page.x[c + 1] - page.x[c])}%`, height: `${100 * (page.y[r + 1] - page.y[r])}%`,
        });
        cell.addEventListener("click", () => { set({ row: String(r), col: String(c) }); cell.focus(); });
        cell.addEventListener("pointerenter", () => say(cellOf(r, c)));
        row.append(cell);
        made.push(cell);
      }
      by("cells").append(row);
    }
    by("cells").addEventListener("pointerleave", () => say(chosenCell()));
    by("cells").setAttribute("aria-rowcount", String(rows));
    by("cells").setAttribute("aria-colcount", String(cols));
    return made;
  }

  function moved(key, whole) {
    const [row, col] = [Number(state.row), Number(state.col)];
    const to = {
      ArrowUp: [row - 1, col], ArrowDown: [row + 1, col], ArrowLeft: [row, col - 1], ArrowRight: [row, col + 1],
      Home: [whole ? 0 : row, 0], End: [whole ? rows - 1 : row, cols - 1],
    }[key];
    return to && [Math.min(rows - 1, Math.max(0, to[0])), Math.min(cols - 1, Math.max(0, to[1]))];
  }

  by("cells").addEventListener("keydown", (event) => {
    if ((event.key === "Enter" || event.key === " ") && allowed.token.includes("cell")) {
      event.preventDefault();
      set({ token: "cell", ...(arrays.attention ? { map: "attention" } : {}) });
    }
    const to = moved(event.key, event.ctrlKey);
    if (!to) return;
    event.preventDefault();
    set({ row: String(to[0]), col: String(to[1]) });
    cells[cellOf(...to)].focus();
  });
  for (const id of ["map", "answer", "head", "region", "read"]) {
    by(id)?.addEventListener("change", (event) => set({ [id]: event.target.value }));
  }
  for (const id of ["layer", "slot"]) {
    by(id)?.addEventListener("input", (event) => set({ [id]: allowed[id][Number(event.target.value)] }));
  }
  by("opacity").addEventListener("input", renderCells);
  chips.forEach((chip) => chip.addEventListener("change", () => set({ token: chip.value })));
  by("copy").addEventListener("click", () => {
    navigator.clipboard?.writeText(location.href).then(
      () => { by("copied").textContent = "Copied."; },
      () => { by("copied").textContent = "Copy the address of this page: it has the state."; },
    );
  });
  window.addEventListener("hashchange", () => { fromAddress(); render(); });
  let timer = 0;
  window.addEventListener("resize", () => { clearTimeout(timer); timer = setTimeout(render, 150); });

  by("image").src = page.image;
  by("plain").src = page.image;
  by("image").width = page.size[0];
  by("image").height = page.size[1];
  choices("answer", answers.map((word) => [JSON.stringify(word)]));
  choices("head", heads.map((head) => [head === "mean" ? "mean over heads" : `head ${head}`, head]));
  choices("region", regions.map((region) => [region.name]));
  by("slot").max = String(slots.length - 1);
  if (by("layer")) by("layer").max = String(layers.length - 1);
  const cells = makeCells();
  fromAddress();
  render();
  document.documentElement.dataset.ready = "yes";
}
