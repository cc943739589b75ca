"use strict";
/* Masks of several classes over a photo: brush, eraser and polygon, by mouse, pen, touch and keyboard.

   Masks are canvases of the photo's canvas size, opaque where there is object. Undo keeps the changed rectangle only. */

const STEPS = 60;

class Editor {
  constructor(onChange) {
    this.canvas = document.getElementById("canvas");
    this.context = this.canvas.getContext("2d");
    this.onChange = onChange;
    this.layers = [];
    this.photo = null;
    this.tool = "brush";
    this.size = 28;
    this.tint = 0.45;
    this.view = { scale: 1, x: 0, y: 0 };
    this.pointers = new Map();
    this.corners = [];
    this.hover = null;
    this.space = this.hidden = this.soft = false;
    this.#listen();
  }

  /* layers: [{name, colour, mask: image or null, soft: image or null}] */
  open(photo, layers) {
    this.photo = photo;
    this.width = photo.naturalWidth;
    this.height = photo.naturalHeight;
    this.layers = [];
    this.undone = [];
    this.done = [];
    this.corners = [];
    this.chosen = 0;
    for (const layer of layers) this.add(layer.name, layer.colour, layer.mask, layer.soft);
    this.choose(0);
    this.fit();
  }

  add(name, colour, mask = null, soft = null) {
    const canvas = this.#blank();
    if (mask) canvas.getContext("2d").drawImage(mask, 0, 0, this.width, this.height);
    this.layers.push({ name, colour, canvas, soft, visible: true, changed: false, version: 0 });
    this.draw();
    return this.layers.length - 1;
  }

  choose(number) {
    this.chosen = number;
    this.corners = [];
    this.draw();
    this.onChange();
  }

  /* Pixels of a layer as PNG. */
  png(number) {
    return new Promise(done => this.layers[number].canvas.toBlob(done, "image/png"));
  }

  /* Share of the photo that a layer marks. */
  share(number) {
    const pixels = this.layers[number].canvas.getContext("2d").getImageData(0, 0, this.width, this.height).data;
    let count = 0;
    for (let i = 3; i < pixels.length; i += 4) count += pixels[i] > 127;
    return count / (this.width * this.height);
  }

  setTool(tool) {
    this.tool = tool;
    this.corners = [];
    for (const button of document.querySelectorAll("[data-tool]"))
      button.setAttribute("aria-pressed", button.dataset.tool === tool);
    this.canvas.style.cursor = tool === "move" ? "grab" : "crosshair";
    this.draw();
  }

  setSize(size) {
    this.size = Math.min(160, Math.max(1, Math.round(size)));
    document.getElementById("size").value = this.size;
    document.getElementById("size-out").textContent = this.size;
    this.draw();
  }

  fit() {
    const box = this.canvas.getBoundingClientRect();
    const scale = Math.min(box.width / this.width, box.height / this.height) * 0.97;
    this.view = { scale, x: (box.width - this.width * scale) / 2, y: (box.height - this.height * scale) / 2 };
    this.draw();
  }

  zoom(factor, x, y) {
    const scale = Math.min(40, Math.max(0.05, this.view.scale * factor));
    const real = scale / this.view.scale;
    this.view = { scale, x: x - (x - this.view.x) * real, y: y - (y - this.view.y) * real };
    this.draw();
  }

  undo() { this.#step(this.done, this.undone); }
  redo() { this.#step(this.undone, this.done); }

  clear() {
    this.#change(context => context.clearRect(0, 0, this.width, this.height), [0, 0, this.width, this.height]);
  }

  closePolygon(cut) {
    if (this.corners.length > 2) {
      const points = this.corners;
      this.#change(context => {
        context.globalCompositeOperation = cut ? "destination-out" : "source-over";
        context.beginPath();
        for (const [x, y] of points) context.lineTo(x, y);
        context.fill();
      }, bounds(points, 1));
    }
    this.corners = [];
    this.draw();
  }

