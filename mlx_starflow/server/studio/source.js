// Where a picture comes from: a file that is chosen, dropped or pasted, or the history.

import { dataUrl } from "./api.js";
import { button, el, say } from "./dom.js";
import { choose } from "./chooser.js";
import { models } from "./models.js";
import { shortened, titleOf } from "./words.js";

/**
 * A place for a picture. `changed` is called with it: `value`, which the server takes, `url` to show, `name`, and
 * `item` if it is of the gallery.
 */
export function pictureSource(root, { label, changed = () => {} }) {
  const input = el("input", { type: "file", accept: "image/*", class: "away", on: { change: () => take(input.files[0]) } });
  const shown = el("img", { alt: "", hidden: true });
  const name = el("span", { class: "name" }, "none yet; drop or paste one here");
  const error = el("p", { class: "error", role: "alert", hidden: true });
  const self = { value: null, url: null, item: null, set, refuse: (sentence) => say(error, sentence) };

  root.setAttribute("role", "group");
  root.setAttribute("aria-label", label);
  root.append(
    el("p", { class: "label" }, label),
    el("div", { class: "chosen" }, shown, name),
    el(
      "div",
      { class: "row buttons" },
      el("label", { class: "button" }, input, "Choose a file"),
      button("From the history", async () => {
        const item = await choose();
        if (item) set(item);
      }),
    ),
    error,
  );
  root.addEventListener("dragover", (event) => {
    event.preventDefault();
    root.classList.add("over");
  });
  root.addEventListener("dragleave", () => root.classList.remove("over"));
  root.addEventListener("drop", (event) => {
    event.preventDefault();
    root.classList.remove("over");
    take(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
    if (file && root.offsetParent && !self.value) take(file);
  });

  async function take(file) {
    if (!file) return;
    input.value = "";
    // Base64 takes a third more.
    if (file.size * 1.35 > models.limits.body) {
      say(error, `The file has ${(file.size / 1e6).toFixed(1)} MB, which is more than the server takes.`);
      return;
    }
    try {
      const url = await dataUrl(file);
      put({ value: url, url, name: file.name || "pasted", item: null });
    } catch (refused) {
      say(error, refused.message);
    }
  }

  /** Takes a picture of the gallery. */
  function set(item) {
    put({ value: item.id, url: item.url, name: titleOf(item), item });
  }

  function put(picture) {
    say(error, "");
    Object.assign(self, picture);
    shown.src = picture.url;
    shown.hidden = false;
    name.textContent = shortened(picture.name, 40);
    changed(self);
  }

  return self;
}
