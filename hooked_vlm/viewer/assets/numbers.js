"use strict";
// The text of a number: four decimals, and a minus sign for negative ones alone.
function shown(value) {
  if (value === null || value === undefined) return "";
  const text = value.toFixed(4);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "−");
}
