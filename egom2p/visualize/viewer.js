// Draws every <section class="viewer"> of the page from the JSON inside it. No library; see page.py for the data.
"use strict";
const COLOURS = {true: "#222222", predicted: "#d1495b"};

function make(tag, parent, className) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  parent.appendChild(element);
  return element;
}

function fit(canvas) {  // one canvas pixel a device pixel; returns the context and the size in CSS pixels
  const box = canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(box.width * ratio);
  canvas.height = Math.round(box.height * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return [context, box.width, box.height];
}

class Scene {  // camera paths, frusta and points, turned by dragging
  constructor(canvas, data) {
    this.canvas = canvas;
    this.data = data;
    this.shown = {true: true, predicted: !("true" in data.points)};
    this.reset();
    canvas.addEventListener("pointerdown", e => { this.held = [e.clientX, e.clientY]; canvas.setPointerCapture(e.pointerId); });
    canvas.addEventListener("pointerup", () => { this.held = null; });
    canvas.addEventListener("pointermove", e => {
      if (!this.held) return;
      this.yaw += (e.clientX - this.held[0]) * 0.01;
      this.pitch = Math.max(-1.55, Math.min(1.55, this.pitch + (e.clientY - this.held[1]) * 0.01));
      this.held = [e.clientX, e.clientY];
      this.draw(this.time);
    });
    canvas.addEventListener("wheel", e => { e.preventDefault(); this.zoom *= Math.exp(-e.deltaY * 0.001); this.draw(this.time); }, {passive: false});
    canvas.addEventListener("dblclick", () => { this.reset(); this.draw(this.time); });
  }
  reset() {
    this.yaw = 0.35; this.pitch = -0.45; this.zoom = 1; this.time = 0;
    const places = Object.values(this.data.paths).flat().map(m => [m[3], m[7], m[11]]);
    for (const frames of Object.values(this.data.points)) for (const frame of frames) for (let i = 0; i < frame.length; i += 7) places.push(frame[i]);
    const sorted = [0, 1, 2].map(k => places.map(p => p[k]).sort((a, b) => a - b));
    const at = (list, share) => list.length ? list[Math.floor(share * (list.length - 1))] : 0;
    this.centre = sorted.map(list => (at(list, 0.05) + at(list, 0.95)) / 2);
    this.radius = Math.max(0.5, ...sorted.map(list => (at(list, 0.95) - at(list, 0.05)) / 2)) * 1.4;
  }
  project(p, width, height) {
    const [x, y, z] = [0, 1, 2].map(k => p[k] - this.centre[k]);
    const cy = Math.cos(this.yaw), sy = Math.sin(this.yaw), cp = Math.cos(this.pitch), sp = Math.sin(this.pitch);
    const rx = cy * x - sy * z, rz = sy * x + cy * z, ry = cp * y + sp * rz, depth = cp * rz - sp * y;
    const scale = 0.5 * Math.min(width, height) / this.radius * this.zoom * 3 / (3 + depth / this.radius * 0.8);
    return [width / 2 + rx * scale, height / 2 + ry * scale, depth];
  }
  draw(time) {
    this.time = time;
    const [context, width, height] = fit(this.canvas);
    context.clearRect(0, 0, width, height);
    const frameOf = (frames, rate) => frames[Math.min(frames.length - 1, Math.floor(time * rate + 1e-6))];
    for (const [side, frames] of Object.entries(this.data.points)) {
      if (!this.shown[side]) continue;
      const drawn = (frameOf(frames, this.data.depthRate) || []).map(p => [this.project(p, width, height), p[3]]);
      drawn.sort((a, b) => b[0][2] - a[0][2]);
      for (const [[x, y], colour] of drawn) {
        context.fillStyle = "#" + colour.toString(16).padStart(6, "0");
        context.fillRect(x - 1.3, y - 1.3, 2.6, 2.6);
      }
    }
    for (const [side, poses] of Object.entries(this.data.paths)) {
      context.strokeStyle = context.fillStyle = COLOURS[side];
      context.lineWidth = 2.2;
      context.beginPath();
      poses.forEach((m, i) => { const [x, y] = this.project([m[3], m[7], m[11]], width, height); i ? context.lineTo(x, y) : context.moveTo(x, y); });
      context.stroke();
      this.frustum(context, frameOf(poses, this.data.poseRate), width, height);
    }
    this.axes(context, width, height);
  }
  frustum(context, m, width, height) {
    const size = this.radius * 0.12;
    const corner = (x, y) => [0, 1, 2].map(k => m[4 * k + 3] + size * (m[4 * k] * x + m[4 * k + 1] * y + m[4 * k + 2] * 1.6));
    const centre = this.project([m[3], m[7], m[11]], width, height);
    const corners = [[-1, -1], [1, -1], [1, 1], [-1, 1]].map(([x, y]) => this.project(corner(x, y), width, height));
    context.lineWidth = 1.2;
    context.beginPath();
    corners.forEach((c, i) => {
      const next = corners[(i + 1) % 4];
      context.moveTo(centre[0], centre[1]); context.lineTo(c[0], c[1]); context.lineTo(next[0], next[1]);
    });
    context.stroke();
  }
  axes(context, width, height) {
    const length = this.radius * 0.25, origin = this.project([0, 0, 0], width, height);
    [["x", "#b42318"], ["y", "#15803d"], ["z", "#1d4ed8"]].forEach(([name, colour], k) => {
      const end = this.project([0, 1, 2].map(i => i === k ? length : 0), width, height);
      context.strokeStyle = context.fillStyle = colour;
      context.lineWidth = 1.5;
      context.beginPath(); context.moveTo(origin[0], origin[1]); context.lineTo(end[0], end[1]); context.stroke();
      context.fillText(name, end[0] + 2, end[1]);
    });
    context.fillStyle = "#6b7486";
    context.fillText(length.toFixed(2) + " m an axis", 8, height - 8);
  }
}

function film(parent, picture) {  // frames of one sheet, gaze on top
  const figure = make("figure", parent), canvas = make("canvas", figure);
  make("figcaption", figure).textContent = picture.name;
  const image = new Image();
  let time = 0;
  const draw = now => {
    time = now;
    const [context, width, height] = fit(canvas);
    if (!image.complete || !image.naturalWidth) return;
    const side = image.naturalWidth / picture.count, frame = Math.min(picture.count - 1, Math.floor(time * picture.rate + 1e-6));
    context.imageSmoothingEnabled = false;
    context.drawImage(image, frame * side, 0, side, image.naturalHeight, 0, 0, width, height);
    for (const side of ["true", "predicted"]) {
      const gaze = (picture.gaze || {})[side];
      if (!gaze) continue;
      const [x, y, seen] = gaze[Math.min(gaze.length - 1, Math.round(time * picture.gaze.rate))];
      if (!(seen > 0)) continue;
      context.lineWidth = 2;
      context.strokeStyle = side === "true" ? "white" : "#00e5ff";
      context.beginPath();
      if (side === "true") context.arc(x * width, y * height, 6, 0, 7);
      else { context.moveTo(x * width - 5, y * height - 5); context.lineTo(x * width + 5, y * height + 5); context.moveTo(x * width + 5, y * height - 5); context.lineTo(x * width - 5, y * height + 5); }
      context.stroke();
    }
  };
  image.onload = () => draw(time);
  image.src = picture.sheet;
  return draw;
}

function curve(parent, data) {
  make("div", parent, "soft").textContent = data.name;
  const canvas = make("canvas", parent, "curve");
  const all = data.lines.flatMap(l => l.values).filter(v => v !== null);
  const low = all.reduce((a, b) => Math.min(a, b), 0), high = all.reduce((a, b) => Math.max(a, b), low + 1e-9);
  return time => {
    const [context, width, height] = fit(canvas), pad = 38;
    const x = i => pad + (width - pad - 6) * i, y = v => height - 14 - (height - 22) * (v - low) / (high - low);
    context.clearRect(0, 0, width, height);
    context.fillStyle = "#6b7486"; context.strokeStyle = "#e3e6ec";
    for (const v of [low, high]) { context.beginPath(); context.moveTo(pad, y(v)); context.lineTo(width, y(v)); context.stroke(); context.fillText(v.toPrecision(2), 2, y(v) + 4); }
    for (const line of data.lines) {
      context.strokeStyle = COLOURS[line.side]; context.lineWidth = 1.6; context.beginPath();
      let gap = true;
      line.values.forEach((v, i) => {
        if (v === null) { gap = true; return; }
        const a = x(i / Math.max(1, line.values.length - 1)), b = y(v);
        gap ? context.moveTo(a, b) : context.lineTo(a, b);
        gap = false;
      });
      context.stroke();
    }
    context.strokeStyle = "#00798c"; context.beginPath();
    context.moveTo(x(time / data.seconds), 4); context.lineTo(x(time / data.seconds), height - 14); context.stroke();
  };
}

function view(section) {
  const data = JSON.parse(section.querySelector("script").textContent), row = make("div", section, "row"), parts = [];
  if (Object.keys(data.paths).length || Object.keys(data.points).length) {
    const scene = new Scene(make("canvas", row, "scene"), data);
    parts.push(time => scene.draw(time));
    const sides = Object.keys(data.points), choice = make("div", section, "soft");
    if (sides.length) choice.textContent = "points of depth: ";
    sides.forEach(side => {
      const label = make("label", choice, side), box = make("input", label);
      Object.assign(box, {type: "checkbox", checked: scene.shown[side]});
      label.appendChild(document.createTextNode(side + " "));
      box.onchange = () => { scene.shown[side] = box.checked; scene.draw(scene.time); };
    });
  }
  const pictures = make("div", row, "pictures");
  data.pictures.forEach(p => parts.push(film(pictures, p)));
  data.curves.forEach(c => parts.push(curve(section, c)));
  const bar = make("div", section, "time"), button = make("button", bar), slider = make("input", bar), label = make("span", bar, "soft");
  Object.assign(slider, {type: "range", min: 0, max: data.seconds, step: 0.01, value: 0});
  slider.setAttribute("aria-label", "time in seconds");
  button.textContent = "play";
  let last = null;
  const draw = () => { const time = Number(slider.value); label.textContent = time.toFixed(2) + " s"; parts.forEach(p => p(time)); };
  const tick = now => {
    if (last === null) return;
    slider.value = (Number(slider.value) + (now - last) / 1000) % data.seconds;
    last = now; draw(); requestAnimationFrame(tick);
  };
  button.onclick = () => { if (last === null) { last = performance.now(); button.textContent = "stop"; requestAnimationFrame(tick); } else { last = null; button.textContent = "play"; } };
  slider.oninput = draw;
  window.addEventListener("resize", draw);
  draw();
}
document.querySelectorAll("section.viewer").forEach(view);
