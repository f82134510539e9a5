// Make: pictures and videos of a prompt.

import { $, $$, el, reveal } from "./dom.js";
import { clearErrors, onSend, showError, valuesOf } from "./form.js";
import { jobs } from "./jobs.js";
import { models } from "./models.js";
import { startQuick } from "./quick.js";
import { pictureSource } from "./source.js";
import { startStage } from "./stage.js";
import { number } from "./words.js";

const form = $("#make-form");
const first = pictureSource($("#make-source"), { label: "First frame, if you like" });
const quick = startQuick(form, $("#stage"), asked);

/** Shows the fields that the model has, with its own values as hints. */
function fit() {
  const { kind, settings, size, step, classes } = models.chosen;
  for (const part of $$("[data-kinds]", form)) part.hidden = !part.dataset.kinds.includes(kind);
  for (const name of ["guidance", "temperature", "attn_temp", "frames", "fps"]) {
    form.elements[name].placeholder = number(settings[name], 4);
  }
  form.elements.size.placeholder = size.join("x");
  form.elements.size.title = step ? `width x height in pixels, multiples of ${step}` : "";
  form.elements.n.max = models.limits.images;
  form.elements.denoise.checked = Boolean(settings.denoise);
  form.elements.label.replaceChildren(...classes.map((name) => el("option", {}, name)));
  $("#sizes").replaceChildren(...sizes(size, step).map((value) => el("option", { value })));
  const scales = models.upscale.map((scale) => el("option", { value: scale }, `${scale} times`));
  form.elements.upscale.replaceChildren(el("option", { value: "" }, "no"), ...scales);
  form.elements.upscale.closest("label").hidden = !scales.length;
  quick.fit();
  clearErrors(form);
}

/** Shapes of about as many pixels as the model's own. */
function sizes([width, height], step) {
  if (!step) return [];
  const ratios = [1, 3 / 2, 2 / 3, 16 / 9, 9 / 16, 2, 1 / 2];
  const side = (value) => Math.max(1, Math.round(value / step)) * step;
  const shapes = ratios.map((ratio) => {
    const area = width * height;
    return `${side(Math.sqrt(area * ratio))}x${side(Math.sqrt(area / ratio))}`;
  });
  return [...new Set([`${width}x${height}`, ...shapes])];
}

function asked() {
  const { kind, id, settings } = models.chosen;
  const { label, ...values } = valuesOf(form);
  const made = { prompt: kind === "classes" ? label : "", ...values, model: id };
  if (made.denoise === Boolean(settings.denoise)) delete made.denoise;
  if (kind === "videos" && first.value) made.image = first.value;
  return made;
}

async function make() {
  const values = asked();
  quick.stop();
  const shown = quick.takeSeed();
  values.seed ??= shown;
  const path = models.chosen.kind === "videos" ? "/api/video" : "/api/generate";
  await jobs.submit(path, values, watcher(values));
  reveal($("#stage"));
}

function watcher({ n: count, best_of: samples, prompt }) {
  return startStage($("#stage"), { count, samples, prompt }, {
    failed: ({ error }) => showError(form, { message: error.message, field: error.param ?? fieldOf(error) }),
  });
}

/** The field that a sentence about a job that failed is about, if it is plain. */
function fieldOf({ message }) {
  return /\bsize of \d+x\d+/.test(message) ? "size" : null;
}

/** Puts what a picture was made with into the form. */
export function reuse({ metadata }) {
  const { prompts = [], seeds = [], settings = {}, model } = metadata;
  models.choose(model);
  form.reset();
  fit();
  const prompt = prompts.at(-1) ?? "";
  form.elements.prompt.value = prompt;
  if (models.chosen.classes.includes(prompt)) form.elements.label.value = prompt;
  form.elements.seed.value = seeds[0] ?? "";
  const size = settings.size ?? metadata.size;
  form.elements.size.value = Array.isArray(size) ? size.join("x") : "";
  for (const name of ["guidance", "temperature", "attn_temp", "method", "frames", "fps"]) {
    form.elements[name].value = settings[name] ?? metadata[name] ?? "";
  }
  const scale = `${metadata.upscaled?.at(-1)?.scale ?? ""}`;
  form.elements.upscale.value = models.upscale.map(String).includes(scale) ? scale : "";
  if (typeof settings.denoise === "boolean") form.elements.denoise.checked = settings.denoise;
  form.elements.prompt.focus();
}

/** Takes up a job that runs, after a reload. */
function takeUp() {
  const job = jobs.running;
  if (job && ["generate", "video"].includes(job.kind)) {
    jobs.watch(job, watcher(job.about));
  }
}

export function startMake() {
  onSend(form, make);
  models.addEventListener("change", fit);
  fit();
  takeUp();
}
