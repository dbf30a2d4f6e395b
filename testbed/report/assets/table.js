// The table of schemes: sorted by any column, with more columns on demand; and schemes hidden in all figures.
"use strict";
(function () {
  const table = document.getElementById("scheme-table");
  if (!table) return;

  // --- sorting: within each part, so that reference lines stay apart
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button"; button.className = "sort";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => (column ? (row.cells[column].dataset.v === undefined ? null : +row.cells[column].dataset.v) : row.cells[0].innerText.trim());
      for (const body of table.tBodies) {
        const rows = [...body.rows].filter((row) => row.dataset.row !== undefined);
        rows.sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          if (x === null || y === null) return (x === null) - (y === null);   // unknown ones last, either way
          return (x < y ? -1 : x > y ? 1 : 0) * (down === !!column ? -1 : 1);
        });
        body.append(...rows);
      }
    });
  });

  // --- more columns
  const more = document.getElementById("more");
  if (more) {
    more.hidden = false;
    more.addEventListener("click", () => {
      const all = table.classList.toggle("all");
      more.setAttribute("aria-expanded", String(all));
      more.textContent = all ? "fewer columns" : "more columns";
    });
  }

  // --- schemes hidden: in every figure, and greyed in the table
  const figures = document.querySelector(".figures");
  if (!figures || !figures.querySelector("[data-scheme]")) return;
  const chips = document.createElement("fieldset");
  chips.className = "chips";
  chips.innerHTML = "<legend>schemes in the figures</legend>";
  for (const row of table.querySelectorAll("tr[data-row]")) {
    const key = row.dataset.row.slice("scheme:".length), drawn = figures.querySelectorAll(`[data-scheme="${CSS.escape(key)}"]`);
    if (!drawn.length) continue;
    const label = document.createElement("label"), box = document.createElement("input");
    box.type = "checkbox"; box.checked = true;
    label.append(box, row.cells[0].querySelector("svg").cloneNode(true), " " + row.cells[0].innerText.trim());
    box.addEventListener("change", () => {
      for (const node of drawn) node.style.display = box.checked ? "" : "none";
      row.classList.toggle("off", !box.checked);
    });
    chips.append(label);
  }
  figures.before(chips);
})();