  draw() {
    if (!this.photo) return;
    const ratio = devicePixelRatio || 1, box = this.canvas.getBoundingClientRect();
    const [width, height] = [Math.round(box.width * ratio), Math.round(box.height * ratio)];
    if (this.canvas.width !== width || this.canvas.height !== height) [this.canvas.width, this.canvas.height] = [width, height];
    const context = this.context, { scale, x, y } = this.view;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    context.setTransform(scale * ratio, 0, 0, scale * ratio, x * ratio, y * ratio);
    context.imageSmoothingEnabled = scale < 3;
    context.drawImage(this.photo, 0, 0, this.width, this.height);
    if (!this.hidden) this.layers.forEach((layer, number) => layer.visible && this.#drawLayer(layer, number));
    this.#drawPolygon(scale);
    if (this.hover && (this.tool === "brush" || this.tool === "eraser") && !this.space) {
      context.beginPath();
      context.arc(...this.hover, this.size / 2, 0, 7);
      context.lineWidth = 3 / scale; context.strokeStyle = "#000a"; context.stroke();
      context.lineWidth = 1.4 / scale; context.strokeStyle = "#fff"; context.stroke();
    }
    const hint = document.getElementById("hint");
    hint.hidden = this.tool !== "polygon";
    hint.textContent = this.corners.length
      ? "Enter or the first corner closes it, Shift+Enter cuts it out, Esc leaves it" : "Click the corners";
  }

  #drawLayer(layer, number) {
    const soft = this.soft && layer.soft;
    this.context.globalAlpha = soft ? 0.85 : this.tint * (number === this.chosen ? 1 : 0.75);
    this.context.drawImage(this.#coloured("tinted", soft ? layer.soft : layer.canvas, layer.colour), 0, 0);
    this.context.globalAlpha = 1;
    if (!soft && this.tint > 0) this.context.drawImage(this.#outline(layer), 0, 0);
  }

  #coloured(name, source, colour) {
    const context = this.#scratch(name);
    context.globalCompositeOperation = "copy";
    context.drawImage(source, 0, 0, this.width, this.height);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = colour;
    context.fillRect(0, 0, this.width, this.height);
    return context.canvas;
  }

  /* A thin line around the mask, white on the outer side; made anew when the mask or the zoom is another. */
  #outline(layer) {
    const reach = Math.max(0.6, 1.1 / this.view.scale), key = `${layer.version} ${reach} ${layer.colour}`;
    if (this.stroke && layer.outline) return layer.outline;
    if (layer.outlineOf === key) return layer.outline;
    const colour = this.#coloured("line", layer.canvas, layer.colour), white = this.#coloured("white", layer.canvas, "#fff");
    const context = (layer.outline ??= this.#blank()).getContext("2d");
    context.clearRect(0, 0, this.width, this.height);
    for (const [picture, far] of [[white, 2 * reach], [colour, reach]])
      for (let turn = 0; turn < 8; turn += 1)
        context.drawImage(picture, far * Math.cos(turn * Math.PI / 4), far * Math.sin(turn * Math.PI / 4));
    context.globalCompositeOperation = "destination-out";
    context.drawImage(layer.canvas, 0, 0);
    context.globalCompositeOperation = "source-over";
    layer.outlineOf = key;
    return layer.outline;
  }

  #scratch(name) {
    const kept = this.scratch ??= {};
    if (kept[name]?.canvas.width !== this.width || kept[name].canvas.height !== this.height)
      kept[name] = this.#blank().getContext("2d");
    return kept[name];
  }

