// Optional comforts: copy buttons, keys, and arrows in a heatmap. The pages work without them.

for (const block of document.querySelectorAll(".code")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(block.querySelector("code").textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(block.querySelector("code"));
      button.textContent = "Selected; press Ctrl-C";
    }
  });
  block.append(button);
}

const go = (selector) => document.querySelector(selector)?.click();

const write = (field) => {
  field.focus();
  field.select();
};

const KEYS = {
  "/": () => write(document.getElementById("q")),
  ArrowLeft: () => go('.beside [rel="prev"]'),
  ArrowRight: () => go('.beside [rel="next"]'),
  c: () => {
    const other = document.querySelector('main input[name="two"]');
    other ? write(other) : go('nav a[href="/compare"]');
  },
  g: () => go(".brand"),
};

addEventListener("keydown", (event) => {
  const isWriting = event.target.matches("input, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey || isWriting || event.defaultPrevented) return;
  const act = KEYS[event.key];
  if (act && !event.target.closest(".scroll")) {
    event.preventDefault();
    act();
  }
});

// A heatmap is one Tab stop; arrow keys move between its cells.
const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

for (const table of document.querySelectorAll(".heat")) {
  const cells = [...table.querySelectorAll("td[tabindex]")];
  cells.forEach((cell, index) => (cell.tabIndex = index ? -1 : 0));
  table.addEventListener("focusin", ({ target }) => {
    if (target.matches("td")) cells.forEach((cell) => (cell.tabIndex = cell === target ? 0 : -1));
  });
  table.addEventListener("keydown", (event) => {
    const cell = event.target.closest("td");
    if (event.key === "Escape") event.target.blur();
    if (!cell || !STEPS[event.key]) return;
    event.preventDefault();
    const [down, right] = STEPS[event.key];
    const row = table.tBodies[0].rows[cell.parentElement.sectionRowIndex + down];
    const next = row?.cells[cell.cellIndex + right];
    if (next?.matches("td[tabindex]")) next.focus();
  });
}
