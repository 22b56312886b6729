"use strict";
// A click on a head sorts by its column, a second click the other way round; empty cells stay at the end.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.key;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "" || x === undefined || y === undefined) return (x ? 0 : 1) - (y ? 0 : 1);
        const [n, m] = [Number(x), Number(y)];
        const order = Number.isNaN(n) || Number.isNaN(m) ? x.localeCompare(y) : n - m;
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}
// A table that is wider than the page fades at its right edge until its last column is seen, and says so below.
for (const box of document.querySelectorAll(".wide")) {
  const hint = box.nextElementSibling;
  const look = () => {
    const hidden = box.scrollWidth - box.clientWidth;
    box.classList.toggle("more", hidden - box.scrollLeft > 1);
    if (hint && hint.classList.contains("more-columns")) hint.hidden = hidden <= 1;
  };
  box.addEventListener("scroll", look, { passive: true });
  addEventListener("resize", look);
  look();
}
