// One scheme: linked charts, and the table of all groups.
"use strict";

async function start() {
  page.theme();
  const controls = {
    subsystem: document.getElementById("subsystem"),
    format: document.getElementById("format"),
  };
  const datasets = Object.fromEntries(
    Object.entries(page.data.datasets).map(([name, columns]) => [name, page.unpack(columns)]),
  );
  const scores = new Map();
  for (const row of datasets.scores) {
    if (!scores.has(row.order)) scores.set(row.order, []);
    scores.get(row.order).push(row);
  }
  const views = {};
  let table = null;
  // Setting the table from the state fires the same events as a hand at the table.
  let applying = false;

  function show() {
    for (const [key, control] of Object.entries(controls)) {
      control.value = page.get(key);
      if (control.selectedIndex < 0) control.value = "";
      for (const view of Object.values(views)) {
        const name = `shown_${key}`;
        if (view.getState({ signals: (signal) => signal === name }).signals[name] !== undefined) {
          view.signal(name, control.value);
        }
      }
    }
    for (const view of Object.values(views)) view.runAsync();
    if (table) {
      applying = true;
      const wanted = controls.subsystem.value;
      const column = table.column(page.data.table.columns.indexOf("Subsystem"));
      const exact = wanted ? `^${wanted.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")}$` : "";
      column.search(exact, { regex: true, smart: false });
      table.search(page.get("search"));
      const [sorted, direction] = (page.get("sort") || "1.asc").split(".");
      if (page.data.table.columns[sorted] !== undefined && ["asc", "desc"].includes(direction)) {
        table.order([Number(sorted), direction]);
      }
      table.draw();
      applying = false;
    }
  }

  for (const [key, control] of Object.entries(controls)) {
    control.addEventListener("change", () => { page.set(key, control.value); show(); });
  }
  for (const button of document.querySelectorAll("button[data-subsystem]")) {
    button.addEventListener("click", () => {
      page.set("subsystem", button.dataset.subsystem);
      show();
      controls.subsystem.focus();
    });
  }
  document.getElementById("reset").addEventListener("click", () => {
    for (const key of ["subsystem", "format", "search", "sort"]) page.set(key, "");
    show();
  });
  addEventListener("hashchange", () => {
    page.state = new URLSearchParams(location.hash.slice(1));
    show();
  });

  function details(index) {
    const entry = page.data.details[index];
    const box = element("div");
    const line = element("p", "Handle: ");
    line.append(element("code", entry.handle));
    box.append(line);
    if (entry.modules.length > 1) {
      const modules = element("p", "Modules: ");
      entry.modules.forEach((name) => modules.append(element("code", name), " "));
      box.append(modules);
    }
    if (entry.why) box.append(element("p", `Not quantized: ${entry.why}.`));
    const list = element("table", null, { class: "plain" });
    const head = element("tr");
    for (const title of ["Format", "Score ± standard error", "Share", "Per MB saved", ""]) {
      head.append(element("th", title, { scope: "col" }));
    }
    list.append(head);
    for (const score of scores.get(entry.order) || []) {
      if (score.state === "none") continue;
      const row = element("tr");
      const doubt = score.error === null ? "" : ` ± ${page.number(score.error)}`;
      for (const text of [
        score.name,
        score.state === "score" ? page.number(score.score) + doubt : score.state,
        score.share === null ? "–" : `${page.number(100 * score.share)} %`,
        page.number(score.per_mb),
        score.selected ? "← the recipe takes this" : "",
      ]) {
        row.append(element("td", text));
      }
      list.append(row);
    }
    box.append(list);
    return box;
  }

  function toggle(row, button) {
    if (row.child.isShown()) row.child.hide();
    else row.child(details(row.index()), "handle").show();
    button.textContent = row.child.isShown() ? "−" : "+";
    button.setAttribute("aria-expanded", String(row.child.isShown()));
  }

  // A point leads to its group in the table.
  function find(layer) {
    if (!table || !layer) return;
    page.set("search", layer);
    show();
    const place = document.getElementById("all-groups");
    place.scrollIntoView();
    place.querySelector("button.open")?.focus({ preventScroll: true });
  }

  await Promise.all(Object.entries(page.data.charts).map(async ([name, spec]) => {
    const place = document.getElementById(`chart-${name}`);
    if (!place) return;
    views[name] = await page.chart(place, spec, datasets);
    views[name].addEventListener("click", (event, item) => find(item?.datum?.layer));
  }));

  const names = page.data.table.columns;
  page.data.table.extra = [
    {
      targets: 0,
      orderable: false,
      searchable: false,
      render: (value, kind, row) => (kind === "display"
        ? `<button type="button" class="open" aria-expanded="false" aria-label="Details of ${
          row[names.indexOf("Layer")]}">+</button>` : ""),
    },
    { targets: names.indexOf("Layer"), className: "name" },
    {
      targets: names.indexOf("#"),
      render: (value, kind) => {
        if (kind === "display") return value === null ? "–" : value;
        return kind === "sort" && value === null ? Number.MAX_VALUE : value;
      },
    },
  ];
  table = await page.table(document.getElementById("groups"), page.data.table);
  const container = table.table().container();
  container.addEventListener("click", (event) => {
    const button = event.target.closest("button.open");
    if (button) toggle(table.row(button.closest("tr")), button);
  });
  table.on("search", () => { if (!applying) page.set("search", table.search()); });
  table.on("order", () => {
    if (applying) return;
    const sort = page.sorting(table);
    page.set("sort", sort === "1.asc" ? "" : sort);
  });
  // Paper has no second page to turn to; a long table stays as it is on the screen.
  const shown = table.page.len();
  addEventListener("beforeprint", () => {
    if (table.rows().count() <= 200) table.page.len(-1).draw();
  });
  addEventListener("afterprint", () => table.page.len(shown).draw());
  show();
  document.documentElement.dataset.ready = "yes";
}

start();
