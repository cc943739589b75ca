"use strict";

let state = null, current = null, shown = 200, seen = -1;
const id = name => document.getElementById(name);
const editor = new Editor(() => current && listClasses(editor, about, !!state.bank));
const MARKS = { accepted: "✓", rejected: "✗", corrected: "✎" };

function about(number) {
  const found = current.classes[editor.layers[number].name];
  if (!found) return "";
  const parts = [];
  if (found.sureness !== null) parts.push(`sureness ${percent(found.sureness)}`);
  if (found.score !== null) parts.push(`there: ${percent(found.score)}`);
  return parts.join(" · ");
}

function listed() {
  const wanted = id("filter").value;
  return state.photos
    .filter(one => wanted === "all" || (wanted === "open" ? !one.decision || one === current : one.decision === wanted))
    .toSorted((a, b) => a.sureness - b.sureness);
}

function list() {
  const photos = listed();
  id("photos").replaceChildren(...photos.slice(0, shown).map(one => {
    const image = element("img", { src: `/api/photos/${one.number}/thumb.jpg?${one.sureness}`, alt: "", loading: "lazy" });
    const text = element("span", { className: "label" }, element("span", { className: "file", textContent: one.name }),
      element("span", { className: "note", textContent: `sureness ${percent(one.sureness)} · ${percent(one.share)}` }));
    const mark = element("span", { className: `mark ${one.decision ?? ""}`, textContent: MARKS[one.decision] ?? "" });
    const button = element("button", { className: current?.number === one.number ? "chosen" : "" }, image, text, mark);
    button.dataset.number = one.number;
    button.addEventListener("click", () => open(one.number));
    return element("li", {}, button);
  }));
  id("more").hidden = photos.length <= shown;
  const count = decision => state.photos.filter(one => one.decision === decision).length;
  id("summary").textContent = `${state.photos.length} photos · ${count(null)} to decide · ${count("accepted")} accepted · `
    + `${count("rejected")} rejected · ${count("corrected")} corrected`
    + (state.failed ? ` · ${state.failed} could not be predicted` : "");
}

async function load() {
  state = await ask("/api/review");
  if (current) current = state.photos[current.number];
  list();
}

// Only the list scrolls: on a narrow screen it is far below the photo.
function follow(chosen) {
  if (!chosen) return;
  const list = chosen.closest(".photos"), around = list.getBoundingClientRect(), own = chosen.getBoundingClientRect();
  list.scrollTop += Math.min(0, own.top - around.top) + Math.max(0, own.bottom - around.bottom);
}

const open = attempt(async number => {
  const photo = state.photos[number];
  const start = `/api/photos/${number}`, stamp = `?${Date.now()}`;
  const picture_ = await picture(`${start}/photo.jpg`);
  const layers = await Promise.all(state.classes.map(async (one, place) => ({
    ...one, mask: await picture(`${start}/mask/${place}.png${stamp}`), soft: null,
  })));
  current = photo;
  id("name").textContent = photo.name;
  id("facts").textContent = `${picture_.naturalWidth} × ${picture_.naturalHeight} shown · sureness ${percent(photo.sureness)}`
    + (photo.decision ? ` · ${photo.decision}` : "");
  editor.open(picture_, layers);
  list();
  follow(document.querySelector(".photos .chosen"));
  for (const name of ["accept", "reject"]) id(name).setAttribute("aria-pressed", photo.decision === `${name}ed`);
  document.body.dataset.open = number;
});

function step(by) {
  const photos = listed(), place = photos.findIndex(one => one === current);
  const next = photos[Math.min(photos.length - 1, Math.max(0, place + by))];
  if (next && next !== current) return open(next.number);
}

/* To the least sure photo without a decision, other than this one. */
async function onward() {
  const rest = state.photos.filter(one => !one.decision && one.number !== current?.number).toSorted((a, b) => a.sureness - b.sureness);
  if (rest.length) await open(rest[0].number);
  else { list(); tell("Every photo has been decided on."); }
}

const decide = attempt(async decision => {
  if (!current) return;
  const done = await ask(`/api/photos/${current.number}/decision`, { decision: current.decision === decision ? null : decision });
  Object.assign(current, done);
  tell("");
  if (done.decision) await onward();
  else await open(current.number);
});

const save = attempt(async () => {
  if (!current || !state.bank) return;
  const form = await drawnForm(editor, layer => layer.ticked ?? true);
  const done = await ask(`/api/photos/${current.number}/annotate`, form);
  tell(`${done.photo} is in the bank now. Photos that nobody has decided on are predicted again.`);
  document.body.dataset.kept = done.id;
  await load();
  await onward();
});

const next = attempt(async () => {
  const { number } = await ask("/api/next");
  if (number === null) tell("Every photo has been decided on.");
  else await open(number);
});

const poll = attempt(async () => {
  const answer = await fetch("/api/status");
  const status = await answer.json();
  const verbs = { reading: "reading photos", fitting: "learning", predicting: "predicting again" };
  id("status").textContent = status.doing === "idle" ? "" : `${verbs[status.doing]} ${status.of ? `${status.done + 1} of ${status.of}` : ""}`;
  if (status.error) tell(status.error, true);
  if (status.doing !== "reading" && status.changes !== seen) {
    seen = status.changes;
    const before = current && JSON.stringify(current);
    const untouched = !editor.layers.some(layer => layer.changed);
    await load();
    if (current && untouched && JSON.stringify(current) !== before) await open(current.number);
  }
  document.body.dataset.doing = status.doing;
});

id("accept").addEventListener("click", () => decide("accepted"));
id("reject").addEventListener("click", () => decide("rejected"));
id("next").addEventListener("click", next);
id("annotate")?.addEventListener("click", save);
id("filter").addEventListener("change", () => { shown = 200; list(); });
id("more").addEventListener("click", () => { shown += 200; list(); });
id("new-class")?.addEventListener("submit", event => {
  event.preventDefault();
  const name = id("new-name").value.trim();
  if (!name || !current) return;
  const there = editor.layers.findIndex(layer => layer.name === name);
  const colours = ["#009e73", "#d55e00", "#0072b2", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442"];
  editor.choose(there >= 0 ? there : editor.add(name, colours[editor.layers.length % colours.length]));
  id("new-name").value = "";
});
addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || typing(event)) return;
  const act = { a: () => decide("accepted"), r: () => decide("rejected"), s: save, n: next,
    arrowdown: () => step(1), arrowup: () => step(-1) }[event.key.toLowerCase()];
  if (act && !event.target.matches("input, select")) { event.preventDefault(); act(); }
});
attempt(async () => {
  await load();
  const first = listed()[0];
  if (first) await open(first.number);
  await poll();
  setInterval(poll, 1000);
})();
