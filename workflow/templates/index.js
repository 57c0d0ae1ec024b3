// All runs and schemes, and two of them compared.
"use strict";

function comparisonOf(a, b) {
  if (a === b) return null;
  const pair = page.data.pairs[a < b ? `${a}-${b}` : `${b}-${a}`];
  if (a < b) return pair;
  return {
    ...pair,
    only_a: pair.only_b,
    only_b: pair.only_a,
    moved: pair.moved.map((entry) => ({
      ...entry,
      rank_a: entry.rank_b, rank_b: entry.rank_a, share_a: entry.share_b, share_b: entry.share_a,
    })),
    changed: pair.changed.map(([layer, before, after]) => [layer, after, before]),
  };
}

function list(caption, titles, rows) {
  const box = element("div", null, {
    class: "wide", tabindex: "0", role: "region", "aria-label": caption,
  });
  const table = element("table", null, { class: "plain" });
  const head = element("tr");
  titles.forEach((title) => head.append(element("th", title, { scope: "col" })));
  table.append(head);
  for (const cells of rows) {
    const row = element("tr");
    cells.forEach((text, index) => row.append(element("td", text, index ? {} : { class: "name" })));
    table.append(row);
  }
  box.append(table);
  return [element("h3", caption), box];
}

const percent = (share) => `${page.number(100 * share)} %`;

function showComparison(a, b) {
  const place = document.getElementById("comparison");
  place.replaceChildren();
  const found = comparisonOf(a, b);
  if (!found) {
    place.append(element("p", "Choose two different reports."));
    return;
  }
  const [one, two] = [page.data.results[a], page.data.results[b]];
  const answer = element("p", null, { class: "answer" });
  answer.append(element("strong", found.verdict));
  place.append(answer);
  const facts = element("dl", null, { class: "figures" });
  const fact = (title, value, more) => {
    const box = element("div");
    box.append(element("dt", title));
    const text = element("dd");
    text.append(element("span", value, { class: "value" }), " ", element("span", more, { class: "more" }));
    box.append(text);
    facts.append(box);
  };
  fact("Rank correlation ρ", found.correlation === null ? "–" : String(found.correlation),
    found.expected === null ? "noise unknown" : `noise alone: ${found.expected} or better`);
  fact("Layers with a score in both", String(found.common),
    `${found.only_a} in A alone, ${found.only_b} in B alone`);
  fact("Shares that differ beyond noise", found.expected === null ? "–" : String(found.moved_beyond_noise), "layers");
  fact("Choices that differ", String(found.changed_count), "layers");
  place.append(facts);
  const basis = found.formats.length
    ? `Scores of the formats that both measured: ${found.formats.join(", ")}.`
    : "They share no format: compared is the worst score over each one's own formats.";
  place.append(element("p", basis));
  const about = element("ul");
  for (const [side, entry] of [["A", one], ["B", two]]) {
    about.append(element("li", `${side}: ${entry.about}; ${entry.versions}`));
  }
  place.append(about);
  if (found.moved.length) {
    place.append(...list("Layers whose share of the sensitivity differs most",
      ["Layer", "Rank in A", "Rank in B", "Share in A", "Share in B", "Beyond noise"],
      found.moved.map((entry) => [entry.layer, entry.rank_a, entry.rank_b, percent(entry.share_a),
        percent(entry.share_b), { true: "yes", false: "no", null: "unknown" }[entry.beyond_noise]])));
  }
  if (found.changed.length) {
    const more = found.changed_count - found.changed.length;
    place.append(...list(`Choices that differ${more ? ` (${found.changed.length} of ${found.changed_count})` : ""}`,
      ["Layer", "In A", "In B"], found.changed));
  }
}

async function start() {
  page.theme();
  const names = page.data.table.columns;
  page.data.table.extra = [
    {
      targets: names.indexOf("Scheme"),
      className: "name",
      render: (value, kind, row, meta) => {
        const { link } = page.data.results[meta.row];
        if (kind !== "display") return value;
        return link ? `<a href="${encodeURI(link)}">${value}</a>` : `${value} (imported)`;
      },
    },
    { targets: names.indexOf("Size"), className: "nowrap" },
    {
      targets: names.indexOf("Along depth"),
      orderable: false,
      searchable: false,
      render: (value, kind, row, meta) => {
        if (kind !== "display") return "";
        const entry = page.data.results[meta.row];
        const image = element("img", null, {
          class: "strip",
          src: entry.strip,
          alt: entry.top.length ? `Most sensitive: ${entry.top.join(", ")}` : "No scores",
        });
        return image.outerHTML;
      },
    },
  ];
  const table = await page.table(document.getElementById("reports"), page.data.table);
  const model = document.getElementById("model");
  const sides = ["a", "b"].map((side) => document.getElementById(side)).filter(Boolean);

  // Setting the table from the state fires the same events as a hand at the table.
  let applying = false;

  function show() {
    applying = true;
    table.search(page.get("search"));
    if (model) {
      model.value = page.get("model");
      if (model.selectedIndex < 0) model.value = "";
      const exact = model.value ? `^${model.value.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")}$` : "";
      table.column(names.indexOf("Model")).search(exact, { regex: true, smart: false });
    }
    const [sorted, direction] = page.get("sort").split(".");
    table.order(names[sorted] !== undefined && ["asc", "desc"].includes(direction)
      ? [[Number(sorted), direction]] : []);
    table.draw();
    applying = false;
    if (sides.length) {
      const last = page.data.results.length - 1;
      const chosen = sides.map((side, index) => {
        const value = Number(page.get(side.id) || index);
        return Number.isInteger(value) && value >= 0 && value <= last ? value : index;
      });
      sides.forEach((side, index) => { side.value = String(chosen[index]); });
      showComparison(...chosen);
    }
  }

  table.on("search", () => { if (!applying) page.set("search", table.search()); });
  table.on("order", () => { if (!applying) page.set("sort", page.sorting(table)); });
  model?.addEventListener("change", () => { page.set("model", model.value); show(); });
  for (const side of sides) {
    side.addEventListener("change", () => { page.set(side.id, side.value); show(); });
  }
  addEventListener("hashchange", () => {
    page.state = new URLSearchParams(location.hash.slice(1));
    show();
  });
  show();
  document.documentElement.dataset.ready = "yes";
}

start();
