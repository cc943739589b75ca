"use strict";
// Sort a table by the column whose heading is clicked, or pressed with the keyboard.
function sortKey(cell, numbers) {
  if (cell.dataset.sort !== undefined) return Number(cell.dataset.sort);
  const text = cell.textContent.trim();
  return numbers || text === "" || text === "\u2013" ? null : text.toLowerCase();
}

function compare(a, b, sign) {
  // What has no value stays last, whichever way the others go.
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a === "number" && typeof b === "number") return sign * (a - b);
  return sign * String(a).localeCompare(String(b), "en", { numeric: true });
}

function sortBy(heading) {
  const body = heading.closest("table").tBodies[0];
  const column = heading.cellIndex;
  const numbers = !heading.classList.contains("text");
  const now = heading.getAttribute("aria-sort");
  const descending = now === "none" ? numbers : now === "ascending";
  for (const other of heading.parentElement.cells) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const rows = Array.from(body.rows, (row) => [sortKey(row.cells[column], numbers), row]);
  rows.sort((one, other) => compare(one[0], other[0], descending ? -1 : 1));
  body.append(...rows.map((pair) => pair[1]));
}

for (const heading of document.querySelectorAll("table.sortable thead th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...heading.childNodes);
  heading.append(button);
  heading.setAttribute("aria-sort", "none");
  button.addEventListener("click", () => sortBy(heading));
}

// What is folded on the screen is open on paper.
let opened = [];
window.addEventListener("beforeprint", () => {
  opened = Array.from(document.querySelectorAll("details:not([open])"));
  for (const part of opened) part.open = true;
});
window.addEventListener("afterprint", () => {
  for (const part of opened) part.open = false;
});
