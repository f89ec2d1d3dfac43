"use strict";
const jobs = JSON.parse(document.getElementById("data").textContent);
const plot = document.getElementById("plot");
const tip = document.getElementById("tip");
const dot = document.getElementById("dot");
const marked = [...document.querySelectorAll("[data-jobs]")].map((e) => [e, new Set(e.dataset.jobs.split(" "))]);

function highlight(numbers) {
  if (plot) plot.classList.toggle("some", numbers.length > 0);
  for (const [element, own] of marked) element.classList.toggle("on", numbers.some((number) => own.has(number)));
}

for (const [element, own] of marked) {
  const isCurve = element.classList.contains("curve");
  if (isCurve) element.querySelector("title").remove(); // the browser's own tooltip would lie over #tip
  if (isCurve || !own.size) continue;
  if (element.tagName === "TR") element.tabIndex = 0;
  for (const event of ["pointerenter", "focus"]) element.addEventListener(event, () => highlight([...own]));
  for (const event of ["pointerleave", "blur"]) element.addEventListener(event, () => highlight([]));
}

if (plot) {
  let at = null; // [job, point], as indices

  function show(job, point) {
    at = [job, point];
    const { number, name } = jobs[job];
    const [tokens, loss, x, y] = jobs[job].points[point];
    highlight([number]);
    tip.textContent = `${name.join("\n")}\ntokens ${tokens.toLocaleString("en")}\nval/loss ${loss.toFixed(4)}`;
    tip.hidden = dot.hidden = false;
    const [left, top] = [(x / 1000) * plot.clientWidth, (Math.max(y, 0) / 1000) * plot.clientHeight];
    dot.style.left = `${left}px`;
    dot.style.top = `${top}px`;
    const room = plot.clientWidth - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(room, left + (left > room ? -tip.offsetWidth - 14 : 14)))}px`;
    tip.style.top = `${top > tip.offsetHeight + 14 ? top - tip.offsetHeight - 14 : top + 14}px`;
  }

  function hide() {
    at = null;
    tip.hidden = dot.hidden = true;
    highlight([]);
  }

  function follow(event) {
    const area = plot.getBoundingClientRect();
    let [nearest, distance] = [null, 60]; // pixels
    jobs.forEach(({ points }, job) => points.forEach(([, , x, y], point) => {
      if (y < 0) return; // above the picture
      const away = Math.hypot(area.left + (x / 1000) * area.width - event.clientX,
                              area.top + (y / 1000) * area.height - event.clientY);
      if (away < distance) [nearest, distance] = [[job, point], away];
    }));
    if (nearest) show(...nearest); else hide();
  }

  function last(job) {
    return jobs[job].points.length - 1;
  }

  plot.tabIndex = 0;
  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("focus", () => { if (!at && plot.matches(":focus-visible")) show(0, last(0)); });
  plot.addEventListener("keydown", (event) => {
    const [job, point] = at ?? [0, last(0)];
    const to = (number) => [number, Math.min(point, last(number))];
    const moves = {
      ArrowLeft: [job, Math.max(point - 1, 0)],
      ArrowRight: [job, Math.min(point + 1, last(job))],
      ArrowUp: to(Math.max(job - 1, 0)),
      ArrowDown: to(Math.min(job + 1, jobs.length - 1)),
    };
    if (event.key === "Escape") hide();
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(...moves[event.key]);
  });
}

function sortBy(heading) {
  const falls = heading.getAttribute("aria-sort") === "ascending";
  for (const other of heading.parentElement.children) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", falls ? "descending" : "ascending");
  const body = heading.closest("table").tBodies[0];
  const valueOf = (row) => {
    const text = row.cells[heading.cellIndex].textContent.trim();
    const number = parseFloat(text.replaceAll(",", ""));
    return Number.isNaN(number) ? text : number;
  };
  const compare = (a, b) => {
    if (a === "" || b === "") return (a === "") - (b === ""); // what is missing is last in both directions
    const order = typeof a === typeof b ? (a > b) - (a < b) : (typeof a > typeof b) - (typeof a < typeof b);
    return falls ? -order : order;
  };
  body.append(...[...body.rows].sort((a, b) => compare(valueOf(a), valueOf(b))));
}

for (const heading of document.querySelectorAll(".board th")) {
  heading.tabIndex = 0;
  heading.addEventListener("click", () => sortBy(heading));
  heading.addEventListener("keydown", (event) => { if (event.key === "Enter") sortBy(heading); });
}

addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
