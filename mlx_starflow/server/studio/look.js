// Look: what the flow knows about a picture. Its likelihood, its surprise, its labels, its noise.

import { Refused } from "./api.js";
import { $, el, img, reveal, say } from "./dom.js";
import { onSend, showError, valuesOf } from "./form.js";
import { jobs } from "./jobs.js";
import { models } from "./models.js";
import { createOverlay } from "./overlay.js";
import { pictureSource } from "./source.js";
import { offer } from "./viewer.js";
import { MEANS, number, progressWords, signed } from "./words.js";

const form = $("#look-form");
const board = $("#findings");
const source = pictureSource($("#look-source"), { label: "Picture", changed: begin });

function begin({ item }) {
  const prompt = item?.metadata.prompts?.filter(Boolean).at(-1);
  if (prompt) form.elements.prompt.value = prompt;
}

/** An article with a title, what was found, and what it means. */
function finding(title, means) {
  const body = el("div", { class: "body" }, el("p", { class: "hint" }, "Waits for its turn."));
  const root = el("article", { class: "finding" }, el("h2", {}, title), body, el("p", { class: "means" }, means));
  return { root, put: (...children) => body.replaceChildren(...children) };
}

function big(text, more) {
  return el("p", { class: "big" }, el("b", {}, text), ` ${more}`);
}

/** Sends a question off; its findings say how far it is, and what was wrong. */
async function ask(kind, values, findings, show) {
  const told = (sentence, kind = "hint") => {
    const line = el("p", { class: kind });
    say(line, sentence);
    for (const each of findings) each.put(line.cloneNode(true));
  };
  try {
    await jobs.submit(`/api/${kind}`, { ...values, model: models.chosen.id }, {
      progress: (progress) => told(progressWords(progress)),
      done: ({ result }) => show(result),
      failed: ({ error }) => told(error.message, "error"),
      cancelled: () => told("Cancelled."),
    });
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    told(error.message, "error");
    if (error.field && error.field !== "image") showError(form, error);
    if (error.field === "image") source.refuse(error.message.replace("image: ", ""));
  }
}

async function look() {
  if (!source.value) {
    source.refuse("Choose a picture first.");
    return;
  }
  const { labels = "", ...values } = valuesOf(form);
  const image = source.value;
  const { prompt = "" } = values;
  const likelihood = finding("Likelihood", MEANS.nll);
  const typical = finding("Typicality", MEANS.typicality);
  const surprise = finding("Surprise", MEANS.surprise);
  const nearest = finding("Labels", MEANS.labels);
  const noise = finding("Noise", MEANS.noise);
  const proof = finding("Certificate", MEANS.certificate);
  board.replaceChildren(...[surprise, likelihood, typical, nearest, noise, proof].map((each) => each.root));
  certify(proof);
  reveal(board);

  const choices = labels.split(",").map((label) => label.trim()).filter(Boolean);
  const enough = choices.length || models.chosen.classes.length;
  if (!enough) nearest.put(el("p", { class: "hint" }, "Give labels to choose from, on the left."));
  await Promise.all([
    ask("score", { ...values, image }, [likelihood, typical, surprise], (result) => {
      showScore(result, likelihood, typical, surprise);
    }),
    enough && ask("classify", { image, ...(choices.length ? { labels: choices } : {}) }, [nearest], (result) => {
      nearest.put(...bars(result.posterior));
    }),
    ask("encode", { image, prompt }, [noise], (result) => showNoise(result, noise)),
  ]);
}

function showScore(result, likelihood, typical, surprise) {
  likelihood.put(
    big(number(result.nll, 4), `± ${number(result.standard_error, 2)} ${result.unit}`),
    el("p", { class: "hint" }, `${result.draws} draws of the training noise, ${result.dimensions} dimensions.`),
  );
  if (result.deviation === undefined) {
    typical.put(el("p", { class: "hint" }, "This model has no statistics of training pictures: mlx-starflow calibrate makes them."));
  } else {
    typical.put(big(signed(result.deviation), "standard deviations"), gauge(result.deviation));
  }
  const maps = { Surprise: { ...result.map, values: result.surprise, unit: "nats per token" } };
  if (result.typicality_map) {
    maps.Typicality = { ...result.typicality_map, values: result.deviation_map, unit: "standard deviations" };
  }
  surprise.put(createOverlay(result.image, maps));
}

/** Where a deviation lies between -4 and 4. */
function gauge(deviation) {
  return el("meter", {
    min: -4, max: 4, low: -2, high: 2, optimum: 0, value: Math.max(-4, Math.min(4, deviation)),
    "aria-label": `${signed(deviation)} standard deviations`,
  });
}

function bars(posterior) {
  const most = Object.entries(posterior).sort((a, b) => b[1] - a[1]).slice(0, 8);
  return most.map(([label, share]) =>
    el("div", { class: "bar" }, el("span", {}, label), el("meter", { min: 0, max: 1, value: share, "aria-label": label }),
      el("span", {}, share > 0.0005 ? `${number(100 * share)}%` : "<0.05%")),
  );
}

function showNoise(result, noise) {
  const trip = result.round_trip;
  const bytes = Uint8Array.from(atob(result.noise), (letter) => letter.charCodeAt(0));
  const url = URL.createObjectURL(new Blob([bytes]));
  noise.put(
    el("div", { class: "pair" }, img(result.image, "The picture as the model saw it", 64), img(result.noise_image, "Its noise", 16)),
    el("p", { class: "hint" }, `Standard deviation ${number(result.standard_deviation)}` +
      (trip ? `; on the way back the flow loses at most ${number(trip.flow_max)} of the latents.` : ".")),
    el("a", { class: "button", href: url, download: "noise.safetensors" }, "Download the noise"),
  );
}

function certify(proof) {
  const certificate = source.item?.metadata.certificate;
  if (certificate) proof.put(big(number(certificate.max), `largest error; RMS ${number(certificate.rms)}`));
  else proof.put(el("p", { class: "hint" }, "Only pictures that were made here with a certificate have one."));
}

export function startLook(open) {
  onSend(form, look);
  offer("Look", (item) => {
    open("look");
    source.set(item);
  });
}
