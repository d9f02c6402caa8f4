// The theme's own markup, made usable by keyboard and screen reader.
addEventListener("load", () => {
  // The buttons of a code block are a <nav> without a name, once for each block.
  document.querySelectorAll(".md-code__nav").forEach((bar, i) => {
    bar.setAttribute("aria-label", `Code block ${i + 1}`)
  })
  // What scrolls inside itself must be reachable by keyboard; what scrolls depends on the width.
  const reachable = new ResizeObserver((seen) => {
    for (const { target } of seen) {
      if (target.scrollWidth > target.clientWidth) target.tabIndex = 0
      else target.removeAttribute("tabindex")
    }
  })
  document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code").forEach((box) => reachable.observe(box))
})