  #drawPolygon(scale) {
    if (!this.corners.length) return;
    const context = this.context;
    context.beginPath();
    for (const [x, y] of this.corners) context.lineTo(x, y);
    if (this.hover) context.lineTo(...this.hover);
    context.lineWidth = 3 / scale; context.strokeStyle = "#000a"; context.stroke();
    context.lineWidth = 1.5 / scale; context.strokeStyle = "#fff"; context.stroke();
    context.fillStyle = "#fff";
    for (const [x, y] of this.corners) context.fillRect(x - 3 / scale, y - 3 / scale, 6 / scale, 6 / scale);
  }

  #blank() {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [this.width, this.height];
    canvas.getContext("2d", { willReadFrequently: true });
    return canvas;
  }

  /* Do something to the chosen layer, to be undone. */
  #change(act, box) {
    if (!this.layers.length) return;
    this.#remember(this.chosen, box);
    const context = this.layers[this.chosen].canvas.getContext("2d");
    context.save();
    context.fillStyle = context.strokeStyle = "#fff";
    act(context);
    context.restore();
    this.#changed();
  }

  #changed() {
    this.layers[this.chosen].changed = true;
    this.layers[this.chosen].version += 1;
    this.undone = [];
    this.draw();
    this.onChange();
  }

  #remember(number, box, source = this.layers[number].canvas) {
    const cut = clip(box, this.width, this.height);
    if (!cut) return;
    this.done.push({ number, x: cut[0], y: cut[1], data: source.getContext("2d").getImageData(...cut) });
    if (this.done.length > STEPS) this.done.shift();
  }

  #step(from, to) {
    const step = from.pop();
    if (!step) return;
    const context = this.layers[step.number].canvas.getContext("2d");
    to.push({ ...step, data: context.getImageData(step.x, step.y, step.data.width, step.data.height) });
    context.putImageData(step.data, step.x, step.y);
    this.layers[step.number].changed = true;
    this.layers[step.number].version += 1;
    this.draw();
    this.onChange();
  }

  /* From the window to the photo. */
  #place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientX - box.left - this.view.x) / this.view.scale, (event.clientY - box.top - this.view.y) / this.view.scale];
  }

  #begin(event) {
    if (!this.photo) return;
    this.canvas.focus({ preventScroll: true });
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
    if (this.pointers.size === 2) return this.#cancelStroke();
    if (this.tool === "move" || this.space || event.button === 1 || event.button === 2) { this.moving = true; return; }
    if (!this.layers.length) return;
    const place = this.#place(event);
    if (this.tool === "polygon") return this.#corner(place);
    this.before = this.#blank();
    this.before.getContext("2d").drawImage(this.layers[this.chosen].canvas, 0, 0);
    this.stroke = [place];
    this.#paint(place, place);
  }

  #corner(place) {
    const [x, y] = this.corners[0] ?? [];
    const near = this.corners.length > 2 && Math.hypot(place[0] - x, place[1] - y) * this.view.scale < 10;
    if (near) return this.closePolygon(false);
    this.corners.push(place);
    this.draw();
  }

  #move(event) {
    if (!this.photo) return;
    const last = this.pointers.get(event.pointerId);
    if (last && this.pointers.size === 2) this.#pinch(event);
    else if (last && this.moving) {
      this.view.x += event.clientX - last[0];
      this.view.y += event.clientY - last[1];
    } else if (this.stroke) {
      for (const part of event.getCoalescedEvents?.() ?? [event]) {
        const place = this.#place(part);
        this.#paint(this.stroke.at(-1), place);
        this.stroke.push(place);
      }
    }
    if (last) this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
    this.hover = event.pointerType === "touch" ? null : this.#place(event);
    this.draw();
  }

  #end(event) {
    this.pointers.delete(event.pointerId);
    this.moving = false;
    if (!this.stroke) return;
    const box = bounds(this.stroke, this.size / 2 + 2);
    this.stroke = null;
    this.#remember(this.chosen, box, this.before);
    this.#changed();
  }

  /* A second finger: what the first one drew was no stroke. */
  #cancelStroke() {
    if (!this.stroke) return;
    const context = this.layers[this.chosen].canvas.getContext("2d");
    context.clearRect(0, 0, this.width, this.height);
    context.drawImage(this.before, 0, 0);
    this.stroke = null;
    this.draw();
  }

  #pinch(event) {
    const [other] = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
    const last = this.pointers.get(event.pointerId), now = [event.clientX, event.clientY];
    const apart = place => Math.hypot(place[0] - other[0], place[1] - other[1]);
    const box = this.canvas.getBoundingClientRect();
    this.view.x += (now[0] - last[0]) / 2;
    this.view.y += (now[1] - last[1]) / 2;
    this.zoom(apart(now) / Math.max(1, apart(last)), (now[0] + other[0]) / 2 - box.left, (now[1] + other[1]) / 2 - box.top);
  }

  #paint(from, to) {
    const context = this.layers[this.chosen].canvas.getContext("2d");
    context.globalCompositeOperation = this.tool === "eraser" ? "destination-out" : "source-over";
    context.strokeStyle = "#fff";
    context.lineCap = context.lineJoin = "round";
    context.lineWidth = this.size;
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(to[0], to[1] + (from === to ? 0.01 : 0));
    context.stroke();
    context.globalCompositeOperation = "source-over";
  }

  #listen() {
    const canvas = this.canvas;
    canvas.addEventListener("pointerdown", event => this.#begin(event));
    canvas.addEventListener("pointermove", event => this.#move(event));
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, event => this.#end(event));
    canvas.addEventListener("pointerleave", () => { this.hover = null; this.draw(); });
    canvas.addEventListener("contextmenu", event => event.preventDefault());
    canvas.addEventListener("wheel", event => {
      event.preventDefault();
      const box = canvas.getBoundingClientRect();
      this.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), event.clientX - box.left, event.clientY - box.top);
    }, { passive: false });
    new ResizeObserver(() => this.photo && this.fit()).observe(canvas);
    for (const button of document.querySelectorAll("[data-tool]"))
      button.addEventListener("click", () => this.setTool(button.dataset.tool));
    const on = (id, event, act) => document.getElementById(id).addEventListener(event, act);
    on("size", "input", event => this.setSize(+event.target.value));
    on("tint", "input", event => { this.tint = event.target.value / 100; this.draw(); });
    on("undo", "click", () => this.undo());
    on("redo", "click", () => this.redo());
    on("clear", "click", () => this.clear());
    on("fit", "click", () => this.fit());
    addEventListener("keydown", event => this.#key(event));
    addEventListener("keyup", event => {
      if (event.key === " ") this.space = false;
      if (event.key === "h") { this.hidden = false; this.draw(); }
    });
  }

  #key(event) {
    if (!this.photo || typing(event)) return;
    const command = event.ctrlKey || event.metaKey, key = event.key.toLowerCase();
    if (command && key === "z") event.shiftKey ? this.redo() : this.undo();
    else if (command && key === "y") this.redo();
    else if (command || event.altKey) return;
    else if (key in TOOLS) this.setTool(TOOLS[key]);
    else if (key === "[" || key === "-") this.setSize(this.size * 0.8 - 1);
    else if (key === "]" || key === "+") this.setSize(this.size * 1.25 + 1);
    else if (key === "0") this.fit();
    else if (key >= "1" && key <= "9" && this.layers[key - 1]) this.choose(key - 1);
    else if (key === "h") { this.hidden = true; this.draw(); }
    else if (key === " ") this.space = true;
    else if (key === "escape") { this.corners = []; this.draw(); }
    else if (key === "enter" && this.corners.length) this.closePolygon(event.shiftKey);
    else return;
    event.preventDefault();
  }
}

