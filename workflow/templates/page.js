// Shared by all pages: data, theme, the state in the URL, charts and tables.
"use strict";

const page = {
  data: JSON.parse(document.getElementById("data").textContent),

  // The state lives behind the # of the URL, so that a copied URL shows the same view.
  state: new URLSearchParams(location.hash.slice(1)),
  get(key) { return this.state.get(key) || ""; },
  set(key, value) {
    if (this.get(key) === value) return;
    if (value) this.state.set(key, value); else this.state.delete(key);
    const hash = this.state.toString();
    history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  },

  // Three significant digits, as the text of the page has them.
  number(value) {
    if (value === null || value === undefined) return "–";
    const magnitude = Math.abs(value);
    if (magnitude && (magnitude < 1e-4 || magnitude >= 1e6)) return value.toExponential(2);
    return value.toLocaleString("en-US", { maximumSignificantDigits: 3 });
  },

  // Columns back into rows; texts are indices into their distinct values.
  unpack(columns) {
    const names = Object.keys(columns);
    const lists = names.map((name) => {
      const column = columns[name];
      return column.codes ? column.codes.map((code) => column.values[code]) : column;
    });
    const rows = [];
    for (let row = 0; names.length && row < lists[0].length; row += 1) {
      const entry = {};
      names.forEach((name, index) => { entry[name] = lists[index][row]; });
      rows.push(entry);
    }
    return rows;
  },

  async chart(place, spec, datasets) {
    const wanted = JSON.stringify(spec);
    const used = Object.fromEntries(
      Object.entries(datasets).filter(([name]) => wanted.includes(`"name":"${name}"`)),
    );
    const options = { actions: false, renderer: "svg", logLevel: 1, tooltip: { theme: "custom" } };
    const data = spec.data.map((source) => (
      used[source.name] ? { ...source, values: used[source.name] } : source));
    const { view } = await vegaEmbed(place, { ...spec, data }, options);
    // The chart's own label and the table say it better than a label for every mark.
    place.querySelector("svg").setAttribute("aria-hidden", "true");
    return view;
  },

  // DataTables comes as a module; a blob is the one way to import it from the page itself.
  async table(place, table) {
    const source = JSON.parse(document.getElementById("datatables").textContent);
    const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    const { ITable, set_or_remove_dark_class: theme } = await import(url);
    URL.revokeObjectURL(url);
    theme();
    const columnDefs = [
      ...table.arguments.columnDefs,
      {
        targets: table.numeric,
        render: (value, kind) => {
          if (kind === "display") return page.number(value);
          // What has no number stands last where the largest stand first.
          return kind === "sort" && value === null ? -1 : value;
        },
      },
      ...(table.extra || []),
    ];
    return new ITable(place, { ...table.arguments, columnDefs }).dt;
  },

  // "column.direction" as the URL has it; a third click on a heading leaves no direction.
  sorting(table) {
    const [first] = table.order();
    return first?.[1] ? `${first[0]}.${first[1]}` : "";
  },

  theme() {
    const button = document.getElementById("theme");
    const dark = () =>
      (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches
        ? "dark" : "light")) === "dark";
    const label = () => { button.textContent = dark() ? "Light" : "Dark"; };
    button.addEventListener("click", () => {
      document.documentElement.dataset.theme = dark() ? "light" : "dark";
      label();
    });
    label();
  },
};

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== null && text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
