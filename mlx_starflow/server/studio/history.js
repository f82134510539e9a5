// The history: what the gallery holds, the newest first.

import { get, quietly, remove, Refused } from "./api.js";
import { $, button, el, img } from "./dom.js";
import { jobs } from "./jobs.js";
import { choosing } from "./compare.js";
import { openPicture } from "./viewer.js";
import { shortened, titleOf } from "./words.js";

const PAGE = 48;

const grid = $("#history");
const older = $("#history-more");

/** Tells "change" when there are other pictures. */
class History extends EventTarget {
  items = [];
  more = false;

  async refresh() {
    const { items, more } = await get(`/api/gallery?limit=${PAGE}`);
    const oldest = items.at(-1)?.id ?? "";
    const beyond = more ? this.items.filter((item) => item.id < oldest) : [];
    if (!beyond.length) this.more = more;
    this.items = [...items, ...beyond];
    this.#changed();
  }

  async older() {
    const before = this.items.at(-1)?.id ?? "";
    const { items, more } = await get(`/api/gallery?limit=${PAGE}&before=${before}`);
    [this.items, this.more] = [[...this.items, ...items], more];
    this.#changed();
  }

  add(item) {
    if (this.items.some((each) => each.id === item.id)) return;
    this.items = [item, ...this.items].sort((a, b) => (a.id < b.id ? 1 : -1));
    this.#changed();
  }

  async remove(item) {
    await remove(`/api/gallery/${item.id}`);
    this.items = this.items.filter((each) => each.id !== item.id);
    choosing.forget(item);
    this.#changed();
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}

export const history = new History();

/** A picture with its name: it opens the viewer, and can be chosen for comparing. */
export function card(item) {
  const title = titleOf(item);
  const seed = item.metadata.seeds?.length ? `seed ${item.metadata.seeds.join(", ")}` : "";
  const place = ["strength", "share"].find((name) => typeof item.metadata[name] === "number");
  const how = item.metadata.made_by ? item.metadata.made_by.replace("edit ", "") : "";
  const small = [how, place ? `${place} ${Math.round(item.metadata[place] * 100) / 100}` : "", seed].filter(Boolean);
  return el(
    "li",
    { class: "card", "data-id": item.id },
    el(
      "button",
      { type: "button", class: "bare", on: { click: () => openPicture(item) } },
      img(item.url, `${shortened(title, 80)}${seed ? `, ${seed}` : ""}`, item.width),
    ),
    el("p", { class: "title", title }, shortened(title, 60)),
    el("p", { class: "how" }, small.join(" · ")),
    choosing.box(item),
  );
}

function show() {
  const before = new Map([...grid.children].map((each) => [each.dataset.id, each]));
  grid.replaceChildren(...history.items.map((item) => before.get(item.id) ?? card(item)));
  $("#history-empty").hidden = history.items.length > 0;
  older.hidden = !history.more;
}

export async function startHistory() {
  history.addEventListener("change", show);
  jobs.addEventListener("picture", ({ detail }) => detail.id && history.add(detail));
  jobs.addEventListener("ended", () => quietly(history.refresh()));
  older.onclick = () => quietly(history.older());
  await history.refresh();
}

/** A button that deletes a picture, when it is pressed twice. */
export function deleteButton(item, done) {
  const made = button("Delete", async () => {
    if (made.textContent === "Delete") {
      made.textContent = "Really delete";
      return;
    }
    try {
      await history.remove(item);
      done();
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      made.after(el("p", { class: "error", role: "alert" }, error.message));
    }
  });
  made.addEventListener("blur", () => (made.textContent = "Delete"));
  return made;
}
