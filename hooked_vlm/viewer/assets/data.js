"use strict";
// Reads the embedded arrays: whole numbers of steps, compressed, in base64.
class Numbers {
  constructor(packed, steps) {
    this.shape = packed.shape;
    this.low = packed.low;
    this.step = packed.step;
    this.steps = steps;
  }

  static async read(packed) {
    const bytes = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const raw = await new Response(stream).arrayBuffer();
    return new Numbers(packed, packed.bits === 16 ? new Uint16Array(raw) : new Uint32Array(raw));
  }

  at(...index) {
    const place = index.reduce((sum, i, axis) => sum * this.shape[axis] + i, 0);
    return this.step ? this.low + this.step * this.steps[place] : this.steps[place];
  }
}

async function readPage() {
  const page = JSON.parse(document.getElementById("data").textContent);
  const names = Object.keys(page.arrays);
  const read = await Promise.all(names.map((name) => Numbers.read(page.arrays[name])));
  page.arrays = Object.fromEntries(names.map((name, i) => [name, read[i]]));
  return page;
}