const TOOLS = { b: "brush", e: "eraser", p: "polygon", m: "move" };

function typing(event) {
  return event.target.matches("input:not([type=range], [type=checkbox]), textarea, select")
    || (event.target.matches("button, a") && (event.key === " " || event.key === "Enter"));
}

function bounds(points, margin) {
  const xs = points.map(p => p[0]), ys = points.map(p => p[1]);
  const left = Math.floor(Math.min(...xs) - margin), top = Math.floor(Math.min(...ys) - margin);
  return [left, top, Math.ceil(Math.max(...xs) + margin) - left, Math.ceil(Math.max(...ys) + margin) - top];
}

function clip([x, y, width, height], most, highest) {
  const left = Math.max(0, x), top = Math.max(0, y);
  const right = Math.min(most, x + width), bottom = Math.min(highest, y + height);
  return right > left && bottom > top ? [left, top, right - left, bottom - top] : null;
}

/* What both pages do: ask the server, load pictures, tell. */

let waiting = 0;

async function ask(address, content) {
  const bar = document.querySelector(".busy") ?? document.body.appendChild(Object.assign(document.createElement("div"), { className: "busy" }));
  waiting += 1;
  bar.hidden = false;
  try {
    const json = content !== undefined && !(content instanceof FormData);
    const answer = await fetch(address, content === undefined ? {} : {
      method: "POST",
      body: json ? JSON.stringify(content) : content,
      headers: json ? { "Content-Type": "application/json" } : {},
    });
    const values = await answer.json();
    if (!answer.ok) throw new Error(values.error ?? answer.statusText);
    return values;
  } finally {
    waiting -= 1;
    bar.hidden = waiting === 0;
  }
}

async function picture(address) {
  const image = new Image();
  image.src = address;
  await image.decode();
  return image;
}

function tell(text, wrong = false) {
  const message = document.getElementById("message");
  message.hidden = !text;
  message.textContent = text;
  message.classList.toggle("wrong", wrong);
}

/* Run, and tell what went wrong. */
function attempt(act) {
  return (...values) => Promise.resolve(act(...values)).catch(error => tell(error.message, true));
}

function element(kind, values = {}, ...children) {
  const made = Object.assign(document.createElement(kind), values);
  made.append(...children);
  return made;
}

const percent = value => `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`;

/* The list of classes beside the canvas; `more(number)` gives a second line. */
function listClasses(editor, more, tickable) {
  const list = document.getElementById("classes");
  list.replaceChildren(...editor.layers.map((layer, number) => {
    const swatch = element("span", { className: "swatch" });
    swatch.style.background = layer.colour;
    const box = element("input", { type: "checkbox", checked: layer.ticked ?? true, disabled: !tickable });
    box.title = "Say something of this class";
    box.addEventListener("change", () => { layer.ticked = box.checked; });
    box.addEventListener("click", event => event.stopPropagation());
    const value = editor.stroke ? "" : percent(editor.share(number));
    const row = element("li", { className: number === editor.chosen ? "chosen" : "" }, box, swatch,
      element("span", { className: "label", textContent: layer.name }), element("span", { className: "value", textContent: value }));
    const text = more(number);
    if (text) row.append(element("span", { className: "more", textContent: text }));
    row.addEventListener("click", () => editor.choose(number));
    return row;
  }));
}

/* What is drawn, for the server: the ticked classes, or those that were changed. */
async function drawnForm(editor, wanted) {
  const form = new FormData();
  for (const [number, layer] of editor.layers.entries()) {
    if (!wanted(layer)) continue;
    form.append(`name-${number}`, layer.name);
    form.append(`mask-${number}`, await editor.png(number), "mask.png");
  }
  return form;
}
