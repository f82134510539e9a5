// Edit: what is made of a picture. Inpaint, re-prompt, vary, interpolate.

import { Refused } from "./api.js";
import { $, $$, button, el, reveal, say } from "./dom.js";
import { onSend, showError, valuesOf } from "./form.js";
import { card } from "./history.js";
import { jobs } from "./jobs.js";
import { createMask } from "./mask.js";
import { models } from "./models.js";
import { createPath, spaced } from "./path.js";
import { pictureSource } from "./source.js";
import { offer, openPicture } from "./viewer.js";
import { number, progressWords } from "./words.js";

const view = $("#edit");
const results = $("#edit-results");
const mask = createMask($("#easel"));
const source = pictureSource($("#edit-source"), { label: "Picture", changed: begin });
const second = pictureSource($("#edit-second"), { label: "Second picture", changed: (it) => hintPrompt(it, ["second"]) });

/** A new picture: an empty mask, and its prompt where the forms ask for it. */
function begin(picture) {
  mask.show(picture.url);
  hintPrompt(picture, ["source", "first", "prompt"]);
}

function hintPrompt({ item }, names) {
  const prompt = item?.metadata.prompts?.filter(Boolean).at(-1);
  if (!prompt) return;
  for (const name of names) {
    for (const field of $$(`form [name="${name}"]`, view)) field.value = prompt;
  }
}

function mode() {
  return $('[name="mode"]:checked', view).value;
}

function showMode() {
  for (const part of $$("[data-mode]", view)) part.hidden = part.dataset.mode !== mode();
}

/** The picture that is edited. Throws Refused if there is none. */
function chosen(place) {
  if (!place.value) {
    place.refuse("Choose a picture first.");
    throw new Refused({ message: "there is no picture yet" }, 0);
  }
  return place.value;
}

function counted(values) {
  const count = values.count ?? 5;
  if (count < 2 || count > models.limits.images) {
    throw new Refused({ message: `between 2 and ${models.limits.images} are possible`, param: "count" }, 0);
  }
  return count;
}

async function inpaint(form) {
  const image = chosen(source);
  const painted = mask.url();
  if (!painted) throw new Refused({ message: "paint over what shall be made anew first" }, 0);
  const values = { ...valuesOf(form), image, mask: painted };
  await send("inpaint", values, form, grid(`Inpainted`));
}

async function reprompt(form) {
  const image = chosen(source);
  const { most, count: _, target, ...values } = valuesOf(form);
  if (!target) throw new Refused({ message: "say what it shall show", param: "target" }, 0);
  const strengths = spaced(counted(valuesOf(form)), Number(most));
  await send("reprompt", { ...values, target, image, strengths }, form, path(`To “${target}”`, "strength", strengths));
}

async function vary(form) {
  const image = chosen(source);
  const { strength, ...values } = valuesOf(form);
  await send("vary", { ...values, image, strengths: [Number(strength)] }, form, grid(`Varied, strength ${strength}`));
}

async function interpolate(form) {
  const pictures = { first: chosen(source), second: chosen(second) };
  const { first = "", second: last = "", ...values } = valuesOf(form);
  const shares = spaced(counted(values));
  await send("interpolate", { ...pictures, prompts: [first, last], shares }, form, path("Between two", "share", shares));
}

/** Results as a row of cards. */
function grid(title) {
  const list = el("ul", { class: "grid" });
  return { title, root: list, fill: (item) => list.append(card(item)) };
}

/** Results as a path with a slider. */
function path(title, what, places) {
  return { title, ...createPath(what, places, actions) };
}

function actions(item) {
  return [button("Edit this one", () => source.set(item)), button("Details", () => openPicture(item))];
}

/** Sends an edit off, and puts what comes of it on top of the results. */
async function send(kind, values, form, board) {
  const words = el("p", { class: "hint", role: "status" }, "Waits for its turn.");
  const root = el("section", { class: "result" }, el("h2", {}, board.title), board.root, words);
  await jobs.submit(`/api/${kind}`, { ...values, model: models.chosen.id }, {
    progress: (progress) => say(words, progressWords(progress)),
    picture: board.fill,
    done: ({ result }) =>
      say(words, result.accepted === undefined ? "" : `${number(100 * result.accepted, 2)}% of the steps were accepted.`),
    failed: ({ error }) => {
      root.remove();
      showError(form, { message: error.message, field: error.param });
    },
    cancelled: () => say(words, "Cancelled."),
  });
  $(":scope > .hint", results)?.remove();
  results.prepend(root);
  reveal(root);
}

export function startEdit(open) {
  for (const [kind, send] of Object.entries({ inpaint, reprompt, vary, interpolate })) {
    const form = $(`#${kind}-form`);
    onSend(form, () => send(form));
  }
  for (const field of $$('[name="mode"]', view)) field.addEventListener("change", showMode);
  const brush = $("#brush");
  brush.addEventListener("input", () => mask.setBrush(brush.value / 100));
  const erase = $("#mask-erase");
  erase.onclick = () => {
    const erasing = erase.getAttribute("aria-pressed") !== "true";
    erase.setAttribute("aria-pressed", `${erasing}`);
    mask.setErasing(erasing);
  };
  $("#mask-undo").onclick = mask.undo;
  $("#mask-clear").onclick = mask.clear;
  $("#mask-invert").onclick = mask.invert;
  offer("Edit", (item) => {
    open("edit");
    source.set(item);
  });
  showMode();
}
