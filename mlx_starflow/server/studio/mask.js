// The mask: painted over a picture with mouse, finger, pen or keyboard; what is painted is free.

import { el } from "./dom.js";

const COLOUR = "#ff2d9b";
const UNDOS = 20;

/** A picture with a mask over it, in `root`. */
export function createMask(root) {
  const picture = el("img", { alt: "The picture to edit" });
  const canvas = el("canvas", {
    tabindex: "0",
    role: "application",
    "aria-label": "Mask over the picture: arrow keys move the brush, Space paints, Shift with them moves further",
  });
  const ring = el("div", { class: "ring", hidden: true });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const undos = [];
  let brush = 0.18;
  let erasing = false;
  let cursor = { x: 0.5, y: 0.5 };
  let last = null;

  root.replaceChildren(picture, canvas, ring);
  root.hidden = true;
  picture.onload = () => {
    [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
    picture.className = picture.naturalWidth < 160 ? "small" : "";
    undos.length = 0;
    root.hidden = false;
  };

  const radius = () => Math.max(0.5, (brush * Math.min(canvas.width, canvas.height)) / 2);

  function remember() {
    undos.push(context.getImageData(0, 0, canvas.width, canvas.height));
    if (undos.length > UNDOS) undos.shift();
  }

  function stroke(from, to) {
    context.globalCompositeOperation = erasing ? "destination-out" : "source-over";
    context.strokeStyle = COLOUR;
    context.lineWidth = 2 * radius();
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(from.x * canvas.width, from.y * canvas.height);
    context.lineTo(to.x * canvas.width + 0.01, to.y * canvas.height);
    context.stroke();
  }

  function showRing() {
    const across = (200 * radius()) / canvas.width;
    ring.hidden = false;
    ring.style.width = `${across}%`;
    ring.style.left = `${100 * cursor.x}%`;
    ring.style.top = `${100 * cursor.y}%`;
  }

  function place(event) {
    const box = canvas.getBoundingClientRect();
    return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
  }

  canvas.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    canvas.focus({ preventScroll: true });
    canvas.setPointerCapture(event.pointerId);
    remember();
    last = cursor = place(event);
    stroke(last, last);
    showRing();
  });
  canvas.addEventListener("pointermove", (event) => {
    cursor = place(event);
    showRing();
    if (!last) return;
    stroke(last, cursor);
    last = cursor;
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (last = null));
  canvas.addEventListener("pointerleave", () => (ring.hidden = true));
  canvas.addEventListener("focus", showRing);
  canvas.addEventListener("blur", () => (ring.hidden = true));
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const move = moves[event.key];
    if (move) {
      const far = event.shiftKey ? 0.1 : 0.02;
      const inside = (value) => Math.min(1, Math.max(0, value));
      cursor = { x: inside(cursor.x + far * move[0]), y: inside(cursor.y + far * move[1]) };
    } else if (event.key === " ") {
      if (!event.repeat) remember();
      stroke(cursor, cursor);
    } else if (event.key === "z" && (event.ctrlKey || event.metaKey)) {
      undo();
    } else {
      return;
    }
    event.preventDefault();
    showRing();
  });

  function undo() {
    const before = undos.pop();
    if (before) context.putImageData(before, 0, 0);
  }

  /** Repaints every pixel: `rule` says of each whether it is painted. */
  function repaint(rule) {
    remember();
    const all = context.getImageData(0, 0, canvas.width, canvas.height);
    const [red, green, blue] = [1, 3, 5].map((at) => parseInt(COLOUR.slice(at, at + 2), 16));
    for (let at = 0; at < all.data.length; at += 4) {
      const painted = rule(all.data[at + 3] > 127);
      all.data.set([red, green, blue, painted ? 255 : 0], at);
    }
    context.putImageData(all, 0, 0);
  }

  return {
    show: (url) => (picture.src = url),
    setBrush: (share) => (brush = share),
    setErasing: (value) => (erasing = value),
    undo,
    clear: () => repaint(() => false),
    invert: () => repaint((painted) => !painted),
    /** The mask as a picture, transparent where it is free; null if nothing is. */
    url() {
      const drawn = context.getImageData(0, 0, canvas.width, canvas.height);
      let free = false;
      for (let at = 0; at < drawn.data.length; at += 4) {
        const painted = drawn.data[at + 3] > 127;
        free ||= painted;
        drawn.data[at + 3] = painted ? 0 : 255;
      }
      if (!free) return null;
      const sheet = el("canvas", { width: canvas.width, height: canvas.height });
      sheet.getContext("2d").putImageData(drawn, 0, 0);
      return sheet.toDataURL("image/png");
    },
  };
}
