"use strict";
/* The images of a report: how each fared, filtered and sorted, and curves. What computes stands before what shows. */

const AT_ONCE = 50;

/** Table of images with what is computed from it: n, and for each row the share of draws that are right, by image. */
function prepared(table) {
  const { width, labels } = table, n = labels.length / width;
  const bytes = (text) => new TextEncoder().encode(text), truth = bytes(labels);
  const rows = table.rows.map((row) => {
    const main = row.fixed ?? row.fresh, count = main.length / width, each = Math.round(count / n) || 1;
    const share = new Float32Array(count / each), answers = bytes(main);
    for (let image = 0; image < share.length; image++) {
      let right = 0;
      for (let draw = 0; draw < each; draw++) {
        let alike = true;
        for (let k = 0; k < width; k++)
          alike &&= answers[(image * each + draw) * width + k] === truth[image * width + k];
        right += alike;
      }
      share[image] = right / each;
    }
    return { ...row, main, draws: each, share, name: `${row.defense === "target" ? "target: " : ""}${row.attack}`
      + (row.randomness === "none" ? "" : `, ${row.randomness}`) };
  });
  const attacked = rows.filter((row) => row.defense === "defense" && row.epsilon);
  const fragility = Float32Array.from({ length: n }, (_, image) =>
    attacked.reduce((sum, row) => sum + 1 - row.share[image], 0) / Math.max(1, attacked.length));
  return { ...table, n, rows, attacked, fragility, number: (image) => table.numbers?.[image] ?? image };
}

/** A class as a number; 36 ** width, which is none, where an answer was wrong and no class is known. */
function classAt(text, index, width) {
  let found = 0;
  for (let k = index * width; k < (index + 1) * width; k++) {
    const code = text.charCodeAt(k); // 0 to 9, a to z, or a hyphen
    if (code === 45) return 36 ** width;
    found = 36 * found + code - (code < 58 ? 48 : 87);
  }
  return found;
}

const average = (row) => row.share.reduce((sum, share) => sum + share, 0) / row.share.length;

const isBroken = (row, image) => row.share[image] < 0.5;

/** The rows of another report's table beside those of this one, and its images by their number; see `changes`. */
function beside(one, other) {
  const key = (row) => `${row.defense}/${row.attack}/${row.randomness}`;
  const rows = new Map(other.rows.map((row) => [key(row), row]));
  const images = new Map(Array.from({ length: other.n }, (_, image) => [other.number(image), image]));
  return { table: other, rows: one.rows.map((row) => rows.get(key(row))),
    images: Array.from({ length: one.n }, (_, image) => images.get(one.number(image))) };
}

/** 1: this report's row breaks an image that the other's leaves right, -1: the reverse, 0: neither, or not in both. */
function change(one, pair, r, image) {
  const there = pair.images[image];
  if (!pair.rows[r] || there === undefined) return 0;
  return isBroken(one.rows[r], image) - isBroken(pair.rows[r], there);
}

/** Images that the filters leave, in the order asked for. */
function chosen(table, { label = "", broken = "", sort = "fragile", changed = false }, pair) {
  const found = [];
  for (let image = 0; image < table.n; image++) {
    if (label !== "" && classAt(table.labels, image, table.width) !== Number(label)) continue;
    const by = broken === "" ? true : broken === "any" ? table.attacked.some((row) => isBroken(row, image))
      : broken === "none" ? !table.attacked.some((row) => isBroken(row, image)) : isBroken(table.rows[broken], image);
    if (!by || (changed && !table.rows.some((_, r) => change(table, pair, r, image)))) continue;
    found.push(image);
  }
  const { fragility } = table, sign = { fragile: -1, robust: 1, number: 0 }[sort];
  return found.sort((a, b) => sign * (fragility[a] - fragility[b]) || a - b);
}

/** Accuracy after k = 1, 2, ... fresh draws of a row: their mean, their majority (a tie is wrong), right in all. */
function byDraws({ labels, width }, row) {
  const text = row.fresh ?? row.main, images = row.share.length, draws = text.length / width / images;
  const sums = Array.from({ length: draws }, () => ({ mean: 0, majority: 0, all: 0 }));
  const votes = new Uint16Array(36 ** width + 1);
  for (let image = 0; image < images; image++) {
    const label = classAt(labels, image, width);
    let right = 0, most = 0;
    votes.fill(0);
    for (let draw = 0; draw < draws; draw++) {
      const answer = classAt(text, image * draws + draw, width);
      if (answer === label) right++;
      else most = Math.max(most, ++votes[answer]);
      sums[draw].mean += right / (draw + 1);
      sums[draw].majority += right > most;
      sums[draw].all += right === draw + 1;
    }
  }
  return Object.fromEntries(["mean", "majority", "all"].map((name) =>
    [name, sums.map((sum, draw) => [draw + 1, sum[name] / images, images])]));
}

