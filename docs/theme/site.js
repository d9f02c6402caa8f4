// The theme's own markup, made usable by keyboard and screen reader.
addEventListener("load", () => {
  // The buttons of a code block are a <nav> without a name, once for each block.
  document.querySelectorAll(".md-code__nav").forEach((bar, i) => {
    bar.setAttribute("aria-label", `Code block ${i + 1}`)
  })
  // What scrolls inside itself must be reachable by keyboard.
  document.querySelectorAll(".md-typeset__scrollwrap").forEach((box) => {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0
  })
})
