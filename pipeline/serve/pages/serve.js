"use strict";

let answer = null, bankClasses = [];
const editor = new Editor(() => answer && listClasses(editor, about, true));
const id = name => document.getElementById(name);

function about(number) {
  const found = answer.classes[number];
  if (!found) return "";
  const parts = [`sureness ${percent(found.sureness)}`];
  if (found.score !== null) parts.push(`there: ${percent(found.score)}`);
  if (found.expected) parts.push(`expected IoU ${found.expected.map(value => (100 * value).toFixed(0)).join(" / ").replace(" / ", " [").replace(" / ", ", ")}]`);
  return parts.join(" · ");
}

function showBank(bank) {
  bankClasses = bank.classes;
  const classes = bank.classes.map(one => `${one.name} (${one.photos})`).join(", ") || "no class yet";
  id("bank").textContent = `${bank.photos} annotated photos · ${classes} · ${bank.reading}`;
}

const send = attempt(async file => {
  tell("");
  const form = new FormData();
  form.append("photo", file, file.name || "pasted.png");
  answer = await ask("/api/predict", form);
  const start = `/api/answers/${answer.id}`;
  const layers = await Promise.all(answer.classes.map(async (one, number) => ({
    ...one, mask: await picture(`${start}/mask/${number}.png`), soft: await picture(`${start}/soft/${number}.png`),
  })));
  const photo = await picture(`${start}/photo.jpg`);
  id("drop").hidden = true;
  id("work").hidden = false;
  id("name").textContent = answer.name;
  id("facts").textContent = `${answer.width} × ${answer.height} pixels, ${answer.seconds} s`;
  for (const link of document.querySelectorAll("[data-kind]")) link.href = `${start}/download/${link.dataset.kind}`;
  id("downloads").hidden = !answer.classes.length;
  editor.open(photo, layers);
  if (!layers.length)
    tell("The bank shows no class yet. Name one at the right, draw it, and put it into the bank: that is the first example.");
  document.body.dataset.shown = answer.id;
});

const annotate = attempt(async () => {
  const form = await drawnForm(editor, layer => layer.ticked ?? true);
  const done = await ask(`/api/answers/${answer.id}/annotate`, form);
  showBank(done.bank);
  tell(done.changed.length
    ? `${done.photo} is in the bank now (${done.changed.join(", ")}). The next photo is answered with it.`
    : `${done.photo} was in the bank like this already.`);
  document.body.dataset.kept = done.id;
});

id("photo").addEventListener("change", event => { if (event.target.files[0]) send(event.target.files[0]); event.target.value = ""; });
id("annotate").addEventListener("click", annotate);
id("soft").addEventListener("change", event => { editor.soft = event.target.checked; editor.draw(); });
id("new-class").addEventListener("submit", event => {
  event.preventDefault();
  const name = id("new-name").value.trim();
  if (!name || !editor.photo) return;
  const there = editor.layers.findIndex(layer => layer.name === name);
  const colours = ["#009e73", "#d55e00", "#0072b2", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442"];
  editor.choose(there >= 0 ? there : editor.add(name, colours[editor.layers.length % colours.length]));
  id("new-name").value = "";
});
addEventListener("dragover", event => { event.preventDefault(); document.body.classList.add("over"); });
addEventListener("dragleave", () => document.body.classList.remove("over"));
addEventListener("drop", event => {
  event.preventDefault();
  document.body.classList.remove("over");
  if (event.dataTransfer.files[0]) send(event.dataTransfer.files[0]);
});
addEventListener("paste", event => { const [file] = event.clipboardData.files; if (file) send(file); });
addEventListener("keydown", event => {
  if (event.key.toLowerCase() === "s" && !event.ctrlKey && !event.metaKey && answer && !typing(event)) annotate();
});
attempt(async () => showBank(await ask("/api/bank")))();