/** The 95 % score interval of a share of n (Wilson 1927). */
function wilson(share, n) {
  const z2 = 1.959963984540054 ** 2, spread = z2 / n, center = (share + spread / 2) / (1 + spread);
  const half = Math.sqrt(z2) * Math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread);
  return [Math.max(0, center - half), Math.min(1, center + half)];
}

/** Lines of [x, share, n] by name as SVG, with 95 % bands; names that begin with "other" are dashed. */
function plot(lines, title, logarithmic) {
  const colors = ["#1f5fa8", "#c2570c", "#2f7d32"], scale = (x) => (logarithmic ? Math.log2(x) : x);
  const all = Object.values(lines).flat().map(([x]) => x);
  const low = scale(Math.min(...all)), high = scale(Math.max(...all));
  const at = (x) => 40 + 250 * (high > low ? (scale(x) - low) / (high - low) : 0.5), up = (y) => 190 - 170 * y;
  const ticks = [...new Set(all)].sort((a, b) => b - a).reduce(
    (kept, x) => (kept.length && at(kept.at(-1)) - at(x) < 34 ? kept : [...kept, x]), []); // names that do not overlap
  const parts = [0, 0.25, 0.5, 0.75, 1].map((y) => `<path d="M40 ${up(y)}H290" stroke="#ddd"/><text x="34"
    y="${up(y) + 4}" text-anchor="end">${100 * y}</text>`);
  ticks.forEach((x) => parts.push(`<text x="${at(x)}" y="206" text-anchor="middle">${+x.toPrecision(3)}</text>`));
  Object.entries(lines).forEach(([name, points], i) => {
    const color = colors[i % 3], dash = name.startsWith("other") ? ` stroke-dasharray="4 3"` : "";
    const ends = points.map(([x, y, n]) => [at(x), ...wilson(y, n).map(up)]);
    parts.push(`<path fill="${color}" opacity=".13" d="M${ends.map(([x, , top]) => `${x} ${top}`).join("L")}L${
      ends.reverse().map(([x, bottom]) => `${x} ${bottom}`).join("L")}Z"/>`);
    parts.push(`<path fill="none" stroke="${color}" stroke-width="2"${dash} d="M${
      points.map(([x, y]) => `${at(x)} ${up(y)}`).join("L")}"/>`);
    parts.push(`<text x="286" y="${34 + 15 * i}" text-anchor="end" fill="${color}">${name}</text>`);
  });
  return `<svg viewBox="0 0 300 230" class="plot" role="img"><g font-size="11">${parts.join("")}
    <text x="165" y="224" text-anchor="middle">${title}</text></g></svg>`;
}

function element(tag, text = "", name = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = name;
  return made;
}

