// Sorts and filters the table of all settings, and fills in the pictures that the page holds once.
const settings = document.querySelector("table.sortable");
const lines = [...settings.tBodies[0].rows];
const heads = [...settings.tHead.rows[0].cells];

function sort(column, down) {
  const text = row => (row.cells[column].firstChild?.textContent ?? "").trim(); // without the interval
  const value = row => (text(row) === "identical" ? Infinity : parseFloat(text(row)));
  const words = heads[column].classList.contains("text");
  const compare = (one, two) => {
    if (text(one) === "" || text(two) === "") return (text(one) === "") - (text(two) === "");
    if (text(one) === text(two)) return 0;
    const order = words ? text(one).localeCompare(text(two), undefined, { numeric: true }) : value(one) - value(two);
    return down ? -order : order;
  };
  heads.forEach(head => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", down ? "descending" : "ascending");
  settings.tBodies[0].append(...[...settings.tBodies[0].rows].sort(compare));
}
heads.forEach((head, column) => {
  const first = !head.classList.contains("text");
  head.firstChild.addEventListener("click", () => {
    const held = head.getAttribute("aria-sort");
    sort(column, held === null ? first : held === "ascending");
  });
});

const filters = { find: document.querySelector(".find"), origin: document.querySelector(".origin"), task: document.querySelector(".task") };
function filter() {
  const words = filters.find.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of lines) {
    const text = `${row.cells[0].textContent} ${row.cells[1].textContent}`.toLowerCase();
    const origin = !filters.origin?.value || row.dataset.origin === filters.origin.value;
    const task = !filters.task?.value || row.dataset.task === filters.task.value;
    row.hidden = !(origin && task && words.every(word => text.includes(word)));
  }
  const count = lines.filter(row => !row.hidden).length;
  document.querySelector(".count").textContent = `${count} of ${lines.length} rows`;
}
for (const field of Object.values(filters)) field?.addEventListener("input", filter);

document.addEventListener("find-row", event => {
  const row = document.getElementById(`row-${event.detail}`);
  Object.values(filters).forEach(field => { if (field) field.value = ""; });
  filter();
  lines.forEach(each => each.classList.toggle("found", each === row));
  row.scrollIntoView({ block: "center" });
});

function follow() {
  const asked = new URLSearchParams(location.hash.slice(1));
  for (const [name, field] of Object.entries(filters)) if (field && asked.has(name)) field.value = asked.get(name);
  filter();
  const [title, order] = (asked.get("sort") ?? "").split(":");
  const column = heads.findIndex(head => head.textContent.trim() === title);
  if (column >= 0) sort(column, order !== "ascending");
}
addEventListener("hashchange", follow);
follow();

const once = JSON.parse(document.getElementById("pictures").textContent);
document.querySelectorAll("img.uncached").forEach(image => {
  if (once[image.dataset.of]) image.src = once[image.dataset.of];
  else image.remove();
});
const motion = document.querySelector(".motion");
if (motion) {
  const still = on => {
    document.body.classList.toggle("still", on);
    motion.textContent = on ? "Play the videos" : "Stop the videos";
  };
  motion.onclick = () => still(!document.body.classList.contains("still"));
  still(matchMedia("(prefers-reduced-motion: reduce)").matches);
}
document.documentElement.dataset.ready = "yes";
