// Tables that sort and filter, and names that light up everywhere when one is pointed at. Without it the page is whole.
"use strict";

function numberOf(text) {
  const found = text.replace(/\u2212/g, "-").replace(/,/g, "").match(/^[<>]?\s*([-+]?\d+(\.\d+)?(e[-+]?\d+)?)/i);
  return found ? Number(found[1]) : NaN;
}

function sortBy(table, column, header) {
  const body = table.tBodies[0];
  const descending = header.getAttribute("aria-sort") === "ascending";
  const words = header.classList.contains("words");
  const key = (row) => row.cells[column].textContent.trim();
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [numberOf(key(a)), numberOf(key(b))];
    // What is no number is last either way.
    if (!words && Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
    const order = words || Number.isNaN(x) ? key(a).localeCompare(key(b)) : x - y;
    return descending ? -order : order;
  });
  body.append(...rows);
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
}

for (const table of document.querySelectorAll(".scroll table")) {
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => sortBy(table, column, header));
  });
  if (table.tBodies[0].rows.length < 4) continue;
  const filter = document.createElement("input");
  filter.type = "search";
  filter.placeholder = "filter rows";
  filter.setAttribute("aria-label", "filter the rows of this table");
  filter.addEventListener("input", () => {
    const wanted = filter.value.toLowerCase();
    for (const row of table.tBodies[0].rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
  table.parentElement.before(filter);
}

function light(event) {
  const name = event.target.closest?.("[data-name]")?.dataset.name;
  for (const one of document.querySelectorAll("[data-name]")) {
    one.classList.toggle("on", one.dataset.name === name);
  }
}
document.addEventListener("pointerover", light);
document.addEventListener("focusin", light);