/** Fill the page: `data` holds `images`, `curves`, and where there are such `sheets` and `other`, another report. */
function start({ images, curves, sheets, other }) {
  const get = (id) => document.getElementById(id);
  const one = prepared(images), pair = other && beside(one, prepared(other.images));
  const option = (select, value, text) => get(select).append(Object.assign(element("option", text), { value }));
  const classes = [...new Set(Array.from({ length: one.n }, (_, image) => classAt(one.labels, image, one.width)))];
  const called = (label) => images.classes?.[label] ?? label;
  classes.sort((a, b) => a - b).forEach((label) => option("class", label, called(label)));
  one.rows.forEach((row, r) => { option("broken", r, row.name); option("drawn", r, row.name); });
  const drawn = one.attacked.filter((row) => row.fresh).sort((a, b) => average(a) - average(b))[0];
  get("drawn").value = String(Math.max(0, one.rows.indexOf(drawn)));
  get("changes").hidden = !pair;

  const named = (label) => (label === 36 ** one.width ? "?" : called(label));
  let order = [], shown = 0;
  const picture = (name, image) => {
    const made = element("i", "", `picture ${name}`);
    const column = image % sheets.columns, row = Math.floor(image / sheets.columns);
    made.style.backgroundPosition = `${-48 * column}px ${-48 * sheets.height / sheets.width * row}px`;
    made.title = name === "natural" ? name : `${name}, ${one.rows[sheets.row[image]].name}`;
    return made;
  };
  const decode = () => {
    const rule = sheets.sheets.map((name) => `.${name} { background-image: url("${get(`sheet-${name}`).textContent}") }`);
    document.head.append(element("style", rule.join(" ")));
  };
  if (sheets) {
    document.head.append(element("style", `.picture { width: 48px; height: ${48 * sheets.height / sheets.width}px;
      background-size: ${48 * sheets.columns}px auto }`));
    new IntersectionObserver(([seen], observer) => {
      if (!seen.isIntersecting) return;
      observer.disconnect();
      if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", decode);
      else decode();
    }, { rootMargin: "400px" }).observe(get("images"));
  }

  const line = (image) => {
    const made = element("tr", "", "image");
    made.dataset.image = image;
    made.append(element("td", one.number(image), "n"), element("td", called(classAt(one.labels, image, one.width)), "n"));
    const pictures = element("td");
    if (sheets && image < sheets.count)
      pictures.append(...sheets.sheets.map((name) => picture(name, image)));
    made.append(pictures, element("td", (100 * one.fragility[image]).toFixed(0), "n"));
    one.rows.forEach((row, r) => {
      const answers = row.share.length > image ? answersOf(row.main, row.draws, image) : [];
      const counts = new Map();
      answers.forEach((answer) => counts.set(answer, (counts.get(answer) ?? 0) + 1));
      const text = [...counts].sort((a, b) => b[1] - a[1])
        .map(([label, count]) => (answers.length > 1 ? `${named(label)}×${count}` : named(label)));
      const cell = element("td", text.join(" "), isBroken(row, image) ? "flag" : "fine");
      const turned = pair ? change(one, pair, r, image) : 0;
      if (turned) cell.append(element("b", turned > 0 ? " ▼" : " ▲"));
      made.append(cell);
    });
    return made;
  };
  const answersOf = (text, draws, image) =>
    Array.from({ length: draws }, (_, draw) => classAt(text, image * draws + draw, one.width));

  const detail = (image) => {
    const made = element("tr", "", "detail"), cell = element("td");
    cell.colSpan = 4 + one.rows.length;
    const label = classAt(one.labels, image, one.width), has = (row, form) => row[form] && row.share.length > image;
    one.rows.forEach((row) => ["fixed", "fresh"].filter((form) => has(row, form)).forEach((form) => {
      const draws = Math.round(row[form].length / one.width / row.share.length);
      const told = element("p", `${row.name}${row.fresh && row.fixed ? `; judged on ${form} draws` : ""}: `);
      answersOf(row[form], draws, image).forEach((answer) =>
        told.append(element("span", `${named(answer)} `, answer === label ? "fine" : "flag")));
      cell.append(told);
    }));
    made.append(cell);
    return made;
  };

  const more = () => {
    get("body").append(...order.slice(shown, shown + AT_ONCE).map(line));
    shown = Math.min(order.length, shown + AT_ONCE);
    get("more").hidden = shown === order.length;
    get("count").textContent = `${order.length} of ${one.n} images, ${shown} shown`;
  };
  const show = () => {
    const [label, broken, sort] = ["class", "broken", "sort"].map((id) => get(id).value);
    order = chosen(one, { label, broken, sort, changed: get("changed").checked }, pair);
    shown = 0;
    get("body").replaceChildren();
    more();
  };
  const draw = () => {
    const row = one.rows[get("drawn").value], lines = byDraws(one, row), there = pair?.rows[get("drawn").value];
    if (there) lines["other, all"] = byDraws(pair.table, there).all;
    const found = Object.entries(curves).map(([name, points]) => {
      const also = other?.curves?.[name];
      return plot({ this: points, ...(also && { other: also }) }, name, name !== "epsilon");
    });
    get("curves").innerHTML = found.join("") + plot(lines, "fresh draws of the attack chosen below");
  };

  const marked = (row) => (row?.marks ?? []).map((mark) => Object.assign(element("span", " !", "flag"), { title: mark }));
  get("head").append(...["image", "class", "pictures", "fragility, %"].map((name) => element("th", name)));
  one.rows.forEach((row) => {
    get("head").append(element("th", row.name));
    get("head").lastChild.append(...marked(row));
  });
  ["class", "broken", "sort", "changed"].forEach((id) => get(id).addEventListener("change", show));
  get("drawn").addEventListener("change", draw);
  get("more").addEventListener("click", more);
  get("body").addEventListener("click", (event) => {
    const row = event.target.closest("tr.image");
    if (!row) return;
    if (row.nextSibling?.className === "detail") row.nextSibling.remove();
    else row.after(detail(Number(row.dataset.image)));
  });
  if (pair) one.rows.forEach((row, r) => {
    const turned = Array.from({ length: one.n }, (_, image) => change(one, pair, r, image)), there = pair.rows[r];
    const count = (sign) => turned.filter((x) => x === sign).length;
    const text = there ? `${(100 * average(there)).toFixed(1)} (+${count(-1)} −${count(1)})` : "";
    const cell = document.querySelectorAll(".other")[r];
    cell.replaceChildren(text, ...marked(there));
    const said = { "natural control": there?.natural, luck: there?.luck };
    cell.title = Object.entries(said).filter(([, share]) => share != null)
      .map(([name, share]) => `${name} ${(100 * share).toFixed(1)}`).join(", ");
  });
  draw();
  show();
}

if (typeof document !== "undefined") start(JSON.parse(document.getElementById("data").textContent));
